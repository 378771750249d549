"""The folder of an export: the files of a stock LoRA, the number formats they may have, and that it is there whole or not at all.

It is written beside its place, forced to disk, then renamed. What is in a folder that is replaced and is no file of the earlier
export is in the new one too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from weftlora.adapted.experts import WeftExperts, WeftExpertWeight, cubes
from weftlora.adapted.updates import base_of
from weftlora.disk.files import restore, unfinished, why_no_file, write_folder, writing
from weftlora.disk.lock import beside, holding
from weftlora.disk.ownership import is_export, listed, of_export
from weftlora.errors import AdapterError, ConfigError, RunError, suggest
from weftlora.export.factors import Pair, Stack
from weftlora.export.source import Source
from weftlora.host.stock_lora import HOST, as_parameters, names_in_file, stock_config

SCRATCH = ".proof"
"""Folder inside the unfinished one, for what a proof needs; gone before the rename."""


def check_out(out: Path, source: Path | None, overwrite: bool, base: str | None = None) -> None:
    """Refuse a place that must not be written, before anything slow begins.

    Args:
        source: the adapter's folder.
        base: folder or hub id of its base.

    Raises:
        RunError: there is something else than an earlier export, or one and no `overwrite`; it is (or holds) the adapter that
            is exported, its base or the current folder; or it cannot be written.
    """
    place = _real(out)
    if not place.exists() and unfinished(place):  # killed between two renames
        with holding(place.parent, "weftlora export", beside(place)), writing(place):
            restore(place)
    if place.exists() and not place.is_dir():
        raise RunError(f"cannot export to {out}: it is a file; choose another folder (out, --out).")
    found = base if base is not None and Path(base).exists() else None  # else a hub id
    kept = {"the adapter itself": source, "the base model": found, "the current folder": Path.cwd()}
    for what, path in kept.items():
        if path is not None and _real(path).is_relative_to(place):
            raise RunError(f"cannot export to {out}: it holds {what}; choose another folder (out, --out).")
    if place.is_dir() and any(place.iterdir()):
        if not overwrite:
            raise RunError(
                f"{out} is not empty: choose another folder (out, --out), or replace what is there with overwrite (--overwrite)."
            )
        if not is_export(place):
            raise RunError(
                f"{out} is not empty and is not an export of weftlora, so it is not replaced: choose another folder (out, --out)."
            )
    nearest = next(path for path in place.parents if path.exists())
    if reason := why_no_file(nearest):
        raise RunError(
            f"cannot export to {out}: {nearest} takes no new file ({reason}); choose another folder (out, --out)."
        )


def write(out: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write the folder; whatever stops it leaves `out` as it was.

    Raises:
        RunError: disk full, read-only, or another process is writing the same folder.
    """
    out = _real(out)
    made = [folder for folder in out.parents if not folder.exists()]

    def whole(place: Path) -> None:
        fill(place)
        shutil.rmtree(place / SCRATCH, ignore_errors=True)
        with (place / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n{listed(place)}\n")

    try:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with holding(out.parent, "weftlora export", beside(out)):
            write_folder(out, whole, {path.relative_to(out) for path in of_export(out)}.__contains__)
    except BaseException:
        for folder in made:
            with suppress(OSError):  # somebody else's files are in it now
                folder.rmdir()
        raise


def _real(path: str | Path) -> Path:
    """The folder itself: what is renamed must have a name (`.` has none) and must not be a link to it."""
    return Path(os.path.realpath(path))


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def config_of(source: Source, ranks: Mapping[str, int], drawn: Sequence[str], base_name: str | None) -> LoraConfig:
    """The stock config, resolved again by peft's own rules.

    Args:
        drawn: names of modules that leave in full beside those that were trained so.

    Raises:
        AdapterError: stock peft would read it as another adapter.
    """
    configs = [config for name in source.adapters if (config := _peft_config(source.model, name)) is not None]
    saved = sorted({*drawn, *(module for config in configs for module in config.modules_to_save or [])})
    kinds = {layer.module_name: type(layer.get_base_layer()).__name__ for layer in source.layers}
    experts = {layer.module_name for layer in source.layers if isinstance(layer, WeftExpertWeight)}
    inside = tuple(f"{name}." for name in kinds)
    base = base_of(source.model)
    modules = [n for n, _ in base.named_modules() if n and not n.startswith(inside) and n not in experts]
    return stock_config(
        modules,
        ranks,
        parameters={name: name for name in ranks if name in experts} | as_parameters(base, set(ranks) - experts),
        fan_in_fan_out=any(kinds[name] == "Conv1D" for name in ranks),
        task_type=configs[0].task_type if configs else None,
        modules_to_save=saved or None,
        base_model_name_or_path=base_name or hub_id(source.base),
    )


def _peft_config(model: nn.Module, adapter: str) -> Any:
    return getattr(model, "peft_config", {}).get(adapter)


def hub_id(base: str | None) -> str | None:
    """The base's name where it means the same on every machine; a folder's path is nobody else's business."""
    return base if base is not None and _HUB_ID.fullmatch(base) and not os.path.exists(base) else None


_HUB_ID = re.compile(r"\w[\w.-]{0,95}(/\w[\w.-]{0,95})?")


def stock_keys(source: Source, sites: Collection[str]) -> dict[str, str]:
    """{site: what the file calls the module that holds its A and B}: its own name, but for experts, and what peft renames.

    Stock peft wraps a module of experts once per adapted parameter, in the order in which it has them: the last is outside.
    """
    experts = {layer.module_name for layer in source.layers if isinstance(layer, WeftExpertWeight)}
    keys = {name: name for name in sites} | names_in_file(base_of(source.model), [n for n in sites if n not in experts])
    for path, module in base_of(source.model).named_modules():
        if isinstance(module, WeftExperts):
            own = [n for n in cubes(module.base_layer) if f"{path}.{n}" in keys]
            for depth, name in enumerate(reversed(own)):
                keys[f"{path}.{name}"] = path + ".base_layer" * depth
    return keys


def save(
    place: Path,
    config: LoraConfig,
    sites: Mapping[str, Pair | Stack],
    heads: Mapping[str, Tensor],
    dtype: torch.dtype,
    keys: Mapping[str, str],
) -> None:
    """adapter_config.json and adapter_model.safetensors as stock peft writes them.

    Args:
        heads: {name in the base model: value} of what was trained in full.
        keys: as `stock_keys` has them.

    Raises:
        AdapterError: a value does not fit into `dtype`.
    """
    tensors = {f"{HOST}{keys[name]}.lora_A.weight": pair.a.to(dtype) for name, pair in sites.items()}
    tensors |= {f"{HOST}{keys[name]}.lora_B.weight": pair.b.to(dtype) for name, pair in sites.items()}
    tensors |= {f"{HOST}{name}": value.detach().to("cpu", dtype) for name, value in heads.items()}
    if wrong := next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None):
        raise AdapterError(
            f"{wrong} has values that {name_of(dtype)} cannot hold, so nothing was exported: use float32, or an adapter that has "
            "not diverged."
        )
    config.save_pretrained(str(place))
    written = place / "adapter_config.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    for field in ("target_modules", "target_parameters"):
        if isinstance(names := content.get(field), list):  # peft writes a set: the same export is the same file
            content[field] = sorted(names)
    written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    own = {name: t.contiguous().clone() for name, t in tensors.items()}  # safetensors takes no shared memory
    save_file(own, place / "adapter_model.safetensors", {"format": "pt"})


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from what the user wrote. Raises ConfigError on any other than float32, bfloat16 and float16."""
    if name is None or name in DTYPES.values():
        return cast("torch.dtype | None", name)
    if str(name) not in DTYPES:
        raise ConfigError(f"dtype={name!r} is not a dtype to write: {suggest(str(name), DTYPES)}")
    return DTYPES[str(name)]


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def save_model(plain: Any, place: Path) -> None:
    """The model in a folder, its generation settings as its base has them.

    transformers refuses to save settings that its newest rules do not allow, such as a temperature without sampling, which many bases
    come with and it loads: they are not ours to correct, and no reason to lose a training.
    """
    settings = getattr(plain, "generation_config", None)
    if settings is None or not plain.can_generate():
        plain.save_pretrained(place)
        return
    plain.generation_config = type(settings)()
    try:
        plain.save_pretrained(place)
    finally:
        plain.generation_config = settings
    settings.to_json_file(place / "generation_config.json", use_diff=True)
