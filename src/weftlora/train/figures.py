"""What a run cost and how large its adapter is: measured as the run ends, kept in run.json.

trained          numbers that were trained, a head that is trained in full (of a classifier) left out
stored           numbers in adapter/adapter_model.safetensors, a head included
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

What a run has none of, or the machine cannot tell, is absent. A resumed run's are over each of its steps once
(`weftlora.train.stopwatch`).
"""

from __future__ import annotations

import math
from pathlib import Path

from peft import PeftModel
from safetensors import safe_open
from transformers import TrainerState

from weftlora.export.size import lora_bytes
from weftlora.export.source import Source
from weftlora.spec import WeftConfig
from weftlora.train.prepare import Prepared
from weftlora.train.run import Run
from weftlora.train.stopwatch import Timed, timed

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
