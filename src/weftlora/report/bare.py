"""The sites of an adapter folder without its base: shapes come from the tensors, all else from the config beside them.

Only a tied site that keeps no tensor of its own has a shape that no file knows; such sites are counted, not shown.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from weftlora.errors import AdapterError, WeftError
from weftlora.glue.sharing import shared_keys
from weftlora.glue.targets import by_pattern
from weftlora.glue.updates import Update
from weftlora.report.subject import Subject, beyond, plain_site
from weftlora.site import Owners, Site, build_site
from weftlora.spec import WeftConfig, read_config
from weftlora.terms.structure import Structure, StructureTerm

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
        raise AdapterError(f"the adapter {folder} has no tensor of a site: it is empty or damaged, save it again.")
    return subject


def _settings(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        kind = str(settings["peft_type"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise AdapterError(
            f"{folder} has no adapter_config.json of an adapter: give a run or adapter folder."
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
        subject.sites[name] = plain_site(Update(a.double(), scale * b.double()))
    subject.sites = {name: subject.sites[name] for name in sorted(subject.sites, key=_as_counted)}
    subject.saved_modules = sum(t.numel() for key, t in named.items() if ".lora_" not in key)
    others = (key for key in named if ".lora_" in key and not key.endswith((".lora_A.weight", ".lora_B.weight")))
    subject.left_out += beyond(others)


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
        sizes = _shared_sizes(config.structure, by_site, sizes)
    owners: dict[Any, StructureTerm] = {}
    waiting = {name: (r, n, m) for name, (r, n, m) in sizes.items() if n is not None and m is not None}
    while ready := [name for name, size in waiting.items() if _has_all(config, name, size, by_site[name], owners)]:
        for name in ready:  # whose shared tensors are their own, or read already
            subject.sites[name] = _site(config, name, waiting.pop(name), by_site[name], owners)
    subject.sites = {name: subject.sites[name] for name in sorted(subject.sites, key=_as_counted)}
    if missing := len(by_site) - len(subject.sites):
        subject.left_out.append(
            f"{missing} tied sites: their shapes are those of the base's modules, which was not read."
        )
    if config.structure.shares and config.structure.tensors() <= {*LETTERS}:
        subject.left_out.append(
            "Tied sites that only share tensors: they keep none of their own, so the file does not name them; give the base."
        )


def _as_counted(name: str) -> list[tuple[bool, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in name.split(".")]


Size = tuple[int, int | None, int | None]


def _size(config: WeftConfig, name: str, tensors: Tensors) -> Size:
    """(r at the start, in, out) as far as the site's own tensors say."""
    own = {key.removeprefix(STRUCTURE): tensor for key, tensor in tensors.items() if key.startswith(STRUCTURE)}
    return by_pattern(config.rank_pattern, name, config.r), *config.structure.sides(own)


def _shared_sizes(structure: Structure, by_site: Mapping[str, Tensors], sizes: Mapping[str, Size]) -> dict[str, Size]:
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
                owned |= {
                    (part, key) for able in possible(size) if (key := shared_keys(structure, name, able).get(part))
                }

    def fits(name: str, size: tuple[int, int, int]) -> bool:
        keys = shared_keys(structure, name, size)
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
    needed, keys = config.structure.tensors(), shared_keys(config.structure, name, size).items()
    return all(STRUCTURE + part in tensors or (part, key) in owners for part, key in keys if part in needed)


def _site(
    config: WeftConfig, name: str, size: tuple[int, int, int], tensors: Tensors, owners: dict[Any, StructureTerm]
) -> Site:
    r, keys = size[0], shared_keys(config.structure, name, size)
    theirs: Owners = {part: owners[part, key] for part, key in keys.items() if (part, key) in owners}
    alpha = by_pattern(config.alpha_pattern, name, cast(float, config.lora_alpha))
    with torch.device("meta"):
        site = build_site(
            config.structure, size, scale=config.scale(r, alpha), dropout=0.0, owners=theirs,
            boost=config.boost, start=config.start, ranks=config.ranks, layers=config.layers,
        )  # fmt: skip
    counters = {"steps"}.union(*(choice.counts for choice in config.choices().values()))
    site.load_state_dict({k: t for k, t in tensors.items() if k not in counters}, assign=True)
    for part, key in keys.items():
        owners.setdefault((part, key), site.structure)
    return site.eval().requires_grad_(False)
