"""The page's sections, in reading order."""

from __future__ import annotations

from weftlora.report.parts.factors import against, directions
from weftlora.report.parts.routing import heads, routers
from weftlora.report.parts.section import Section
from weftlora.report.parts.update import groups, history, layers, merging, ranks, sites
from weftlora.report.result import Inspection


def sections(found: Inspection) -> list[Section]:
    """All parts that have something to show."""
    parts = (sites, ranks, history, layers, routers, heads, against, directions, groups, merging)
    return [section for part in parts for section in part(found)]
