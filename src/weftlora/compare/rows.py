"""From runs to rows: the scores of each method over its seeds, its differences to the baseline by seed, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from weftlora.compare.record import Interval, Method, Outcome, Row, Verdict
from weftlora.compare.stats import interval
from weftlora.compare.verdict import verdict
from weftlora.errors import RunError


def rows(
    methods: Sequence[Method], outcomes: Sequence[Outcome], metric: str, higher_is_better: bool, baseline: str
) -> list[Row]:
    """A row per method, in their order. Only complete runs count, and only seeds that are complete in both are compared.

    Raises:
        RunError: a complete run without the metric, or with one that is no finite number; two runs of a method and seed.
    """
    by_method = {method.name: _by_seed(method.name, outcomes) for method in methods}
    base = by_method.get(baseline, {})
    made = []
    for method in methods:
        runs = by_method[method.name]
        scores = {seed: _score(run, metric) for seed, run in _complete(runs).items()}
        score = interval(list(scores.values())) if scores else None
        if said := _no_contender(method, baseline, bool(scores)):
            made.append(Row(method.name, score, None, 0, said))
            continue
        beside = {seed: _score(run, metric) for seed, run in _complete(base).items()}
        gaps = [scores[seed] - beside[seed] for seed in sorted(scores.keys() & beside.keys())]
        wins = sum(gap > 0 if higher_is_better else gap < 0 for gap in gaps)
        planned = len(runs.keys() | base.keys())
        judged = verdict(gaps, metric, higher_is_better, baseline, planned)
        gap = interval(gaps) if gaps else None
        made.append(Row(method.name, score, gap, wins, judged, _step_ratio(runs, base)))
    return made


def _no_contender(method: Method, baseline: str, complete: bool) -> Verdict | None:
    """The verdict on what is not compared: the baseline itself, of which a seed is complete or not, and the frozen base."""
    if method.name == baseline:
        missing = "" if complete else ", and no seed of it is complete"
        return Verdict("baseline", f"what the others are compared with{missing}")
    if method.frozen:
        return Verdict("single", "the frozen base: no verdict")
    return None


def _by_seed(name: str, outcomes: Sequence[Outcome]) -> dict[int, Outcome]:
    runs: dict[int, Outcome] = {}
    for run in outcomes:
        if run.method == name:
            if run.seed in runs:
                raise RunError(
                    f"{name} has two runs of seed {run.seed}, {runs[run.seed].folder} and {run.folder}: keep one."
                )
            runs[run.seed] = run
    return runs


def _complete(runs: dict[int, Outcome]) -> dict[int, Outcome]:
    return {seed: run for seed, run in runs.items() if run.status == "complete"}


def _score(run: Outcome, metric: str) -> float:
    if metric not in run.scores:
        known = ", ".join(run.scores) or "nothing"
        raise RunError(
            f"the run {run.folder} has no {metric}, only {known}: evaluate it again, or compare by one of these."
        )
    return run.scores[metric]


def _step_ratio(runs: dict[int, Outcome], base: dict[int, Outcome]) -> Interval | None:
    """CPU seconds per step over the baseline's, paired by seed; None where either has no such figure."""
    ours, theirs = (
        {seed: run.figures["cpu_per_step"] for seed, run in _complete(these).items() if run.figures.get("cpu_per_step")}
        for these in (runs, base)
    )
    ratios = [ours[seed] / theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]
    return interval(ratios) if ratios else None
