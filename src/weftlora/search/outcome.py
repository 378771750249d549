"""What a search has found so far: its rule applied to α, and the numbers that go with it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from weftlora.errors import RunError
from weftlora.schedule import together
from weftlora.search.rules import choose
from weftlora.search.selection import Candidate, Selection
from weftlora.terms.layers.search import Search, weights

if TYPE_CHECKING:
    from weftlora.search.driver import LayerSearch


def selection(search: LayerSearch) -> Selection:
    """What the rule selects from α as it is now.

    Raises:
        RunError: no step on α or none on θ was ever possible, or fewer are selected than `min_layers` and that is to be an
            error.
    """
    _check_learned(search)
    alpha = search.alpha.detach().clone()
    together.take_over([alpha], search.passes.device)
    asked = search.search
    assert asked.select is not None
    chosen = choose(
        alpha.tolist(),
        asked.select,
        top_k=asked.top_k,
        min_layers=asked.min_layers,
        when_fewer=asked.when_fewer,
        step=search.last_move,
    )
    alpha_hat, norms = weights(alpha).tolist(), (search.norms / max(1, search.loop.taken)).tolist()
    candidates = [
        Candidate(
            name=group.name,
            block=group.block,
            modules=tuple(group.sites),
            alpha=float(alpha[i]),
            alpha_hat=alpha_hat[i],
            distance=chosen.distance[i],
            selected=i in chosen.selected,
            near=i in chosen.near,
            filled=i in chosen.filled,
            gradient_norm=norms[i],
        )
        for i, group in enumerate(search.gates.groups)
    ]
    settings = dataclasses.asdict(asked), dataclasses.asdict(search.inner)
    return Selection(
        tuple(candidates), asked.granularity, search.adapter_config, *settings, _record(search), search.seconds
    )


def _check_learned(search: LayerSearch) -> None:
    """Refuse to select from an α that no step has moved, or that moved beside a θ that none has."""
    for what, steps, skipped, unlabelled in (
        ("validation", search.done, search.skipped, search.unlabelled),
        ("training", search.loop.taken, search.loop.skipped, search.loop.unlabelled),
    ):
        if steps and skipped == steps:
            advice = (
                "none of their rows has a label that counts: look at how they are labelled and cut to length"
                if unlabelled == steps
                else f"lower lr, or look at the {what} rows"
            )
            raise RunError(
                f"none of the {steps} {what} losses of the search was a number, so nothing was learned of the layers: {advice}."
            )


def _record(search: LayerSearch) -> dict[str, Any]:
    return {
        "steps": search.done,
        "cost_in_steps": round(search.done * _cost(search), 3),
        "skipped_steps": search.skipped,
        "skipped_inner_steps": search.loop.skipped,
        "unlabelled_steps": search.unlabelled,
        "unlabelled_inner_steps": search.loop.unlabelled,
        "seed": search.seed,
        "rows": {name: len(getattr(search.splits, name)) for name in ("train", "validation")},
        "repeated_rows": search.splits.repeated,
        **{name: _last(search, name) for name in ("loss", "validation_loss", "sum_alpha", "max_alpha_hat")},
    }


def _last(search: LayerSearch, name: str) -> float | None:
    """The last value that is a number: a step that was skipped has no loss."""
    return next((row[name] for row in reversed(search.history) if math.isfinite(row[name])), None)


def _cost(search: LayerSearch) -> float:
    inner = search.inner
    return cost_of_step(search.search, inner.batch_size * inner.accumulation, search.sizes["validation"])


def cost_of_step(search: Search, rows: int, outer_rows: int) -> float:
    """Of one step on α, in training steps of `rows` rows: rows through forward and backward, and twice those of a double backward.

    Args:
        outer_rows: rows of an outer micro-batch.
    """
    unrolled = 0 if search.hypergrad == "direct" else 2 * (search.unroll_steps or search.inner_steps)
    return search.inner_steps + unrolled + outer_rows * search.outer_batches / rows
