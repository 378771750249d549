"""What a run costs: its steps measured as they are taken, its adapter's size as it ends, kept in run.json.

Timed is what lies between the start of a step's first forward and the end of its optimiser step, so neither loading rows nor
evaluation nor checkpoints. The first step of a process pays for what is loaded and allocated on first use: it is not timed.
The sums are part of every checkpoint, so those of a resumed run are over each of its steps once: a kill loses the steps after
its checkpoint with their times, and they are done and timed again.

    trained          parameters that were trained, a head that is trained in full (of a classifier) left out
    stored           values in adapter/adapter_model.safetensors, a head included
    stored_bytes     bytes of that file
    export_bytes     bytes of the same file as a stock LoRA in fp32, as `weftlora.export_lora` writes it (HydraLoRA: at its mean gate);
                     of a stock peft adapter those of its own file
    peak_bytes       most memory in use during a step: allocated on a GPU, else resident in the process, libraries included (Linux)
    train_seconds    wall seconds of the training, with its evaluations and checkpoints, without a search
    cpu_per_step     CPU seconds of the main process per step, all threads, without loading rows, evaluations and checkpoints
    tokens_per_s     tokens of the steps, padding left out, per wall second of the steps
    timed_steps      how many steps the last two are means over: not the first of a process
    search_steps     cost of a search of layers, in training steps
    search_seconds   its wall seconds

What a run has none of, or the machine cannot tell, is absent.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from weftlora.adapter.spec import WeftConfig
from weftlora.export.lora import lora_bytes
from weftlora.export.source import Source
from weftlora.runs.run import Run
from weftlora.train import checkpoint
from weftlora.train.prepare import Prepared

log = logging.getLogger(__name__)
WORTH_SAYING = 5.0
"""Seconds that somebody waits without wondering."""
KEY = f"{checkpoint.SIGNATURE}.timed"
"""Of the sums in `TrainerState.stateful_callbacks`."""


@dataclass
class Timed:
    """Sums over the steps that were timed, in the main process; on one device only, to which `steps` and what follows belong."""

    device: str
    train_seconds: float = 0.0
    """Wall seconds of the whole training up to now, with its evaluations and checkpoints; on every device."""
    steps: int = 0
    cpu_seconds: float = 0.0
    """Of the process, all threads."""
    seconds: float = 0.0
    tokens: int = 0
    peak_bytes: int | None = None
    """The most memory that was in use during a step, timed or not: allocated on a GPU, or resident on a CPU under Linux; None
    where neither can be told."""


def timed(state: TrainerState) -> Timed:
    """The sums in a trainer's state. Raises KeyError where no `Stopwatch` has watched."""
    return Timed(**state.stateful_callbacks[KEY])


def measuring_seconds(sums: Timed, tokens: int) -> float:
    """What measuring a loss on so many tokens will take: a forward pass is under half of a step."""
    return 0.5 * tokens * sums.seconds / sums.tokens if sums.tokens else 0.0


def announce_measuring(sums: Timed, rows: Any) -> None:
    """Say how long measuring a loss on these rows will take, where that is worth saying."""
    if not sums.tokens:
        return
    seconds = measuring_seconds(sums, sum(map(len, rows["input_ids"])))
    if seconds > WORTH_SAYING:
        log.info("measuring the validation loss on %d rows: about %.0f s", len(rows), seconds)


class Stopwatch(TrainerCallback):
    """Keeps the sums in the trainer's state, so that every checkpoint has them."""

    def __init__(self) -> None:
        self.since: tuple[float, float] | None = None  # CPU and wall clock at the start of the step
        self.peak_known = self.warm = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = state.stateful_callbacks.get(KEY)
        name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type
        self.sums = Timed(name) if kept is None else Timed(**kept)
        if self.sums.device != name:
            self.sums = Timed(name, self.sums.train_seconds)
        self.device, self.warm = args.device, False
        self.began = time.monotonic() - self.sums.train_seconds
        self.tokens = int(state.num_input_tokens_seen)
        self._keep(state)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:  # Trainer's empty step after the last
            return
        self.peak_known = forget_peak(self.device)
        self.since = time.process_time(), time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.since is None:
            return
        cpu, wall = time.process_time() - self.since[0], time.perf_counter() - self.since[1]
        tokens, self.tokens = int(state.num_input_tokens_seen) - self.tokens, int(state.num_input_tokens_seen)
        self.since, sums = None, self.sums
        if self.peak_known:
            sums.peak_bytes = max(peak_bytes(self.device), sums.peak_bytes or 0)
        if self.warm:
            sums.steps += 1
            sums.cpu_seconds += cpu
            sums.seconds += wall
            sums.tokens += tokens
        self.warm = True
        self._keep(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._keep(state)

    def _keep(self, state: TrainerState) -> None:
        self.sums.train_seconds = time.monotonic() - self.began
        state.stateful_callbacks[KEY] = {**vars(self.sums)}


_RESET = "/proc/self/clear_refs"


def forget_peak(device: torch.device) -> bool:
    """Let `peak_bytes` count from now on; False where it cannot tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    if device.type != "cpu":
        return False
    try:
        with open(_RESET, "wb", buffering=0) as file:
            file.write(b"5")  # sets VmHWM back to what is resident now, see proc(5)
    except OSError:
        return False
    return True


def peak_bytes(device: torch.device) -> int:
    """The most memory in use since `forget_peak`: allocated tensors on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status", "rb", buffering=0) as file:  # in every step, so no more than is needed
        _, _, behind = file.read().partition(b"VmHWM:")
    return 1024 * int(behind.split(None, 1)[0])


WEIGHTS = "adapter_model.safetensors"


def measured(prepared: Prepared, run: Run, state: TrainerState) -> dict[str, float]:
    """The figures of a run whose training has ended and whose adapter is written."""
    file = run.adapter_folder / WEIGHTS
    found: dict[str, float | None] = {
        "trained": trained_numbers(prepared.model),
        "stored": stored_numbers(file),
        "stored_bytes": file.stat().st_size,
        "export_bytes": _export_bytes(prepared, file),
        **_cost(timed(state)),
        "search_steps": run.time.get("search_in_steps"),
        "search_seconds": run.time.get("search_seconds"),
    }
    return {name: value for name, value in found.items() if value is not None}


def trained_numbers(model: PeftModel) -> int:
    """How many numbers of the adapter are trained; a tensor shared by sites counts once, a head not at all."""
    named = model.named_parameters()
    return sum(p.numel() for name, p in named if p.requires_grad and ".modules_to_save." not in name)


def stored_numbers(file: Path) -> int:
    """How many numbers a safetensors file holds."""
    with safe_open(file, "pt") as saved:
        return sum(math.prod(saved.get_slice(name).get_shape()) for name in saved.keys())  # noqa: SIM118


def _export_bytes(prepared: Prepared, file: Path) -> int | None:
    if not isinstance(prepared.adapter, WeftConfig):
        return file.stat().st_size
    return lora_bytes(Source(prepared.model, ("default",), prepared.base.source))


def _cost(sums: Timed) -> dict[str, float | None]:
    known = sums.steps > 0 and sums.seconds > 0
    return {
        "peak_bytes": sums.peak_bytes,
        "train_seconds": round(sums.train_seconds, 3),
        "cpu_per_step": sums.cpu_seconds / sums.steps if known else None,
        "tokens_per_s": sums.tokens / sums.seconds if known else None,
        "timed_steps": sums.steps,
    }
