"""What is inspected: the sites of one adapter, with as much around them as is at hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer
from weftlora.adapted.updates import Update, adapter_names, base_matrix, base_of, module_of, read_updates
from weftlora.adapter.site import Site
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import AdapterError, MergeError, suggest
from weftlora.host.attach import schedules
from weftlora.search import Selection
from weftlora.terms.structure.plain import PlainTerm

Events = list[dict[str, Any]]


@dataclass
class Rows:
    """Batches to look at the routers with: keyword arguments of a forward, by domain ("" where there are none)."""

    source: str
    count: int
    batches: Mapping[str, list[dict[str, Any]]]


@dataclass
class Start:
    """What A and B are compared with: A [k, in] and Bᵀ [l, out] by site, either may be missing."""

    kind: str
    what: str
    A: dict[str, Tensor] = field(default_factory=dict)
    B: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Subject:
    """One adapter. Without `model` its base was not at hand, and only what needs no base can be said."""

    source: str
    adapter: str
    settings: dict[str, Any]
    sites: dict[str, Site]
    config: WeftConfig | None = None
    """What the settings are of; None for a stock LoRA."""
    stock: bool = False
    """A stock LoRA: its scale is inside B."""
    model: nn.Module | None = None
    base: str | None = None
    trained_by: str | None = None
    steps: int | None = None
    saved_modules: int = 0
    events: Events = field(default_factory=list)
    events_from: str = ""
    selection: Selection | None = None
    rows: Rows | None = None
    start: Start | None = None
    left_out: list[str] = field(default_factory=list)

    def weight(self, name: str) -> Tensor:
        """W [out, in] of a site's module, as it is in memory."""
        assert self.model is not None
        return base_matrix(self.model, name)[0]

    def why_not_merged(self, name: str) -> str | None:
        """Why this site cannot be merged into the base at hand; None where it can, or where there is none to ask."""
        module = None if self.model is None else module_of(self.model, name)
        if not isinstance(module, WeftLayer):
            return None
        try:
            module.check_mergeable([self.adapter])
        except MergeError as error:
            return str(error)
        return None


def live_subject(model: nn.Module, adapter: str | None, source: str) -> Subject:
    """An adapter in memory.

    Raises:
        AdapterError: no such adapter, several active ones and no name, one of another method, or one that is merged.
    """
    name = _name(model, adapter)
    layers = {n: m for n, m in base_of(model).named_modules() if isinstance(m, WeftLayer) and name in m.weft_site}
    if merged := next((n for n, layer in layers.items() if layer.merged_adapters), None):
        raise AdapterError(
            f"{merged} has its adapter merged, so the original W is not available: call model.unmerge_adapter() first."
        )
    config = getattr(model, "peft_config", {}).get(name)
    settings = {} if config is None else {key: _plain(value) for key, value in config.to_dict().items()}
    subject = Subject(
        source,
        name,
        settings,
        {member.name: member.site for layer in layers.values() for member in layer.members(name)},
        config if isinstance(config, WeftConfig) else None,
        model=model,
        base=_kind(model),
    )
    if not layers:
        subject.sites, subject.stock = {n: plain_site(u) for n, u in read_updates(model, name).items()}, True
        own = [n for n, _ in base_of(model).named_parameters() if ".lora_" in n and name in n.split(".")]
        subject.left_out += unread_tensors(
            n for n in own if not n.endswith((f".lora_A.{name}.weight", f".lora_B.{name}.weight"))
        )
    elif schedule := schedules(model).get(name):
        subject.steps, subject.events, subject.events_from = schedule.steps, schedule.events, "the adapter's schedule"
    subject.saved_modules = _saved_modules(model, name)
    return subject


def _plain(value: Any) -> Any:
    """A setting as JSON has it: stock configs hold sets and enums."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else value


def _name(model: nn.Module, adapter: str | None) -> str:
    names, active = adapter_names(model)
    if not names:
        raise AdapterError("the model has no weftlora or plain LoRA adapter: put one in, or give the folder of one.")
    if adapter is not None and adapter not in names:
        raise AdapterError(f"the model has no adapter {adapter!r}: {suggest(adapter, names)}")
    if adapter is None and len(active or names) > 1:
        raise AdapterError(f"the model has the adapters {', '.join(active or names)}: say which one with adapter=....")
    return adapter or (active or names)[0]


def plain_site(update: Update) -> Site:
    """A stock LoRA as a site: its A, and its B with all scales in it."""
    term = PlainTerm(update.a, update.shape[0])
    term.B = nn.Parameter(update.b)
    site = Site(term, scale=1.0)
    site.initial_rank = update.a.shape[0]
    return site.eval().requires_grad_(False)


def unread_tensors(names: Iterable[str]) -> list[str]:
    """A sentence on the tensors of a stock adapter, named here, that are no A or B of a linear module; none where all are."""
    if not (held := sorted(names)):
        return []
    return [
        f"{len(held)} tensors that are not A or B of a linear module, such as {held[0]}: weftlora inspects no others."
    ]


def _kind(model: nn.Module) -> str:
    config = getattr(base_of(model), "config", None)
    return str(
        getattr(config, "name_or_path", "") or getattr(config, "model_type", "") or type(base_of(model)).__name__
    )


def _saved_modules(model: nn.Module, adapter: str) -> int:
    found = {id(p): p.numel() for n, p in model.named_parameters() if f".modules_to_save.{adapter}." in n}
    return sum(found.values())
