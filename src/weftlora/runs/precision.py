"""In which type a base's weights are held, where nobody says it.

    float32     as a rule: nothing is rounded
    bfloat16    on a CPU, where the checkpoint is in bfloat16 itself and this CPU multiplies it faster than float32

Whether it does is measured, since a CPU can know the type and emulate it: a product of a batch of tokens with a weight, and the one
that brings its gradient back, in both types in turn, the best of several. It takes a tenth of a second, once for a CPU, a torch and a
number of threads, and is kept in the user's cache. The checkpoint being in bfloat16, its values are the same in both types, and half
as large; what is rounded are activations.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weftlora.disk.files import user_cache, write_json
from weftlora.errors import RunError
from weftlora.foreign_text import from_json
from weftlora.settings import is_number

TOKENS, WIDTH, INNER, ROUNDS = 256, 576, 1536, 7
"""Of the product that is timed: those of a small decoder's MLP."""
ENOUGH = 1.2
"""As often as fast at the least; below that, noise could choose."""


@dataclass(frozen=True)
class Precision:
    """A type for weights and why it is that one."""

    dtype: str
    why: str = ""
    """Empty where it is what was asked for, or the rule."""


def precision(asked: str | None, settings: Any) -> Precision:
    """The type for a base with this config; `asked` is what the user says, None for the choice of the module's rule."""
    if asked is not None:
        return Precision(asked)
    stored = getattr(settings, "dtype", None) or getattr(settings, "torch_dtype", None)
    if str(stored).removeprefix("torch.") != "bfloat16" or torch.cuda.is_available():
        return Precision("float32")
    gain = bfloat16_gain()
    if gain < ENOUGH:
        return Precision("float32")
    return Precision(
        "bfloat16", f"as the model is stored; this CPU multiplies them {gain:.1f} times as fast as float32"
    )


@functools.cache
def bfloat16_gain() -> float:
    """How many times as fast this CPU multiplies in bfloat16 as in float32, from the user's cache where it was measured before."""
    known = [cpu_kind(), torch.__version__, str(torch.get_num_threads())]
    file = user_cache("precision") / f"{hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        kept = from_json(file.read_text(encoding="utf-8"))["gain"]
        if is_number(kept) and 0 < kept < math.inf:
            return float(kept)
    gain = round(measured_gain(), 2)
    with contextlib.suppress(OSError, RunError):  # a cache that cannot be written costs time only
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"gain": gain, "cpu": known[0], "torch": known[1], "threads": known[2]})
    return gain


def measured_gain() -> float:
    """The best time in float32 over the best in bfloat16, of products forward and back."""
    draw = torch.Generator().manual_seed(0)
    x, w = torch.randn(TOKENS, WIDTH, generator=draw), torch.randn(INNER, WIDTH, generator=draw)
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    with torch.no_grad():
        for _ in range(ROUNDS):
            for dtype in best:
                a, b = x.to(dtype), w.to(dtype)
                began = time.perf_counter()
                (a @ b.T) @ b
                best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]


def cpu_kind() -> str:
    """What tells one kind of CPU from another: its name, with what torch says that it can do."""
    return f"{cpu_name()} {torch.backends.cpu.get_cpu_capability()}"


def cpu_name() -> str:
    """The CPU's name under Linux, and elsewhere that of its architecture."""
    lines = _cpuinfo().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def has_amx() -> bool:
    """Whether Linux counts bfloat16 in tiles among the CPU's instructions; False where nobody says so."""
    return "amx_bf16" in _cpuinfo().split()


def _cpuinfo() -> str:
    """What Linux says of the CPUs; empty where it says nothing."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return ""
