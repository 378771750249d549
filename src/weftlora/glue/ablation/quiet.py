"""Scoring leaves no trace: modes, random state, gates, listeners and cache flags are put back, also after an error."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from weftlora.glue.modes import in_mode
from weftlora.site import Site


@contextmanager
def undisturbed(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Evaluation mode without gradients, caches and listeners, for the length of the block.

    Gradients of parameters are not touched by what runs inside; whoever needs gates' gradients asks for them alone.
    """
    listeners = [(site, site.recorder, site.gate_meter, site.keep) for site in sites]
    cached = [config for config in _configs(model) if getattr(config, "use_cache", None)]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
            for kind in {p.device.type for p in model.parameters()}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            for config in cached:
                config.use_cache = False
            for site in sites:
                site.recorder = site.gate_meter = None
            stack.enter_context(in_mode(model, training=False))
            yield
    finally:
        for site, recorder, meter, keep in listeners:
            site.recorder, site.gate_meter, site.keep = recorder, meter, keep
        for config in cached:
            config.use_cache = True


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(c): c for c in found if c is not None and not isinstance(c, dict)}.values())
