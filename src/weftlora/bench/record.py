"""The record of a speed measurement, and the targets it is held against."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any, Literal

from weftlora.bench.agree import Agreement
from weftlora.bench.cases import DTYPES, Case, Dtype, Shape
from weftlora.bench.goals import Target
from weftlora.bench.spread import Spread
from weftlora.errors import ConfigError, suggest

Clock = Literal["cpu", "wall"]
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


@dataclass(frozen=True)
class CaseResult:
    """One case on a base of one dtype. Ratios are to the floor of the same round; seconds are per round.

    `saved_bytes` are kept from forward to backward. `exact` says that the gradients agree with the reference kernel's
    within tolerance and that none of them is zero; both it and `agreement` are None for a model without weftlora sites, and for
    dropout in compiled blocks, which draw their masks in another order (tests hold their gradients against differences).
    `nodes`: how many adapted linears each kind of node computes (`weftlora.glue.fusion.nodes`).
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
        chosen = {} if self.table else {"dropout": self.dropouts, "only": self.kinds}
        many = {"dtype": self.dtypes, **chosen, "case": self.outside}
        one = {
            **vars(self.shape),
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
class StepBench:
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
