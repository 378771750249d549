"""A comparison from its plan to its end: which run is next, who is told, and what is written last."""

from __future__ import annotations

import dataclasses
import re
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftlora.compare import at_once, results
from weftlora.compare.engine import Over, never
from weftlora.compare.leases import check_none
from weftlora.compare.methods import check_saved, contenders
from weftlora.compare.plan import Job, Plan, check_rows, make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison, Method
from weftlora.compare.workers import NAMES, SCORES, here, in_charge, status
from weftlora.disk.files import read_json, why_no_file, write_json, writing
from weftlora.disk.ownership import FOLDERS, delete, files_of, is_temporary, of_run, without_empty
from weftlora.errors import ConfigError, RunError
from weftlora.progress import Tick
from weftlora.runs.run import differences

RESULT = "comparison.json"
LEASES = "leases"
"""Where workers say which of them runs what."""
LOGS = "logs"
"""Where workers on a cluster write what they say."""
TRAINING = 0.8
"""The share of a run that its training is taken for, to guess what time is left."""


@dataclass(frozen=True)
class Running:
    """A run at work."""

    name: str
    tick: Tick


@dataclass(frozen=True)
class Standing:
    """How far a comparison is, for whoever watches it."""

    done: int
    total: int
    running: list[Running]
    best: dict[str, tuple[int, float | None]]
    """Method: how many of its reported runs are done, and their mean of the metric."""
    metric: str
    seconds_left: float | None
    said: str = ""
    """What was decided, in a line, once."""


Watch = Callable[[Standing], None]


def ignore(standing: Standing) -> None:
    """Watch nothing."""


def compare(
    source: str | Path | Mapping[str, Any] | CompareRecipe,
    overrides: tuple[str, ...],
    jobs: at_once.Jobs,
    overwrite: bool,
    watch: Watch,
    over: Over = never,
) -> Comparison:
    """See `weftlora.compare.compare`; once it is `over`, no run begins and those at work are stopped where they are."""
    at_once.check(jobs)
    recipe = CompareRecipe.read(source, *overrides)
    folder = Path(recipe.out).expanduser()
    check_place(folder, recipe, overwrite)
    new = None if has_plan(folder) and not overwrite else make(recipe)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with in_charge(folder) as lock:
        check_none(folder / LEASES)
        plan = _settled(folder, recipe, new, overwrite)
        queue = Queue(plan, folder, watch)
        if queue.left:
            if new is None:
                check_rows(plan, recipe)
            decision = at_once.decided(jobs, plan, _runs(plan, folder), queue.left)
            numbers = sorted({*plan.jobs, decision.jobs})
            dataclasses.replace(plan, jobs=numbers, at_once=decision.said or plan.at_once).save(folder)
            if decision.said:
                watch(dataclasses.replace(queue.standing(), said=decision.said))
            with here(jobs and decision.jobs, folder, lock) as engine:
                engine.run(queue.following, queue.told, over)
        comparison = results.read(folder)
        write_json(folder / RESULT, comparison.record())
    return comparison


def _runs(plan: Plan, folder: Path) -> list[Path]:
    """The folders of a plan's runs that are there."""
    return [
        path for slug in plan.slugs.values() for top in ("runs", "tuning") for path in (folder / top / slug).glob("*")
    ]


def has_plan(folder: Path) -> bool:
    """Whether a comparison in this folder has been planned."""
    return (folder / "compare.json").is_file()


def check_place(folder: Path, recipe: CompareRecipe, overwrite: bool) -> None:
    """Refuse a folder that is not this comparison's, before anything slow begins. Raises ConfigError or RunError."""
    check_folder(folder, "comparison", has_plan(folder), (*NAMES, LEASES, LOGS))
    if has_plan(folder) and not overwrite:
        check_same(Plan.load(folder), recipe, folder)


def check_folder(folder: Path, what: str, is_begun: bool, ours: Collection[str]) -> None:
    """Refuse a folder that cannot be that of a `what`, which has files named `ours` and has begun here or not. Raises RunError."""
    if folder.exists() and not folder.is_dir():
        raise RunError(f"the {what}'s folder {folder} is a file: choose another with --out.")
    if is_begun:
        return
    if folder.is_dir() and (
        other := [path.name for path in folder.iterdir() if path.name not in ours and not is_temporary(path)]
    ):
        raise RunError(f"{folder} holds other files, such as {other[0]}, and no {what}: choose another with --out.")
    nearest = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if reason := why_no_file(nearest):
        raise RunError(
            f"the {what}'s folder {folder} cannot be made: {nearest} takes no new file ({reason}); choose another with --out."
        )


def check_same(plan: Plan, recipe: CompareRecipe, folder: Path) -> None:
    """Refuse to go on with another recipe than the plan's. Raises ConfigError."""
    given = recipe.model_dump(mode="json")
    given["train"]["num_threads"] = recipe.train.num_threads or 1
    given["model"]["dtype"] = recipe.model.dtype or plan.recipe["model"].get("dtype")
    for key, (before, after) in differences(recipe.with_newer_keys(plan.recipe), given, ""):
        if key == "train.lr" and after is None and plan.rates == recipe.all_rates:
            continue  # a comparison of before a rate could be left out
        if key != "out" and not (key == "seeds" and _adds_seeds(plan, recipe)):
            raise ConfigError(
                f"{folder} holds a comparison with {key}={before!r}, not {after!r}: continue it as it was, choose another folder "
                "with --out, or start again with --overwrite."
            )


def _adds_seeds(plan: Plan, recipe: CompareRecipe) -> bool:
    """Whether a recipe has all seeds of the plan and others, none of which has been used to choose a rate."""
    asked = set(recipe.all_seeds)
    return asked >= set(plan.seeds) and not asked & set(plan.tuning_seeds)


def _settled(folder: Path, recipe: CompareRecipe, plan: Plan | None, overwrite: bool) -> Plan:
    """The plan to follow, on disk; called by the one in charge."""
    if overwrite and has_plan(folder):
        clear(folder)
    if has_plan(folder):
        there = Plan.load(folder)
        check_same(there, recipe, folder)
        check_saved(contenders(recipe.methods), there.methods, there.draws)
        more = [seed for seed in recipe.all_seeds if seed not in there.seeds]
        asked = there.recipe | ({"seeds": recipe.seeds} if more else {})
        plan = dataclasses.replace(there, recipe=asked, seeds=[*there.seeds, *more])
        plan = dataclasses.replace(plan, base_dir=str(recipe.base_dir))  # the project may have moved
        if more:
            plan.save(folder)
        return plan
    plan = plan or make(recipe)
    plan.save(folder)
    return plan


def clear(folder: Path) -> None:
    """Delete what a comparison has written, the plan last, so that what a kill leaves is still one."""
    plan = Plan.load(folder)
    runs = [path for path in _runs(plan, folder) if _RUN.fullmatch(path.name) and not path.is_symlink()]
    for run in runs:
        ours = of_run(run, vouched=True)
        for name in files_of(run):
            if name.name != NAMES[0] and not any((run / name).is_relative_to(path) for path in ours):
                raise RunError(f"{run / name} was not written by this comparison: move it away before --overwrite.")
    with writing(folder):
        for run in runs:
            delete(of_run(run, vouched=True), folder)
            without_empty({run / name for name in FOLDERS} | {run}, folder)
        delete([*(folder / LEASES).glob("*.lease"), *(folder / LOGS).glob("*.log")], folder)
        (folder / RESULT).unlink(missing_ok=True)
        (folder / "compare.json").unlink()


_RUN = re.compile(r"base|(lr[^/]+-)?s[0-9]+")
"""How a plan calls the folder of a run."""


class Queue:
    """The runs that are left, rates first, seeds outermost: whenever it stops, what there is stays paired."""

    def __init__(self, plan: Plan, folder: Path, watch: Watch) -> None:
        self.plan, self.folder, self.watch = plan, folder, watch
        self.waiting: deque[Job] = deque()
        self.at_work: dict[str, tuple[Job, Tick]] = {}
        self.scores: dict[str, list[float]] = {method.name: [] for method in plan.methods}
        self.tuning: dict[str, int] = {}
        self.done, self.finished, self.began = 0, 0, time.monotonic()
        jobs: list[Job] = []
        for method in plan.methods:
            left = [job for job in plan.tuning(method) if self._is_left(job)]
            self.tuning[method.name] = len(left)
            jobs += left or self._reported(method)
        self.waiting.extend(sorted(jobs, key=self._order))

    @property
    def left(self) -> int:
        """How many runs have not ended."""
        return self.plan.runs - self.done

    def following(self) -> Job | None:
        """The next run; None where none can begin now."""
        return self.waiting.popleft() if self.waiting else None

    def told(self, job: Job, tick: Tick | None) -> None:
        """Keep account of a run that has come on, or has ended."""
        if tick is not None:
            self.at_work[job.folder] = (job, tick)
        else:
            self.at_work.pop(job.folder, None)
            self.finished += 1
            self._ended(job)
        self.watch(self.standing())

    def standing(self) -> Standing:
        """How far it is."""
        took = time.monotonic() - self.began
        running = [Running(_title(job), tick) for job, tick in self.at_work.values()]
        begun = sum(TRAINING * tick.done / tick.total for _, tick in self.at_work.values() if tick.phase == "train")
        best = {name: (len(s), sum(s) / len(s) if s else None) for name, s in self.scores.items()}
        left = took / (self.finished + begun) * (self.left - begun) if self.finished + begun > 0 else None
        return Standing(self.done, self.plan.runs, running, best, self.plan.metric, left)

    def _is_left(self, job: Job) -> bool:
        """Whether a run is to be carried out; one that has ended is counted. What failed is tried again."""
        state = status(self.folder / job.folder, job.tuning, job.frozen)
        if state in ("missing", "failed"):
            return True
        self._count(job)
        return False

    def _count(self, job: Job) -> None:
        self.done += 1
        if not job.tuning and status(self.folder / job.folder, False, job.frozen) == "complete":
            score = read_json(self.folder / job.folder / SCORES)["scores"].get(job.metric)
            if score is not None:
                self.scores[job.method].append(score)

    def _ended(self, job: Job) -> None:
        self._count(job)
        if job.tuning:
            self.tuning[job.method] -= 1
            if self.tuning[job.method] == 0:
                more = [*self.waiting, *self._reported(self.plan.of(job.method))]
                self.waiting = deque(sorted(more, key=self._order))

    def _reported(self, method: Method) -> list[Job]:
        """The reported runs of a method whose rate is settled; none where every rate diverged."""
        lr = results.with_rate(self.plan, method, self.folder).lr
        if lr is None and self.plan.tuning(method):
            self.done += len(self.plan.seeds)
            return []
        return [job for job in self.plan.reported(method, lr or self.plan.rates[0]) if self._is_left(job)]

    def _order(self, job: Job) -> tuple[bool, int]:
        seeds = self.plan.tuning_seeds if job.tuning else self.plan.seeds
        return not job.tuning, seeds.index(job.seed)


def _title(job: Job) -> str:
    return f"{job.method}, lr {job.lr:g}" if job.tuning else f"{job.method}, seed {job.seed}"
