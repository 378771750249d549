"""`weftlora.directions`: what adapters do along the core directions of W, for adapters in memory or in folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from weftlora.adapted.frozen_weights import Checkpoint, Decomposer
from weftlora.adapted.updates import adapter_names, base_matrix, base_of, is_transposed, read_updates
from weftlora.errors import AdapterError, ModelError
from weftlora.foreign_text import from_json
from weftlora.inspection.core_directions import DirectionsReport, Question, TrueUpdate, Updates, measure
from weftlora.progress import Progress, Tick, ignore
from weftlora.runs.base_model import Fingerprint, check_same, fingerprint
from weftlora.runs.load import borrowed, load_base, load_run, put_in
from weftlora.runs.run import Run, adapter_in

Folder = str | Path
Inputs = Iterable[Mapping[str, Any]]


def directions(
    model: nn.Module | Folder,
    adapter: Folder | Sequence[Folder] | None = None,
    *,
    against: Folder | None = None,
    directions: int = 8,
    full: bool = False,
    seed: int = 0,
    inputs: Inputs | None = None,
    original: Folder | None = None,
    cache: Folder | None = None,
    progress: Progress = ignore,
) -> DirectionsReport:
    """How far adapters move each core direction of the frozen weights, and whether they predict where training goes.

    Args:
        model: a model with adapters in it; a base model or its folder, for adapters in folders; or, alone, a run folder or
            an adapter folder, which know their base.
        adapter: names of adapters in `model` (by default the active ones), or run or adapter folders. Of several, the
            overlap of their directions is measured too.
        against: what the predicted directions are held against: a later adapter of the same base (a name or a folder), or
            the folder of a model that was fine-tuned in full from it.
        directions: s, how many directions are predicted; true are the first s/2 and 2s.
        full: keep σ and change rate of every core direction, not only of the first s.
        seed: of the directions drawn at random as a control.
        inputs: batches (keyword arguments of a forward) over which the gate of a HydraLoRA adapter is averaged.
        original: folder of the checkpoint that a quantised base was made from; its weights are decomposed instead.
        cache: folder that keeps decompositions; without it, the one that WEFT_CACHE names.
        progress: called with a `Tick` after every site.

    Returns:
        A report of plain numbers; `report.record()` is what the command line writes.

    Raises:
        AdapterError: no adapter there, one that has no ΔW of factors, or one of another base.
        ConfigError: `directions` is no number of directions.
        ModelError: a base or a full fine-tune that is missing or of another architecture.
    """
    question = Question(directions, full, seed)
    given = [adapter] if isinstance(adapter, (str, Path)) else list(adapter or [])
    if isinstance(model, nn.Module) and adapter_names(model)[0]:
        base, updates, truth = _in_memory(model, given, against, inputs)
    else:
        base, updates, truth = _in_folders(model, given, against, inputs)
    names = [name for name, _ in base_of(base).named_modules() if any(name in u for u in updates.values())]
    return measure(
        {name: _reader(base, name, original) for name in names},
        updates,
        question,
        Decomposer(None if cache is None else Path(cache)),
        truth,
        None if against is None else str(against),
        lambda done, total: progress(Tick("decomposing", done, total)),
    )


def _reader(base: nn.Module, name: str, original: Folder | None) -> Callable[[], tuple[Tensor, str]]:
    if original is None:
        return lambda: base_matrix(base, name)
    checkpoint = Checkpoint(original)
    return lambda: (_stored(base, name, checkpoint), "original")


def _stored(base: nn.Module, name: str, checkpoint: Checkpoint) -> Tensor:
    """W [out, in] of a module as a checkpoint has it, on the device of the base."""
    stored, (here, _) = checkpoint.read(name).to(torch.float32), base_matrix(base, name)
    w = stored.T if is_transposed(base, name) else stored
    if w.shape != here.shape:
        raise ModelError(
            f"{name} is {list(w.shape)} in {checkpoint.folder} and {list(here.shape)} in the base: give a model of the same "
            "architecture."
        )
    return w.to(here.device)


# ---------------------------------------------------------------------- adapters in memory


def _in_memory(
    model: nn.Module, given: list[Folder], against: Folder | None, inputs: Inputs | None
) -> tuple[nn.Module, dict[str, Updates], TrueUpdate | None]:
    names, active = adapter_names(model)
    batches = None if inputs is None else list(inputs)

    def read(name: Folder) -> Updates:
        if str(name) not in names:
            raise AdapterError(
                f"the model has the adapters {', '.join(names)} and no {str(name)!r}: give one of these, or load that one with "
                "model.load_adapter first."
            )
        return read_updates(model, str(name), batches)

    updates = {str(name): read(name) for name in given or active}
    if against is None:
        return model, updates, None
    if str(against) not in names and _is_model(Path(against)):
        return model, updates, _full(model, Path(against))
    return model, updates, _later(read(against), str(against))


# ---------------------------------------------------------------------- adapters in folders


@dataclass(frozen=True)
class _Saved:
    """An adapter folder, and the run it belongs to where there is one."""

    label: str
    folder: Path
    run: Run | None

    @classmethod
    def at(cls, folder: Folder) -> _Saved:
        path = Path(folder)
        inside = adapter_in(path)
        if not (inside / "adapter_config.json").is_file():
            raise AdapterError(
                f"{folder} is not an adapter: give a run folder or a folder with an adapter_config.json."
            )
        holder = next((p for p in (inside.parent, inside.parent.parent) if (p / "run.json").is_file()), None)
        return cls(str(folder), inside, None if holder is None else Run.load(holder))


def _in_folders(
    model: nn.Module | Folder, given: list[Folder], against: Folder | None, inputs: Inputs | None
) -> tuple[nn.Module, dict[str, Updates], TrueUpdate | None]:
    if not given:
        if isinstance(model, nn.Module):
            raise AdapterError("the model has no adapter: give the folder of one as the second argument.")
        given = [model]
    saved = [_Saved.at(folder) for folder in given]
    later = None if against is None or _is_model(Path(against)) else _Saved.at(against)
    if isinstance(model, nn.Module):
        base, source = model, type(model).__name__
    else:
        first, path = saved[0], None if model is given[0] else str(model)
        found = load_base(first.folder, path) if first.run is None else load_run(first.run, path, adapted=False)
        base, source = found.model, found.base.source
    batches = None if inputs is None else list(inputs)

    def read(one: _Saved) -> Updates:
        if one.run is not None and isinstance(base, PreTrainedModel):
            trained = Fingerprint.of(one.run.base)
            check_same(trained, fingerprint(base), one.label, source)
        with borrowed(base) as shell:
            return read_updates(put_in(cast(PreTrainedModel, shell), one.folder), "default", batches)

    updates = {one.label: read(one) for one in saved}
    if against is None:
        return base, updates, None
    return base, updates, _full(base, Path(against)) if later is None else _later(read(later), later.label)


# ---------------------------------------------------------------------- what the prediction is held against


def _later(updates: Updates, label: str) -> TrueUpdate:
    def truth(name: str) -> Any:
        if name not in updates:
            raise AdapterError(
                f"{label} has no update at {name}, so nothing to compare with: give one of the same targets."
            )
        return updates[name]

    return truth


def _full(base: nn.Module, folder: Path) -> TrueUpdate:
    """ΔW of a full fine-tune: its weights less the base's, a site at a time."""
    own, kind = getattr(base_of(base), "config", None), _model_type(folder)
    if kind is not None and own is not None and own.model_type != kind:
        raise ModelError(f"{folder} is a {kind} and the base a {own.model_type}: give a fine-tune of the same base.")
    checkpoint = Checkpoint(folder)
    return lambda name: _stored(base, name, checkpoint).double() - base_matrix(base, name)[0].double()


def _is_model(folder: Path) -> bool:
    """Whether this is the folder of a whole model, not of an adapter or a run."""
    adapter = (folder / "adapter_config.json").is_file() or (folder / "run.json").is_file()
    return not adapter and (folder / "config.json").is_file()


def _model_type(folder: Path) -> str | None:
    try:
        return str(from_json((folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (OSError, ValueError, KeyError):
        return None
