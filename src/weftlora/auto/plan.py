"""How much fits into a budget: a few steps are timed, and what follows is counts, so that no later decision looks at a clock.

    a run of n steps     c_m(n) = f_m (a + b n)       a, b from two short runs of plain LoRA, f_m from one of each method
    scoring a run        e
    a search of a size   rates c(S) + tries Σ_m c_m(S/3) + p c̄(S) + finalists · seeds (c̄(S) + e)          all in seconds

Letters: S steps of a full run; p runs that successive halving lets on, a third of the tries and `LUCKY` early ones beside plain
LoRA's, which has been trained by then; c̄ the mean over methods. The largest size that fits into what is left of the budget is taken;
where the user has named no length, the longest for which a middle size fits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from weftlora.auto.record import FORMAT, Left
from weftlora.disk.files import read_json, write_json
from weftlora.errors import ConfigError, RunError
from weftlora.records import Record

NAME = "auto.json"
ETA = 3
"""Of successive halving: a run's length grows by this factor, and about one in so many goes on."""
LUCKY = 1
"""Runs that go on because they come early, beside the first, which always does."""
SHARE = 0.9
"""Of what is left of the budget, how much is planned with: times are of a few short runs."""
EPOCHS = (3.0, 2.0, 1.0, 0.5, 0.25, 0.125)
"""Lengths that are tried, longest first, where the user names none."""


@dataclass(frozen=True)
class Size:
    """Counts of a search."""

    rates: int
    """Full runs of plain LoRA, each at another rate."""
    methods: int
    """At most so many, plain LoRA among them."""
    tries: int
    """Rates of every method."""
    finalists: int
    """Plain LoRA among them."""
    seeds: int


SIZES = (
    Size(8, 99, 3, 4, 20),
    Size(8, 99, 3, 4, 10),
    Size(6, 99, 3, 3, 7),
    Size(5, 99, 3, 3, 5),
    Size(5, 99, 2, 3, 5),
    Size(5, 99, 1, 2, 5),
    Size(5, 6, 1, 2, 5),
    Size(5, 4, 1, 2, 4),
    Size(5, 3, 1, 2, 3),
)
"""Largest first. Below the last there is no verdict worth the name: three pairs of seeds. The first three rates are a factor of four
apart, so that it takes two more to find one, while a second rate of every method finds little (the lab log)."""
MIDDLE = SIZES[4]


@dataclass(frozen=True)
class Profile:
    """What was timed, in seconds."""

    fixed: float
    """a: a run without its steps."""
    step: float
    """b."""
    factors: dict[str, float]
    """f of every method that ran; at least 1."""
    scoring: float
    export: float
    seconds: float
    """Of the budget, what the timing itself took."""

    def run(self, method: str, steps: int) -> float:
        """Seconds of a run that is not scored."""
        return self.factors.get(method, 1.0) * (self.fixed + self.step * steps)

    @property
    def ending(self) -> float:
        """Seconds that are kept for the export and the page."""
        return 1.5 * self.export + PAGE


PAGE = 5.0
"""Seconds of writing two pages; measured: 2 to 3."""


def rungs(steps: int) -> list[int]:
    """The lengths of successive halving, the full one last; a run that is too short to be halved has one length.

    >>> rungs(150), rungs(4)
    ([50, 150], [4])
    """
    return [steps // ETA, steps] if steps >= 4 * ETA else [steps]


def cost(size: Size, methods: list[str], steps: int, profile: Profile, jobs: int) -> float:
    """Seconds of a search: see the module. Only the rates that are proposed one after the other do not run side by side."""
    searched = methods[: size.methods]
    short, *full = rungs(steps)
    mean = sum(profile.run(name, steps) for name in searched) / len(searched)
    tries = sum(size.tries * profile.run(name, short) for name in searched)
    let_on = math.ceil(size.tries * len(searched) / ETA) + LUCKY if full else 0
    final = size.finalists * size.seeds * (mean + profile.scoring)
    first = min(size.rates, 3)
    side_by_side = first * profile.run(methods[0], steps) + tries + let_on * mean + final
    return side_by_side / max(jobs, 1) + (size.rates - first) * profile.run(methods[0], steps)


def fitting(budget: float, methods: list[str], steps: int, profile: Profile, jobs: int) -> Size | None:
    """The largest size within `budget` seconds; None where none is."""
    return next((size for size in SIZES if cost(size, methods, steps, profile, jobs) <= budget), None)


def for_what_is_left(total: float, spent: float, profile: Profile) -> float:
    """Seconds to plan with."""
    return SHARE * (total - spent - profile.ending)


def too_small(total: float, spent: float, methods: list[str], steps: int, profile: Profile, jobs: int) -> ConfigError:
    """The error for a budget in which no verdict can be had, with the budget or the length that would do."""
    least = SIZES[-1]
    one = profile.run(methods[0], steps)
    needed = spent + profile.ending + cost(least, methods, steps, profile, jobs) / SHARE
    left = for_what_is_left(total, spent, profile)
    shorter = next((n for n in range(steps - 1, 0, -1) if cost(least, methods, n, profile, jobs) <= left), None)
    instead = f", or train.steps={shorter}" if shorter else ""
    runs = max(0, int(left / one * max(jobs, 1)))
    return ConfigError(
        f"the budget of {in_words(total)} is too small for a verdict: a run of {steps} steps takes {one:.1f} s here, so about {runs} "
        f"fit, and a verdict takes {least.rates} rates, {least.methods} methods and {least.finalists} of them on {least.seeds} seeds; "
        f"give budget={in_words(60 * math.ceil(needed / 60) if needed > 120 else math.ceil(needed))}{instead}."
    )


def in_words(seconds: float) -> str:
    """A time as a recipe takes it.

    >>> in_words(5400), in_words(45.0)
    ('1h30m', '45s')
    """
    whole = max(1, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, left = divmod(rest, 60)
    return "".join(f"{n}{unit}" for n, unit in ((hours, "h"), (minutes, "m"), (left, "s")) if n)


@dataclass(frozen=True)
class AutoPlan(Record):
    """A search before its first decision: everything later follows from this and from results. `auto.json` has it."""

    format_version: ClassVar[int | None] = FORMAT
    recipe: dict[str, Any]
    base_dir: str
    r: int
    methods: dict[str, dict[str, Any]]
    left_out: list[Left]
    hashes: list[str]
    steps: int
    train: dict[str, Any]
    """The length of a full run, as a recipe has it."""
    lr: float
    """Where the search of the rate begins."""
    starts: dict[str, float]
    """Method → where its rates begin, over plain LoRA's."""
    size: Size
    profile: Profile
    estimate: float
    """Seconds that the search was expected to take."""
    jobs: int
    at_once: str = ""
    """Why there were as many runs at once, where that was left to us."""
    stages: dict[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write auto.json. Raises RunError."""
        write_json(folder / NAME, self.record())

    @classmethod
    def load(cls, folder: Path) -> AutoPlan:
        """Read auto.json. Raises RunError if it is damaged or of a newer format."""
        content = read_json(folder / NAME)
        try:
            fields = cls.fields_in(content, folder / NAME)
            made = {
                "size": Size(**fields["size"]),
                "profile": Profile(**fields["profile"]),
                "left_out": [Left(**left) for left in fields["left_out"]],
            }
            return cls(**fields | made)
        except (TypeError, KeyError) as error:
            raise RunError(f"{folder / NAME} is damaged: {type(error).__name__}: {error}.") from None
