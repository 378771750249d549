"""The core directions that an adapter chose, and how far it moves every direction of some W by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weftlora.glue.decompose import Decomposer
from weftlora.linalg import change_rate, moved
from weftlora.report.result import Chosen, SiteDirections, SiteFacts
from weftlora.report.subject import Subject
from weftlora.schedule.ranking import MeanGate, factor_pair
from weftlora.schedule.start import start_of
from weftlora.site import Site
from weftlora.terms.boost.dash import DashTerm
from weftlora.train.progress import Progress, Tick


def site_directions(
    subject: Subject,
    sites: Sequence[SiteFacts],
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
                f"Change rates of {len(moving) - spectra} sites: W was decomposed for {done_for} (spectra={len(moving)}, "
                f"--spectra {len(moving)}, does all)."
            )
    return [row for row in found.values() if row.chosen or row.sigma is not None or row.phase.startswith("before")]


def _chosen(name: str, site: Site) -> SiteDirections:
    """What the adapter itself says about its directions; those of Dash where it has both."""
    start, boost = start_of(site), site.boost
    phase, rows = "plain", []
    if start is not None:
        phase = "switched" if bool(start.launched) else "before the switch"
        rows = [_row(start, k, None) for k, index in enumerate(start.index.tolist()) if index >= 0]
    if isinstance(boost, DashTerm):
        phase = "launched" if bool(boost.launched) else "before the launch"
        gains, used = boost.gain.detach().tolist(), (boost.index >= 0) | boost.up.any(0)
        rows = [_row(boost, k, gains[k]) for k in used.nonzero().flatten().tolist()] or rows
    return SiteDirections(name, phase, rows)


def _row(term: Any, k: int, gain: float | None) -> Chosen:
    if int(term.index[k]) < 0:  # imported from the released code, whose files do not say
        return Chosen(None, None, None, gain)
    return Chosen(int(term.index[k]), float(term.sigma[k]), float(term.rate[k]), gain)
