"""`weftlora` under accelerate's FSDP on CPUs, for tests: accelerate shards only where it sees accelerators.

    accelerate launch --config_file examples/accelerate-fsdp2.yaml tests/sharding/on_cpu.py train RECIPE.yaml

What accelerate calls several CPUs is called several GPUs before its state is made, and nothing else changes: the process group is
gloo, tensors are on the CPU.
"""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def shard_on_cpu() -> None:
    torch.set_num_threads(1)
    real = PartialState.__init__

    def init(self: PartialState, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def end_at(step: str) -> None:
    """Kill this process by SIGKILL after the optimiser step that WEFT_TEST_KILL names as `rank:step`."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    rank, at, seen = *map(int, step.split(":")), [0]

    def count(*_: object) -> None:
        seen[0] += 1
        if seen[0] == at and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(count)


if __name__ == "__main__":
    shard_on_cpu()
    if "WEFT_TEST_KILL" in os.environ:
        end_at(os.environ["WEFT_TEST_KILL"])
    from weftlora.cli import main

    main()
