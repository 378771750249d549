"""Does the fast path compute the gradients of the equation? The same step on `weftlora.kernel.reference`, compared.

    error = max over tensors of ‖g − g_ref‖ / ‖g_ref‖      over the input's gradient and every trained tensor's

Both run in the dtype that is measured and draw the same dropout masks (same seed).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weftlora.bench.cases import Batch
from weftlora.kernel import use_reference
from weftlora.site import Site

TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2}
"""What rounding alone may do. In bf16 it reaches 2e-2 in the smallest tensors (the r numbers of Tied's u, a router): fp32 is
what finds a wrong formula, bf16 what finds a lost cast."""


@dataclass(frozen=True)
class Agreement:
    """The largest relative gradient error, the tensor it belongs to, and the smallest gradient norm of the reference."""

    error: float
    where: str
    smallest_gradient: float


def agreement(model: nn.Module, batch: Batch, seed: int) -> Agreement | None:
    """Compare one step's gradients with the reference kernel's; None for a model without weftlora sites."""
    if not any(isinstance(module, Site) for module in model.modules()):
        return None
    fast = gradients(model, batch, seed)
    with use_reference(), torch.compiler.set_stance("force_eager"):
        slow = gradients(model, batch, seed)
    errors = {name: relative_error(fast[name], slow[name]) for name in slow}
    where = max(errors, key=errors.__getitem__)
    return Agreement(errors[where], where, min(g.norm().item() for g in slow.values()))


def gradients(model: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
    """Gradients of the input ("input") and of every trained tensor by name, in fp64; leaves no gradient behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batch.loss(model).backward()
    trained = {"input": batch.embeddings, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    zero = torch.zeros(())
    found = {name: (zero if p.grad is None else p.grad).double() for name, p in trained.items()}
    for p in trained.values():
        p.grad = None
    return found


def relative_error(g: Tensor, reference: Tensor) -> float:
    """‖g − reference‖ / ‖reference‖; infinite where the reference vanishes or a value is not finite."""
    error = ((g - reference).norm() / reference.norm()).item()
    return error if math.isfinite(error) else math.inf
