"""One training run, from a recipe to a run folder.

    prepare (nothing written) → run folder → [search of layers] → Trainer → adapter/ → run.json says complete

Whatever fails before the first step leaves no folder; whatever fails later leaves one that --resume continues.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib.metadata
import logging
import math
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback

from weftlora.adapted.updates import base_of
from weftlora.adapter.shards import is_sharded
from weftlora.data import sampled
from weftlora.disk.lock import claimed
from weftlora.disk.ownership import check_no_links
from weftlora.errors import ConfigError, DivergedError, RunError, WeftError
from weftlora.host.attach import warn_of_missing
from weftlora.progress import Progress
from weftlora.runs import identity, quantisation
from weftlora.runs.adapter import parameters, write_adapter
from weftlora.runs.recipe import Recipe
from weftlora.runs.run import Made, Run, check_free, is_run, now, settle
from weftlora.runs.scores import accuracy, mean_loss
from weftlora.schedule import processes
from weftlora.train import ahead, arguments, checkpoint, costs, extending, layer_search, sampling
from weftlora.train.costs import announce_measuring, timed
from weftlora.train.prepare import Prepared, begun_from, prepare
from weftlora.train.resuming import check_can_resume, check_same_input, resume_point, with_as_many_rows
from weftlora.train.sharded import whole_adapter, whole_sites
from weftlora.train.trainer import make_trainer
from weftlora.version import __version__

log = logging.getLogger(__name__)
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}
COMMAND = "weftlora train"
"""What the lock of a run's folder says is at work there."""
PACKAGES = ("weftlora", "torch", "peft", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers")


def train(
    recipe: Recipe,
    before: Run | None,
    overwrite: bool,
    verify_base: bool,
    progress: Progress,
    callbacks: Sequence[TrainerCallback],
    extends: Run | None = None,
) -> Run:
    """See `weftlora.train.train`; `recipe` and the run to continue or to extend as `recipe.asked` and `asked_to_extend` give them."""
    if before is not None and before.status == "complete":
        return before
    with contextlib.ExitStack() as held:
        folder = Path(recipe.out).expanduser()
        main = int(os.environ.get("RANK", "0")) == 0
        there = main and is_run(folder)
        if there:
            held.enter_context(claimed(folder, COMMAND))
            settle(folder)
        if before is not None:
            check_no_links(folder)
            before = Run.load(folder)  # another process may have gone on with it meanwhile
        elif main:
            check_free(folder, overwrite)

        def claim() -> None:
            """Make a new folder, which another process may have done meanwhile."""
            if main and not there:
                held.enter_context(claimed(folder, COMMAND))
                check_free(folder, overwrite)

        return _train(recipe, before, claim, verify_base, progress, callbacks, extends)


def _train(
    recipe: Recipe,
    before: Run | None,
    claim: Callable[[], None],
    verify_base: bool,
    progress: Progress,
    callbacks: Sequence[TrainerCallback],
    extends: Run | None,
) -> Run:
    """Train, or go on with `before`, or with `extends` for longer.

    `claim` is called once all that can be wrong was looked at, before anything is written.
    """
    folder = Path(recipe.out).expanduser()
    main = int(os.environ.get("RANK", "0")) == 0
    started = time.monotonic()
    begins = 0 if before is None else before.extends.get("step", 0)
    if extends is not None and (newest := checkpoint.newest(extends.checkpoints)) is not None:
        begins = checkpoint.step_of(newest)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    shared = recipe if before is None else with_as_many_rows(recipe, before, world)
    prepared = prepare(shared, None if before is None else before.adapter, begins)
    if prepared.adapter is None:
        raise ConfigError(
            "adapter none trains nothing: use `weftlora eval RECIPE --adapter none` to measure the frozen base."
        )
    samples = sampling.asked(prepared)  # what is wrong with them is said before anything is written
    run = _describe(prepared, prepared.adapter, folder, round(time.monotonic() - started, 3))
    last = None
    if before is not None:
        check_same_input(before, run, prepared)
        check_can_resume(before)
        begun = {**run.recipe["train"], "accumulation": recipe.train.accumulation}
        run = dataclasses.replace(
            run, extends=before.extends, processes=before.processes, recipe={**run.recipe, "train": begun}
        )
    if extends is not None:
        check_same_input(extends, run, prepared)
        extending.check_schedule(prepared.recipe.train)
        last = extending.point(extends, run.steps)
        run = dataclasses.replace(run, extends=extending.described(extends, last))
    validate = prepared.data.validation is not None
    args = arguments.arguments(prepared.recipe.train, run.checkpoints, run.steps, validate, before=begins)
    arguments.check_made(args, prepared.model)
    if main and verify_base:
        source = before or extends or begun_from(prepared.recipe)  # on whose base this run goes on
        known = None if source is None else source.base.get("weights")
        expected = known if isinstance(known, dict) else None
        prepared = dataclasses.replace(
            prepared, weights=identity.Weights(prepared.base.source, expected, str(run.adapter_folder))
        )
    elif not verify_base:
        run.base["weights"] = identity.NOT_VERIFIED
    claim()
    with _recorded(main) as record, _sentences(record, run):
        with _started(record, run, before, main, prepared.defaults):
            if extends is not None and last is not None and main:
                said = extending.sentence(run.extends, prepared.recipe.train, run.steps)
                extending.take_over(extends, run, last)
                run.event("extend", steps=run.steps, **run.extends, said=said)
                log.info("%s", said)
            search = layer_search.begin(prepared, run, args, main)
            if search is None:
                trainer = make_trainer(prepared, run, args, progress, callbacks, samples)
        _announce(run, prepared)
        if main:
            for line in ahead.lines(prepared, None if search is None else search.search):
                log.info("%s", line)

        def start() -> tuple[Trainer, Prepared, Run]:
            if search is None:
                return trainer, prepared, run
            selected, described = search.finish(before is not None or extends is not None, progress)
            return make_trainer(selected, described, args, progress, callbacks, samples), selected, described

        return _run_trainer(record, start, run, before is not None or extends is not None, main, progress)


def _describe(prepared: Prepared, adapter: PeftConfig, folder: Path, load_seconds: float) -> Run:
    recipe, data = prepared.recipe, prepared.data
    return Run(
        folder=folder,
        status="running",
        recipe=recipe.model_dump(mode="json"),
        base_dir=str(recipe.base_dir),
        task=prepared.task,
        seed=recipe.train.seed,
        steps=prepared.steps,
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        device=arguments.device(),
        threads=torch.get_num_threads(),
        base={
            "source": prepared.base.source,
            **dataclasses.asdict(prepared.fingerprint),
            "config": identity.config_digest(prepared.base.settings, prepared.base.source),
            "tokenizer": identity.tokenizer_digest(prepared.base.source),
            **identity.quantised(prepared.base.source),
            **quantisation.described(base_of(prepared.model)),
        },
        adapter=_plain(adapter.to_dict()),
        parameters=parameters(prepared.model),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        data={
            "format": data.format,
            "max_length": data.max_length,
            "hashes": data.hashes,
            "counts": {name: dataclasses.asdict(count) for name, count in data.counts.items()},
            "domains": data.domains,
            "labels": data.labels,
            "measured": 0 if prepared.measured_on is None else len(prepared.measured_on),
        },
        time={"started": now(), "load_seconds": load_seconds},
    )


def _announce(run: Run, prepared: Prepared) -> None:
    """What was read, what was decided, and what is trained, for whoever listens to the `weftlora` logger."""
    for split, count in run.data["counts"].items():
        extra = ", ".join(f"{count[key]:,} {key}" for key in ("empty", "repeated") if count[key])
        log.info("%s: %d rows, %d tokens%s", split, count["rows"], count["tokens"], f" ({extra})" if extra else "")
    for line in prepared.data.columns:
        log.info("%s", line)
    log.info("the first row, what is learned in ⟦ ⟧: %s", sampled(prepared.data.train, prepared.base.tokenizer))
    if prepared.recipe.data.packing:
        how = getattr(prepared.model.config, "_attn_implementation", None)
        log.info(
            "packed rows: %s",
            f"a batch is one row without padding ({how})"
            if prepared.flat
            else f"a batch is padded to its longest, since {how} attention works on a mask "
            "(model.attn_implementation=flash_attention_2 on a GPU leaves the padding out)",
        )
    added, warmup = run.steps - run.extends.get("step", 0), prepared.recipe.train.warmup
    if warmup >= 1 and warmup >= added:
        log.warning(
            "train.warmup=%g is no less than the %d steps of this run, so that its rate never gets to train.lr: give fewer, or "
            "a fraction",
            warmup,
            added,
        )
    for sentence in lost_rows(run):
        log.warning("%s", sentence)
    if prepared.defaults:
        log.info("by default: %s", "; ".join(prepared.defaults))
    if prepared.data.validation is not None:
        every = prepared.recipe.train.eval_every
        log.info(
            "validation loss: of %d of %d validation rows, %s%s",
            run.data["measured"],
            len(prepared.data.validation),
            f"every {every} steps and at the end" if every else "once, at the end",
            "" if run.data["measured"] == len(prepared.data.validation) else " (train.eval_rows=all takes all)",
        )
    trained, total = run.parameters["trainable"], run.parameters["total"]
    log.info(
        "training %s of %s parameters (%.2f %%) into %s",
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
        run.folder,
    )


def lost_rows(run: Run) -> list[str]:
    """A sentence for every split that lost rows, or parts of rows, to the length that they are held to."""
    said = []
    for split, count in run.data["counts"].items():
        dropped, cut, whole = count["dropped"], count["truncated"], count["kept"] + count["dropped"]
        parts = [f"{dropped:,} were dropped, since their answer does not fit"] if dropped else []
        parts += [f"{cut:,} were cut"] if cut else []
        if parts:
            said.append(
                f"{split}: of {whole:,} rows, {' and '.join(parts)} (data.max_length={run.data['max_length']}): raise "
                "data.max_length, or choose with data.truncate what is cut"
            )
    return said


def version(package: str) -> str:
    """The version of a package that runs, or `missing`."""
    if package == "weftlora":
        return __version__  # metadata of an editable installation is that of the day it was installed
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _plain(value: Any) -> Any:
    """A config as JSON has it: sets sorted, enums as their values."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(inner) for inner in value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return str(getattr(value, "value", value))


@dataclasses.dataclass
class _Record:
    """What run.json says of this process; nothing, before there is one or once it was taken back."""

    run: Run | None = None
    trainer: Trainer | None = None


@contextlib.contextmanager
def _recorded(main: bool) -> Iterator[_Record]:
    """Whatever ends the process after its first run.json, the last one says so; only SIGKILL leaves `running`."""
    record = _Record()
    try:
        yield record
    except BaseException as error:
        if main and record.run is not None:
            step = 0 if record.trainer is None else record.trainer.state.global_step
            _record_failure(record.run, error, step)
        raise


@contextlib.contextmanager
def _started(record: _Record, run: Run, before: Run | None, main: bool, defaults: Sequence[str]) -> Iterator[None]:
    """The run folder with its first run.json; if the start fails, a new folder is removed again."""
    if not main:
        yield
        return
    if before is not None:
        record.run = run
        run.save()
        run.event("resume", steps=run.steps)
        yield
        return
    made = Made(run.folder)
    try:
        run.save()
        run.event("start", steps=run.steps, defaults=list(defaults))
        yield
        record.run = run
    except BaseException:
        made.undo()
        raise
    made.keep()


def _run_trainer(
    record: _Record,
    start: Callable[[], tuple[Trainer, Prepared, Run]],
    run: Run,
    resume: bool,
    main: bool,
    progress: Progress,
) -> Run:
    """Search layers where the recipe does, train, save the adapter, measure; run.json then says that it is complete."""
    last = resume_point(run, main) if resume else None
    trainer, prepared, run = start()
    record.trainer, record.run = trainer, run
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    took: dict[str, Any] = {"train_seconds": round(timed(trainer.state).train_seconds, 3), "finished": now()}
    if resume and not (run.extends and last and checkpoint.step_of(last) == run.extends["step"]):
        took["resumed_from"] = checkpoint.step_of(last) if last else 0
    warn_of_missing(prepared.model, over=True)
    metrics = _final(trainer, prepared, progress)
    _check_finite(metrics)
    metrics |= _kept(trainer, prepared)
    run = dataclasses.replace(run, metrics=metrics, status="complete", time=run.time | took)
    split = is_sharded(prepared.model)
    with whole_sites(prepared.model):  # nothing below waits for the other processes
        if main:
            run.check_there()
            prepared.name_weights(run)
            write_adapter(prepared.model, run, whole_adapter(prepared.model) if split else None)
            run = dataclasses.replace(run, figures=costs.measured(prepared, run, trainer.state))
            run.event("end", step=trainer.state.global_step)
            run.save()
    return run


def _record_failure(run: Run, error: BaseException, step: int) -> None:
    status = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
    with contextlib.suppress(RunError):  # a full disk may be why we are here
        run.check_there()
        if Run.load(run.folder).status == "complete":  # a signal between the last write and the return
            return
        checkpoint.drop_incomplete(run.checkpoints)
        dataclasses.replace(run, status=status, metrics={}, figures={}).save()
        run.event(status, step=step)


@contextlib.contextmanager
def _sentences(record: _Record, run: Run) -> Iterator[None]:
    """Failures of the disk and of memory inside Trainer, as one sentence each."""
    try:
        yield
    except WeftError:
        raise
    except torch.OutOfMemoryError:
        raise RunError(
            "the GPU is out of memory: lower train.batch_size or set train.gradient_checkpointing=true."
        ) from None
    except (OSError, SafetensorError) as error:
        if record.run is not None:
            record.run.check_there()
        if isinstance(error, OSError) and error.errno not in _DISK:
            raise
        raise RunError(
            f"cannot write below {run.folder}: {_reason(error)}; free space and continue with --resume."
        ) from error
    except RuntimeError as error:
        if record.run is not None:
            record.run.check_there()
        if processes.world() > 1 and processes.ends_a_wait(error):
            raise RunError(
                "another process of this run has ended, and its own log says why: start all of them again with --resume."
            ) from error
        if not _is_of_saving(error):
            raise
        raise RunError(
            f"a checkpoint could not be written into {run.folder}: the disk refused it; free space on it and continue with --resume."
        ) from error


def _is_of_saving(error: BaseException) -> bool:
    """Whether torch was writing a file: what a disk does to it then is a RuntimeError, which has many texts and no number."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(code.co_name == "save" and Path(code.co_filename).name == "serialization.py" for code in frames)


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0].rstrip(".").lower()


def _check_finite(metrics: dict[str, float]) -> None:
    for name in ("train_loss", "validation_loss"):
        if not math.isfinite(metrics.get(name, 0.0)):
            raise DivergedError(
                f"the run has diverged ({name} is {metrics[name]}): lower train.lr, or set train.warmup."
            )


def _kept(trainer: Trainer, prepared: Prepared) -> dict[str, float]:
    """Where training ended and which step's adapter is kept, where it is not simply the last."""
    if not arguments.keeps_best(prepared.recipe.train):
        return {}
    best = trainer.state.best_model_checkpoint
    kept = {"best_step": checkpoint.step_of(Path(best))} if best else {}
    return kept | {"last_step": trainer.state.global_step}


def _final(trainer: Trainer, prepared: Prepared, progress: Progress) -> dict[str, float]:
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    metrics: dict[str, float] = {"tokens": trainer.state.num_input_tokens_seen}
    metrics |= {"train_loss": losses[-1]} if losses else {}
    rows = prepared.measured_on
    if rows is None or not len(rows):
        return metrics
    size = prepared.recipe.train.batch_size
    announce_measuring(timed(trainer.state), rows)
    measured = mean_loss(prepared.model, rows, prepared.collator, size, progress)
    metrics |= {"validation_loss": measured.loss}
    if measured.predicted:
        return metrics | {"validation_accuracy": accuracy(measured.predicted, rows["labels"])}
    return metrics | ({"validation_perplexity": measured.perplexity} if math.isfinite(measured.perplexity) else {})
