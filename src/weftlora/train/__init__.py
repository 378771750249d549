"""Train a recipe, evaluate a run, generate from it. Heavy modules load on the first call, not on import."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from weftlora.data.paths import is_model, locate
from weftlora.errors import ConfigError
from weftlora.extras import needs
from weftlora.progress import Progress, Tick, ignore
from weftlora.runs.run import Run

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from weftlora.runs.recipe import Recipe
    from weftlora.train.evaluation import Conversation, Evaluation, Generation
    from weftlora.train.previewing import Preview

__all__ = ["Progress", "Run", "Tick", "chat", "evaluate", "generate", "newest_checkpoint", "preview", "train"]


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *overrides: str,
    resume: bool = False,
    extend: bool = False,
    overwrite: bool = False,
    verify_base: bool = True,
    progress: Progress = ignore,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train an adapter and return its run; everything is in the run folder `out`.

    Args:
        recipe: a recipe file, a built-in name, a mapping or a `Recipe`; with `resume`, also a run folder.
        overrides: `key=value` with dots, such as `train.lr=1e-3`; values are YAML.
        resume: continue the run in `out` from its newest complete checkpoint. On a CPU the final adapter is the
            uninterrupted run's, bit for bit. A complete run is returned as it is.
        extend: go on with a complete run, whose folder `recipe` is, to the longer `train.steps` of the overrides: a new run, by
            default in a folder of its name and those steps, from the last checkpoint, with its optimiser. The schedule begins again
            over the added steps, so it is not the run that would have been.
        overwrite: replace an earlier run in `out`; your own files in it stay.
        verify_base: identify the base's weights by their content, in the background. False on network disks that are slow to read;
            the run records it, and a base whose values were changed later is then found by a sample of them only.
        progress: called with a `Tick` after every optimiser step.
        callbacks: further transformers callbacks.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work; nothing was written.
        RunError: the run folder is in use, cannot be written, or is not one to resume.
    """
    with needs("train", "weftlora.train"):
        from weftlora.runs.recipe import asked, asked_to_extend

        if extend and resume:
            raise ConfigError("resume continues a run as it was, and extend makes it longer: give one of them.")
        read, before = asked_to_extend(recipe, overrides) if extend else asked(recipe, overrides, resume)
        from weftlora.train import loop

        return loop.train(
            read,
            None if extend else before,
            overwrite,
            verify_base,
            progress,
            callbacks,
            extends=before if extend else None,
        )


def preview(
    recipe: str | Path | Mapping[str, Any] | Recipe | Run,
    *overrides: str,
    model: bool = True,
    rows: int = 3,
    progress: Progress = ignore,
) -> Preview:
    """Look at what a recipe will train on: rows of each file, what was cut and dropped, lengths, what is learned, time and memory.

    Nothing is written. Time and memory are measured by a few passes of the recipe's own model over its rows, on this machine.

    Args:
        recipe: as for `train`; also a run or its folder.
        model: load the model; without it no time and no memory are estimated.
        rows: training rows to show as the model is given them.
        progress: called with a `Tick` after every pass.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work.
    """
    with needs("train", "weftlora.preview"):
        if isinstance(recipe, (str, Path)) and not (Path(recipe) / "run.json").is_file():
            from weftlora.runs.recipe import asked

            asked(recipe, overrides)
        from weftlora.train import previewing as module

        return module.preview(recipe, overrides, model, rows, progress)


def evaluate(
    run: Run | str | Path | Recipe,
    *overrides: str,
    split: str | None = None,
    limit: int | None = None,
    adapter: str = "trained",
    base: str | None = None,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    answers: bool = True,
    progress: Progress = ignore,
) -> Evaluation:
    """Measure a run on held-out rows and write `eval-<split>.json` into its folder (not where `limit` cuts the rows).

    Args:
        run: a run or its folder; an adapter folder, or a model by itself, for which nothing is written; with `adapter="none"` also
            a recipe, whose frozen base is measured.
        overrides: `key=value` changes to the recipe's data section. An adapter folder out of its run, and a model, are measured on
            the rows of `data.test=FILE` or `data.validation=FILE`.
        split: `test` or `validation`; without it the test rows, or the validation rows where there are none.
        limit: at most so many rows, the first ones.
        adapter: `trained`, or `none` for the frozen base of a run (`eval-<split>-base.json`).
        base: where the base lies now, if not where it was trained on.
        batch_size: rows at a time; the recipe's by default.
        max_new_tokens: bound of the answers compared with their references; the longest reference and one more by default.
        answers: whether to generate answers, which may take far longer than the loss; without them there is no exact match, BLEU
            or ROUGE-L.
        progress: called with a `Tick` after every batch.

    Raises:
        AdapterError: no adapter, a newer format, or another base than the adapter's own.
        ConfigError, DataError, ModelError, RunError: as their names say.
    """
    with needs("train", "weftlora.evaluate"):
        _check_source(run, adapter == "none")
        from weftlora.train import evaluation as module

        return module.evaluate(
            run, overrides, split, limit, adapter, base, batch_size, max_new_tokens, answers, progress
        )


def generate(
    run: Run | str | Path,
    prompt: str | Sequence[Mapping[str, Any]] | Mapping[str, Any],
    *,
    system: str | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    raw: bool = False,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    base: str | None = None,
) -> Generation:
    """Answer a prompt with a run, its folder, a bare adapter folder, or a model by itself (`smollm2`, a GGUF file, a folder).

    What the run was trained on decides what a text becomes: the user's turn in the chat template, the prompt template filled in, or
    the text as it stands.

    Args:
        prompt: a text; chat messages; or the columns of `data.prompt_template`, by name.
        system: a system turn before it, for runs that were trained on conversations.
        tools: the tools that it may call, as rows have them in `tools`; for runs that were trained on conversations.
        raw: take the text as it stands, whatever the run was trained on.
        temperature: 0 is greedy; above, tokens are sampled with `seed`.
        base: where the base lies now, if not where the adapter says.

    Raises:
        AdapterError: no adapter, a newer format, or another base than the adapter's own.
        ConfigError, DataError: a prompt that the run has no place for.
        ModelError: the base is missing, or the run is a classifier.
    """
    _check_speaks(run)
    with needs("train", "weftlora.generate"):
        from weftlora.train import evaluation as module

        return module.generate(run, prompt, system, raw, max_new_tokens, temperature, seed, base, tools)


def chat(
    run: Run | str | Path,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    base: str | None = None,
) -> Conversation:
    """Open a run to talk to: `weftlora.chat(run).say("hello").text`, turn after turn, with the model loaded once.

    A model by itself (`smollm2`, a GGUF file, a folder) answers as it does before it is trained, in its chat template if it has one.

    Args:
        system: a system turn before all others, for runs that were trained on conversations.
        temperature: 0 is greedy; above, tokens are sampled with `seed`.
        base: where the base lies now, if not where the adapter says.

    Raises:
        AdapterError: no adapter, a newer format, or another base than the adapter's own.
        ConfigError: a system turn for a run that has no place for one.
        ModelError: the base is missing, or the run is a classifier.
    """
    _check_speaks(run)
    with needs("train", "weftlora.chat"):
        from weftlora.train import evaluation as module

        return module.chat(run, system, max_new_tokens, temperature, seed, base)


def _check_speaks(source: Run | str | Path) -> None:
    """Whether there is a run, an adapter or a model to talk to, before anything that takes seconds to load."""
    if isinstance(source, Run):
        return
    if is_model(source):
        locate(str(source), Path.cwd())
    elif not (Path(source) / "adapter_config.json").is_file():
        Run.load(source)  # says what the folder lacks


def _check_source(source: Run | str | Path | Recipe, bare: bool) -> None:
    """Whether there is a run, or a recipe for its frozen base, before anything that takes seconds to load."""
    if not isinstance(source, (str, Path)):
        return
    if (
        Path(source).is_dir()
        or is_model(source)
        or (not bare and Path(source).suffix not in (".yaml", ".yml") and not Path(source).exists())
    ):
        _check_speaks(source)
    elif bare:
        from weftlora.runs.recipe import asked

        asked(source)


def newest_checkpoint(checkpoints: str | Path) -> Path | None:
    """The newest complete checkpoint below a folder, or None; half-written ones do not count.

    For `trainer.train(resume_from_checkpoint=...)` of your own Trainer with `weftlora.Callback`.

    Raises:
        RunError: a newer one was written by a Trainer without it, so nobody knows whether it is complete.
    """
    from weftlora.train import checkpoint

    return checkpoint.newest(checkpoints)


class _Callable(ModuleType):
    """`weftlora.train` is a package and the public function: importing the first must not hide the second."""

    def __call__(self, *args: Any, **kwargs: Any) -> Run:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
