"""Which ways through the kernel are open: from the environment at the start, and within a `with` block.

    WEFT_REFERENCE=1    every site computes the equation in einsums, after its base layer
    WEFT_GROUPS=0       no node spans several linears that read one input
    WEFT_MLP=0          no node spans a gated MLP
    WEFT_TRITON=1       the node's products are Triton's on every GPU; =0: on none
    WEFT_DEQUANTISED=1  W of a base in 4 bits, dequantised in the forward, is kept for its backward; =0: never

Without WEFT_TRITON they are Triton's on the architectures that have a record (`MEASURED`), of which the package has none until
`make gpu` was run on one. TRITON_INTERPRET=1 makes Triton run its kernels in Python, and then WEFT_TRITON=1 takes them on a CPU too:
so are they tested where there is no GPU. Without WEFT_DEQUANTISED a W is kept where gradient checkpointing gives it a life of one
block and no longer (`weftlora.adapted.quantised`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from importlib.util import find_spec

import torch

from weftlora.errors import ConfigError, MissingExtraError


@dataclass(frozen=True)
class Switches:
    """`reference`: the plain equation everywhere. `groups`, `mlp`: nodes that span several linears. `triton`: on every GPU or on
    none; None is on those that were measured. `dequantised`: of bases in 4 bits W is kept for the backward, or never; None is under
    gradient checkpointing."""

    reference: bool = False
    groups: bool = True
    mlp: bool = True
    triton: bool | None = None
    dequantised: bool | None = None


def _triton_asked(said: str | None) -> bool | None:
    """What WEFT_TRITON says."""
    if said not in (None, "", "0", "1"):
        raise ConfigError(
            f"WEFT_TRITON={said!r} is neither 1 nor 0: 1 takes the Triton kernels on every GPU, 0 on none."
        )
    return None if not said else said == "1"


def _dequantised_asked(said: str | None) -> bool | None:
    """What WEFT_DEQUANTISED says."""
    if said not in (None, "", "0", "1"):
        raise ConfigError(
            f"WEFT_DEQUANTISED={said!r} is neither 1 nor 0: 1 keeps dequantised weights of a base in 4 bits from the forward to the "
            "backward, 0 never does."
        )
    return None if not said else said == "1"


_current = Switches(
    reference=os.environ.get("WEFT_REFERENCE") == "1",
    groups=os.environ.get("WEFT_GROUPS") != "0",
    mlp=os.environ.get("WEFT_MLP") != "0",
    triton=_triton_asked(os.environ.get("WEFT_TRITON")),
    dequantised=_dequantised_asked(os.environ.get("WEFT_DEQUANTISED")),
)


def current() -> Switches:
    """The switches as they are now. Under `torch.jit.trace` the reference, as its files hold no Python functions."""
    return replace(_current, reference=True) if torch._C._get_tracing_state() is not None else _current


@contextmanager
def switched(**to: bool) -> Iterator[None]:
    """Within the block the switches named have these values; nested blocks and errors leave what was before."""
    global _current
    before, _current = _current, replace(_current, **to)
    try:
        yield
    finally:
        _current = before


def use_reference(on: bool = True) -> AbstractContextManager[None]:
    """Within the block every site computes with `reference` (or, with False, with the fast path)."""
    return switched(reference=on)


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether Triton runs kernels in Python, on the CPU, slowly. Triton asks once, when a kernel is defined."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


FOUND = find_spec("triton") is not None
"""Whether triton is installed; it is not imported for that."""


def _measured() -> tuple[str, ...]:
    record = files("weftlora") / "assets" / "gpu.json"
    return tuple(json.loads(record.read_text(encoding="utf-8"))["on"]) if record.is_file() else ()


MEASURED = _measured()
"""The architectures on which the kernels are on unless WEFT_TRITON=0: those of assets/gpu.json, which is `make gpu`'s to write."""


def triton_runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of such tensors are Triton's.

    Raises:
        MissingExtraError: WEFT_TRITON=1 asks for them, and triton is not installed.
    """
    asked, kind = _current.triton, device.type
    if kind == "cpu" and not INTERPRETED:
        return False
    if asked is False or dtype not in DTYPES or kind not in ("cpu", "cuda"):
        return False
    if kind == "cpu":
        return bool(asked) and FOUND
    if not asked and not (MEASURED and FOUND and architecture(device.index or 0) in MEASURED):
        return False
    if not FOUND:
        raise MissingExtraError(
            "WEFT_TRITON=1 asks for the Triton kernels and triton is not installed: a CUDA build of torch brings it; "
            "or set WEFT_TRITON=0."
        )
    return True


@lru_cache
def architecture(index: int = 0) -> str:
    """Of a CUDA device as compilers name it, such as "sm_90"; a GPU that is not NVIDIA's has the name that torch has for it."""
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(index).gcnArchName)
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


# torch.compiler.assume_constant_result sets this and imports all of torch._dynamo first, which takes a second and imports triton.
architecture._dynamo_marked_constant = True  # type: ignore[attr-defined]
