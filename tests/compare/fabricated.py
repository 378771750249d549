"""Comparisons that never ran: outcomes with planted scores, as if read from run folders."""

from __future__ import annotations

from collections.abc import Sequence

from weftlora.compare.record import Method, Outcome


def method(name: str) -> Method:
    return Method(name, {"recipe": name})


def runs(name: str, scores: Sequence[float], metric: str = "loss", cpu: float | None = None) -> list[Outcome]:
    """A complete run per score, of seeds 0, 1, ..."""
    figures = {} if cpu is None else {"cpu_per_step": cpu}
    return [
        Outcome(name, seed, f"runs/{name}/seed-{seed}", "complete", {metric: score}, figures=figures)
        for seed, score in enumerate(scores)
    ]


def lost(name: str, seed: int, status: str = "diverged") -> Outcome:
    return Outcome(name, seed, f"runs/{name}/seed-{seed}", status, problem="the loss became nan")  # type: ignore[arg-type]
