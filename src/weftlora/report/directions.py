"""The core directions that an adapter chose, and how far it moves every direction of some W by now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from weftlora.glue.decompose import Decomposer
from weftlora.linalg import change_rate, moved
from weftlora.report.result import Chosen, SiteDirections, SiteFacts
from weftlora.report.subject import Subject
from weftlora.schedule.ranking import MeanGate, factor_pair
from weftlora.site import Site
from weftlora.terms.extra import Direction
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
    rows: list[Direction] = []
    for extra in (site.boost, site.start):
        rows = rows or ([] if extra is None else extra.chosen())
    return SiteDirections(name, site.phase, [Chosen(row.index, row.sigma, row.rate, row.gain) for row in rows])
