"""A run or adapter folder as a subject: with its base where that can be loaded, else from the adapter's files alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from weftlora.errors import AdapterError, DataError, DivergedError, MissingExtraError, ModelError, WeftError
from weftlora.extras import needs
from weftlora.report.bare import bare_subject
from weftlora.report.subject import Rows, Start, Subject, live_subject
from weftlora.search import Selection
from weftlora.site import Site
from weftlora.spec import WeftConfig
from weftlora.terms.layers.search import search_of
from weftlora.train.adapter import adapt, adapter_config, saved_selection
from weftlora.train.checkpoint import marked
from weftlora.train.files import read_lines
from weftlora.train.load import Trained, borrowed, load_adapter, load_run, recipe_of
from weftlora.train.measure import batches
from weftlora.train.run import Run

if TYPE_CHECKING:
    from weftlora.data import DataConfig, Task

BATCH = 8
"""Rows per forward pass."""


def folder_subject(folder: str | Path, base: str | bool | None, data: str | None, limit: int) -> Subject:
    """The adapter in a run folder or an adapter folder.

    Args:
        base: where the base lies; None takes the folder's word and goes on without it if it is not there; False does not try.
        data: a file of rows to look at the routers with; a run has rows of its own.
        limit: rows per domain.

    Raises:
        AdapterError, ModelError: no adapter, a damaged one, or the base that was given cannot be used.
        DataError, ConfigError: `data` cannot be read.
    """
    path = Path(folder)
    run = _run_of(path)
    inside = run.adapter_folder if run is not None and (path / "run.json").is_file() else path
    if run is not None and not (inside / "adapter_config.json").is_file():
        instead = "".join(f", or look at its last checkpoint, {last}" for last in marked(run.checkpoints)[-1:])
        raise AdapterError(f"{path} has no adapter: the run is {run.status}; finish it with --resume{instead}.")
    subject = bare_subject(inside, str(folder))
    if base is not False:
        subject = _with_base(subject, run, inside, base if isinstance(base, str) else None, data, limit)
    else:
        subject.left_out.append("The base was not asked for, so nothing is said relative to W and no router was run.")
    if data is not None and subject.model is None:
        raise AdapterError(f"data={data!r} needs the base, which is not at hand: give it with base=... (--base).")
    return subject if run is None else _with_run(subject, run, inside)


def _run_of(path: Path) -> Run | None:
    """The run that a folder is, or lies in."""
    if not path.exists():
        raise AdapterError(f"there is no folder {str(path)!r}: give a run folder or an adapter folder.")
    holder = next(
        (p for p in (path, path.resolve().parent, path.resolve().parent.parent) if (p / "run.json").is_file()), None
    )
    return None if holder is None else Run.load(holder)


def _with_base(bare: Subject, run: Run | None, inside: Path, base: str | None, data: str | None, limit: int) -> Subject:
    """The same adapter on its base; the bare one, with the reason, where the base was only guessed and cannot be had."""
    drawn: list[Start] = []
    whole = run is not None and inside == run.adapter_folder
    try:
        if run is not None and whole:
            trained = load_run(run, base, at_the_start=lambda plain: drawn.extend(_drawn(run, plain)))
        else:
            trained = load_adapter(inside, base)
    except (ModelError, AdapterError, DivergedError) as error:
        if base is not None:
            raise
        bare.left_out.append(
            f"Everything relative to W, the routers and what this base can merge: the base was not read ({str(error).rstrip('.')})."
        )
        return bare
    subject = live_subject(trained.model, "default", bare.source)
    subject.config, subject.settings, subject.steps = bare.config, bare.settings, bare.steps
    subject.base = trained.base.config.path
    subject.start = drawn[0] if drawn else None
    if any(site.routed for site in subject.sites.values()):
        try:
            subject.rows = _rows(run, trained, data, limit)
        except (DataError, ModelError, MissingExtraError) as error:
            if data is not None:
                raise
            subject.left_out.append(f"Router usage: the run's rows cannot be read ({str(error).rstrip('.')}).")
    elif data is not None:
        subject.left_out.append(f"The rows of {data}: this adapter has no routers to run over them.")
    return subject


def _with_run(subject: Subject, run: Run, inside: Path) -> Subject:
    """What a run folder knows beyond its adapter."""
    subject.trained_by = run.recipe["adapter"].get("recipe") or "its axes"
    told = run.folder / "events.jsonl"
    subject.events, subject.events_from = read_lines(told), str(told)
    if inside != run.adapter_folder:  # a checkpoint: the run's events go on after it
        subject.events = [event for event in subject.events if event.get("step", 0) <= (subject.steps or 0)]
        return subject
    subject.steps = run.steps if run.status == "complete" else subject.steps
    try:
        if (run.folder / "selection.json").is_file():
            subject.selection = Selection.load(run.folder / "selection.json")
        elif isinstance(named := run.recipe["adapter"].get("layers"), str) and named.endswith(".json"):
            subject.selection = saved_selection(run.recipe["adapter"], Path(run.base_dir))
    except WeftError as error:
        subject.left_out.append(f"α and margins of the selected layers: {error}")
    return subject


# ---------------------------------------------------------------------- rows for the routers


def _rows(run: Run | None, trained: Trained, data: str | None, limit: int) -> Rows | None:
    if run is None and data is None:
        return None
    with needs("train", "running routers over rows"):
        from weftlora.data import Collator, load

        config, base_dir, labels, split, said = _which(run, data)
        loaded = load(config, trained.base.tokenizer, base_dir=base_dir, task=trained.task, labels=labels)
    rows = getattr(loaded, split)
    if rows is None or not len(rows):
        raise DataError(f"there are no {split} rows; give some with data=... (--data).")
    collate = Collator(cast(int, trained.base.tokenizer.pad_token_id))
    names = rows["domain"] if "domain" in rows.column_names else [""] * len(rows)
    kept: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        if len(chosen := kept.setdefault(str(name or ""), [])) < limit:
            chosen.append(index)
    keep = [name for name in ("input_ids", "attention_mask", "labels") if name in rows.column_names]
    parts = {
        name: [collate(batch) for batch in batches(rows.select(chosen).select_columns(keep), BATCH)]
        for name, chosen in sorted(kept.items())
    }
    count = sum(map(len, kept.values()))
    cut = f", the first {limit} of each domain" if "domain" in rows.column_names else f", the first {limit}"
    return Rows(f"{count} of {len(rows)} {said}{cut if count < len(rows) else ''}", count, parts)


def _which(run: Run | None, data: str | None) -> tuple[DataConfig, Path | None, list[str] | None, str, str]:
    """(data section, where its paths start, labels, split, how it is called): what is given, else the run's validation rows."""
    given = None if data is None else data if data == "demo" else str(Path(data).resolve())
    from weftlora.data import DataConfig

    if run is None:
        return DataConfig(train=cast(str, given), validation_fraction=0.0), None, None, "train", f"rows of {data}"
    recipe = recipe_of(run)
    labels = run.data["labels"]
    if given is not None:  # alone: the run's own files need not be there any more
        alone = {"train": given, "validation": None, "test": None, "validation_fraction": 0.0, "limit": None}
        split = "test" if given == "demo" else "train"
        return recipe.data.model_copy(update=alone), recipe.base_dir, labels, split, f"rows of {data}"
    own = recipe.data
    split = "validation" if own.validation or own.train == "demo" or own.validation_fraction > 0 else "test"
    return own, recipe.base_dir, labels, split, f"{split} rows of the run"


# ---------------------------------------------------------------------- where A started


def _drawn(run: Run, plain: PreTrainedModel) -> list[Start]:
    """A as the run drew it, drawn again; empty where that cannot be done.

    Called in the random state that the run's seed gives. Another torch may draw other numbers; after a search that restarts,
    the adapter was drawn from the seed anew.
    """
    recipe = recipe_of(run)
    try:
        selection = saved_selection(recipe.adapter, recipe.base_dir)
        config = adapter_config(recipe.adapter, run.steps, selection, recipe.from_folder)
    except WeftError:  # the selection that it was trained with is no longer where it was
        return []
    if run.versions.get("torch") != torch.__version__ or not isinstance(config, WeftConfig):
        return []
    if (search := search_of(config.layers)) is not None:
        if search.finetune != "restart" or not (run.folder / "selection.json").is_file():
            return []
        config.layers = Selection.load(run.folder / "selection.json").layers
        torch.manual_seed(run.seed)
    with borrowed(plain) as shell:
        sites = live_subject(adapt(cast(PreTrainedModel, shell), config, cast("Task", run.task)), "default", "").sites
        A = {name: f.A.detach().clone() for name, site in sites.items() for f in [site.structure.factors(1.0)]}
    return [Start("start drawn again", f"the start of A, drawn again from the run's seed {run.seed}", A)]


def _shape(site: Site) -> tuple[int, int]:
    """(out, in)."""
    factors = site.structure.factors(site.scale)
    return factors.B.shape[0], factors.A.shape[1]


def other_adapter(folder: str | Path, subject: Subject) -> Start:
    """A and B of another adapter (or an earlier state of this one), from its files.

    Raises:
        AdapterError: no adapter there, or none of its sites is one of this one's.
    """
    from weftlora.report.measure import factor

    path = Path(folder)
    run = _run_of(path)
    other = bare_subject(run.adapter_folder if run is not None and (path / "run.json").is_file() else path, str(folder))
    own = {name: _shape(site) for name, site in subject.sites.items()}
    both = {name: site for name, site in other.sites.items() if own.get(name) == _shape(site)}
    if not both:
        raise AdapterError(
            f"{folder} has no site in common with {subject.source}, by name and shape: give an adapter of the same base and "
            "targets."
        )
    if apart := len(other.sites) - len(both):
        subject.left_out.append(
            f"{apart} sites of {folder}: this adapter has none of their name and shape beside them."
        )
    found: dict[str, dict[str, Any]] = {
        part: {name: value for name, site in both.items() if (value := factor(site, part)) is not None} for part in "AB"
    }
    return replace(Start("adapter", f"the adapter {folder}"), A=found["A"], B=found["B"])
