"""The record of a speed measurement, and the targets it is held against."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from weft.bench.agree import Agreement
from weft.bench.cases import DTYPES, Case, Dtype, Shape
from weft.errors import ConfigError, suggest

Clock = Literal["cpu", "wall"]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}
NEAR_PEFT = 0.03  # plain and tied against stock peft LoRA of the same rank and adapter dtype, in units of the floor
HYDRA_OVER_PLAIN = 1.15  # HydraLoRA N=3 r=8 over plain weft LoRA r=16
DASH_OVER_PLAIN = 1.03  # launched LoRA-Dash r=8 with 8 directions over plain weft LoRA r=16, which has as many slots
OVER_PLAIN = {"hydra": HYDRA_OVER_PLAIN, "dash": DASH_OVER_PLAIN}


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


@dataclass(frozen=True)
class CaseResult:
    """One case on a base of one dtype. Ratios are to the floor of the same round; seconds are per round.

    `saved_bytes` are kept from forward to backward. `exact` says that the gradients agree with the reference kernel's
    within tolerance and that none of them is zero; both it and `agreement` are None for a model without weft sites.
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
    seconds: list[float]
    seconds_adamw: list[float]


@dataclass(frozen=True)
class Target:
    """A figure the project promises: met if at most `limit` (median over rounds)."""

    name: str
    dtype: Dtype
    value: Spread
    limit: float
    met: bool


@dataclass(frozen=True)
class Setting:
    """What to measure and how; fields as in `weft.bench.step`.

    Raises:
        ConfigError: a value that cannot work.
    """

    shape: Shape
    dtypes: tuple[Dtype, ...]
    dropouts: tuple[float, ...]
    kinds: tuple[str, ...]
    outside: tuple[str, ...]
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
                raise ConfigError(f"dropout {p} is no probability below 1: use 0 or 0.05.")
        if self.clock not in CLOCKS:
            raise ConfigError(f"clock {self.clock!r} does not exist: {suggest(self.clock, CLOCKS)}")
        for name, value in (("rounds", self.rounds), ("threads", self.threads)):
            if value < 1:
                raise ConfigError(f"{name}={value} measures nothing: use a whole number from 1 up.")

    @property
    def command(self) -> str:
        """The command line that measures the same."""
        many = {"dtype": self.dtypes, "dropout": self.dropouts, "only": self.kinds, "case": self.outside}
        one = {
            **vars(self.shape),
            "rounds": self.rounds,
            "threads": self.threads,
            "clock": self.clock,
            "seed": self.seed,
        }
        words = [f"--{name} {value}" for name, values in many.items() for value in values]
        return " ".join(["weft bench step", *words, *(f"--{name} {value}" for name, value in one.items())])


@dataclass(frozen=True)
class StepBench:
    """What `weft bench step` measured, with all that is needed to measure it again.

    `order` has, per base dtype and round, the cases in the order they ran.
    """

    setting: Setting
    versions: dict[str, str]
    cases: list[CaseResult]
    targets: list[Target]
    order: dict[str, list[list[str]]]

    @property
    def exact(self) -> bool:
        """Whether every weft case computed the gradients of the equation."""
        return all(result.exact is not False for result in self.cases)

    def result(self, dtype: Dtype, case: str) -> CaseResult:
        """The result of one case, such as `result("bf16", "plain r=16 p=0 fp32")`; KeyError if it was not measured."""
        for result in self.cases:
            if result.dtype == dtype and str(result.case) == case:
                return result
        raise KeyError(f"no case {case!r} on a {dtype} base")

    def to_dict(self) -> dict[str, Any]:
        """The record as plain JSON values; every case with its label."""
        out = dataclasses.asdict(self)
        for row, result in zip(out["cases"], self.cases, strict=True):
            row["label"] = str(result.case)
        return {"command": self.setting.command, "exact": self.exact, **out}


def targets(results: Sequence[CaseResult]) -> list[Target]:
    """The project's targets, for the pairs of cases that were measured."""
    floor = {r.dtype: r.seconds for r in results if r.case.kind == "floor"}
    seconds = {(r.dtype, r.case): r.seconds for r in results}
    found = []
    for (dtype, case), own in seconds.items():
        peft = seconds.get((dtype, dataclasses.replace(case, kind="peft")))
        if case.kind in ("plain", "tied") and peft is not None:
            behind = Spread.over([(a - b) / f for a, b, f in zip(own, peft, floor[dtype], strict=True)])
            found.append(Target(f"{case}: behind peft", dtype, behind, NEAR_PEFT, behind.median <= NEAR_PEFT))
        plain = seconds.get((dtype, dataclasses.replace(case, kind="plain", r=16)))
        if (limit := OVER_PLAIN.get(case.kind)) is not None and plain is not None:
            over = Spread.over([a / b for a, b in zip(own, plain, strict=True)])
            found.append(Target(f"{case}: over plain r=16", dtype, over, limit, over.median <= limit))
    return found
