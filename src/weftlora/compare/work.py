"""One run of a comparison, from wherever a kill has left it to its scores.

    complete.  run.json says so, and a reported run has eval-test.json
    begun      it goes on from its newest checkpoint; what cannot go on starts anew
    problem    problem.json says why there will be no scores: diverged (final), or failed (tried again the next time)

Nothing here looks at other runs.
"""

from __future__ import annotations

import contextlib
import math
import traceback
from pathlib import Path
from typing import Any

import weftlora.train as training
from weftlora.compare.methods import seeded
from weftlora.compare.plan import Job
from weftlora.compare.record import Status
from weftlora.errors import DivergedError, RunError, WeftError
from weftlora.train.evaluation import Evaluation
from weftlora.train.files import read_json, write_json, writing
from weftlora.train.ownership import delete, inside, of_run
from weftlora.train.progress import Progress
from weftlora.train.recipe import Recipe
from weftlora.train.run import Run

SCORES = "eval-test.json"
PROBLEM = "problem.json"


def status(folder: Path, tuning: bool, frozen: bool = False) -> Status:
    """How far a run is; `missing` is one that has not ended."""
    if (folder / PROBLEM).is_file():
        found: Status | None = read_json(folder / PROBLEM).get("status")
        if found not in ("diverged", "failed"):
            raise RunError(f"{folder / PROBLEM} is damaged: delete it, and the run is tried again.")
        return found
    if not frozen and not _is_trained(folder):
        return "missing"
    return "complete" if tuning or (folder / SCORES).is_file() else "missing"


def _is_trained(folder: Path) -> bool:
    return (folder / "run.json").is_file() and Run.load(folder).status == "complete"


def carry_out(job: Job, top: Path, progress: Progress) -> None:
    """Train and measure a run. What goes wrong in it is written beside it as its problem; only the disk's refusal is raised.

    Raises:
        RunError: not even the problem could be written.
    """
    folder = inside(top, job.folder)
    try:
        (folder / PROBLEM).unlink(missing_ok=True)
        _carry_out(job, folder, progress)
    except WeftError as error:
        kind = "diverged" if isinstance(error, DivergedError) or _has_diverged(folder) else "failed"
        give_up(folder, kind, str(error))
    except Exception as error:
        give_up(folder, "failed", f"{type(error).__name__}: {error}", traceback.format_exc())


def give_up(folder: Path, kind: str, problem: str, trace: str = "") -> None:
    """Write down why a run has no scores. Raises RunError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / PROBLEM, {"status": kind, "problem": " ".join(problem.split())} | ({"trace": trace} if trace else {})
    )


def _carry_out(job: Job, folder: Path, progress: Progress) -> None:
    adapter = seeded(job.recipe["adapter"], job.seed)
    recipe = Recipe.read({**job.recipe, "adapter": adapter, "out": str(folder)}, base_dir=Path(job.base_dir))
    if job.frozen:
        evaluation = training.evaluate(recipe, adapter="none", answers=job.answers, progress=progress)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / SCORES, _finite(evaluation).record())
        return
    if not _is_trained(folder):
        training.train(recipe, resume=_can_go_on(folder), progress=progress)
    if not job.tuning and not (folder / SCORES).is_file():
        _finite(training.evaluate(Run.load(folder), answers=job.answers, progress=progress))


def _can_go_on(folder: Path) -> bool:
    """Whether a begun run can be resumed; one that cannot is deleted, so that it starts anew."""
    if not folder.exists():
        return False
    with contextlib.suppress(RunError):
        if Run.load(folder).adapter["peft_type"] != "ADALORA":
            return True
    with writing(folder):
        delete(of_run(folder, vouched=True), folder)
    return False


def _finite(evaluation: Evaluation) -> Evaluation:
    if not math.isfinite(evaluation.scores.loss):
        raise DivergedError(f"the loss of the test rows is {evaluation.scores.loss}: lower the rate.")
    return evaluation


def _has_diverged(folder: Path) -> bool:
    """Whether a loss that was logged is no number: whatever failed after that failed of it."""
    with contextlib.suppress(RunError):
        rows: list[dict[str, Any]] = Run.load(folder).history()
        return any(not math.isfinite(row[key]) for row in rows for key in ("loss", "validation_loss") if key in row)
    return False
