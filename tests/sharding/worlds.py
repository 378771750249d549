"""One adapter over several processes, by engine and method: `worlds.py WORLD FOLDER ENGINE [METHOD ...]`, over gloo on the loopback.

Every process trains the same tiny Llama on its rows of one global batch, with the method's event at step 3 of 7, and writes what it
came to: the decisions, the adapter as it is saved, and the largest tensor of an event. `trained(name, dtype)` is the one process that
all are compared with.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weftlora
from families import FAMILIES
from weftlora.host.attach import schedules

EVENT, END, ROWS = 3, 7, 8
IDS = torch.randint(3, 64, (ROWS * END + 16, 7), generator=torch.Generator().manual_seed(5))
HELD_OUT = [{"input_ids": row, "labels": row} for row in IDS[ROWS * END :]]

METHODS: dict[str, Callable[[], weftlora.WeftConfig]] = {
    "lora": lambda: weftlora.PlainLoraConfig(r=4, target_modules="all-linear"),
    "hydralora": lambda: weftlora.HydraLoraConfig(r=2, heads=3, balance=0.01, target_modules="all-linear"),
    "tied_lora": lambda: weftlora.TiedLoraConfig(r=4),
    "lora_dash": lambda: weftlora.LoraDashConfig(r=2, directions=3, after=EVENT, target_modules="all-linear"),
    "lora_init": lambda: weftlora.LoraInitConfig(r=2, after=EVENT, target_modules="all-linear"),
    "lora_tsd": lambda: weftlora.LoraTsdConfig(r=2, directions=3, after=EVENT, target_modules="all-linear"),
    "alora": lambda: weftlora.AllocLoraConfig(
        r=2, first=EVENT, every=2, max_rounds=2, rows=4, score="exact", target_modules="all-linear"
    ),
}
DTYPES = {"fp32": (torch.float32, 1e-5), "fp64": (torch.float64, 1e-9)}


def model_of(name: str, dtype: torch.dtype) -> PeftModel:
    base = FAMILIES["llama"].build()
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[name]()).to(dtype).train()
    if name == "alora":
        weftlora.attach(model, validation=HELD_OUT)
    return model


def steps(run: nn.Module, model: PeftModel, rank: int, world: int) -> None:
    """The global batch of every step, this process's rows of it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    for step in range(END):
        ids = IDS[ROWS * step : ROWS * (step + 1)].chunk(world)[rank]
        with weftlora.routing(model) as routers:
            loss = run(input_ids=ids, labels=ids).loss
        if any(site.routed for site in _sites(model)):
            loss = loss + routers.balance_loss()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _sites(model: nn.Module) -> list[Any]:
    from weftlora.adapter.site import Site

    return [m for m in model.modules() if isinstance(m, Site)]


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def of(run: nn.Module, model: PeftModel) -> dict[str, Any]:
    """`outcome`, also where a wrapper must be asked for the whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(run, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(run, writeback=False):
            return outcome(model)
    return outcome(model)


def outcome(model: PeftModel) -> dict[str, Any]:
    told = [e for s in schedules(model).values() for e in s.events]
    tensors = {n: whole(t) for n, t in model.state_dict().items() if ".weft_site." in n}
    return {"tensors": tensors, "events": [{k: v for k, v in e.items() if k != "seconds"} for e in told]}


def trained(name: str, dtype: torch.dtype) -> dict[str, Any]:
    model = model_of(name, dtype)
    steps(model, model, 0, 1)
    return outcome(model)


# ---------------------------------------------------------------------- engines


def ddp(model: PeftModel) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model)


def fsdp2(model: PeftModel) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def fsdp1(model: PeftModel) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    blocks = {type(block) for block in model.base_model.model.model.layers}
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy(blocks), device_id=cpu
    )


ENGINES: Mapping[str, Callable[[PeftModel], nn.Module]] = {"ddp": ddp, "fsdp1": fsdp1, "fsdp2": fsdp2}


def work(rank: int, world: int, engine: str, names: list[str]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in names:
        for kind, (dtype, _) in DTYPES.items():
            model = model_of(name, dtype)
            run = ENGINES[engine](model)
            steps(run, model, rank, world)
            found[name, kind] = of(run, model)
    return found


if __name__ == "__main__":
    import datetime

    torch.set_num_threads(1)
    world, folder, engine, *names = sys.argv[1:]
    children = []
    for rank in range(int(world)):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=world)
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/store",
                rank=rank,
                world_size=int(world),
                timeout=datetime.timedelta(seconds=40),
            )
            torch.save(work(rank, int(world), engine, names or list(METHODS)), f"{folder}/{rank}.pt")
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    for child in children:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit(1)
