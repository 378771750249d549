"""The record of a speed measurement: medians with quartiles, beside what the project promises.

A target is what must be reached and what is aimed at. Each is the median over rounds of one case's time over another's in the same
round, or the bytes a case saves over the floor's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

from weftlora.bench.cases import DTYPES, Agreement, Case, Dtype, Shape
from weftlora.errors import ConfigError, suggest
from weftlora.records import Record
from weftlora.settings import MOST_THREADS, check_seed


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of one ratio over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Spread:
        """Of one value per round; quartiles interpolate between rounds."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


P = 0.05
FLOOR = Case("floor")
SAVED = (1.37, 1.00)


class Measured(Protocol):
    """What is needed of one case's result."""

    @property
    def dtype(self) -> Dtype: ...
    @property
    def case(self) -> Case: ...
    @property
    def seconds(self) -> list[float]: ...
    @property
    def saved_ratio(self) -> float: ...


@dataclass(frozen=True)
class Goal:
    """The time of `case` over that of `over`. Without `must` it is shown and not judged."""

    name: str
    dtype: Dtype
    case: Case
    over: Case = FLOOR
    must: float | None = None
    aim: float | None = None


@dataclass(frozen=True)
class Target:
    """A goal and what was measured. `verdict`: "aim", "must" (reached, but not the aim), "missed", or "" if it is not judged."""

    name: str
    dtype: Dtype
    value: Spread
    must: float | None
    aim: float | None
    verdict: str


def goals() -> Iterator[Goal]:
    """All of them, in the order of the table."""
    plain, hydra, dash, peft = Case("lora", 16), Case("hydralora", 8), Case("lora_dash", 8), Case("peft:lora", 16)
    low = replace(peft, adapter="bf16")
    yield Goal("LoRA r=16", "fp32", plain, must=1.07, aim=1.05)
    yield Goal("LoRA r=16", "bf16", plain, must=1.12, aim=1.07)
    yield Goal("LoRA r=16, p=0.05, a mask per linear", "bf16", replace(plain, p=P), must=1.24, aim=1.15)
    yield Goal("LoRA r=16, p=0.05, a mask per input", "bf16", replace(plain, p=P, mask="input"), must=1.18, aim=1.12)
    yield Goal("HydraLoRA N=3 r=8", "fp32", hydra, must=1.08, aim=1.06)
    yield Goal("HydraLoRA N=3 r=8", "bf16", hydra, must=1.16, aim=1.10)
    yield Goal("HydraLoRA N=3 r=8, p=0.05, a mask per linear", "bf16", replace(hydra, p=P), must=1.28, aim=1.18)
    yield Goal(
        "HydraLoRA N=3 r=8, p=0.05, a mask per input", "bf16", replace(hydra, p=P, mask="input"), must=1.28, aim=1.18
    )
    yield Goal("LoRA-Dash r=8 + 8 directions", "fp32", dash, must=1.08, aim=1.06)
    yield Goal("LoRA-Dash r=8 + 8 directions", "bf16", dash, must=1.12, aim=1.08)
    equal_slots = {"Tied-LoRA r=16": Case("tied_lora", 16), "ALoRA r=12, room for 16": Case("alora", 12)}
    for dtype, must, aim in (("fp32", 1.07, 1.05), ("bf16", 1.12, 1.07)):
        for name, case in {**equal_slots, "Flexora-gated r=16": Case("flexora", 16)}.items():
            yield Goal(name, dtype, case, must=must, aim=aim)  # type: ignore[arg-type]
            yield Goal(f"{name} / LoRA r=16", dtype, case, plain, must=1.02, aim=1.00)  # type: ignore[arg-type]
    for dtype in ("fp32", "bf16"):
        compiled = replace(plain, compiled=True)
        yield Goal("compiled / compiled floor", dtype, compiled, replace(FLOOR, compiled=True), must=1.12, aim=1.06)  # type: ignore[arg-type]
        yield Goal("compiled, p=0.05 / eager", dtype, replace(compiled, p=P), replace(plain, p=P), must=1.00, aim=0.95)  # type: ignore[arg-type]
    for p, must, aim in ((0.0, 0.87, 0.82), (P, 0.78, 0.72)):
        of = "" if not p else f", p={p:g}"
        yield Goal(
            f"LoRA r=16{of} / stock peft as shipped",
            "bf16",
            replace(plain, p=p),
            replace(peft, p=p),
            must=must,
            aim=aim,
        )
        yield Goal(f"LoRA r=16{of} / stock peft with bf16 adapters", "bf16", replace(plain, p=p), replace(low, p=p))
        yield Goal(f"LoRA r=16{of} / stock peft", "fp32", replace(plain, p=p), replace(peft, p=p))


def targets(results: Sequence[Measured]) -> list[Target]:
    """The goals whose cases were measured, and per dtype the largest saved ratio of a weftlora case."""
    found = {(r.dtype, r.case): r for r in results}
    times = [
        _timed(goal, found) for goal in goals() if {(goal.dtype, goal.case), (goal.dtype, goal.over)} <= found.keys()
    ]
    return [*times, *_saved(results)]


def _timed(goal: Goal, found: Mapping[tuple[Dtype, Case], Measured]) -> Target:
    own, other = found[goal.dtype, goal.case].seconds, found[goal.dtype, goal.over].seconds
    value = Spread.over([a / b for a, b in zip(own, other, strict=True)])
    return Target(goal.name, goal.dtype, value, goal.must, goal.aim, _verdict(value.median, goal.must, goal.aim))


def _saved(results: Sequence[Measured]) -> Iterator[Target]:
    for dtype in dict.fromkeys(r.dtype for r in results):
        own = [r.saved_ratio for r in results if r.dtype == dtype and r.case.is_weft and not r.case.compiled]
        if own:
            value = Spread(max(own), min(own), max(own))
            verdict = _verdict(value.median, *SAVED)
            yield Target("saved activations, largest of all weftlora cases [range]", dtype, value, *SAVED, verdict)


def _verdict(value: float, must: float | None, aim: float | None) -> str:
    if must is None or aim is None:
        return ""
    return "aim" if value <= aim else "must" if value <= must else "missed"


Clock = Literal["cpu", "wall"]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class CaseResult:
    """One case on a base of one dtype. Ratios are to the floor of the same round; seconds are per round.

    `saved_bytes` are kept from forward to backward. `exact` says that the gradients agree with the reference kernel's
    within tolerance and that none of them is zero; both it and `agreement` are None for a model without weftlora sites, and for
    dropout in compiled blocks, which draw their masks in another order (tests hold their gradients against differences).
    `nodes`: how many adapted linears each kind of node computes (`weftlora.adapted.fusion.nodes`).
    """

    dtype: Dtype
    case: Case
    trained: int
    ratio: Spread
    ratio_adamw: Spread
    saved_bytes: int
    saved_ratio: float
    agreement: Agreement | None
    exact: bool | None
    nodes: dict[str, int]
    seconds: list[float]
    seconds_adamw: list[float]


@dataclass(frozen=True)
class Setting:
    """What to measure and how; fields as in `weftlora.bench.step`.

    Raises:
        ConfigError: a value that cannot work.
    """

    shape: Shape
    dtypes: tuple[Dtype, ...]
    dropouts: tuple[float, ...]
    kinds: tuple[str, ...]
    table: bool
    own_cases: tuple[str, ...]
    rounds: int
    threads: int
    clock: Clock
    seed: int

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            if dtype not in DTYPES:
                raise ConfigError(f"dtype {dtype!r} is not measured: {suggest(dtype, DTYPES)}")
        for p in self.dropouts:
            if not 0 <= p < 1:
                raise ConfigError(f"dropout {p} is not a probability below 1: use 0 or 0.05.")
        if self.clock not in CLOCKS:
            raise ConfigError(f"clock {self.clock!r} does not exist: {suggest(self.clock, CLOCKS)}")
        for name, value in (("rounds", self.rounds), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"{name}={value} measures nothing: use a whole number from 1 up.")
        if self.threads > MOST_THREADS:
            raise ConfigError(f"threads={self.threads} is more than a machine has: use at most {MOST_THREADS}.")
        check_seed(self.seed, "seed")

    @property
    def command(self) -> str:
        """The command line that measures the same."""
        chosen = {} if self.table else {"dropout": self.dropouts, "only": self.kinds}
        many = {"dtype": self.dtypes, **chosen, "case": self.own_cases}
        one = {
            **{name: value for name, value in vars(self.shape).items() if value},
            "rounds": self.rounds,
            "threads": self.threads,
            "clock": self.clock,
            "seed": self.seed,
        }
        words = [f"--{name} {value}" for name, values in many.items() for value in values]
        return " ".join(
            [
                "weftlora bench step",
                *(["--all"] if self.table else []),
                *words,
                *(f"--{name} {value}" for name, value in one.items()),
            ]
        )


@dataclass(frozen=True)
class StepBench(Record):
    """What `weftlora bench step` measured, with all that is needed to measure it again.

    `order` has, per base dtype and round, the cases in the order they ran.
    """

    setting: Setting
    versions: dict[str, str]
    cases: list[CaseResult]
    targets: list[Target]
    order: dict[str, list[list[str]]]

    @property
    def exact(self) -> bool:
        """Whether every weftlora case computed the gradients of the equation."""
        return all(result.exact is not False for result in self.cases)

    def result(self, dtype: Dtype, case: str) -> CaseResult:
        """The result of one case, such as `result("bf16", "lora r=16 p=0 fp32")`; KeyError if it was not measured."""
        for result in self.cases:
            if result.dtype == dtype and str(result.case) == case:
                return result
        raise KeyError(f"no case {case!r} on a {dtype} base")

    def record(self) -> dict[str, Any]:
        """This as plain data, with its command; every case with its label."""
        out = super().record()
        for row, result in zip(out["cases"], self.cases, strict=True):
            row["label"] = str(result.case)
        return {"command": self.setting.command, "exact": self.exact, **out}
