"""Read adapters that released code wrote, so that published weights can be checked against ours.

HydraLoRA's code saves `adapter_model.bin` with one tensor per head:
`…{gate,up,down}_proj.lora_A.weight` [r, in], `…lora_B{n}.weight` [out, r] for n = 0…N−1, `…lora_route.weight` [N, in].
Here the heads lie side by side in one B [out, N·r]. With N = 1 the softmax of one logit is exactly 1, so the adapter is
plain LoRA and its router is dropped.

LoRA-Dash's code for language models saves `…lora_A.weight` [r, in], `…lora_B.weight` [out, r] and, once launched,
`…lora_index.weight` [1, s] (the gains), `…lora_w_u` [out, s] and `…lora_w_vt` [s, in]. Its term has scale 1, as ours.

Sources (layouts only; no code taken): repository Clin0212/HydraLoRA at commit afb693b; repository
Chongjie-Si/Subspace-Tuning, state of 2026-01-29.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weftlora.adapter.spec import WeftConfig
from weftlora.disk.files import check_regular, write_folder, writing
from weftlora.errors import AdapterError
from weftlora.foreign_text import from_json
from weftlora.host.tuner import PREFIX
from weftlora.terms.boost.dash import Dash
from weftlora.terms.structure.hydra import Hydra
from weftlora.terms.structure.plain import Plain

_KEY = re.compile(r"^(?P<site>.+)\.lora_(?P<part>A|B(?P<head>\d+)|route)\.weight$")
_DASH_KEY = re.compile(r"^(?P<site>.+)\.lora_(?P<part>A|B|index|w_u|w_vt)(\.weight)?$")
Converted = tuple[dict[str, Tensor], tuple[int, int]]
"""One site's tensors under weftlora's names, and its (rank, heads or directions)."""


def import_hydralora(source: str | Path, out: str | Path) -> Path:
    """Convert a folder written by the released HydraLoRA code into a weftlora adapter folder and return its path.

    Args:
        source: folder with `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin` (read with
            torch's weights-only unpickler, which runs no code from the file).
        out: folder to create; must not exist or be empty.

    Raises:
        AdapterError: a file is missing or unreadable, a tensor has an unknown name, or the sites disagree on r or N.
        RunError: `out` cannot be written; then nothing is there.
    """
    source, out = Path(source), Path(out)
    settings = _settings(source)
    sites = _by_site(_tensors(source), _KEY, "HydraLoRA", "lora_A, lora_B0…, lora_route")
    tensors, shapes = _converted(sites, _join_heads)
    r, heads = _one(source, shapes, settings, "(rank, heads)")
    dropout = float(settings.get("lora_dropout", 0.0))
    structure = Plain() if heads == 1 else Hydra(heads=heads, per_head_dropout=dropout > 0)
    return _write(out, tensors, _config(settings, sites, structure=structure, r=r, lora_dropout=dropout))


def import_lora_dash(source: str | Path, out: str | Path) -> Path:
    """Convert a folder written by the released LoRA-Dash code into a weftlora adapter folder and return its path.

    The gains and directions of the file are taken as they are and never chosen again; the released code, which keeps no
    phase, would ignore them for a hundred forwards and then choose others. Which singular directions they are, and
    their σ and change rates, the file does not say: `index` is −1, `sigma` and `rate` are 0.

    Args:
        source, out: as in `import_hydralora`.

    Raises:
        AdapterError: a file is missing or unreadable, a tensor has an unknown name, the sites disagree on r or s, or gains
            are there without their directions (the copy of the code for sequence classification saves none).
        RunError: `out` cannot be written; then nothing is there.
    """
    source, out = Path(source), Path(out)
    settings = _settings(source)
    sites = _by_site(_tensors(source), _DASH_KEY, "LoRA-Dash", "lora_A, lora_B, lora_index, lora_w_u, lora_w_vt")
    tensors, shapes = _converted(sites, _dash_site)
    r, s = _one(source, shapes, settings, "(rank, directions)")
    boost = Dash(directions=s) if s else None
    config = _config(settings, sites, boost=boost, r=r, lora_dropout=float(settings.get("lora_dropout", 0.0)))
    if boost is not None:
        tensors[f"{next(iter(sites))}.{PREFIX}site.steps"] = torch.tensor(int(cast(int, boost.after)))
    return _write(out, tensors, config)


def _converted(
    sites: dict[str, dict[str, Tensor]], convert: Callable[[str, dict[str, Tensor]], Converted]
) -> tuple[dict[str, Tensor], set[tuple[int, int]]]:
    """The tensors of all sites under weftlora's names, and which pairs of sizes occur."""
    tensors: dict[str, Tensor] = {}
    shapes = set()
    for site, parts in sites.items():
        found, shape = convert(site, parts)
        shapes.add(shape)
        tensors.update({f"{site}.{PREFIX}site.{name}": value for name, value in found.items()})
    return tensors, shapes


def _one(source: Path, shapes: set[tuple[int, int]], settings: dict[str, Any], what: str) -> tuple[int, int]:
    """The one pair that all sites share, with the rank that the settings name."""
    if len(shapes) != 1:
        raise AdapterError(f"{source}: modules disagree on {what}: {sorted(shapes)}; one adapter has one of each.")
    [(r, other)] = shapes
    if int(settings.get("r", r)) != r:
        raise AdapterError(
            f"{source}: adapter_config.json says r={settings['r']}, the tensors have rank {r}: the files do not belong together."
        )
    return r, other


def _config(settings: dict[str, Any], sites: Iterable[str], **fields: Any) -> WeftConfig:
    """The config of an adapter with these choices on these sites."""
    return WeftConfig(
        **fields,
        lora_alpha=settings.get("lora_alpha", 2 * fields["r"]),
        target_modules=sorted({site.rpartition(".")[2] for site in sites}),
        task_type=settings.get("task_type"),
        base_model_name_or_path=settings.get("base_model_name_or_path"),
        inference_mode=True,
    )


def _write(out: Path, tensors: dict[str, Tensor], config: WeftConfig) -> Path:
    """A weftlora adapter folder with these tensors."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise AdapterError(f"{out} is not an empty folder: name a new folder for the converted adapter.")

    def fill(place: Path) -> None:
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(place))

    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    write_folder(out.resolve(), fill, lambda name: False)
    return out


def _settings(source: Path) -> dict[str, Any]:
    check_regular(source, AdapterError)
    path = source / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{source} has no adapter_config.json: give the folder that the released code saved.")
    try:
        settings = from_json(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise AdapterError(f"{path} cannot be read as JSON ({error}): save the adapter again.") from None
    if not isinstance(settings, dict):
        raise AdapterError(
            f"{path} holds a {type(settings).__name__} and no settings: give the folder that the released code saved."
        )
    for key, kinds in (("r", int), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        if key in settings and (not isinstance(settings[key], kinds) or isinstance(settings[key], bool)):
            raise AdapterError(f"{path}: {key}={settings[key]!r} is not a number: write the one that was trained with.")
    for key in ("use_rslora", "rank_pattern", "alpha_pattern"):
        if settings.get(key):
            raise AdapterError(
                f"{path}: {key}={settings[key]!r} is nothing the released code has, so its scale is unknown."
            )
    return settings


def _tensors(source: Path) -> dict[str, Tensor]:
    if (path := source / "adapter_model.safetensors").is_file():
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise AdapterError(f"{path} is damaged ({error}): copy it again.") from None
    if (path := source / "adapter_model.bin").is_file():
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise AdapterError(
                f"{path} cannot be read safely ({type(error).__name__}): only plain tensors are accepted."
            ) from None
    raise AdapterError(
        f"{source} has no adapter_model.safetensors or adapter_model.bin: the adapter's weights are missing."
    )


def _by_site(
    tensors: dict[str, Tensor], pattern: re.Pattern[str], method: str, expected: str
) -> dict[str, dict[str, Tensor]]:
    sites: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        if (match := pattern.match(key)) is None:
            raise AdapterError(f"tensor {key!r} is not part of a {method} adapter: expected {expected}.")
        whole = tensor.is_floating_point() and tensor.element_size() > 1  # torch computes with none of 8 bits
        if tensor.dim() != 2 or not whole:
            raise AdapterError(
                f"tensor {key!r} is {tuple(tensor.shape)}, {tensor.dtype}: a {method} adapter has matrices of numbers."
            )
        sites[match["site"]][match["part"]] = tensor
    if not sites:
        raise AdapterError("the adapter file holds no tensors: save the adapter again.")
    return dict(sites)


def _join_heads(site: str, parts: dict[str, Tensor]) -> Converted:
    """One site's tensors in weftlora's layout, and its (rank, heads)."""
    ups = [parts[name] for name in sorted((n for n in parts if n.startswith("B")), key=lambda n: int(n[1:]))]
    heads = len(ups)
    complete = (
        "A" in parts and heads and all(f"B{n}" in parts for n in range(heads)) and (heads == 1 or "route" in parts)
    )
    if not complete:
        raise AdapterError(
            f"{site} is incomplete: it has {', '.join(sorted(parts))}, but needs A, B0…B{{N-1}} and route."
        )
    r = parts["A"].shape[0]
    odd = any(up.shape != (ups[0].shape[0], r) for up in ups)
    if odd or (heads > 1 and parts["route"].shape != (heads, parts["A"].shape[1])):
        raise AdapterError(f"{site}: the shapes of A, B and route disagree on rank or number of heads.")
    joined = {"structure.A": parts["A"].contiguous(), "structure.B": torch.cat(ups, 1).contiguous()}
    return (joined if heads == 1 else joined | {"structure.router": parts["route"].contiguous()}), (r, heads)


def _dash_site(site: str, parts: dict[str, Tensor]) -> Converted:
    """One site's tensors in weftlora's layout, and its (rank, directions); 0 directions where none were launched."""
    if not {"A", "B"} <= parts.keys():
        raise AdapterError(f"{site} is incomplete: it has {', '.join(sorted(parts))}, but needs A and B.")
    a, b, gain = parts["A"], parts["B"], parts.get("index", torch.zeros(0)).flatten()
    if a.dim() != 2 or b.dim() != 2 or b.shape[1] != a.shape[0]:
        raise AdapterError(f"{site}: the shapes of A {tuple(a.shape)} and B {tuple(b.shape)} do not fit together.")
    plain = {"structure.A": a.contiguous(), "structure.B": b.contiguous()}
    if not {"w_u", "w_vt"} <= parts.keys():
        if gain.any():
            raise AdapterError(
                f"{site} has gains without their directions (lora_w_u, lora_w_vt), so its function is lost: save the adapter "
                "again with the code that keeps them."
            )
        return plain, (a.shape[0], 0)
    up, down = parts["w_u"], parts["w_vt"]
    s = len(gain)
    if up.shape != (b.shape[0], s) or down.shape != (s, a.shape[1]):
        raise AdapterError(f"{site}: the shapes of A, B, the gains and the directions do not fit together.")
    dash = {
        "gain": gain.float(),
        "up": up.float().contiguous(),
        "down": down.float().contiguous(),
        "index": torch.full((s,), -1, dtype=torch.long),
        "sigma": torch.zeros(s),
        "rate": torch.zeros(s),
        "launched": torch.tensor(True),
    }
    return plain | {f"boost.{name}": value for name, value in dash.items()}, (a.shape[0], s)
