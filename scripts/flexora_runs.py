"""Measure Flexora's selections against all layers and against selections made without it; write evidence/flexora-runs.json.

    python scripts/flexora_runs.py --jobs 2               # runs what is missing; then scripts/evidence.py --page
    python scripts/flexora_runs.py --tasks demo --seeds 1 # a quick look

Every seed searches once per kind of search; then `weftlora compare` trains plain LoRA from its own start on what each variant names,
with everything else as in the recipes evidence/flexora-*.yaml. A script is needed for what a recipe cannot say: which layers a method
has follows from the search of the same seed, and `longer` trains for as many more steps as that search was worth.

    all         every block, which is plain LoRA       longer      the same for as many more steps as the search was worth
    flexora     what the search selects (above_mean, restart)
    random      three draws of as many groups          first, last the first and the last ones
    norm        those with the largest mean gradient norm during the search, which a search without α has too

Searches are of blocks, at the rate of the training (not on SST-2, to save an hour) and, "slow", at a tenth of it; on the demo
model, which has four blocks, also of single modules. Variants that name the same layers are one run.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compared
from compared import TASKS, section_head, spread
from compared import paired_gap as _gap

from weftlora.search.agreement import Stability, chance, jaccard, stability

RANK, DRAWS = 4, 3
SEARCHES: dict[str, tuple[str, float]] = {
    "block": ("block", 1),
    "block-slow": ("block", 0.1),
    "module-slow": ("module", 0.1),
}
"""Kind of search: what it selects, and its rate as a share of the training's."""
KINDS = {"demo": tuple(SEARCHES), "e2e": ("block", "block-slow"), "sst2": ("block-slow",)}
SEARCH = {"steps": 30, "outer_batches": 1, "val_size": 160}
"""One batch of held-out rows per step, as many rows as θ is trained on: the released code's proportion."""

RANDOM = tuple(f"random {i + 1}" for i in range(DRAWS))
VARIANTS = ("all", "longer", "flexora", *RANDOM, "first", "last", "norm")
Layers = list[int | str]


def search_section(task: str, kind: str, seed: int) -> dict[str, Any]:
    """The recipe of a search, as `weftlora.train.layer_search.search_recipe` takes it."""
    (granularity, share), base = SEARCHES[kind], compared.recipe(f"flexora-{task}")
    train = base["train"]
    adapter = {"recipe": "flexora", "r": RANK, "lora_alpha": 2 * RANK, "granularity": granularity, **SEARCH}
    return {
        "model": base["model"],
        "data": base["data"],
        "adapter": adapter | {"inner_lr": share * train["lr"]},
        "train": train | {"seed": seed, "save_every": 0, "num_threads": 1},
        "out": "unused",
    }


def search(task: str, kind: str, seed: int) -> dict[str, Any]:
    """The layers of every variant of one seed and kind of search, and what the search cost and found; kept where it lies."""
    import torch

    from weftlora.search import Selection
    from weftlora.train.layer_search import search_recipe

    torch.set_num_threads(1)
    path = Path(f"{compared.recipe(f'flexora-{task}')['out']}-searches") / f"{kind}-s{seed}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        search_recipe(search_section(task, kind, seed), out=path)
    selection = Selection.load(path)
    names = {"gradient norm": "norm"}
    controls = selection.controls(draws=DRAWS, seed=seed)
    return {
        "kind": kind,
        "seed": seed,
        "groups": [c.name for c in selection.candidates],
        "alpha": [c.alpha for c in selection.candidates],
        "gradient_norm": [c.gradient_norm for c in selection.candidates],
        "layers": {"flexora": list(selection.blocks)} | {names.get(k, k): list(v.blocks) for k, v in controls.items()},
        "cost_in_steps": selection.record["cost_in_steps"],
        "seconds": selection.seconds,
        "margin": selection.margin,
        "near_ties": selection.near_ties,
    }


def layers_of(found: dict[str, Any], variant: str) -> Layers:
    """What a variant names; all groups stand for `longer`, and for the controls of a search that selected everything."""
    layers: dict[str, Layers] = found["layers"]
    everything = variant == "longer" or layers["flexora"] == layers["all"]
    return layers["all"] if everything else layers[variant]  # four groups or more always have three other selections


def length(task: str, found: dict[str, Any], variant: str) -> int:
    """Steps of a run."""
    steps: int = compared.recipe(f"flexora-{task}")["train"]["steps"]
    return steps + round(found["cost_in_steps"]) if variant == "longer" else steps


def comparisons(task: str, searches: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """For each number of steps the comparison of one seed's runs; what names the same layers is one method."""
    base, (seed,) = compared.recipe(f"flexora-{task}"), {found["seed"] for found in searches}
    methods: dict[int, dict[tuple[int | str, ...], str]] = {}
    for found in searches:
        for variant in VARIANTS:
            named = methods.setdefault(length(task, found, variant), {})
            named.setdefault(tuple(layers_of(found, variant)), f"{found['kind']} {variant}")
    return {
        steps: base
        | {
            "train": base["train"] | {"steps": steps},
            "methods": [{"recipe": "lora", "layers": list(layers), "name": name} for layers, name in named.items()],
            "baseline": next(iter(named.values())),
            "seeds": [seed],
            "out": f"{base['out']}/{steps}-steps-s{seed}",
        }
        for steps, named in methods.items()
    }


def made(task: str, args: Namespace) -> dict[str, Any]:
    """Search every seed, then run what the variants name; seeds outermost, so that what there is stays paired."""
    import weftlora

    searches, runs = [], []
    for seed in range(args.seeds):
        mine = [search(task, kind, seed) for kind in KINDS[task]]
        figures: dict[tuple[int, tuple[int | str, ...]], dict[str, Any]] = {}
        for steps, content in comparisons(task, mine).items():
            done = {row["variant"]: row for row in compared.rows(weftlora.compare(content, jobs=args.jobs).record())}
            figures |= {(steps, tuple(each["layers"])): done[each["name"]] for each in content["methods"]}
        for found in mine:
            for variant in VARIANTS:
                layers = layers_of(found, variant)
                row = figures[length(task, found, variant), tuple(layers)]
                runs.append(row | {"variant": variant, "kind": found["kind"], "layers": layers})
        searches += mine
    return {"searches": searches, "runs": runs}


# ---------------------------------------------------------------------- the document's part

READING = """
### How to read selections

- No selection beats adapting every block. Not distinguishable from it, with a quarter to half of the trainable parameters, are a
  slow search on the demo (of blocks or of modules: worse by 0.10 and 0.08 nats, intervals with 0) and on SST-2 (0.5 points of
  accuracy); on E2E every selection is worse, by 0.09 nats.
- What a search costs, spent on training all blocks longer, gains 0.16 nats on the demo, 0.06 on E2E and 1.8 points on SST-2. So
  a search pays where fewer trainable parameters are wanted, or its result is used many times, not as a way to a lower loss.
- At the training's own rate (1e-2 and 2e-2 here, 30 steps) the search is harmful: on the demo it leaves out the one
  block that matters, in all five seeds, and loses to random blocks by 0.62 nats; on E2E it names the last three blocks
  every time, as good as a random draw. Seeds agreeing is no sign of being right. At a tenth of the rate it selects that
  one block in all five seeds and beats random blocks by 1.11 nats, random modules by 0.28; on E2E it is ahead of random
  blocks by less than five seeds decide. Search slowly (`inner_lr`).
- On SST-2 the search does not settle: three seeds name the last two blocks, two the first four, which is hardly more agreement than
  chance. Both do as well as all blocks; random draws vary more, and five seeds do not tell them apart.
- The gradient norm, which needs no α and no held-out rows, names what the slow search names on the demo and is not
  distinguishable from it on E2E and SST-2, told how many blocks to take. So are the first blocks on the demo (the same sets) and
  the last on SST-2.
- There are some 70 intervals of 95 % in these tables, and not all are independent: two or three miss by chance.
"""


def section() -> list[str]:
    """The part of docs/real-runs.md, a pure function of evidence/flexora-runs.json."""
    saved = compared.saved("flexora-runs")
    lines = [
        "## Flexora",
        "",
        f"Plain LoRA with r = {RANK} and α = 2r on all linear modules of the named blocks; all share steps, batch, rate, seeds",
        f"and data order. `flexora` are the blocks that a search of {SEARCH['steps']} steps on α selects (α above its mean; the",
        "adapter starts from scratch); `random` are three draws per seed of as many blocks, `norm` those of largest gradient norm",
        "during the search, and `longer` is `all` trained for as many more steps as the search was worth. A search is at the",
        "training's rate, a slow one at a tenth of it. The training's rate was chosen with `all` on validation rows over two",
        "seeds that are not reported. Differences are paired by seed, with 95 % intervals.",
        f"Made by `{saved['command']}` ({saved['versions']}); every run is in",
        "`evidence/flexora-runs.json`.",
    ]
    for task in saved["tasks"]:
        for kind in KINDS[task["task"]]:
            lines += ["", *_table(task, kind), "", *_story(task, kind)]
    return [*lines, READING]


def _of(task: dict[str, Any], kind: str) -> tuple[list[dict[str, Any]], dict[str, list[dict[str, Any]]]]:
    """The searches, and the runs of every variant, in order of seed."""
    searches = sorted((s for s in task["searches"] if s["kind"] == kind), key=lambda s: s["seed"])
    mine = sorted((f for f in task["runs"] if f["kind"] == kind), key=lambda f: f["seed"])
    return searches, {variant: [f for f in mine if f["variant"] == variant] for variant in VARIANTS}


def _table(task: dict[str, Any], kind: str) -> list[str]:
    (granularity, share), (searches, by) = SEARCHES[kind], _of(task, kind)
    tests = {variant: [f["test"] for f in runs] for variant, runs in by.items() if variant not in RANDOM}
    tests["random"] = [
        statistics.mean(each) for each in zip(*([f["test"] for f in by[v]] for v in RANDOM), strict=True)
    ]
    shown = ("all", "longer", "flexora", "random", "first", "last", "norm")
    out = [
        f"### {TASKS[task['task']].title}, {granularity}s selected" + ("" if share == 1 else ", slow search"),
        "",
        section_head(
            f"flexora-{task['task']}", task["task"], len(searches), f"{len(searches[0]['groups'])} {granularity}s"
        ),
        "",
        f"| variant | {granularity}s | trained parameters | mean ± sd | difference to all (95 %) | flexora − this (95 %) |",
        "|---|---|---|---|---|---|",
    ]
    for variant in shown:
        runs = by[RANDOM[0] if variant == "random" else variant]
        trained = f"{round(statistics.mean(f['trainable'] for f in runs)):,}"
        kept = f"{statistics.mean(len(f['layers']) for f in runs):.1f}"
        cells = [variant, kept, trained, spread(tests[variant])]
        cells += [_gap(tests[variant], tests["all"]) if variant != "all" else ""]
        cells += [_gap(tests["flexora"], tests[variant]) if variant != "flexora" else ""]
        out.append("| " + " | ".join(cells) + " |")
    return out


def _story(task: dict[str, Any], kind: str) -> list[str]:
    """What the search cost, how far its selections agree, and how often a random draw was as good."""
    searches, by = _of(task, kind)
    steps = compared.recipe(f"flexora-{task['task']}")["train"]["steps"]
    cost = statistics.mean(s["cost_in_steps"] for s in searches)
    pairs = list(zip(searches, by["all"], by["flexora"], strict=True))
    seconds = statistics.mean(s["seconds"] / plain["train_seconds"] for s, plain, _ in pairs)
    second = statistics.mean(chosen["train_seconds"] / plain["train_seconds"] for _, plain, chosen in pairs)
    sign = -1 if TASKS[task["task"]].measure == "loss" else 1
    gaps = [
        sign * (mine["test"] - drawn["test"])
        for variant in RANDOM
        for mine, drawn in zip(by["flexora"], by[variant], strict=True)
    ]
    better, worse = sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps)
    agree, norms = _agreement(searches), _with_norms(searches)
    lines = [
        f"The search was worth {cost:.0f} training steps (+{cost / steps:.0%}) and took {seconds:.0%} of the seconds of `all`;",
        f"training on what it selected took {second:.0%} of them. Selections of seeds agree with a Jaccard index of",
        f"{agree.jaccard:.2f} (chance {agree.chance:.2f}), with the sets of largest gradient norm {norms[0]:.2f}",
        f"(chance {norms[1]:.2f}). `flexora` was better than a random draw in {better} and worse in {worse} of {len(gaps)}.",
    ]
    same = sum(s["layers"][v] == s["layers"]["flexora"] for s in searches for v in RANDOM if v in s["layers"])
    if same:
        lines.append(
            f"{same} of those draws are the selection itself, by chance, so the comparison with them is too mild."
        )
    if SEARCHES[kind][0] == "block":
        lines.append("Selected: " + ", ".join(str(s["layers"]["flexora"]) for s in searches) + ".")
    return lines


def _agreement(searches: Sequence[dict[str, Any]]) -> Stability:
    """Over pairs of seeds; of a single one with itself."""
    chosen = [_indices(s, "flexora") for s in searches]
    return stability(chosen if len(chosen) > 1 else chosen * 2, len(searches[0]["groups"]))


def _with_norms(searches: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Mean Jaccard index of the selection and the set of largest gradient norm, and its chance."""
    pairs = [(_indices(s, "flexora"), _indices(s, "norm"), len(s["groups"])) for s in searches]
    return (
        statistics.mean(jaccard(mine, norm) for mine, norm, _ in pairs),
        statistics.mean(chance(len(mine), len(norm), n) for mine, norm, n in pairs),
    )


def _indices(found: dict[str, Any], variant: str) -> list[int]:
    """Places among the groups: those of blocks are their numbers."""
    return [each if isinstance(each, int) else found["groups"].index(each) for each in layers_of(found, variant)]


if __name__ == "__main__":
    compared.main("flexora-runs", __doc__, made)
