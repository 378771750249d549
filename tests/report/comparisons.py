"""Comparisons with planted findings, and run folders to go with them; nothing is trained.

found = comparison(seeds=5)
write_runs(found, tmp_path)
"""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

from weftlora.compare.record import Comparison, Method, Outcome, Rate
from weftlora.compare.statistics import rows
from weftlora.runs.run import Run

PLANTED = {"lora": 0.0, "hydralora": -0.004, "tied_lora": 0.03, "alora": 0.001, "flexora": 0.0005, "lora_dash": -0.0004}
"""What a method's loss has over the baseline's."""
PARAMETERS = {
    "lora": 146432,
    "hydralora": 146001,
    "tied_lora": 6240,
    "alora": 146432,
    "flexora": 147200,
    "lora_dash": 146496,
}
DOMAINS = ("dock", "loom", "mill")
NONE = "none"


def comparison(
    seeds: int = 5, names: tuple[str, ...] = tuple(PLANTED), domains: bool = True, folder: str = "top"
) -> Comparison:
    """Losses around 0.05 that differ by what is planted, with noise of 0.001 per seed and of 0.0005 per run."""
    methods = [_method(name) for name in names]
    outcomes = [_outcome(method, seed, domains) for method in methods for seed in range(seeds)]
    methods.append(Method(NONE, {"recipe": NONE}))
    outcomes += [Outcome(NONE, 0, "runs/none/base", "complete", {"loss": 4.6543, "exact_match": 0.03125})]
    bare = Comparison(
        folder=folder, model="demo", data="demo", task="causal", metric="loss", higher_is_better=False, baseline="lora",
        seeds=list(range(seeds)), budget="Every method trains about 146,432 numbers for 150 steps of 8 rows.", methods=methods,
        outcomes=outcomes, rows=[], versions={"weftlora": "0.1.0", "torch": "2.9.0"}, machine="cpu, 1 thread, 2 runs at once",
        complete=True,
    )  # fmt: skip
    return judged(bare)


def judged(found: Comparison) -> Comparison:
    """The comparison with the rows that its outcomes give."""
    made = rows(found.methods, found.outcomes, found.metric, found.higher_is_better, found.baseline)
    return dataclasses.replace(found, rows=made)


def changed(found: Comparison, name: str, seed: int, **fields: Any) -> Comparison:
    """The comparison with one outcome changed."""
    outcomes = [dataclasses.replace(o, **fields) if (o.method, o.seed) == (name, seed) else o for o in found.outcomes]
    return judged(dataclasses.replace(found, outcomes=outcomes))


def broken(found: Comparison) -> Comparison:
    """One run that failed and one that diverged."""
    lost: dict[str, Any] = {"scores": {}, "domains": {}, "figures": {}, "curve": []}
    failed = changed(found, "alora", 1, status="failed", problem="The disk was full at step 80.", **lost)
    return changed(
        failed, "tied_lora", 0, status="diverged", problem="The loss was not finite from step 31 on.", **lost
    )


def renamed(found: Comparison, old: str, new: str) -> Comparison:
    """The comparison with a method (or model, or folder) called otherwise."""

    def change(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return type(value)(**{f.name: change(getattr(value, f.name)) for f in dataclasses.fields(value)})
        if isinstance(value, dict):
            return {new if key == old else key: change(inner) for key, inner in value.items()}
        return [change(inner) for inner in value] if isinstance(value, list) else new if value == old else value

    return change(found)


def write_runs(found: Comparison, folder: Path) -> Comparison:
    """The comparison in `folder`, with a run.json for every outcome that is not missing."""
    for outcome in found.outcomes:
        if outcome.status != "missing":
            place = folder / outcome.folder
            place.mkdir(parents=True)
            recipe = {
                "model": {"path": "demo"},
                "data": {"train": "demo"},
                "adapter": found.method(outcome.method).adapter,
                "train": {"steps": 150, "seed": outcome.seed, "lr": 1e-3},
                "out": outcome.folder,
            }
            base = {"source": "demo", "kind": "llama", "shapes": "0", "values": "0"}
            counts, data = {"trainable": 1000, "total": 20000}, {"hashes": {}, "labels": None}
            Run(
                place,
                "complete",
                recipe,
                str(folder),
                "causal",
                outcome.seed,
                150,
                {},
                "cpu",
                1,
                base,
                {},
                counts,
                data,
            ).save()
    return dataclasses.replace(found, folder=str(folder))


def _method(name: str) -> Method:
    rates = [Rate(lr, 1000, 0.05 + abs(math.log10(lr / 3e-3))) for lr in (1e-3, 3e-3, 1e-2)]
    parameters = PARAMETERS.get(name, 146432)
    return Method(
        name, {"recipe": name}, rank=2 if name == "tied_lora" else 16, alpha=16, parameters=parameters,
        budget_gap=parameters / 146432 - 1, steps=150, lr=1e-2 if name == "tied_lora" else 3e-3, rates=rates,
        rate_at_edge=name == "tied_lora", note="it cannot reach the budget." if name == "tied_lora" else "",
    )  # fmt: skip


def _outcome(method: Method, seed: int, domains: bool) -> Outcome:
    shared, own = random.Random(f"seed {seed}"), random.Random(f"{method.name} {seed}")
    loss = 0.05 + shared.gauss(0, 0.001) + PLANTED.get(method.name, 0.0) + own.gauss(0, 0.0005)
    match = 0.97 - 4 * (loss - 0.05)
    slow = {"hydralora": 1.3, "lora_dash": 1.1}.get(method.name, 1.0)
    search = {"search_steps": 40.0, "search_seconds": 6.0} if method.name == "flexora" else {}
    losses = {step: loss + 4 * math.exp(-step / 25) + abs(own.gauss(0, 0.01)) for step in range(10, 151, 10)}
    numbers = float(method.parameters or 0)
    curve = [{"step": step, "loss": value} for step, value in losses.items()]
    curve += [{"step": step, "validation_loss": losses[step] + 0.01} for step in (50, 100, 150)]
    return Outcome(
        method.name, seed, f"runs/{method.name}/seed-{seed}", "complete", {"loss": loss, "exact_match": match},
        {d: {"loss": loss * (1 + n / 5), "exact_match": match} for n, d in enumerate(DOMAINS)} if domains else {},
        {
            "trained": numbers, "stored": numbers, "stored_bytes": 4 * numbers, "export_bytes": 612_000.0,
            "peak_bytes": 3.1e8 * slow, "train_seconds": 20 * slow, "cpu_per_step": 0.12 * slow * own.uniform(0.98, 1.02),
            "tokens_per_s": 9000 / slow, **search,
        },
        curve,
    )  # fmt: skip
