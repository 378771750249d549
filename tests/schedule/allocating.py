"""A small adapted decoder whose rank slots move, and its training loop, for the tests of ALoRA.

model = alora(first=3, every=2, max_rounds=2)     # tiny llama, r = 2 on all 14 linear modules, rows attached
train(model, 8)                                   # a bare loop
events(model), ranks(model)
"""

from __future__ import annotations

from typing import Any

import torch
from dashing import sites
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weftlora
from families import FAMILIES
from weftlora.host.attach import schedules
from weftlora.schedule.reallocate import ReallocateController
from weftlora.schedule.schedule import Event
from weftlora.scoring.scorer import Ablation

TOKENS = torch.randint(3, 64, (64, 7), generator=torch.Generator().manual_seed(5))
HELD_OUT = [{"input_ids": row, "labels": row} for row in TOKENS[40:]]


def bare(family: str = "llama", **fields: Any) -> PeftModel:
    """The adapted model, without rows."""
    base = FAMILIES[family].build()
    torch.manual_seed(0)
    given = {
        "r": 2,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "first": 3,
        "every": 2,
        "max_rounds": 2,
        "rows": 4,
        "score": "exact",
    }
    return get_peft_model(base, weftlora.AllocLoraConfig(**{**given, **fields})).train()


def alora(**fields: Any) -> PeftModel:
    model = bare(**fields)
    weftlora.attach(model, validation=HELD_OUT)
    return model


def adam(model: nn.Module, lr: float = 2e-2, **fields: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(weftlora.param_groups(model, lr=lr, weight_decay=0.1), **fields)


def batch(step: int, rows: int = 4) -> dict[str, Tensor]:
    ids = TOKENS[torch.arange(rows * step, rows * (step + 1)) % 40]
    return {"input_ids": ids, "labels": ids}


def train(model: nn.Module, end: int, optimizer: torch.optim.Optimizer | None = None, start: int = 0) -> list[float]:
    """Steps `start` … `end` of a bare loop; the losses."""
    optimizer = optimizer or adam(model)
    losses = []
    for step in range(start, end):
        loss = model(**batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def controller(model: nn.Module, adapter: str = "default") -> ReallocateController:
    return schedules(model)[adapter].controllers[-1]  # type: ignore[return-value]


def scorer(model: nn.Module) -> Ablation:
    found = controller(model).scorer
    assert isinstance(found, Ablation)
    return found


def events(model: nn.Module, adapter: str = "default") -> list[Event]:
    return [e for e in schedules(model)[adapter].events if e["event"] == "reallocation"]


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: len(site.live()) for name, site in sites(model).items()}


def random_factors(model: nn.Module, seed: int = 3, size: float = 0.2) -> None:
    """Live slots with B ≠ 0, as after some training; dead ones stay 0."""
    draw = torch.Generator().manual_seed(seed)
    for site in sites(model).values():
        with torch.no_grad():
            for slot in site.live():
                b = site.structure.B.unflatten(1, (-1, site.structure.A.shape[0]))[:, :, slot]
                b.copy_(size * torch.randn(b.shape, generator=draw))
