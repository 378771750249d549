"""Whether a run that has begun may be continued, and from where.

    recipe       the one that it was started with, but for keys that leave the adapter as it is (`weftlora.runs.run.check_continues`)
    input        the same rows and the same base
    checkpoint   the newest complete one; what was written after it is dropped

A peft method that keeps something in no checkpoint is started again.
"""

from __future__ import annotations

from pathlib import Path

from weftlora.errors import RunError
from weftlora.runs import identity
from weftlora.runs.base_model import Fingerprint, check_same
from weftlora.runs.recipe import Recipe
from weftlora.runs.run import Run
from weftlora.train import checkpoint
from weftlora.train.prepare import Prepared


def check_same_input(before: Run, run: Run, prepared: Prepared) -> None:
    """Refuse other rows and another base than those that the run has begun with.

    Raises:
        RunError: the rows have changed.
        AdapterError: the base has.
    """
    if [*before.data["hashes"].values()] != [*run.data["hashes"].values()]:  # by split; a project may have moved
        raise RunError(f"the data of {run.folder} has changed since it was started: resume on the same rows.")
    for split, counts in before.data.get("counts", {}).items():
        now = run.data["counts"].get(split, {})
        if any(counts.get(name) != now.get(name) for name in ("rows", "tokens", "answer_tokens")):
            raise RunError(
                f"the {split} rows of {run.folder} are the same and their tokens are not ({counts.get('tokens')} then, "
                f"{now.get('tokens')} now): another version of weftlora or of the tokenizer has read them; start it again with "
                "--overwrite, or resume it with the version in its run.json."
            )
    trained, now_on = Fingerprint.of(before.base), Fingerprint.of(run.base)
    check_same(trained, now_on, str(run.folder), run.base["source"])
    identity.check_files(before.base, prepared.base.settings, run.base["source"], str(run.folder))


def with_as_many_rows(recipe: Recipe, before: Run, processes: int) -> Recipe:
    """The recipe with the accumulation that makes `processes` processes take the rows per step that the run was begun with.

    Raises:
        RunError: no whole number does.
    """
    passes = recipe.train.accumulation * before.processes
    if passes % processes:
        raise RunError(
            f"{before.folder} was begun by {before.processes} processes with train.accumulation={recipe.train.accumulation}: that is "
            f"{passes} batches per step, which {processes} processes cannot share evenly; resume it with a number of processes that "
            f"divides {passes}."
        )
    train = recipe.train.model_copy(update={"accumulation": passes // processes})
    return recipe.model_copy(update={"train": train})


def check_can_resume(before: Run) -> None:
    """Refuse a method whose checkpoints lack something that it needs. Raises RunError."""
    if before.adapter["peft_type"] == "ADALORA" and checkpoint.newest(before.checkpoints):
        raise RunError(
            f"{before.folder} trains peft's AdaLoRA, whose checkpoints lack the importance averages it needs to continue: "
            "start it again with --overwrite."
        )


def resume_point(run: Run, main: bool) -> Path | None:
    """The newest complete checkpoint; half-written ones and the rows logged after it are dropped."""
    last = checkpoint.newest(run.checkpoints)
    if not main:
        return last
    step = checkpoint.step_of(last) if last else 0
    for path in checkpoint.marked(run.checkpoints):
        if checkpoint.step_of(path) > step:  # a damaged one
            checkpoint.unmark(path)
    checkpoint.drop_incomplete(run.checkpoints)
    run.keep_until(step, run)
    return last
