"""Another adapter of the same structure into the tensors of one that a model has, in place.

    weftlora.hotswap(model, "adapters/customer-b")

Nothing about the model changes but the values: no module, no shape and no number that a compiled graph has been made for, so nothing
is compiled again. An adapter of a smaller rank gets slots that are zero, and one of another scale α/r has the ratio of both in a
factor that its update is linear in. So the model's adapter is the room: make it with the largest rank that will come.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.sharing import shared_keys
from weftlora.adapted.targets import rank_and_alpha
from weftlora.adapter.site import Owners, Site, build_site
from weftlora.adapter.spec import WeftConfig, read_config
from weftlora.errors import AdapterError, suggest
from weftlora.host.attach import unwrapped
from weftlora.host.loading import SITE, OtherShape, tensor_mismatch
from weftlora.terms.structure import StructureTerm

FILE = "adapter_model.safetensors"
SAME = ("structure", "boost", "start")
"""The axes that say what the tensors compute; what the others have left in them, masks and gates, is swapped with the tensors."""
Tensors = dict[str, Tensor]


def hotswap(model: nn.Module, folder: str | Path, adapter_name: str = "default") -> None:
    """Put the adapter in `folder` in the place of the model's adapter `adapter_name`, without making anything again.

    Both have the same structure, boost and start, on the same modules; the ranks in the folder are at most those of the model's
    adapter, whose config stays as it is: saving it afterwards writes what was swapped in, at the model's ranks and scale. Checked
    before a value is changed. An optimiser's moments are those of the adapter before.

    Args:
        model: with a weftlora adapter, compiled or not.
        folder: what save_pretrained wrote.

    Raises:
        AdapterError: no such adapter, a merged one, or one whose tensors do not fit; says which and what to do.
    """
    model = unwrapped(model)
    found = [m for m in model.modules() if isinstance(m, WeftLayer) and adapter_name in m.weft_site]
    layers = [m for m in found if isinstance(m, WeftLinear)]
    if len(layers) < len(found):
        raise AdapterError(
            f"adapter {adapter_name!r} is on experts that are one parameter, which are not swapped: use model.load_adapter."
        )
    configs = cast("Mapping[str, WeftConfig]", getattr(model, "peft_config", {}))
    if not layers or adapter_name not in configs:
        known = {name for m in model.modules() if isinstance(m, WeftLinear) for name in m.weft_site}
        end = suggest(adapter_name, known) if known else "make one with get_peft_model, of the largest rank to come."
        raise AdapterError(f"the model has no weftlora adapter {adapter_name!r} to put another in the place of: {end}")
    if any(adapter_name in layer.merged_adapters for layer in layers):
        raise AdapterError(f"adapter {adapter_name!r} is merged into the base: call model.unmerge_adapter() first.")
    config = read_config(folder)
    for axis in SAME:
        mine, theirs = getattr(configs[adapter_name], axis), getattr(config, axis)
        if mine != theirs:
            raise AdapterError(
                f"the adapter in {folder} has {axis}={theirs!r} and the model's {adapter_name!r} {mine!r}: a swap keeps the "
                "structure, so load it beside with model.load_adapter."
            )
    pairs = _matched(layers, adapter_name, config, _by_module(Path(folder), configs[adapter_name], layers))
    moves = [move for here, there in pairs for move in _moves(here, there)]
    with torch.no_grad():
        for tensor, value in moves:
            tensor.copy_(value)


def _by_module(folder: Path, mine: WeftConfig, layers: list[WeftLinear]) -> dict[str, Tensors]:
    """The folder's tensors by module and by their name in a site; counts of the adapter as a whole with the first module."""
    try:
        tensors = load_file(folder / FILE)
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{folder} has no {FILE} that can be read ({error}): give a folder that save_pretrained wrote."
        ) from None
    found: dict[str, Tensors] = {layer.module_name: {} for layer in layers}
    others = []
    counts = {"steps"}.union(*(choice.counts for choice in mine.choices().values()))
    for key, tensor in tensors.items():
        name, marked, inside = key.removeprefix("base_model.model.").partition(SITE)
        if not marked:
            others.append(key)
        else:
            found.setdefault(layers[0].module_name if inside in counts else name, {})[inside] = tensor
    if others or mine.modules_to_save or mine.trainable_token_indices is not None or mine.bias != "none":
        where = f"the adapter in {folder} ({others[0]})" if others else "the model's adapter"
        raise AdapterError(
            f"{where} trains modules, tokens or biases of the base, which are not swapped: load it with model.load_adapter."
        )
    if elsewhere := sorted(found.keys() - {layer.module_name for layer in layers}):
        raise AdapterError(
            f"the adapter in {folder} also adapts {elsewhere[0]}, which the model's does not: make the model's adapter with the "
            "target_modules of every adapter that will be swapped in."
        )
    return found


def _matched(
    layers: list[WeftLinear], adapter_name: str, config: WeftConfig, given: Mapping[str, Tensors]
) -> list[tuple[Site, Site]]:
    """Each site of the model and, with the folder's tensors, its counterpart.

    Raises:
        AdapterError: tensors are missing, too many, of another shape, or of more ranks than there is room for.
    """
    owners: dict[tuple[str, Hashable], StructureTerm] = {}
    found = []
    extra, missing, wrong = [], [], []
    for layer in layers:
        name, here = layer.module_name, layer.site(adapter_name)
        r, alpha = rank_and_alpha(config, name, layer.within)
        size = (r, layer.in_features, layer.out_features)
        keys = shared_keys(config.structure, name, size)
        theirs: Owners = {part: owners[part, key] for part, key in keys.items() if (part, key) in owners}
        with torch.device("meta"):
            there = build_site(
                config.structure,
                size,
                scale=config.scale(r, alpha),
                dropout=0.0,
                owners=theirs,
                boost=config.boost,
                start=config.start,
                ranks=config.ranks,
                layers=config.layers,
            )
        if r > here.initial_rank:
            raise AdapterError(
                f"the folder's adapter has rank {r} at {name}, and the model's has room for {here.initial_rank}: make the model's "
                f"adapter with r={r}, the largest that will be swapped in."
            )
        for counter in here.counters:
            there.register_counter(counter, torch.empty_like(getattr(here, counter), device="meta"))
        wanted, mine = there.state_dict(), given[name]
        if wanted and not mine:
            raise AdapterError(
                f"the model's adapter adapts {name} and the folder's does not, so there is nothing to put there: swap adapters of "
                "the same modules, or load it with model.load_adapter."
            )
        extra += [f"{name}{SITE}{key}" for key in mine.keys() - wanted.keys()]
        missing += [f"{name}{SITE}{key}" for key in (wanted.keys() | here.state_dict().keys()) - mine.keys()]
        shapes = [(key, tuple(mine[key].shape), tuple(wanted[key].shape)) for key in mine.keys() & wanted.keys()]
        wrong += [OtherShape(f"{name}{SITE}{key}", file, own) for key, file, own in shapes if file != own]
        if not (extra or missing or wrong):
            there.load_state_dict(mine, assign=True)
        for part, key in keys.items():
            owners.setdefault((part, key), there.structure)
        found.append((here, there))
    if extra or missing or wrong:
        raise tensor_mismatch(sorted(extra), sorted(missing), wrong)
    return found


@torch.no_grad()
def _moves(here: Site, there: Site) -> list[tuple[Tensor, Tensor]]:
    """(tensor of the model's site, what it becomes)."""
    by_slot = {
        id(p): (see, q, look)
        for (p, see), (q, look) in zip(here.structure.by_slot(), there.structure.by_slot(), strict=True)
    }
    ratio = there.scale / here.scale
    scaled = [] if ratio == 1 else _scaled(here)
    moves = []
    values = there.state_dict()
    for name, tensor in here.state_dict(keep_vars=True).items():
        value = values[name]
        if tensor.shape != value.shape:
            fill = -1 if name.endswith(".index") else 0  # no direction of W
            room = torch.full(tensor.shape, fill, dtype=value.dtype)
            if id(tensor) in by_slot:
                see, theirs, look = by_slot[id(tensor)]
                see(room)[: len(look(theirs))] = look(theirs)
            else:
                room[tuple(map(slice, value.shape))] = value
            value = room
        moves.append((tensor, value * ratio if any(tensor is each for each in scaled) else value))
    return moves


def _scaled(site: Site) -> list[Tensor]:
    """What takes another scale into itself: a factor of the structure that is the site's own, and the frozen twins of its slots.

    Raises:
        AdapterError: the structure has none.
    """
    own = [*site.structure.parameters(), *site.structure.buffers()]
    factor = next((value for value in site.structure.linear() if any(value is each for each in own)), None)
    if factor is None:
        raise AdapterError(
            f"the adapter of the folder has another lora_alpha / r than the one it is to replace, and "
            f"{site.structure.choice.method} cannot be rescaled in place: load it beside the other with "
            "model.load_adapter, or train both with the same lora_alpha / r."
        )
    twins = None if site.start is None else site.start.slots(1.0, None, None)
    return [factor] if twins is None else [factor, twins.up]
