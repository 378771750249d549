"""How long the launch of Dash takes, beside the way the released code does it, in one run.

    ratio = seconds of weftlora's launch / seconds of the published one, of the same round

weftlora's is the real launch: an adapter's optimiser step after which it is due, change rates by the fp64 Gram route of the
smaller side, no ΔW. The published one happens inside a forward pass: a full thin SVD of W in fp32 and two dense products
with a dense ΔW; its cost is re-implemented here in six lines of our own. Both run on the same weights and factors, in
random order within a round; beside the times stands the share of directions on which they agree.
"""

from __future__ import annotations

import copy
import os
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from weftlora.adapted.frozen_weights import CACHE
from weftlora.bench.cases import Shape, frozen_base, leave_the_start
from weftlora.bench.record import CLOCKS, Clock, Spread
from weftlora.bench.rounds import torch_threads, versions
from weftlora.errors import ConfigError, suggest
from weftlora.host.attach import schedules
from weftlora.progress import Progress, Tick, ignore
from weftlora.recipes import LoraDashConfig
from weftlora.records import Record
from weftlora.settings import MOST_THREADS, check_seed

SHAPES = ("768x768@7", "3072x768@7", "2048x2048@5", "4096x4096@2")
QUICK = ("48x32@2", "32x48@2")


@dataclass(frozen=True)
class Matrix:
    """One weight [out, in] to launch on, and in how many rounds."""

    out: int
    fan_in: int
    rounds: int

    @classmethod
    def parse(cls, text: str) -> Matrix:
        """Of "OUTxIN@ROUNDS"; one round where none is written. Raises ConfigError."""
        size, _, rounds = text.partition("@")
        out, _, fan_in = size.partition("x")
        if not all(part.isdecimal() and int(part) for part in (out, fan_in, rounds or "1")):
            raise ConfigError(f"shape {text!r} is not of the form OUTxIN@ROUNDS: write 4096x4096@2.")
        return cls(int(out), int(fan_in), int(rounds or 1))

    def __str__(self) -> str:
        return f"{self.out}x{self.fan_in}"


@dataclass(frozen=True)
class LaunchResult:
    """One weight, or all of a model's: seconds per round of either way, and on what share of the directions they agree."""

    what: str
    sites: int
    seconds: list[float]
    published: list[float]
    ratio: Spread
    agreed: float

    @property
    def rounds(self) -> int:
        """How often it was measured."""
        return len(self.seconds)


@dataclass(frozen=True)
class LaunchBench(Record):
    """What `weftlora bench launch` measured, with all that is needed to measure it again."""

    command: str
    r: int
    directions: int
    threads: int
    clock: Clock
    seed: int
    versions: dict[str, str]
    results: list[LaunchResult]

    def record(self) -> dict[str, Any]:
        """This as plain data, medians included."""
        out = super().record()
        for row, result in zip(out["results"], self.results, strict=True):
            row["median_seconds"] = statistics.median(result.seconds)
            row["median_published"] = statistics.median(result.published)
        return out


def launch(
    shapes: Sequence[str] = SHAPES,
    *,
    layers: int = 4,
    hidden: int = 768,
    rounds: int = 3,
    r: int = 8,
    directions: int = 8,
    threads: int = 1,
    clock: Clock = "cpu",
    seed: int = 0,
    quick: bool = False,
    progress: Progress = ignore,
) -> LaunchBench:
    """Time the launch on single weights and on a whole Llama-type model, beside the published way.

    Args:
        shapes: "OUTxIN@ROUNDS", one weight each.
        layers, hidden, rounds: of the model whose linear modules are all launched; layers=0 leaves it out.
        r, directions: rank of ΔW and number of directions.
        threads: torch's intra-op threads while measuring.
        clock: "cpu", process CPU time, or "wall", for an otherwise idle machine only.
        quick: tiny weights, to see that everything runs.
        progress: called with a `Tick` after every round.

    Raises:
        ConfigError: a setting that cannot work, or WEFT_CACHE set: then decompositions would be read, not made.
    """
    if os.environ.get(CACHE):
        raise ConfigError(
            f"{CACHE} is set, so decompositions would be read instead of made: unset it to measure a launch."
        )
    matrices = [Matrix.parse(text) for text in (QUICK if quick else shapes)]
    if clock not in CLOCKS:
        raise ConfigError(f"clock {clock!r} does not exist: {suggest(clock, CLOCKS)}")
    for name, value in {"rounds": rounds, "threads": threads, "r": r, "directions": directions}.items():
        if value < 1:
            raise ConfigError(f"{name}={value} measures nothing: use a whole number from 1 up.")
    if threads > MOST_THREADS:
        raise ConfigError(f"threads={threads} is more than a machine has: use at most {MOST_THREADS}.")
    check_seed(seed, "seed")
    if quick:
        layers, hidden, rounds = min(layers, 1), 64, 2
    words = [f"--shape {m}@{m.rounds}" for m in matrices]
    settings: dict[str, Any] = {"layers": layers, "hidden": hidden, "rounds": rounds, "r": r, "directions": directions}
    settings |= {"threads": threads, "clock": clock, "seed": seed}
    results = []
    with torch_threads(threads), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for m in matrices:
            one = nn.Sequential(nn.Linear(m.fan_in, m.out, bias=False))
            results.append(_measure(str(m), m.rounds, one, (r, directions), CLOCKS[clock], seed, progress))
        if layers:
            base, what = frozen_base(Shape(hidden, layers), "fp32"), f"all of {layers} layers of width {hidden}"
            results.append(_measure(what, rounds, base, (r, directions), CLOCKS[clock], seed, progress))
    command = " ".join(["weftlora bench launch", *words, *(f"--{name} {value}" for name, value in settings.items())])
    return LaunchBench(command, r, directions, threads, clock, seed, versions(), results)


@torch.no_grad()
def published_launch(w_oi: Tensor, a_ri: Tensor, b_or: Tensor, scale: float, count: int) -> list[int]:
    """The directions of largest |d|/σ by the released code's operations: fp32 SVD, dense ΔW, two dense products."""
    u, sigma, vt = torch.linalg.svd(w_oi.float(), full_matrices=False)
    delta = scale * (b_or @ a_ri)
    moved = torch.diagonal(u.T @ delta @ vt.T)
    chosen = torch.topk(moved.abs() / sigma.abs(), count).indices
    u[:, chosen], vt[chosen]  # what it keeps
    return [int(k) for k in chosen]


def _measure(
    what: str, rounds: int, base: nn.Module, size: tuple[int, int], now: Any, seed: int, progress: Progress
) -> LaunchResult:
    order = random.Random(f"{seed} {what}")
    seconds: dict[str, list[float]] = {"weftlora": [], "published": []}
    chosen: dict[str, list[list[int]]] = {}
    for done in range(1, rounds + 1):
        model, optimizer = _due(base, *size)
        factors = [
            (member.weight(), member.site.structure.factors(member.site.scale), min(size[1], *member.weight().shape))
            for member in schedules(model)["default"].members
        ]
        for way in order.sample(["weftlora", "published"], 2):
            started = now()
            if way == "weftlora":
                optimizer.step()
                seconds[way].append(now() - started)
                sites = schedules(model)["default"].events[0]["sites"]
                chosen[way] = [site["index"] for site in sites.values()]
            else:
                chosen[way] = [published_launch(w, f.A, f.B, f.scale, count) for w, f, count in factors]
                seconds[way].append(now() - started)
        progress(Tick(f"launching {what}", done, rounds))
    agreed = [len(set(a) & set(b)) / len(a) for a, b in zip(*chosen.values(), strict=True)]
    ratio = Spread.over([a / b for a, b in zip(seconds["weftlora"], seconds["published"], strict=True)])
    return LaunchResult(what, len(agreed), seconds["weftlora"], seconds["published"], ratio, statistics.mean(agreed))


def _due(base: nn.Module, r: int, directions: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The base under a Dash adapter with a ΔW, and an optimiser whose next step, of rate 0, is followed by the launch."""
    model = copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})
    targets = ["0"] if isinstance(base, nn.Sequential) else "all-linear"
    adapted = get_peft_model(model, LoraDashConfig(r=r, directions=directions, after=1, target_modules=targets))
    leave_the_start(adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)  # a step that finds no gradient is none
    return adapted, torch.optim.SGD(trained, lr=0.0)
