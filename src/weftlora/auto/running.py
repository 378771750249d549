"""A search from its recipe to its adapter: timing, rates, methods, finalists, choice, export, pages.

    auto.json            what was timed and planned, before the first decision
    profile/             the short runs that were timed
    search/<method>/     runs of the search: n<steps>-lr<rate>-s1000
    finalists/           a comparison, as `weftlora compare` makes it
    clock.json           seconds spent, over all starts
    recipe.yaml, export/, report.html, finalists.html, found.json       what it ends with

Whatever is stopped goes on from the folders: a run that has ended is not run again, and everything that is decided is decided by
results and counts. The clock begins no run that would not end in time, and stops those at work when only the time for the export
is left.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from weftlora.auto import pages, search, storing
from weftlora.auto.candidates import PLAIN, SERVERS, choose, comparison
from weftlora.auto.plan import (
    EPOCHS,
    MIDDLE,
    NAME,
    AutoPlan,
    Profile,
    Size,
    cost,
    fitting,
    for_what_is_left,
    too_small,
)
from weftlora.auto.recipe import AutoRecipe
from weftlora.auto.record import Found, Left, Tried
from weftlora.auto.storing import CLOCK, EXPORT, FINALISTS, FOUND, RECIPE
from weftlora.compare import at_once, results, workers
from weftlora.compare import running as comparing
from weftlora.compare.engine import BEGUN
from weftlora.compare.leases import TTL
from weftlora.compare.plan import TUNING_SEED, Job, Plan, make
from weftlora.compare.record import METRICS, Comparison, Interval, Method, Outcome, Rate, Row, Verdict
from weftlora.compare.workers import PROBLEM, in_charge, status
from weftlora.data import load as load_data
from weftlora.data.paths import resolve_path
from weftlora.disk.files import read_json, write_json, write_text, writing
from weftlora.disk.ownership import FOLDERS, delete, of_export, of_run, without_empty
from weftlora.errors import ConfigError, MergeError, RunError, WeftError, _TimeIsUpError
from weftlora.export import LoraExport, export_lora
from weftlora.progress import Tick
from weftlora.runs import base_model as models
from weftlora.runs import rates as default_rates
from weftlora.runs.run import Run, differences
from weftlora.train import arguments

OURS = {
    NAME,
    FOUND,
    CLOCK,
    FINALISTS,
    EXPORT,
    RECIPE,
    "profile",
    "search",
    search.JOURNAL,
    *pages.PAGES,
    *workers.NAMES,
}
LEAST = 12
"""Steps that a method is timed for, so that whatever happens over time in it does."""
SAVE_EVERY = 2.0
"""Seconds of the clock that a kill may lose."""


@dataclass(frozen=True)
class Standing:
    """How far a search is, for whoever watches it."""

    stage: str
    done: int
    total: int
    """Runs of this stage."""
    running: list[comparing.Running]
    spent: float
    budget: float
    said: str = ""
    """What was decided, in a line, once."""


Watch = Callable[[Standing], None]


def ignore(standing: Standing) -> None:
    """Watch nothing."""


class Clock:
    """Seconds spent, over all starts of a search."""

    def __init__(self, file: Path, budget: float, now: Callable[[], float] = time.monotonic) -> None:
        self.file, self.budget, self.now = file, budget, now
        self.before = float(read_json(file)["spent"]) if file.is_file() else 0.0
        self.began = self.saved = now()
        self.ending = 0.0
        """Seconds that are kept for what comes after the last run."""

    @property
    def spent(self) -> float:
        return self.before + self.now() - self.began

    def tick(self, least: float = SAVE_EVERY) -> None:
        """Write it down, now and then. Raises RunError."""
        if self.now() - self.saved >= least:
            self.saved = self.now()
            write_json(self.file, {"spent": round(self.spent, 3)})

    def is_over(self) -> bool:
        """Whether only the time for the ending is left."""
        return self.spent + self.ending >= self.budget

    def has(self, seconds: float) -> bool:
        """Whether so much is left before the ending."""
        return self.spent + seconds + self.ending <= self.budget


def auto(
    recipe: AutoRecipe, jobs: at_once.Jobs, overwrite: bool, watch: Watch, store: str | None = None, ttl: float = TTL
) -> Found:
    """See `weftlora.auto.auto`."""
    at_once.check(jobs)
    if overwrite and store:
        raise ConfigError("--overwrite does not delete what is in a store: choose another --store.")
    pages.check_extra()
    recipe.check_places()
    folder = Path(recipe.out).expanduser()
    _check_place(folder, recipe, overwrite)
    arguments.check(recipe.train)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with in_charge(folder) as lock, storing.kept(store, folder, ttl) as keep:
        if overwrite:
            _clear(folder)
        _check_place(folder, recipe, False)  # what was brought
        return _Auto(recipe, folder, jobs, lock, watch, keep).run()


class _Auto:
    def __init__(
        self,
        recipe: AutoRecipe,
        folder: Path,
        jobs: at_once.Jobs,
        lock: int,
        watch: Watch,
        keep: Callable[[], None],
    ) -> None:
        self.recipe, self.folder, self.lock, self.watch, self.keep = recipe, folder, lock, watch, keep
        self.asked, self.jobs, self.room = jobs, 1 if jobs == "auto" else jobs, ""
        """Runs at once as they were asked for and as they are, and why, where that was left to us."""
        self.clock = Clock(folder / CLOCK, recipe.seconds)
        self.stages: dict[str, float] = {}
        self.timed: dict[tuple[str, bool], float] = {}
        """Wall seconds of the runs of this start, by their folder and whether they were only trained."""

    def run(self) -> Found:
        """Everything that is left to do."""
        if (found := _ended(self.folder, self.recipe)) is not None:
            return found
        base = models.find(self.recipe.model, self.recipe.base_dir)
        data = load_data(self.recipe.data, base.tokenizer, base_dir=self.recipe.base_dir, task=base.wants)
        plan = self._planned(base, data)
        self.clock.ending = plan.profile.ending
        runs = make(self._comparison(plan.train, list(plan.methods.values()), plan.r))
        self._settle(runs)
        if self.room and self.room != plan.at_once:
            plan = replace(plan, at_once=self.room)
            plan.save(self.folder)
        if plan.hashes != runs.hashes:
            raise RunError(
                f"the rows of {self.recipe.data.train} have changed since this search began: put them back, choose another folder "
                "with --out, or start again with --overwrite."
            )
        tried: list[Tried] = []
        comparison: Comparison | None = None
        ended = True
        try:
            self._search(plan, runs, tried)
            comparison = self._finalists(plan, runs, tried)
            ended = comparison.complete
        except _TimeIsUpError:
            ended = False
        return self._conclude(plan, runs, tried, comparison, ended)

    # ------------------------------------------------------------------ before the first decision

    def _planned(self, base: models.Base, data: Any) -> AutoPlan:
        if (self.folder / NAME).is_file():
            plan = AutoPlan.load(self.folder)
            self.stages = dict(plan.stages)
            return plan
        for left in (self.folder / "profile").glob("*"):  # what a kill left half-timed
            _remove_run(left, self.folder)
        try:
            return self._timed_and_planned(base, data)
        except _TimeIsUpError:
            _clear(self.folder)
            raise ConfigError(
                f"the budget of {self.recipe.budget} ended while a few steps of every method were timed, so it is too small for a "
                "verdict: give a longer one."
            ) from None
        except WeftError:  # nothing was decided, so nothing is left behind
            _clear(self.folder)
            raise

    def _timed_and_planned(self, base: models.Base, data: Any) -> AutoPlan:
        chosen = choose(self.recipe, base, data)
        train = self.recipe.train.model_dump(exclude_unset=True)
        shortest = train if self.recipe.has_length else train | {"epochs": 1.0}
        runs = make(self._comparison(shortest, list(chosen.entries.values()), chosen.r))
        settings = base.settings
        start = default_rates.rate(PLAIN, settings, models.is_encoder(settings))
        starts = {
            name: default_rates.rate(str(entry.get("recipe")), settings, models.is_encoder(settings)).lr / start.lr
            for name, entry in chosen.entries.items()
        }
        self._settle(runs)
        with self._stage("timing"):
            profile, failed = self._profile(runs, start.lr)
        self._settle(runs)
        kept = {name: entry for name, entry in chosen.entries.items() if name not in failed}
        size, steps, length = self._size(runs, list(kept), profile, len(data.train), shortest)
        estimate = cost(size, list(kept), steps, profile, self.jobs)
        left = [*chosen.left_out, *(Left(name, why) for name, why in failed.items())]
        plan = AutoPlan(
            recipe=self.recipe.model_dump(mode="json"),
            base_dir=str(self.recipe.base_dir),
            r=chosen.r,
            methods=kept,
            left_out=left,
            hashes=runs.hashes,
            steps=steps,
            train=length,
            lr=start.lr,
            starts=starts,
            size=size,
            profile=profile,
            estimate=round(estimate, 3),
            jobs=self.jobs,
            stages=self.stages,
            at_once=self.room,
        )
        plan.save(self.folder)
        self.keep()
        one = profile.run(PLAIN, steps)
        fit = int(for_what_is_left(self.recipe.seconds, self.clock.spent, profile) / one * max(self.jobs, 1))
        self._say("timing", f"a run of {steps} steps takes {one:.1f} s: about {fit} fit; {_in_counts(size, len(kept))}")
        return plan

    def _settle(self, runs: Plan) -> None:
        """How many runs at once, where that is left to us: by an estimate, and by what runs took once some have ended."""
        if self.asked != "auto":
            return
        decision = at_once.decided("auto", runs, trained(self.folder), None)
        self.jobs = decision.jobs
        if decision.said != self.room:
            self.room = decision.said
            self._say("runs", decision.said)

    def _comparison(self, train: dict[str, Any], methods: list[Any], r: int, **more: Any) -> Any:
        recipe = self.recipe.model_copy(update={"train": type(self.recipe.train).parse(train)})
        recipe._base_dir = self.recipe.base_dir
        answers = self.recipe.metric is not None and METRICS[self.recipe.metric].of == "answers"
        given = {"metric": self.recipe.metric, "answers": answers, "out": str(self.folder / FINALISTS), **more}
        return comparison(recipe, methods, r, **given)

    def _profile(self, runs: Plan, lr: float) -> tuple[Profile, dict[str, str]]:
        """Time a few steps of every method, a scoring and an export; and why methods failed in it."""
        began = self.clock.spent
        few, more = max(2, runs.steps // 30), min(max(runs.steps // 10, LEAST), max(4, runs.steps))

        def job(name: str, steps: int) -> Job:
            return runs.trial(runs.of(name), 0, lr, steps, f"profile/{runs.slugs[name]}-{steps}")

        short, plain = job(PLAIN, few), job(PLAIN, more)
        others = [job(method.name, more) for method in runs.methods if method.name != PLAIN]
        losses = self._carry_out("timing", [short, plain, *others], lambda _: 0.0)
        if losses[plain.folder] is None or losses[short.folder] is None:
            raise RunError(f"plain LoRA cannot be trained on these rows: {self._problem(plain.folder)}")
        reported = replace(plain, tuning=False, answers=runs.recipe.get("answers") is not False)
        self._carry_out("timing", [reported], lambda _: 0.0)
        scoring = self.timed[reported.folder, False]
        first, second = self.timed[short.folder, True], self.timed[plain.folder, True]
        step = max((second - first) / (more - few), 1e-4)
        fixed = max(second - step * more, 0.1)
        began_export = self.clock.spent
        out = self.folder / "profile" / "export"
        export_lora(self.folder / plain.folder, out, **SERVERS[self.recipe.serve].options, overwrite=True)
        export = self.clock.spent - began_export
        failed = {each.method: self._problem(each.folder) for each in others if losses[each.folder] is None}
        factors = {
            each.method: max(1.0, self.timed[each.folder, True] / (fixed + step * more))
            for each in others
            if each.method not in failed
        }
        rounded = {name: round(value, 3) for name, value in {PLAIN: 1.0, **factors}.items()}
        spent = self.clock.spent - began
        return Profile(fixed, step, rounded, scoring, export, spent), failed

    def _size(
        self, runs: Plan, methods: list[str], profile: Profile, rows: int, train: dict[str, Any]
    ) -> tuple[Size, int, dict[str, Any]]:
        """The size, the steps of a full run, and the training section that says so. Raises ConfigError: too small a budget."""
        left = for_what_is_left(self.recipe.seconds, self.clock.spent, profile)
        if self.recipe.has_length:
            if size := fitting(left, methods, runs.steps, profile, self.jobs):
                return size, runs.steps, train
            raise too_small(self.recipe.seconds, self.clock.spent, methods, runs.steps, profile, self.jobs)
        lengths = []
        for epochs in EPOCHS:
            asked = type(self.recipe.train).parse(train | {"epochs": epochs})
            lengths.append((arguments.total_steps(asked, rows), train | {"epochs": epochs}))
        for steps, section in lengths:
            if cost(MIDDLE, methods, steps, profile, self.jobs) <= left and (
                size := fitting(left, methods, steps, profile, self.jobs)
            ):
                return size, steps, section
        steps, section = lengths[-1]
        if size := fitting(left, methods, steps, profile, self.jobs):
            return size, steps, section
        raise too_small(self.recipe.seconds, self.clock.spent, methods, steps, profile, self.jobs)

    # ------------------------------------------------------------------ the search

    def _search(self, plan: AutoPlan, runs: Plan, tried: list[Tried]) -> None:
        """Rates, then methods; `tried` has what is known, also where the time is up."""

        def seconds(job: Job) -> float:
            return plan.profile.run(job.method, job.recipe["train"]["steps"])

        with search.journal(self.folder) as storage:
            stage = "rates"

            def carry_out(jobs: list[Job]) -> search.Losses:
                return self._carry_out(stage, jobs, seconds)

            studies = search.Search(plan, runs, carry_out, self._problem, storage)
            with self._stage("rates"):
                tried += studies.rates(PLAIN)
            lr = _tuned(tried, plan)
            self._say("rates", f"plain LoRA's rate is {lr:g}, of {len(tried)} that were tried")
            stage = "methods"
            with self._stage("methods"):
                tried += studies.methods(lr)

    def _finalists(self, plan: AutoPlan, runs: Plan, tried: list[Tried]) -> Comparison:
        """Plain LoRA and the best others on fresh paired seeds."""
        plain = _tuned(tried, plan)
        others = [each for each in search.ranking(tried, plan.steps) if each.method != PLAIN]
        chosen = [(PLAIN, plain), *((each.method, each.lr) for each in others[: plan.size.finalists - 1])]
        self._say("finalists", ", ".join(f"{name} at lr {lr:g}" for name, lr in chosen))
        methods = [plan.methods[name] | {"lr": lr} for name, lr in chosen]
        asked = self._comparison(plan.train, methods, plan.r, seeds=plan.size.seeds, baseline=PLAIN)

        done = 0

        def watch(standing: comparing.Standing) -> None:
            nonlocal done
            self.clock.tick()
            if standing.done > done:
                done = standing.done
                self.keep()
            self.watch(
                Standing(
                    *(
                        "finalists",
                        standing.done,
                        standing.total,
                        standing.running,
                        self.clock.spent,
                        self.recipe.seconds,
                    )
                )
            )

        with self._stage("finalists"):
            return comparing.compare(asked, (), self.jobs, False, watch, self.clock.is_over)

    # ------------------------------------------------------------------ running

    def _carry_out(self, stage: str, jobs: list[Job], seconds: Callable[[Job], float]) -> search.Losses:
        """The validation losses of runs, those that have ended already among them.

        Raises:
            _TimeIsUpError: not all of them ended in time.
        """
        by_folder = {job.folder: job for job in jobs}
        left = [job for job in by_folder.values() if self._state(job) in ("missing", "failed")]
        waiting, at_work, cut = list(left), dict[str, tuple[Job, Tick]](), False
        began: dict[str, float] = {}

        def following() -> Job | None:
            nonlocal cut
            if not waiting:
                return None
            if not self.clock.has(seconds(waiting[0])):
                cut = True
                return None
            return waiting.pop(0)

        def told(job: Job, tick: Tick | None) -> None:
            if tick == BEGUN:
                began[job.folder] = self.clock.now()
            if tick is None:
                at_work.pop(job.folder, None)
                self.timed[job.folder, job.tuning] = self.clock.now() - began[job.folder]
                self.keep()
            else:
                at_work[job.folder] = (job, tick)
            self.clock.tick()
            running = [comparing.Running(f"{j.method}, lr {j.lr:g}", t) for j, t in at_work.values()]
            done = len(jobs) - len(waiting) - len(at_work)
            self.watch(Standing(stage, done, len(jobs), running, self.clock.spent, self.recipe.seconds))

        if left:
            with workers.here(self.jobs, self.folder, self.lock) as engine:
                engine.run(following, told, self.clock.is_over)
        self.clock.tick(0.0)
        if cut or any(self._state(job) == "missing" for job in by_folder.values()):
            raise _TimeIsUpError
        return {folder: self._loss(job) for folder, job in by_folder.items()}

    def _state(self, job: Job) -> str:
        return status(self.folder / job.folder, job.tuning)

    def _loss(self, job: Job) -> float | None:
        if self._state(job) != "complete":
            return None
        loss = Run.load(self.folder / job.folder).metrics.get("validation_loss", math.nan)
        return loss if math.isfinite(loss) else None

    def _problem(self, folder: str) -> str:
        file = self.folder / folder / PROBLEM
        return str(read_json(file).get("problem", "")) if file.is_file() else "its validation loss is not a number."

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        began = self.clock.spent
        try:
            yield
        finally:
            self.stages[name] = round(self.stages.get(name, 0.0) + self.clock.spent - began, 3)
            if (self.folder / NAME).is_file():
                replace(AutoPlan.load(self.folder), stages=self.stages).save(self.folder)

    def _say(self, stage: str, said: str) -> None:
        self.watch(Standing(stage, 0, 0, [], self.clock.spent, self.recipe.seconds, said))

    # ------------------------------------------------------------------ the end

    def _conclude(
        self, plan: AutoPlan, runs: Plan, tried: list[Tried], comparison: Comparison | None, ended: bool
    ) -> Found:
        if comparison is None and (self.folder / FINALISTS / "compare.json").is_file():
            comparison = results.read(self.folder / FINALISTS)
        known = self._known(plan, runs) if not ended else tried
        method, place, why = _choice(comparison, known or tried, plan, ended, self.folder, runs)
        run = Run.load(self.folder / place)
        with self._stage("ending"):
            export, note = self._export(run)
            write_text(self.folder / RECIPE, _recipe_text(run, method))
        error = export.proof.error if export is not None and export.proof is not None else None
        section = {key: value for key, value in run.recipe["adapter"].items() if key != "seed"}
        found = Found(
            folder=str(self.folder),
            model=self.recipe.model.path,
            data=str(self.recipe.data.train),
            serve=self.recipe.serve,
            metric=runs.metric,
            method=method,
            adapter=section,
            lr=run.recipe["train"]["lr"],
            rank=runs.of(method).rank,
            parameters=runs.of(method).parameters,
            steps=run.steps,
            seed=run.seed,
            run=place,
            recipe=RECIPE,
            export="" if export is None else EXPORT,
            export_error=error,
            export_note=note,
            why=why,
            ended="complete" if ended else "time",
            budget=self.recipe.seconds,
            spent=round(self.clock.spent, 3),
            stages=self.stages,
            runs=len({*self.folder.glob("search/*/*/run.json"), *self.folder.glob(f"{FINALISTS}/runs/*/*/run.json")}),
            tried=known or tried,
            left_out=[*plan.left_out, *_beyond(plan)],
            seeds=plan.size.seeds,
            methods=[] if comparison is None else comparison.methods,
            outcomes=[] if comparison is None else comparison.outcomes,
            rows=[] if comparison is None else comparison.rows,
            at_once=self.room or plan.at_once,
            peak_bytes=at_once.peak(trained(self.folder)),
        )
        pages.write(found, comparison, self.folder)
        found = replace(found, spent=round(self.clock.spent, 3))
        write_json(self.folder / FOUND, found.record())
        self.clock.tick(0.0)
        return found

    def _known(self, plan: AutoPlan, runs: Plan) -> list[Tried]:
        """What has ended of the search, whatever was to come of it: for when the time was up."""
        found = []
        for name in plan.methods:
            for file in sorted(self.folder.glob(f"search/{runs.slugs[name]}/*/run.json")):
                run = Run.load(file.parent)
                loss = run.metrics.get("validation_loss", math.nan)
                if run.status == "complete" and math.isfinite(loss):
                    lr = float(run.recipe["train"]["lr"])
                    stage: Any = "rates" if name == PLAIN and run.steps == plan.steps else "methods"
                    found.append(Tried(stage, name, lr, {str(run.steps): loss}, "complete"))
        return found

    def _export(self, run: Run) -> tuple[LoraExport | None, str]:
        """The folder for the server, and what is to be known of it."""
        options: dict[str, Any] = {**SERVERS[self.recipe.serve].options, "overwrite": True}
        out = self.folder / EXPORT
        try:
            return export_lora(run.folder, out, **options), ""
        except MergeError as error:
            if self.recipe.serve != "any" or not isinstance(self.recipe.data.train, str):
                return None, str(error)
            said = str(error)
        train = self.recipe.data.train
        place = train if train == "demo" else str(resolve_path(train, self.recipe.base_dir))
        try:
            export = export_lora(run.folder, out, approximate="mean-gate", data=place, **options)
        except WeftError:
            return None, said
        return export, (
            "It is an approximation: its router is fixed at its mean output over the training rows, and what that loses is in the "
            "export's README. weftlora itself runs the adapter as it was trained."
        )


def _tuned(tried: list[Tried], plan: AutoPlan) -> float:
    """Plain LoRA's rate. Raises RunError where it diverged at every one."""
    found = search.best([each for each in tried if each.stage == "rates"], plan.steps)
    if found is None:
        problems = next((each.problem for each in tried if each.problem), "its loss is not a number")
        raise RunError(f"plain LoRA has failed at every rate that was tried: {problems}")
    return found.lr


def _choice(
    comparison: Comparison | None, tried: list[Tried], plan: AutoPlan, ended: bool, folder: Path, runs: Plan
) -> tuple[str, str, str]:
    """The method, the folder of its run, and why. Raises RunError where no run has an adapter."""
    complete = {} if comparison is None else {m.name: _best_run(comparison, m.name, folder) for m in comparison.methods}
    usable = {name: place for name, place in complete.items() if place}
    if comparison is not None and usable:
        better = [row for row in comparison.rows if row.verdict.kind == "better" and row.name in usable and row.gap]
        sign = 1 if comparison.higher_is_better else -1
        rate = next((m.lr for m in comparison.methods if m.name == PLAIN), None)
        late = "" if ended else "The budget ended before all seeds were trained. "
        if better:
            row = max(better, key=lambda each: sign * (each.gap.mean if each.gap else 0.0))
            why = f"{late}{row.name} is {row.verdict.sentence} than plain LoRA, over {row.gap.n if row.gap else 0} paired seeds."
            return row.name, f"{FINALISTS}/{usable[row.name]}", why
        name = PLAIN if PLAIN in usable else next(iter(usable))
        said = "; ".join(f"{row.name}: {row.verdict.sentence}" for row in comparison.rows if row.name != PLAIN)
        enough = f"Plain LoRA at lr {rate:g} is enough" if name == PLAIN and rate is not None else f"{name} has a run"
        return (
            name,
            f"{FINALISTS}/{usable[name]}",
            f"{late}{enough}: {said or 'nothing else was left to compare it with'}.",
        )
    order = search.ranking(tried, plan.steps)
    if not order:
        raise RunError(
            f"the budget of {plan.recipe['budget']} ended before the first run did: give the same command "
            "with a longer budget, and it continues."
        )
    first = order[0]
    length = max(map(int, first.losses))
    place = f"search/{runs.slugs[first.method]}/n{length}-lr{first.lr:g}-s{TUNING_SEED}"
    return (
        first.method,
        place,
        (
            f"No verdict: the budget ended before the methods were trained on paired seeds. {first.method} at lr "
            f"{first.lr:g} had the lowest validation loss of one seed ({first.losses[str(length)]:.4f} after {length} steps)."
        ),
    )


def _beyond(plan: AutoPlan) -> list[Left]:
    """The methods that a small search has no room for."""
    count = plan.size.methods
    return [Left(name, f"the budget has room for {count} methods.") for name in list(plan.methods)[count:]]


def _best_run(comparison: Comparison, method: str, folder: Path) -> str:
    """The folder of a method's run with the lowest validation loss; empty where none is complete."""
    found = []
    for outcome in comparison.of(method):
        if outcome.status == "complete":
            metrics = Run.load(folder / FINALISTS / outcome.folder).metrics
            found.append((metrics.get("validation_loss", math.inf), outcome.seed, outcome.folder))
    return min(found)[2] if found else ""


def _recipe_text(run: Run, method: str) -> str:
    """The recipe of a run as a file, with the places of model and rows written out."""
    content = {key: value for key, value in run.recipe.items() if key != "out"}
    base_dir = Path(run.base_dir)

    def placed(written: Any) -> Any:
        if isinstance(written, list):
            return [placed(each) for each in written]
        if isinstance(written, dict):
            return {placed(name): weight for name, weight in written.items()}
        path = resolve_path(written, base_dir) if isinstance(written, str) else None
        return str(path) if path is not None and written != "demo" and path.exists() else written

    data = content["data"] | {name: placed(content["data"].get(name)) for name in ("train", "validation", "test")}
    model = content["model"] | {"path": placed(content["model"]["path"])}
    whole = {
        "model": model,
        "data": data,
        "adapter": content["adapter"],
        "train": content["train"],
        "out": f"runs/{run.folder.name}",
    }

    def short(section: Any) -> Any:
        return {k: short(v) for k, v in section.items() if v is not None} if isinstance(section, dict) else section

    return f"# {method}, as weftlora auto chose it\n" + yaml.safe_dump(
        short(whole), sort_keys=False, allow_unicode=True
    )


def _in_counts(size: Size, methods: int) -> str:
    return (
        f"{size.rates} rates of plain LoRA, {min(size.methods, methods)} methods at {size.tries} rate{'s' * (size.tries > 1)} each, "
        f"then {size.finalists} of them on {size.seeds} seeds"
    )


# ---------------------------------------------------------------------- the folder


def _ended(folder: Path, recipe: AutoRecipe) -> Found | None:
    """What a search that has ended found; None where there is more to do, as with a budget that was made larger."""
    if not (folder / FOUND).is_file():
        return None
    found = read_found(folder)
    return found if found.ended == "complete" or recipe.seconds <= found.budget else None


def read_found(folder: Path) -> Found:
    """Read found.json. Raises RunError if it is damaged or of a newer format."""
    content = read_json(folder / FOUND)
    try:
        fields = Found.fields_in(content, folder / FOUND)

        def interval(value: dict[str, Any] | None) -> Interval | None:
            return None if value is None else Interval(**value)

        rows = [
            Row(
                **row
                | {
                    "score": interval(row["score"]),
                    "gap": interval(row["gap"]),
                    "verdict": Verdict(**row["verdict"]),
                    "step_ratio": interval(row.get("step_ratio")),
                }
            )
            for row in fields["rows"]
        ]
        made = {
            "tried": [Tried(**each) for each in fields["tried"]],
            "left_out": [Left(**each) for each in fields["left_out"]],
            "methods": [Method(**m | {"rates": [Rate(**r) for r in m.get("rates", ())]}) for m in fields["methods"]],
            "outcomes": [Outcome(**each) for each in fields["outcomes"]],
            "rows": rows,
        }
        return Found(**fields | made)
    except (TypeError, KeyError, AttributeError) as error:
        raise RunError(f"{folder / FOUND} is damaged: {type(error).__name__}: {error}.") from None


def trained(folder: Path) -> list[Path]:
    """The folders of all runs of a search, those that were timed among them."""
    forms = ("profile/*", "search/*/*", f"{FINALISTS}/runs/*/*")
    return [file.parent for form in forms for file in folder.glob(f"{form}/run.json")]


def _check_place(folder: Path, recipe: AutoRecipe, overwrite: bool) -> None:
    """Refuse a folder that is not this search's, before anything slow begins. Raises ConfigError or RunError."""
    is_begun = (folder / NAME).is_file()
    comparing.check_folder(folder, "search", is_begun, OURS)
    if is_begun and not overwrite:
        _check_same(AutoPlan.load(folder), recipe, folder)


def _check_same(plan: AutoPlan, recipe: AutoRecipe, folder: Path) -> None:
    for key, (before, after) in differences(recipe.with_newer_keys(plan.recipe), recipe.model_dump(mode="json"), ""):
        if key not in ("out", "budget"):
            raise ConfigError(
                f"{folder} holds a search with {key}={before!r}, not {after!r}: continue it as it was, choose another folder with "
                "--out, or start again with --overwrite."
            )


def _clear(folder: Path) -> None:
    """Delete what a search has written, auto.json last."""
    if (folder / FINALISTS / "compare.json").is_file():
        comparing.clear(folder / FINALISTS)
    with writing(folder):
        (folder / FINALISTS / workers.NAMES[1]).unlink(missing_ok=True)
    for run in [*folder.glob("profile/*"), *folder.glob("search/*/*")]:
        _remove_run(run, folder)
    with writing(folder):
        for place in (folder / EXPORT, folder / "profile" / "export"):
            delete(of_export(place), folder)
            without_empty({place}, folder)
        without_empty({*folder.glob("search/*"), folder / "search", folder / "profile", folder / FINALISTS}, folder)
        for name in (FOUND, CLOCK, RECIPE, search.JOURNAL, *pages.PAGES, NAME):
            (folder / name).unlink(missing_ok=True)


def _remove_run(run: Path, top: Path) -> None:
    if run.is_symlink():
        return
    with writing(run):
        delete(of_run(run, vouched=True), top)
        without_empty({run / name for name in FOLDERS} | {run}, top)
