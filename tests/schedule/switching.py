"""What LoRA-Init and LoRA-TSD should come to, dense and in fp64: shared by the tests of their claims."""

from __future__ import annotations

import torch
from dashing import init, sites, train
from peft import PeftModel
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLinear

T = 3


def base_of(model: PeftModel, x: Tensor) -> Tensor:
    with model.disable_adapter(), torch.no_grad():
        return model(x)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Module name → the base's own weight tensor."""
    return {m.module_name: m.base_layer.weight for m in model.modules() if isinstance(m, WeftLinear)}


def train_seeded(model: PeftModel, steps: int) -> None:
    """The same dropout masks for everybody."""
    torch.manual_seed(1)
    train(model, steps)


def pre_launch(steps: int = T, dtype: torch.dtype = torch.float32, **fields) -> dict[str, Tensor]:
    """ΔW of every site after the same steps of plain LoRA, fp64, dense."""
    model = init(after=10**6, **fields).to(dtype)
    train_seeded(model, steps)
    return {n: s.scale * (s.structure.B @ s.structure.A).detach().double() for n, s in sites(model).items()}


def defined(w: Tensor, delta: Tensor, count: int) -> tuple[list[int], Tensor, Tensor, Tensor, Tensor]:
    """Index, σ̄, δ, Ū [out, count] and V̄ᵀ [count, in] of the directions that the definition names."""
    u, sigma, vt = torch.linalg.svd(w.detach().double(), full_matrices=False)
    rate = (u.T @ delta @ vt.T).diagonal().abs() / (sigma + 1e-8 * sigma[0])
    order = rate.argsort(descending=True)[:count].tolist()
    return order, sigma[order], rate[order], u[:, order], vt[order]
