"""docs/evidence.md, a pure function of evidence/*.json: the claims of the papers, and what our runs say of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import compared
import llm_page

from claims import CLAIMS, SOURCES, Claim, Contrast, Side
from weftlora.compare.record import METRICS, Interval, Method, Outcome, Row, Verdict
from weftlora.compare.statistics import expected_false, interval, rows, verdict

PLACES = {
    "demo": "demo tasks, bundled model",
    "e2e": "E2E, stories260k (decoder)",
    "sst2": "SST-2, MiniLM (encoder)",
}
WORDS = {
    "better": "holds here",
    "worse": "does not hold here",
    "undecided": "not distinguishable",
    "single": "one seed: no verdict",
}
HEAD = """# Evidence

What the papers claim, and what our runs say of it. Every row compares a method with a named control on the same seeds. The interval
holds the true mean difference at 95 %; `weftlora.compare.statistics` says how it is made and how often it errs.

- *holds here*: the method is better, and the interval leaves out 0;
- *does not hold here*: the method is worse, and the interval leaves out 0;
- *not distinguishable*: the interval contains 0. The number of seeds that would settle it supposes a difference as large as the
  one that was seen.

Models and runs of these rows are small: 60 to 150 steps on models of 0.2 to 23 million parameters. They can refute an effect that
shows everywhere, and no other. Each claim in the regime of its paper, on a model of 135 million parameters, is
[further below](#on-a-real-language-model). The last column names the data: `evidence/NAME.json`, made by
`python scripts/evidence.py NAME`.
[Real runs](real-runs.md) has all variants and controls of these runs."""


class EvidenceError(Exception):
    """A row cites what is not in the data."""


@dataclass(frozen=True)
class Found:
    """A contrast and what the committed runs say of it."""

    contrast: Contrast
    metric: str
    gap: Interval
    wins: int
    verdict: Verdict


def page(folder: Path) -> str:
    """The whole page. Raises EvidenceError where a claim cites a run that its file does not have."""
    data = {
        name: json.loads(path.read_text(encoding="utf-8"))
        for name in SOURCES
        if (path := folder / f"{name}.json").exists()
    }
    found = {claim.method: [judge(c, data[c.file]) for c in claim.contrasts if c.file in data] for claim in CLAIMS}
    count = sum(map(len, found.values()))
    lines = [HEAD, "", *summary(found)]
    lines += ["", f"{count} rows follow; {expected_false(count)}."]
    for claim in CLAIMS:
        lines += ["", *section(claim, found[claim.method])]
    lines += ["", *llm_page.section(folder / "llm")]
    if "demo" in data:
        lines += ["", *demo_table(data["demo"])]
    return "\n".join([*lines, "", *sources(data)]) + "\n"


# ---------------------------------------------------------------------- what the runs say


def scores(file: str, data: Mapping[str, Any], task: str, side: Side) -> dict[int, float]:
    """The test score of every seed on one side of a contrast.

    Raises:
        EvidenceError: no run has these labels, or seeds have other numbers of such runs.
    """
    found: dict[int, list[float]] = {}
    for run in _runs(data, task):
        if all(run.get(k) in v if isinstance(v, tuple) else run.get(k) == v for k, v in side.where.items()):
            found.setdefault(run["seed"], []).append(run["test"])
    if not found:
        raise EvidenceError(f"evidence/{file}.json has no run of {task} with {dict(side.where)}")
    each = {len(values) for values in found.values()}
    wanted = max([len(v) for v in side.where.values() if isinstance(v, tuple)], default=1)
    if each != {wanted}:
        raise EvidenceError(
            f"evidence/{file}.json has {sorted(each)} runs a seed of {task} with {dict(side.where)}, not {wanted}"
        )
    return {seed: fmean(values) for seed, values in sorted(found.items())}


def _runs(data: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """The runs of a task, of a script's result or of a comparison's record."""
    if "outcomes" in data:
        done = [o for o in data["outcomes"] if o["status"] == "complete"]
        return [{"method": o["method"], "seed": o["seed"], "test": o["scores"][data["metric"]]} for o in done]
    return [run for each in data["tasks"] if each["task"] == task for run in each["runs"]]


def judge(contrast: Contrast, data: Mapping[str, Any]) -> Found:
    """What the runs of a file say of a contrast."""
    metric = data["metric"] if "outcomes" in data else compared.TASKS[contrast.task].measure
    higher = metric != "loss"
    ours, control = (scores(contrast.file, data, contrast.task, side) for side in (contrast.ours, contrast.control))
    gaps = [ours[seed] - control[seed] for seed in sorted(ours.keys() & control.keys())]
    if not gaps:
        raise EvidenceError(
            f"evidence/{contrast.file}.json has no seed of both {contrast.ours.name} and {contrast.control.name}"
        )
    wins = sum(gap > 0 if higher else gap < 0 for gap in gaps)
    said = verdict(gaps, metric, higher, contrast.control.name)
    return Found(contrast, metric, interval(gaps), wins, said)


def overall(found: Sequence[Found]) -> str:
    """One word for several contrasts: a claim holds where all do, and does not where one is worse."""
    kinds = {each.verdict.kind for each in found}
    if not kinds:
        return "not measured"
    return WORDS["worse" if "worse" in kinds else "better" if kinds == {"better"} else "undecided"]


# ---------------------------------------------------------------------- how it is shown


def summary(found: Mapping[str, Sequence[Found]]) -> list[str]:
    """A line per claim, a column per task."""
    out = [f"| claim of | {' | '.join(PLACES.values())} |", "|---|" + "---|" * len(PLACES)]
    for claim in CLAIMS:
        cells = [overall([f for f in found[claim.method] if f.contrast.task == task]) for task in PLACES]
        out.append(f"| [{claim.method}](#{anchor(claim.method)}) | {' | '.join(cells)} |")
    return [
        *out,
        "",
        "A claim holds where it holds against every control below, and does not hold where the method is worse than one.",
    ]


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def section(claim: Claim, found: Sequence[Found]) -> list[str]:
    """A claim, how it is tested, and its rows."""
    out = [
        f"## {claim.method}",
        "",
        f"[Its page](methods/{claim.card}.md), [arXiv:{claim.paper}](https://arxiv.org/abs/{claim.paper}).",
        "",
        f"**Claim.** {claim.says}",
        "",
        " ".join(f"**Our setting.** {claim.tested} {claim.missing}".split()),
        "",
        "| where | setting | steps × rows | method | control | n | difference (95 %) | wins | verdict | data |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        of = each.contrast
        cells = [PLACES[of.task], of.setting, length(of), of.ours.name, of.control.name, str(each.gap.n)]
        cells += [difference(each.gap, each.metric), f"{each.wins}/{each.gap.n}", words(each.verdict)]
        cells += [f"[{of.file}](#data-and-commands)"]
        out.append("| " + " | ".join(cells) + " |")
    return out


def length(contrast: Contrast) -> str:
    """Steps and rows a step of a contrast's runs."""
    name = contrast.file if contrast.file == "demo" else f"{contrast.file.removesuffix('-runs')}-{contrast.task}"
    train = compared.recipe(name)["train"]
    return f"{train['steps']} × {train['batch_size']}"


def difference(gap: Interval, metric: str) -> str:
    """A signed difference with its interval and unit."""
    unit = METRICS[metric]
    digits = 4 if metric == "loss" else 2
    mean, *ends = (f"{value * unit.factor:+.{digits}f}" for value in (gap.mean, gap.low, gap.high) if value is not None)
    return f"{mean} [{', '.join(ends)}] {unit.word}" if ends else f"{mean} {unit.word}"


def words(said: Verdict) -> str:
    """A verdict on a claim, and what would settle it where it is open."""
    _, _, rest = said.sentence.partition("; ")
    return WORDS[said.kind] + (f"; {rest}" if said.kind == "undecided" else "")


def demo_table(data: Mapping[str, Any]) -> list[str]:
    """The comparison of all recipes on the demo, from its record."""
    methods = [Method(**each) for each in data["methods"]]
    outcomes = [Outcome(**each) for each in data["outcomes"]]
    made = rows(methods, outcomes, data["metric"], data["higher_is_better"], data["baseline"])
    compared = sum(row.gap is not None for row in made)
    out = [
        "## All recipes on the demo",
        "",
        f"{data['budget']} Seeds: {len(data['seeds'])}; {data['machine']}.",
        f"Scores are {data['metric']} on the test rows, steps CPU time over the baseline's; {expected_false(compared)}.",
        "",
        "| method | rank | trainable parameters | lr | score (95 %) | difference to "
        + data["baseline"]
        + " (95 %) | wins | step | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    out += [demo_row(method, row, data["metric"]) for method, row in zip(methods, made, strict=True)]
    notes = [f"- {method.name}: {method.note}" for method in methods if method.note]
    return [
        *out,
        "",
        "edge: the lowest or highest rate that was tried; a better one may lie outside.",
        *([""] if notes else []),
        *notes,
    ]


def demo_row(method: Method, row: Row, metric: str) -> str:
    """A method of the comparison; a rate at the edge of those tried is marked."""
    parameters = "" if method.parameters is None else f"{method.parameters:,}"
    lr = "" if method.lr is None else f"{method.lr:g}" + (" (edge)" if method.rate_at_edge else "")
    step = "" if row.step_ratio is None else plain(row.step_ratio, 2)
    cells = [row.name, str(method.rank or ""), parameters, lr, "" if row.score is None else plain(row.score)]
    cells += [
        "" if row.gap is None else difference(row.gap, metric),
        "" if row.gap is None else f"{row.wins}/{row.gap.n}",
        step,
    ]
    return "| " + " | ".join([*cells, row.verdict.sentence]) + " |"


def plain(score: Interval, digits: int = 4) -> str:
    """A score with its interval."""
    ends = "" if score.low is None else f" [{score.low:.{digits}f}, {score.high:.{digits}f}]"
    return f"{score.mean:.{digits}f}{ends}"


def sources(data: Mapping[str, Any]) -> list[str]:
    """Every committed file and the command that makes it."""
    out = [
        "## Data and commands",
        "",
        "Every result is committed as data and made by one command. `make evidence` makes all but those that say why not.",
        "",
        "| file | what | make it again | which runs | not by `make evidence` |",
        "|---|---|---|---|---|",
    ]
    for name, source in SOURCES.items():
        there = f"`evidence/{name}.json`" if name in data else f"`evidence/{name}.json`, not there yet"
        run = ", ".join(f"`{command}`" for command in source.commands)
        out.append(f"| {there} | {source.what} | `python scripts/evidence.py {name}` | {run} | {source.alone} |")
    return out
