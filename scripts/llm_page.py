"""The section of docs/evidence.md on SmolLM2, a pure function of evidence/llm/: what was reached, what it says, what was not.

Contrasts have verdicts once all of their seeds are there. Controls are described: means and differences, no intervals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from llm_plan import CONTRASTS, FORMS, PILOT, SEEDS, Contrast, Form, hours_left, judge, losses, records, smallest_effect

HEAD = f"""## On a real language model

SmolLM2-135M-Instruct (134.5 million parameters, 30 blocks), as `evidence/plan.md` planned it before the first run: a contrast for
every paper in the setting of its own claim, rates tuned for each method on a seed of its own, {SEEDS} paired seeds, the loss in nats
per answer token on held-out rows. An interval is the mean of the paired differences at 95 % by Student's t; the five are not
corrected for one another. *s* is the standard deviation of those differences, and *can see* the smallest true difference that
{SEEDS} seeds find in four of five experiments, {smallest_effect(SEEDS):.2f} s. Where that is more than the plan's smallest effect of
interest, the contrast is **underpowered**, whatever its interval says."""
AGAIN = "python scripts/evidence_llm.py --form {form}"


def section(folder: Path) -> list[str]:
    """The section, from evidence/llm; the form of the plan first, then those that have a record."""
    lines = [HEAD]
    for form in FORMS.values():
        found = records(folder, form.name)
        if form.name == "plan" or found:
            lines += ["", *form_section(form, found)]
    return lines


def form_section(form: Form, found: Mapping[str, Any]) -> list[str]:
    """What the runs of a form say, and which were not reached."""
    lines = [f"### Form {form.name}: {form.says}", ""]
    judged = {c.name: judge(c, found[c.name]) for c in CONTRASTS if c.name in found}
    if any(each.n for each in judged.values()):
        lines += [*primary_table(found), ""]
        gone = [f"{name} diverged" for each in judged.values() for name in each.diverged]
        lines += [f"Counted with their last finite loss: {'; '.join(gone)}.", ""] if gone else []
    for contrast in CONTRASTS:
        lines += [*described(contrast, found), *domains(contrast, found), *turns(contrast, found)]
    lines += heads(found)
    return [*lines, *not_reached(form, found)]


def primary_table(found: Mapping[str, Any]) -> list[str]:
    """A line a contrast, in the plan's order."""
    lines = [
        f"| paper | set-up | n of {SEEDS} | difference (95 %) | s | can see | of interest | power | verdict | rates |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for contrast in CONTRASTS:
        if contrast.name not in found or not (said := judge(contrast, found[contrast.name])).n:
            continue
        ends = said.interval
        mean = f"{fmean(said.gaps.values()):+.4f}" + (f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else "")
        interest = f"{contrast.effect:g}" + (" (margin)" if contrast.margin else "")
        power = {None: "unknown", True: "**underpowered**", False: "enough"}[said.underpowered]
        numbers = ["", ""] if said.spread is None or said.seen is None else [f"{said.spread:.4f}", f"{said.seen:.4f}"]
        cells = [contrast.paper, contrast.setup, str(said.n), mean, *numbers, interest, power, said.verdict]
        lines.append("| " + " | ".join([*cells, rates(found[contrast.name])]) + " |")
    pilots = [c.paper for c in CONTRASTS if c.name in found and 1 < judge(c, found[c.name]).n <= PILOT]
    if pilots:
        lines += ["", f"An s of two seeds, as of {', '.join(pilots)}, may be wrong by a factor of several."]
    return lines


def rates(record: Mapping[str, Any]) -> str:
    """The rate of every method, as it was tuned."""
    shown = (
        f"{m['name']} {m['lr']:g}" + (" (edge)" if m["rate_at_edge"] else "") for m in record["methods"] if m["lr"]
    )
    return ", ".join(shown)


def described(contrast: Contrast, found: Mapping[str, Any]) -> list[str]:
    """The methods of a contrast and of its controls: mean loss, and how far from the control of the contrast on the same seeds."""
    names = [name for name in (contrast.name, *contrast.controls) if name in found and "-domain-" not in name]
    rows = [(m, losses(found[name], m["name"])) for name in names for m in found[name]["methods"]]
    if not any(seeds for _, seeds in rows):
        return []
    control = losses(found[contrast.name], contrast.control) if contrast.name in found else {}
    lines = [
        f"**{contrast.paper}**, the methods of its contrast and of its controls, described without a verdict:",
        "",
        "| method | trainable parameters | rate | n | loss | less that of the control |",
        "|---|---|---|---|---|---|",
    ]
    for method, seeds in rows:
        both = [seeds[s] - control[s] for s in sorted(seeds.keys() & control.keys())]
        gap = f"{fmean(both):+.4f}" if both and method["name"] != contrast.control else ""
        gap = gap if method["rates"] else "not compared: its rate is not tuned"
        loss = spread(list(seeds.values())) if seeds else "not reached"
        cells = [
            method["name"],
            f"{method['parameters']:,}",
            f"{method['lr']:g}" if method["lr"] else "",
            str(len(seeds)),
        ]
        lines.append("| " + " | ".join([*cells, loss, gap]) + " |")
    return [*lines, ""]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation over the seeds."""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def domains(contrast: Contrast, found: Mapping[str, Any]) -> list[str]:
    """The loss by domain, where rows have some, and that of one LoRA for each."""
    record = found.get(contrast.name)
    ended = [o for o in record["outcomes"] if o["status"] == "complete" and o["domains"]] if record else []
    if not ended:
        return []
    names = sorted(ended[0]["domains"])
    methods = [contrast.ours, contrast.control]
    paired = set.intersection(*({o["seed"] for o in ended if o["method"] == method} for method in methods))
    ended = [o for o in ended if o["seed"] in paired]
    if not ended:
        return []
    lines = [
        f"By domain, over the {len(paired)} seed{'s' * (len(paired) > 1)} that both have:",
        "",
        f"| method | {' | '.join(names)} |",
        "|---|" + "---|" * len(names),
    ]
    for method in methods:
        of = [o["domains"] for o in ended if o["method"] == method]
        if of:
            lines.append(
                f"| {method} | " + " | ".join(f"{fmean(o[name]['loss'] for o in of):.4f}" for name in names) + " |"
            )
    single = {name: losses(found[key], "lora") for name in names if (key := f"{contrast.name}-domain-{name}") in found}
    if single:
        cells = (f"{fmean(single[name].values()):.4f}" if single.get(name) else "not reached" for name in names)
        lines.append(f"| one LoRA a domain | {' | '.join(cells)} |")
    return [*lines, ""]


def turns(contrast: Contrast, found: Mapping[str, Any]) -> list[str]:
    """Where the validation loss of a claim about overfitting is lowest: it has turned if that is before the end."""
    if contrast.name != "flexora" or contrast.name not in found:
        return []
    lines = []
    for method in (contrast.ours, contrast.control):
        series = [
            o["validation"] for o in found[contrast.name]["outcomes"] if o["method"] == method and o.get("validation")
        ]
        lowest = [(min(rows, key=lambda row: row[1])[0], rows[-1][0]) for rows in series]
        if lowest:
            lines.append(
                f"Of {method}, validation is lowest at step {', '.join(f'{at} of {end}' for at, end in lowest)}."
            )
    return [*lines, ""] if lines else []


def heads(found: Mapping[str, Any]) -> list[str]:
    """The heads over training: means over the seeds, a line a method and step."""
    lines = []
    for name in ("hydra", "hydra-controls", "hydra-start"):
        outcomes = found[name]["outcomes"] if name in found else []
        for method in dict.fromkeys(o["method"] for o in outcomes if o.get("heads")):
            series = [o["heads"] for o in outcomes if o["method"] == method and o.get("heads")]
            for step in sorted({point["step"] for points in series for point in points}):
                at = [point for points in series for point in points if point["step"] == step]
                by = " ".join(f"{d} {fmean(p['domains'][d] for p in at):.2f}" for d in sorted(at[0]["domains"]))
                cells = [
                    method,
                    str(step),
                    str(len(at)),
                    *(_mean(at, key) for key in ("cosine", "entropy", "information")),
                    by,
                ]
                lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return []
    return [
        "Heads over training, on the validation rows ([how to follow your own](methods/hydralora.md#following-the-heads)): the mean",
        "cosine between heads' B, the entropy of a token's gates (1: even), and how much of the head its domain tells (mutual",
        "information; both of ln 3).",
        "",
        "| method | step | runs | cosine | entropy | information | entropy by domain |",
        "|---|---|---|---|---|---|---|",
        *lines,
        "",
    ]


def _mean(points: Sequence[Mapping[str, Any]], key: str) -> str:
    known = [point[key] for point in points if point[key] is not None]
    return f"{fmean(known):.3f}" if known else ""


def not_reached(form: Form, found: Mapping[str, Any]) -> list[str]:
    """What has run and for how long, which runs are left, and the command that goes on."""
    done = sum(record["runs_done"] for record in found.values())
    took = sum(record["seconds"] for record in found.values()) / 3600
    versions = next((r["versions"] for r in found.values()), {})
    with_what = ", ".join(f"{k} {versions[k]}" for k in ("torch", "peft", "transformers", "weftlora") if k in versions)
    machines = " and ".join(sorted({record["machine"] for record in found.values()}))
    lines = (
        [f"{done} runs took {took:.1f} hours ({machines}; {with_what})."]
        if done
        else ["No run of this form has been made."]
    )
    left = hours_left(form, found)
    if not left:
        return [*lines, "", f"Everything planned was reached. Again: `{AGAIN.format(form=form.name)}`."]
    names = ", ".join(f"{name} {hours:.1f}" for name, hours in left.items())
    return [
        *lines,
        f"**Not reached:** {sum(left.values()):.1f} more hours on one core of this machine, by recipe: {names}.",
        f"`{AGAIN.format(form=form.name)}` goes on in parts of an hour.",
    ]
