"""A comparison as one HTML file, a pure function of its run folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from weftlora.report.comparison.curves import curves
from weftlora.report.comparison.domains import domains
from weftlora.report.comparison.evidence import Evidence
from weftlora.report.comparison.opening import differences, facts, overall, verdicts, warnings
from weftlora.report.comparison.parts import Part
from weftlora.report.comparison.places import inside
from weftlora.report.comparison.quality import quality
from weftlora.report.comparison.results import results
from weftlora.report.comparison.runs import columns, groups, recipes
from weftlora.report.comparison.wording import listed
from weftlora.report.web import render


def parts(evidence: Evidence) -> Iterator[Part]:
    """All parts between the verdict and the runs that have something to show, in reading order."""
    found = evidence.found
    yield from differences(found)
    yield results(found)
    for part in (quality, curves, domains):
        yield from part(found)
    yield from inside(evidence)


def page(evidence: Evidence, title: str | None = None) -> str:
    """The page. Equal run folders give equal pages, byte for byte, with one version of the libraries.

    Raises:
        ConfigError: the extra `html` is not installed.
    """
    found, shown = evidence.found, list(parts(evidence))
    specs = {
        f"{part.key}-{n}": {**chart.spec, "description": chart.alt}
        for part in shown
        for n, chart in enumerate(part.charts)
    }
    said = verdicts(found)
    return render(
        "comparison.html.jinja",
        specs,
        styles=["comparison.css"],
        scripts=["comparison.js"],
        found=found,
        title=title or f"{Path(found.model).name} on {Path(found.data).name}",
        overall=overall(found),
        verdicts=said,
        warnings=warnings(found),
        facts=[(what, value) for what, value in facts(found) if value],
        parts=shown,
        kinds=list(dict.fromkeys(each.kind for each in said)),
        run_columns=columns(found),
        groups=groups(found),
        recipes=recipes(evidence),
        versions=listed([f"{name} {version}" for name, version in found.versions.items()]),
    )
