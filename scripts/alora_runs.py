"""Measure moving ranks (ALoRA), LoRA-Init and LoRA-TSD against LoRA and their controls; write evidence/alora-runs.json.

    python scripts/alora_runs.py --jobs 2               # runs what is missing; then scripts/evidence.py --page
    python scripts/alora_runs.py --tasks demo --seeds 2 # a quick look

The runs are those of the recipes evidence/alora-*.yaml and, at rates of its own, adalora-*.yaml, which `weftlora compare` takes.
A script is needed for what a recipe cannot say: `final` trains plain LoRA from the start at the ranks that `shortlist` ended with
in the run of the same seed; and what the rounds of a run say of their scores is in its events, which a comparison's record has not.

    lora        plain LoRA; the same bit for bit as moving no ranks (score="none")
    exact, shortlist, taylor    AB-LoRA scores, eight rounds from a third of the run on
    random      as many moves in the same rounds, slots chosen at random
    early       as shortlist, with rounds from a tenth of the run on, every fortieth: the paper's quarter epochs of ten
    early-random                as many moves in those rounds, at random
    adalora     stock peft AdaLoRA, from 1.5 r down to r
    init, tsd   LoRA-Init and LoRA-TSD, switched after a fifth of the steps
    init-random, init-top       as init, along directions drawn at random, or those of largest σ

On the demo `taylor` also measures, every round, how far its scores and exact ones on other rows are from exact ones. What is left
out on E2E and SST-2 would take hours: eight rounds of exact scores of 140 slots and more, and controls.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compared
from compared import TASKS, paired_gap, section_head, spread

from weftlora.schedule.rank_slots import kind_of, spearman

RANK = 4

MOVING = ("exact", "shortlist", "taylor", "random", "early", "early-random")
STARTING = ("init", "init-random", "init-top", "tsd")
VARIANTS = ("lora", *MOVING, "final", "adalora", *STARTING)
CHECKED = ("demo",)
"""Tasks on which `taylor` measures its scores against exact ones, which takes two exact rounds per round."""


def final_recipe(task: str, seed: int, ranks: dict[str, int]) -> dict[str, Any]:
    """The comparison of one run: plain LoRA at these ranks, otherwise as evidence/alora-TASK.yaml."""
    method = {"recipe": "lora", **_pattern(ranks), "name": "final"}
    return compared.recipe(f"alora-{task}") | {
        "methods": [method],
        "baseline": "final",
        "seeds": [seed],
        "out": f"runs/compare-alora-{task}-final/s{seed}",
    }


def _pattern(ranks: dict[str, int]) -> dict[str, Any]:
    """Fields for modules of different ranks, at the scale of rank RANK; a module of rank 0 is left alone."""
    other = {name: rank for name, rank in ranks.items() if rank not in (0, RANK)}
    fields: dict[str, Any] = {
        "rank_pattern": {re.escape(name): rank for name, rank in other.items()},
        "alpha_pattern": {re.escape(name): 2 * rank for name, rank in other.items()},
    }
    gone = [name for name, rank in ranks.items() if rank == 0]
    return fields | ({"exclude_modules": gone} if gone else {})


def rounds(folder: Path) -> list[dict[str, Any]]:
    """The reallocations of a run, in order."""
    lines = (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "reallocation"]


def with_rounds(found: dict[str, Any], out: Path) -> dict[str, Any]:
    """A run's figures with where its ranks went and what its rounds say of their scores."""
    if found["variant"] == "adalora":
        kept = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))["rank_pattern"]
        return found | {"ranks": {_module(key): sum(mask) for key, mask in kept.items()}}
    if found["variant"] not in MOVING:
        return found
    events = rounds(out)
    figures = ("round", "step", "margin", "noise", "agreement", "seconds", "parameters")
    return found | {
        "ranks": events[-1]["ranks"],
        "rounds": [{key: event[key] for key in figures if key in event} for event in events],
    }


def _module(key: str) -> str:
    """The module that an entry of AdaLoRA's rank pattern stands for."""
    return re.sub(r"^base_model\.model\.|\.lora_E.*$", "", key)


def made(task: str, args: Namespace) -> dict[str, Any]:
    """The runs of the task's recipes, and `final`, which needs those of `shortlist`."""
    import weftlora

    runs = []
    for name in (f"alora-{task}", f"adalora-{task}"):
        found = weftlora.compare(compared.FOLDER / f"{name}.yaml", f"seeds={args.seeds}", jobs=args.jobs)
        folder = {(o.method, o.seed): Path(found.folder) / o.folder for o in found.outcomes}
        runs += [with_rounds(row, folder[row["variant"], row["seed"]]) for row in compared.rows(found.record())]
    for run in [run for run in runs if run["variant"] == "shortlist"]:
        found = weftlora.compare(final_recipe(task, run["seed"], run["ranks"]), jobs=args.jobs)
        runs += compared.rows(found.record())
    return {"runs": runs}


# ---------------------------------------------------------------------- the document's part

READING = """
### How to read moving and starting

- AB-LoRA scores are not noise. Against as many random moves in the same rounds they win on the demo (by 0.09 nats late,
  0.05 early) and on E2E (0.14 and 0.06), all four intervals without 0. There, seeds agree on where ranks go (rank
  correlation 0.6 to 0.8; random moves 0.0 to 0.1), and the ways of scoring agree with each other. On SST-2, in 60
  steps, seeds agree little (0.16) and moving, at random or not, makes no difference.
- They do not beat leaving ranks alone. With rounds from a third of these short runs on, ALoRA is worse than LoRA on the
  demo, by 0.04 nats, and not distinguishable from it elsewhere; from a tenth on it is not distinguishable from LoRA on
  either task. A move costs what the pruned slot did and what the new one has no time to learn, so late rounds pay more:
  prefer `first=0.1, every=0.025` in a short run.
- LoRA trained from the start at the ranks found is better than at uniform ranks by 0.03 nats on the demo and E2E and by
  0.2 points on SST-2, each within what five seeds leave open.
- Slots are budgeted, not numbers: on E2E the ranks go to the MLP, whose slots are larger, and ALoRA ends with an eighth
  more trainable parameters than LoRA. No row corrects for that; it favours ALoRA.
- Where ranks go depends on the task: away from q and k on the demo, from all of attention to the MLP on E2E (AdaLoRA
  moves them so too). The paper reports the opposite, more for q and k.
- `taylor` decides as `exact` does: what it gets wrong is a fraction of what other 32 rows change.
- LoRA-Init and LoRA-TSD are worse than LoRA on the demo, by 0.16 nats, and not distinguishable from it on E2E and
  SST-2. Directions by change rate are nowhere distinguishable from random ones, and better than those of largest σ by
  0.27 and 0.12 nats. A fifth of these runs is spent on finding directions and thrown away.
- AdaLoRA needs more than 60 steps: on SST-2 it has learned next to nothing at the largest rate that was tried.
- There are 46 intervals of 95 % in these tables: two or three of them miss by chance.
"""
AGAINST = {
    **dict.fromkeys(("exact", "shortlist", "taylor"), "random"),
    "early": "early-random",
    **dict.fromkeys(("init-random", "init-top", "tsd"), "init"),
}
"""Variant: what it is compared with besides LoRA."""


def section() -> list[str]:
    """The part of docs/real-runs.md, a pure function of evidence/alora-runs.json."""
    saved = compared.saved("alora-runs")
    lines = [
        "## ALoRA, LoRA-Init and LoRA-TSD",
        "",
        f"All start from r = {RANK} and α = 2r on all linear modules and share batch, steps, seeds and data order.",
        "ALoRA moves slots in eight rounds from a third of the run on, `early` from a tenth on; LoRA-Init and",
        "LoRA-TSD switch after a fifth.",
        "`random` moves as many slots in the same rounds, chosen at random; `final` is plain LoRA trained from the",
        "start at the ranks that `shortlist` ended with; `adalora` is peft's, from 1.5 r to r. Moving no slots is",
        "`lora`, bit for bit. Rates were chosen from four each, on validation rows over two seeds that are not",
        "reported: with LoRA for all whose values start as its do, with LoRA-Init for those along directions, and",
        f"for AdaLoRA its own. Differences are paired by seed, with 95 % intervals. Made by `{saved['command']}`",
        f"({saved['versions']}); every run is in `evidence/alora-runs.json`.",
    ]
    for task in saved["tasks"]:
        lines += ["", *_table(task), "", *_where(task)]
    return [*lines, "", *_fidelity(saved["tasks"]), READING]


def _by_variant(task: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Its runs in order of seed."""
    found = {v: sorted((f for f in task["runs"] if f["variant"] == v), key=lambda f: f["seed"]) for v in VARIANTS}
    return {variant: runs for variant, runs in found.items() if runs}


def _table(task: dict[str, Any]) -> list[str]:
    by = _by_variant(task)
    out = [
        f"### {TASKS[task['task']].title}, moving and starting",
        "",
        section_head(f"alora-{task['task']}", task["task"], len(by["lora"])),
        "",
        "| variant | trained parameters | lr | mean ± sd | difference to lora (95 %) | difference to another (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for variant, runs in by.items():
        cells = [variant, f"{_parameters(runs, by['lora']):,}", f"{runs[0]['lr']:g}", spread([f["test"] for f in runs])]
        cells += [_gap(runs, by["lora"]) if variant != "lora" else ""]
        other = AGAINST.get(variant)
        cells += [f"{other}: {_gap(runs, by[other])}" if other else ""]
        out.append("| " + " | ".join(cells) + " |")
    return out


def _gap(runs: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> str:
    return paired_gap([run["test"] for run in runs], [other["test"] for other in others])


def _parameters(runs: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> int:
    """Trainable parameters, the mean over seeds; of moving ranks those that are live at the end, with a classifier's head."""
    counts = [run["trainable"] for run in runs]
    if "rounds" in runs[0]:
        # there is room for 2 r slots, so `trainable` is twice LoRA's adapter and the head once
        head = 2 * plain[0]["trainable"] - runs[0]["trainable"]
        counts = [run["rounds"][-1]["parameters"] + head for run in runs]
    return round(statistics.mean(counts))


def _where(task: dict[str, Any]) -> list[str]:
    by = {variant: runs for variant, runs in _by_variant(task).items() if "ranks" in runs[0]}
    kinds = list(dict.fromkeys(kind_of(name) for name in by["random"][0]["ranks"]))
    short = [kind.rpartition("#.")[2] for kind in kinds]
    out = [
        "Where the ranks went: the mean final rank of each kind of module over its layers ± sd over seeds (start:",
        f"{RANK}), and how far seeds agree on the ranks of single modules (mean rank correlation between pairs of",
        "seeds).",
        "",
        "| variant | " + " | ".join(short) + " | seeds agree |",
        "|---|" + "---|" * (len(kinds) + 1),
    ]
    for variant, runs in by.items():
        means = [
            [statistics.mean(r for n, r in run["ranks"].items() if kind_of(n) == kind) for run in runs]
            for kind in kinds
        ]
        cells = [variant, *(spread(each, 1) for each in means), _agreement(runs)]
        out.append("| " + " | ".join(cells) + " |")
    return out


def _agreement(runs: Sequence[dict[str, Any]]) -> str:
    names = list(runs[0]["ranks"])
    lists = [[run["ranks"][name] for name in names] for run in runs]
    return f"{statistics.mean(spearman(one, other) for one, other in itertools.combinations(lists, 2)):+.2f}"


def _fidelity(tasks: Sequence[dict[str, Any]]) -> list[str]:
    """Taylor's scores and exact ones on other rows, both against exact ones, over all rounds of all seeds."""
    out = [
        "### How good Taylor's scores are",
        "",
        "Each round of `taylor`: its scores, and exact scores on other 32 rows, both against exact scores on the",
        "rows in use. The second is as well as any score can do. Mean ± sd over rounds and seeds; regret is",
        "relative to the sum over the truly lowest.",
        "",
        "| task | rounds | scores | Spearman | Kendall | overlap of those that move | regret |",
        "|---|---|---|---|---|---|---|",
    ]
    names = {"score_in_use": "Taylor", "exact_on_other_rows": "exact, other rows"}
    for task in tasks:
        if task["task"] not in CHECKED:
            continue
        told = [each["agreement"] for f in task["runs"] if f["variant"] == "taylor" for each in f["rounds"]]
        for key, name in names.items():
            columns = [[each[key][figure] for each in told] for figure in ("spearman", "kendall", "overlap", "regret")]
            cells = [task["task"], str(len(told)), name, *(spread(column, 2) for column in columns)]
            out.append("| " + " | ".join(cells) + " |")
    return out


if __name__ == "__main__":
    compared.main("alora-runs", __doc__, made)
