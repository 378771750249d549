"""Scoring leaves no trace, wherever it is stopped."""

from __future__ import annotations

import contextlib
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from allocating import TOKENS, adam, alora, controller, random_factors, scorer, train
from dashing import sites
from torch import Tensor, nn

import weftlora


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    its, moments = sites(model), optimizer.state_dict()["state"]
    return {
        "moments": {f"{p} {n}": torch.as_tensor(t).clone() for p, kept in moments.items() for n, t in kept.items()},
        "dice": (random.getstate(), np.random.get_state()[1].tolist()),
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "rng": torch.get_rng_state(),
        "keep": [site.keep for site in its.values()],
        "masks": [id(site.mask) for site in its.values()],
        "listeners": [(site.recorder, site.gate_meter) for site in its.values()],
        "cache": model.config.use_cache,
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("mode", ["exact", "taylor", "shortlist"])
def test_scoring_leaves_no_trace_wherever_it_is_interrupted(mode: str) -> None:
    """Stopped in the first, second, … forward pass, until one goes through: modes, masks, gradients, moments, generators."""
    model = alora(score=mode, structure=weftlora.Hydra(heads=2), lora_dropout=0.3)
    random_factors(model)
    optimizer = adam(model, lr=1e-3)
    train(model, 1, optimizer)
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    next(iter(model.modules())).training = True
    list(sites(model).values())[2].train(False)
    next(iter(sites(model).values())).gate_meter = meter = lambda _: pytest.fail("a meter heard the scoring")
    last = list(sites(model).values())[-1]
    for stop in itertools.count():
        calls = 0

        def boom(*_: Any, stop: int = stop) -> None:
            nonlocal calls
            calls += 1
            torch.rand(1)  # as a model does that is never without noise
            if calls > stop:
                raise KeyboardInterrupt

        hook = last.register_forward_hook(boom)
        before = everything(model, optimizer)
        with contextlib.suppress(KeyboardInterrupt):
            controller(model).scoring.measure(1)
        after = everything(model, optimizer)
        hook.remove()
        assert [name for name in before if not same(after[name], before[name])] == [], stop
        scorer(model).known = False  # the next one looks for a way from the start
        if calls <= stop:
            break
    assert stop >= 8
    assert next(iter(sites(model).values())).gate_meter is meter
