"""What a run will spend beside its steps, said before the first of them.

    8 rounds of scoring rank slots by taylor (auto), about 40 s, 6 % of this run
    the launch of Dash decomposes 28 weights, about 12 s, 2 % of this run (nothing where they are kept from an earlier one)
    a search of 30 steps on α, worth 45 training steps, about 90 s, 45 % of this run

Shares of scoring and of a search are from counts; what decides anything decides by them. A launch happens once and is part of the
method, so nothing bounds it: where it is more than a tenth of the run, the line says what makes it less. Seconds are for whoever
waits: one forward pass, and one decomposition of a small matrix, are timed and scaled.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from weftlora.adapter.site import Site
from weftlora.host.attach import schedules
from weftlora.schedule.launch import LaunchController
from weftlora.schedule.reallocate import ReallocateController
from weftlora.schedule.schedule import Schedule
from weftlora.schedule.scoring_cost import BACKWARD, BOUND
from weftlora.scoring.scorer import undisturbed
from weftlora.search.driver import LayerSearch, cost_of_step
from weftlora.train.prepare import Prepared, tokens_per_step

PROBED = 2
"""Rows of the pass that is timed."""
SIDE = 256
"""Of the matrix whose decomposition is timed; larger ones take (rows · columns · smaller side) / SIDE³ as long."""


def lines(prepared: Prepared, search: LayerSearch | None) -> list[str]:
    """A sentence for each thing that costs more than steps; none for plain training."""
    if search is not None:
        asked, inner = search.search, search.inner
        worth = search.steps * cost_of_step(asked, inner.batch_size * inner.accumulation, search.sizes["validation"])
        said = f"a search of {search.steps} steps on α, worth {worth:.0f} training steps"
        if (step := tokens_per_step(prepared.recipe, prepared.data)) is not None:
            said += f", about {_seconds(worth * BACKWARD * step * _per_token(prepared, search.gates.sites))}"
        said += f", {worth / prepared.steps:.0%} of this run"
        bound = (
            "" if asked.steps or asked.max_share is None else f" (at most {asked.max_share:.0%}; adapter.steps sets it)"
        )
        return [said + bound]
    told = []
    for schedule in schedules(prepared.model).values():
        for controller in schedule.pending():
            if isinstance(controller, ReallocateController) and controller.choice.needs_data:
                told.append(_scoring(prepared, schedule, controller))
            elif isinstance(controller, LaunchController):
                told.append(_launch(prepared, schedule, controller))
    return told


def _scoring(prepared: Prepared, schedule: Schedule, controller: ReallocateController) -> str:
    counts, choice = controller.counts(schedule.length), controller.choice
    share, tokens = counts.share(choice.way), counts.tokens(choice.way)
    said = f"{counts.rounds} rounds of scoring rank slots by {choice.score}"
    if tokens is not None:
        said += f", about {_seconds(tokens * _per_token(prepared, [member.site for member in schedule.members]))}"
    return said + (f", {share:.0%} of this run" if share is not None else "")


def _launch(prepared: Prepared, schedule: Schedule, controller: LaunchController) -> str:
    shapes = [tuple(member.site.structure.factors(1.0).A.shape) for member in schedule.members]
    outs = [member.site.structure.factors(1.0).B.shape[0] for member in schedule.members]
    work = sum(fan_in * out * min(fan_in, out) for (_, fan_in), out in zip(shapes, outs, strict=True))
    took = work / SIDE**3 * _decomposing()
    said = f"{controller.what} decomposes {len(schedule.members)} weights, about {_seconds(took)}"
    step = tokens_per_step(prepared.recipe, prepared.data)
    if step is None:
        return said
    training = BACKWARD * prepared.steps * step * _per_token(prepared, [member.site for member in schedule.members])
    share = took / max(training, 1e-9)
    less = "; fewer adapter.target_modules make it less" if share > BOUND else ""
    return said + f", {share:.0%} of this run (nothing where they are kept from an earlier one{less})"


def _per_token(prepared: Prepared, sites: Sequence[Site]) -> float:
    """Seconds of a forward pass per token, on a few rows, the second time."""
    rows = prepared.data.train.select(range(min(PROBED, len(prepared.data.train))))
    batch = prepared.collator([rows[i] for i in range(len(rows))])
    device = next(prepared.model.parameters()).device
    given = {k: v.to(device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    with undisturbed(prepared.model, sites):
        for _ in range(2):
            began = time.perf_counter()
            prepared.model(**given)
            if device.type == "cuda":
                torch.cuda.synchronize()
            took = time.perf_counter() - began
    return took / given["input_ids"].numel()


def _decomposing() -> float:
    draw = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    torch.linalg.svd(draw, full_matrices=False)
    return time.perf_counter() - began


def _seconds(value: float) -> str:
    return f"{value / 60:.0f} min" if value >= 120 else f"{max(value, 1):.0f} s"
