"""A run or adapter folder as what is inspected: with its base where that can be loaded, else from the adapter's files alone.

Without a base, shapes come from the tensors and all else from the config beside them. Only a tied site that keeps no tensor of its
own has a shape that no file knows; such sites are counted, not shown.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from weftlora.adapted.attention import PARTS
from weftlora.adapted.sharing import shared_keys
from weftlora.adapted.targets import by_pattern, rank_and_alpha
from weftlora.adapted.updates import Update
from weftlora.adapter.site import Owners, Site, build_batch, build_site
from weftlora.adapter.spec import WeftConfig, read_config
from weftlora.disk.files import check_regular, read_lines
from weftlora.errors import AdapterError, DataError, DivergedError, MissingExtraError, ModelError, WeftError
from weftlora.extras import needs
from weftlora.foreign_text import from_json
from weftlora.inspection.subject import Rows, Start, Subject, live_subject, plain_site, unread_tensors
from weftlora.runs.adapter import adapt, adapter_config, saved_selection
from weftlora.runs.load import Trained, borrowed, load_adapter, load_run, recipe_of
from weftlora.runs.run import Run
from weftlora.runs.scores import batches
from weftlora.search import Selection
from weftlora.terms.structure import StructureTerm
from weftlora.train.checkpoint import marked

if TYPE_CHECKING:
    from weftlora.data import DataConfig, Task


MARK = ".weft_site."
STRUCTURE = "structure."
LETTERS = ("A", "B")
"""The parts that a site's shape can be told by."""
Tensors = dict[str, Tensor]


def bare_subject(folder: Path, source: str) -> Subject:
    """The adapter in `folder`, from its two files.

    Raises:
        AdapterError: no adapter there, a damaged or newer one, or one that is neither weftlora's nor plain LoRA.
    """
    kind, settings = _settings(folder)
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"the adapter {folder} cannot be read ({error}): it needs an adapter_model.safetensors."
        ) from None
    named = {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}
    subject = Subject(source, "default", settings, {})
    try:
        if kind == "WEFT":
            config = read_config(folder)
            subject.config, subject.settings = config, config.to_dict()
            _read_weft(subject, config, named)
        else:
            _read_stock(subject, named)
    except WeftError:
        raise
    except (KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError, ArithmeticError) as error:
        raise AdapterError(
            f"the tensors of {folder} do not fit its config ({' '.join(str(error).split())[:200]}): save the adapter again."
        ) from None
    if not subject.sites:
        raise AdapterError(
            f"the adapter {folder} has no tensor of an adapted module: it is empty or damaged, save it again."
        )
    return subject


def _settings(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "adapter_config.json"
    check_regular(folder, AdapterError)
    try:
        settings = from_json(path.read_text(encoding="utf-8"))
        kind = str(settings["peft_type"])
    except (OSError, ValueError, KeyError, TypeError):
        raise AdapterError(
            f"{folder} has no adapter_config.json that describes an adapter: give a run or adapter folder."
        ) from None
    if kind not in ("WEFT", "LORA") or settings.get("use_dora"):
        name = "DoRA" if settings.get("use_dora") else kind
        raise AdapterError(
            f"{folder} is an adapter of the kind {name}: weftlora inspects its own adapters and plain LoRA."
        )
    return kind, settings


def _read_stock(subject: Subject, named: Tensors) -> None:
    subject.stock, settings = True, subject.settings
    ranks, alphas = settings.get("rank_pattern") or {}, settings.get("alpha_pattern") or {}
    for key, a in named.items():
        name, marked, _ = key.partition(".lora_A.")
        if not marked:
            continue
        r = by_pattern(ranks, name, settings["r"])
        alpha = by_pattern(alphas, name, settings["lora_alpha"])
        scale = alpha / (r**0.5 if settings.get("use_rslora") else r)
        b = named[f"{name}.lora_B.weight"]
        if (
            a.dim() != 2
            or b.dim() != 2
            or len(a) != b.shape[1]
            or not (a.is_floating_point() and b.is_floating_point())
        ):
            raise ValueError(f"A {list(a.shape)} and B {list(b.shape)} of {name} are not factors of one update")
        subject.sites[name] = plain_site(Update(a.double(), scale * b.double()))
    subject.sites = {name: subject.sites[name] for name in sorted(subject.sites, key=_as_counted)}
    subject.saved_modules = sum(t.numel() for key, t in named.items() if ".lora_" not in key)
    others = (key for key in named if ".lora_" in key and not key.endswith((".lora_A.weight", ".lora_B.weight")))
    subject.left_out += unread_tensors(others)


def _read_weft(subject: Subject, config: WeftConfig, named: Tensors) -> None:
    by_site: dict[str, Tensors] = {}
    for key, tensor in named.items():
        name, marked, inside = key.partition(MARK)
        if marked:
            by_site.setdefault(name, {})[inside] = tensor
        else:
            subject.saved_modules += tensor.numel()
    subject.steps = next((int(t["steps"]) for t in by_site.values() if "steps" in t), None)
    sizes = {name: _size(config, name, tensors) for name, tensors in by_site.items()}
    if config.structure.shares:
        sizes = _shared_sizes(config, by_site, sizes)
    owners: dict[Any, StructureTerm] = {}
    read = 0
    waiting = {name: (r, n, m) for name, (r, n, m) in sizes.items() if n is not None and m is not None}
    while ready := [name for name, size in waiting.items() if _has_all(config, name, size, by_site[name], owners)]:
        for name in ready:  # whose shared tensors are their own, or read already
            subject.sites |= _read_site(config, name, waiting.pop(name), by_site[name], owners)
            read += 1
    subject.sites = {name: subject.sites[name] for name in sorted(subject.sites, key=_as_counted)}
    if missing := len(by_site) - read:
        subject.left_out.append(
            f"{missing} tied modules: their shapes are those of the base's modules, which was not read."
        )
    if config.structure.shares and config.structure.tensors() <= {*LETTERS}:
        subject.left_out.append(
            "Tied modules that only share tensors: they keep none of their own, so the file does not name them; give the base."
        )


def _as_counted(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


Size = tuple[int, int | None, int | None]


def _size(config: WeftConfig, name: str, tensors: Tensors) -> Size:
    """(r at the start, in, out) as far as the site's own tensors say."""
    own = {key.removeprefix(STRUCTURE): tensor for key, tensor in tensors.items() if key.startswith(STRUCTURE)}
    if _is_experts(config, name):  # what all share has no axis of experts
        own = {key: t[0] if t.dim() == 3 or key in ("u", "v") else t for key, t in own.items()}
    return rank_and_alpha(config, name, _within(config, name))[0], *config.structure.sides(own)


def _within(config: WeftConfig, name: str) -> str | None:
    """Of a matrix of an attention that is adapted as a whole, what that is called: nothing else that is a target has modules in it."""
    above, _, last = name.rpartition(".")
    return above if last in PARTS and _is_target(config, above) else None


def _is_target(config: WeftConfig, name: str) -> bool:
    wanted = config.target_modules or ()
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def _is_experts(config: WeftConfig, name: str) -> bool:
    """Whether `name` is that of a fused parameter of experts, and its tensors those of a batch of sites."""
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters or ())


def _keys(config: WeftConfig, name: str, size: tuple[int, int, int]) -> dict[str, Hashable]:
    return shared_keys(config.structure, name, size, expert=_is_experts(config, name))


def _shared_sizes(config: WeftConfig, by_site: Mapping[str, Tensors], sizes: Mapping[str, Size]) -> dict[str, Size]:
    """Sizes of sites that lack an A or B of their own: those at which the owners in the file are exactly what they share."""
    ins, outs = (sorted({size[i] for size in sizes.values() if size[i]}) for i in (1, 2))  # type: ignore[type-var]

    def possible(size: Size) -> Iterator[tuple[int, int, int]]:
        r, fan_in, out = size
        for n, m in itertools.product([fan_in] if fan_in else ins, [out] if out else outs):
            yield r, n, m  # type: ignore[misc]

    owned: set[tuple[str, Hashable]] = set()
    for name, size in sizes.items():
        for part in LETTERS:
            if STRUCTURE + part in by_site[name]:
                owned |= {(part, key) for able in possible(size) if (key := _keys(config, name, able).get(part))}

    def fits(name: str, size: tuple[int, int, int]) -> bool:
        keys = _keys(config, name, size)
        return all(
            (part, keys[part]) in owned for part in LETTERS if part in keys and STRUCTURE + part not in by_site[name]
        )

    found: dict[str, Size] = {}
    for name, size in sizes.items():
        able = [one for one in possible(size) if fits(name, one)]
        found[name] = able[0] if len(able) == 1 else (size[0], None, None)
    return found


def _has_all(
    config: WeftConfig, name: str, size: tuple[int, int, int], tensors: Tensors, owners: Mapping[Any, StructureTerm]
) -> bool:
    needed, keys = config.structure.tensors(), _keys(config, name, size).items()
    return all(STRUCTURE + part in tensors or (part, key) in owners for part, key in keys if part in needed)


def _read_site(
    config: WeftConfig, name: str, size: tuple[int, int, int], tensors: Tensors, owners: dict[Any, StructureTerm]
) -> dict[str, Site]:
    """The site called `name` with the tensors of the file; of a batch the sites of its experts, by their names."""
    r, fan_in, out = size
    keys = _keys(config, name, size)
    theirs: Owners = {part: owners[part, key] for part, key in keys.items() if (part, key) in owners}
    _, alpha = rank_and_alpha(config, name, _within(config, name))
    made: dict[str, Any] = {"dropout": 0.0, "owners": theirs}
    made |= {axis: getattr(config, axis) for axis in ("boost", "start", "ranks", "layers")}
    with torch.device("meta"):
        if _is_experts(config, name):
            count = next(
                len(t) for key, t in tensors.items() if t.dim() == 3 or key in (f"{STRUCTURE}u", f"{STRUCTURE}v")
            )
            each = [rank_and_alpha(config, f"{name}.{e}", name) for e in range(count)]
            ranks_of, scales = [r for r, _ in each], [config.scale(r, alpha) for r, alpha in each]
            site = build_batch(config.structure, ranks_of, (fan_in, out), scales=scales, shares=list(keys), **made)
        else:
            site = build_site(config.structure, size, scale=config.scale(r, alpha), **made)
    counters = {"steps"}.union(*(choice.counts for choice in config.choices().values()))
    kept = {k: t for k, t in tensors.items() if k not in counters}
    for inside, tensor in site.state_dict().items():
        given = kept.get(inside, tensor).dtype
        if given != tensor.dtype and not (given.is_floating_point and tensor.is_floating_point()):
            raise AdapterError(
                f"{name} has {inside} as {given}, which is {tensor.dtype}: the file is damaged, save it again."
            )
    site.load_state_dict(kept, assign=True)
    for part, key in keys.items():
        owners.setdefault((part, key), site.structure)
    site.eval().requires_grad_(False)
    return {f"{name}.{e}": site.expert(e) for e in range(site.experts)} if site.experts else {name: site}


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
        subject.left_out.append("The base was left out, so nothing is measured relative to W and no router was run.")
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
    return None if holder is None else Run.load(holder).whole()


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
        alone = {
            "train": given,
            "validation": None,
            "test": None,
            "validation_fraction": 0.0,
            "test_fraction": None,
            "limit": None,
        }
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
    if (search := config.layers.search) is not None:
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
    from weftlora.inspection.measures import factor

    path = Path(folder)
    run = _run_of(path)
    other = bare_subject(run.adapter_folder if run is not None and (path / "run.json").is_file() else path, str(folder))
    own = {name: _shape(site) for name, site in subject.sites.items()}
    both = {name: site for name, site in other.sites.items() if own.get(name) == _shape(site)}
    if not both:
        raise AdapterError(
            f"{folder} has no module in common with {subject.source}, by name and shape: give an adapter of the same base and "
            "targets."
        )
    if apart := len(other.sites) - len(both):
        subject.left_out.append(
            f"{apart} modules of {folder}: this adapter has none of their name and shape beside them."
        )
    found: dict[str, dict[str, Any]] = {
        part: {name: value for name, site in both.items() if (value := factor(site, part)) is not None} for part in "AB"
    }
    return replace(Start("adapter", f"the adapter {folder}"), A=found["A"], B=found["B"])
