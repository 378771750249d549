"""`weftlora.inspect`: everything there is to see of one adapter, in memory or in a folder, with or without its base.

Also along core directions: those that the adapter chose, and how far it moves every direction of some W by now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weftlora.adapted.frozen_weights import Decomposer
from weftlora.adapter.site import Site
from weftlora.change_rates import change_rate, moved
from weftlora.errors import AdapterError, ConfigError
from weftlora.inspection import measures
from weftlora.inspection.folders import folder_subject, other_adapter
from weftlora.inspection.measures import compare_factors
from weftlora.inspection.record import AdaptedModule, Chosen, Inspection, Parameters, Routers, SiteDirections, TiedGroup
from weftlora.inspection.routers import measure_usage
from weftlora.inspection.subject import Rows, Subject, live_subject
from weftlora.progress import Progress, Tick, ignore
from weftlora.runs.run import Run
from weftlora.schedule.direction_ranking import MeanGate, factor_pair
from weftlora.settings import is_whole
from weftlora.terms.extra import Direction


def site_directions(
    subject: Subject,
    sites: Sequence[AdaptedModule],
    gates: Mapping[str, MeanGate],
    spectra: int,
    cache: str | Path | None,
    progress: Progress,
) -> list[SiteDirections]:
    """Chosen directions of all sites, and change rates of the `spectra` sites that moved most, relative to W."""
    found = {name: _chosen(name, site) for name, site in subject.sites.items()}
    if subject.model is not None:
        moving = sorted((s for s in sites if s.norm > 0), key=lambda s: -(s.relative or 0.0))
        decompose = Decomposer(None if cache is None else Path(cache))
        for done, fact in enumerate(moving[:spectra], 1):
            w, site = subject.weight(fact.site), subject.sites[fact.site]
            spectrum = decompose(fact.site, w)
            a, b, scale = factor_pair(site, gates.get(fact.site), dash=True)
            rate = change_rate(spectrum, moved(spectrum, w, a.to(w.device), b.to(w.device), scale))
            here = found[fact.site]
            found[fact.site] = SiteDirections(
                here.site, here.phase, here.chosen, spectrum.sigma.tolist(), rate.tolist()
            )
            progress(Tick("decomposing", done, min(spectra, len(moving))))
        if len(moving) > spectra:
            done_for = f"the {spectra} that moved most" if spectra else "none"
            subject.left_out.append(
                f"Change rates of {len(moving) - spectra} modules: W was decomposed for {done_for} (spectra={len(moving)}, "
                f"--spectra {len(moving)}, does all)."
            )
    return [row for row in found.values() if row.chosen or row.sigma is not None or row.phase.startswith("before")]


def _chosen(name: str, site: Site) -> SiteDirections:
    """What the adapter itself says about its directions; those of Dash where it has both."""
    rows: list[Direction] = []
    for extra in (site.boost, site.start):
        rows = rows or ([] if extra is None else extra.chosen())
    return SiteDirections(name, site.phase, [Chosen(row.index, row.sigma, row.rate, row.gain) for row in rows])


Batches = Sequence[Mapping[str, Any]]


def inspect(
    model: nn.Module | Run | str | Path,
    adapter: str | None = None,
    *,
    base: str | Path | bool | None = None,
    data: str | Path | None = None,
    inputs: Batches | Mapping[str, Batches] | None = None,
    against: str | Path | None = None,
    rows: int = 64,
    spectra: int = 4,
    cache: str | Path | None = None,
    progress: Progress = ignore,
) -> Inspection:
    """Look inside an adapter.

    Args:
        model: a run or its folder, an adapter folder, or a model with an adapter in it.
        adapter: which one, for a model in memory that has several active ones.
        base: for a folder, where its base lies, if not where the folder says. Without it, a base that cannot be loaded is
            left out, and what needs it; False does not try.
        data: for a folder, a file of rows to measure routers on; a run has validation rows of its own.
        inputs: for a model in memory, batches (keyword arguments of a forward) to measure routers on, or such batches by
            domain.
        against: a run or adapter folder, such as an earlier checkpoint or an adapter of another task, whose A and B are held
            beside these. Without it, A is held beside its start, where that is known.
        rows: of `data`, at most so many per domain.
        spectra: for how many sites, those of largest ‖ΔW‖ / ‖W‖ first, W is decomposed for its change rates. A
            decomposition is cubic in the smaller side of W; `cache` (or WEFT_CACHE) names a folder that keeps them.
        progress: called with a `Tick` after every batch and every decomposition.

    Returns:
        Plain numbers; `left_out` says what is not among them and why.

    Raises:
        AdapterError: no adapter there, one that is neither weftlora's nor plain LoRA, or one with values that are not finite.
        ConfigError: a setting that does not go with what is inspected.
        ModelError, DataError: a base or data that was named and cannot be used.
    """
    _check(model, rows=rows, spectra=spectra, inputs=inputs, data=data, base=base, adapter=adapter)
    if isinstance(model, nn.Module):
        subject = live_subject(model, adapter, type(model).__name__)
        subject.rows = _given(inputs)
    else:
        folder = model.folder if isinstance(model, Run) else model
        where = str(base) if isinstance(base, Path) else base
        subject = folder_subject(folder, where, None if data is None else str(data), rows)
    _check_finite(subject)
    if against is not None:
        subject.start = other_adapter(against, subject)
    routers, gates = _routers(subject, progress)
    sites = _facts(subject, gates)
    return Inspection(
        source=subject.source,
        adapter=subject.adapter,
        method=_method(subject),
        trained_by=subject.trained_by,
        base=subject.base,
        steps=subject.steps,
        settings=subject.settings,
        parameters=_parameters(subject),
        sites=sites,
        layers=measures.layers(subject),
        history=measures.rank_history(subject),
        routers=routers,
        heads=[found for name, site in subject.sites.items() if (found := measures.heads(name, site)) is not None],
        factor_comparison=compare_factors(subject),
        directions=site_directions(subject, sites, gates, spectra, cache, progress),
        groups=_groups(subject),
        left_out=subject.left_out,
    )


def _check(model: Any, rows: int, spectra: int, **given: Any) -> None:
    for name, value, least in (("rows", rows, 1), ("spectra", spectra, 0)):
        if not is_whole(value, least):
            raise ConfigError(f"{name}={value!r} is out of range: use a whole number from {least} up.")
    live = isinstance(model, nn.Module)
    for name, instead in (_NOT_LIVE if live else _NOT_A_FOLDER).items():
        if given[name] is not None:
            raise ConfigError(f"{name} does not go with {'a model in memory' if live else 'a folder'}: {instead}.")


_NOT_LIVE = {"base": "it has one", "data": "give inputs=[batch, ...]"}
_NOT_A_FOLDER = {"inputs": "give data=, a file of rows", "adapter": "a folder holds one"}


def _check_finite(subject: Subject) -> None:
    tensors = ((name, t) for name, site in subject.sites.items() for t in (*site.parameters(), *site.buffers()))
    wide = (
        (name, t if t.element_size() > 1 else t.float()) for name, t in tensors if t.is_floating_point()
    )  # no test for 8 bits
    if site := next((name for name, t in wide if not t.isfinite().all()), None):
        raise AdapterError(
            f"{site} holds values of the adapter that are not finite, as after a training that diverged: nothing can be measured; "
            "inspect an earlier checkpoint, or train with a smaller rate."
        )


def _given(inputs: Batches | Mapping[str, Batches] | None) -> Rows | None:
    if inputs is None:
        return None
    given = inputs if isinstance(inputs, Mapping) else {"": inputs}
    parts: dict[str, list[dict[str, Any]]] = {}
    for name, batches in given.items():
        listed = isinstance(batches, Iterable) and not isinstance(batches, (str, Mapping, Tensor))
        held: list[Any] = list(batches) if listed else []
        if not listed or not all(isinstance(batch, Mapping) for batch in held):
            raise ConfigError(
                "inputs takes a list of batches, each the keyword arguments of a forward, or such lists by domain: "
                "give inputs=[batch], or inputs={domain: [batch]}."
            )
        parts[str(name)] = [dict(batch) for batch in held]
    tensors = [[v for v in batch.values() if isinstance(v, Tensor) and v.dim()] for p in parts.values() for batch in p]
    count = sum(len(held[0]) for held in tensors if held)
    return Rows(f"the {count} rows given", count, parts)


def _method(subject: Subject) -> str:
    """The choices of the axes in a line; what is the default of an axis is not said."""
    if subject.stock:
        return "stock LoRA"
    return "" if subject.config is None else subject.config.label()


def _parameters(subject: Subject) -> Parameters:
    trained: dict[int, int] = {}
    stored: dict[int, int] = {}
    for site in subject.sites.values():
        trained |= measures.trained_numbers(site)
        stored |= measures.stored_numbers(site)
    base = None
    if subject.model is not None:
        mine = {id(t) for site in subject.sites.values() for t in site.parameters()}
        extra = (".modules_to_save.", ".lora_A.", ".lora_B.", ".weft_site.")
        named = subject.model.named_parameters()
        base = sum(_numbers(p) for n, p in named if id(p) not in mine and not any(mark in n for mark in extra))
    return Parameters(sum(trained.values()), sum(stored.values()), subject.saved_modules, base)


def _numbers(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: bitsandbytes keeps two 4-bit ones in a byte, and their shape in the state."""
    return math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))


def _facts(subject: Subject, gates: Mapping[str, MeanGate]) -> list[AdaptedModule]:
    found = []
    for name, site in subject.sites.items():
        norm = None if subject.model is None else float(subject.weight(name).float().norm())
        found.append(
            measures.measure_site(name, site, gates.get(name), norm, subject.why_not_merged(name), subject.stock)
        )
    return found


def _routers(subject: Subject, progress: Progress) -> tuple[Routers | None, dict[str, MeanGate]]:
    routed = {name: site for name, site in subject.sites.items() if site.routed and site.part_of is None}
    if len(routed) < sum(site.routed for site in subject.sites.values()):
        subject.left_out.append(
            "Router usage of experts: the figures of their updates are at equal weights of the heads."
        )
    if not routed:
        if subject.rows is not None:
            subject.left_out.append("The rows that were given: this adapter has no routers to run over them.")
        return None, {}
    if subject.model is None or subject.rows is None:
        if not any(s.startswith(("Router usage", "Everything relative", "The base was not")) for s in subject.left_out):
            subject.left_out.append(
                "Router usage: it needs rows; give data=... (--data), or inputs=[batch, ...] for a model in memory."
            )
        return None, {}
    return measure_usage(subject.model, routed, subject.adapter, subject.rows, progress)


def _groups(subject: Subject) -> list[TiedGroup]:
    """Sites whose A or B are one tensor; what the same sites share is one group."""
    members: dict[tuple[str, int], list[str]] = {}
    size: dict[tuple[str, int], int] = {}
    for name, site in subject.sites.items():
        for part, value in site.structure.shared().items():
            if part in ("A", "B"):
                members.setdefault((part, id(value)), []).append(name)
                size[part, id(value)] = value.numel()
    groups: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for key, names in members.items():
        groups.setdefault(tuple(names), []).append((key[0], size[key]))
    found = []
    for sites, parts in groups.items():
        stored = sum(numbers for _, numbers in parts)
        found.append(TiedGroup(", ".join(part for part, _ in parts), list(sites), stored, len(sites) * stored))
    return found
