"""The page as text: one file, the same for the same record, with names from files as text and nothing to fetch."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from pages import NASTY, Elements, renamed, specs

from weftlora.inspection.record import Inspection
from weftlora.report.inspection.page import page
from weftlora.report.inspection.sections import sections


def test_the_same_record_gives_the_same_page(inspections: dict[str, Inspection]):
    for found in inspections.values():
        assert page(found) == page(found)


def test_between_them_the_pages_have_every_section(inspections: dict[str, Inspection]):
    keys = {name: [section.key for section in sections(found)] for name, found in inspections.items()}
    assert keys["hydralora"] == ["update", "routers", "heads", "start", "directions", "merging"]
    assert keys["alora"] == ["update", "ranks", "moves", "start", "merging"]
    assert keys["flexora"] == ["update", "layers", "start", "directions", "merging"]
    assert keys["lora_tsd"] == ["update", "start", "directions", "merging"]
    assert keys["tied_lora"] == ["update", "start", "groups", "merging"]


def test_names_from_files_are_text_wherever_they_stand(inspections: dict[str, Inspection]):
    found = renamed(inspections["hydralora"], NASTY)
    text = page(found)
    elements = Elements(text)
    assert [tag for tag, _ in elements.tags if tag == "script"] == ["script"] * 3
    assert NASTY in "".join(elements.text)
    assert "49" not in re.findall(r"<h1>(.*?)</h1>", text)[0]
    held = json.dumps(specs(text), ensure_ascii=False)
    assert json.dumps(NASTY, ensure_ascii=False)[1:-1] in held


def test_nothing_on_the_page_points_elsewhere(inspections: dict[str, Inspection]):
    for found in inspections.values():
        elements = Elements(page(found))
        for tag, attributes in elements.tags:
            for name in ("src", "href", "action", "data"):
                value = attributes.get(name)
                assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        policy = next(a["content"] for tag, a in elements.tags if tag == "meta" and a.get("http-equiv"))
        assert policy is not None
        assert policy.startswith("default-src 'none'")
        assert "unsafe-eval" not in policy
        assert not re.search(r"script-src[^;]*unsafe-inline", policy)


def test_every_chart_has_words_and_every_section_a_heading(inspections: dict[str, Inspection]):
    for found in inspections.values():
        text, drawn = page(found), specs(page(found))
        for spec in drawn.values():
            assert spec["description"]
            assert spec["data"]["values"]
        levels = [int(tag[1]) for tag, _ in Elements(text).tags if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1
        assert set(levels[1:]) == {2}
        ids = [a["id"] for _, a in Elements(text).tags if a.get("id")]
        assert len(ids) == len(set(ids))
        assert all(f"{key}" in ids for key in drawn)
        for sentence in found.verdict:
            assert sentence.split(":")[0].split("'")[0] in "".join(Elements(text).text)


def test_numbers_of_the_charts_are_those_of_the_record(inspections: dict[str, Inspection]):
    drawn = specs(page(inspections["hydralora"]))
    moved = {row["site"]: row["value"] for row in drawn["update-0"]["data"]["values"]}
    assert moved == {site.site: site.relative for site in inspections["hydralora"].sites}
    ranks = specs(page(inspections["alora"]))["ranks-0"]["data"]["values"]
    assert {row["site"]: row["value"] for row in ranks} == {s.site: s.rank for s in inspections["alora"].sites}
    gates = [row for row in drawn["routers-0"]["data"]["values"] if row["rows"] == "all rows"]
    assert sum(row["mean"] for row in gates) == pytest.approx(len(inspections["hydralora"].routers.sites))
    assert sum(row["top"] for row in gates) == pytest.approx(len(inspections["hydralora"].routers.sites))


def test_an_adapter_that_did_nothing_yet_has_a_page_too(inspections: dict[str, Inspection]):
    found = inspections["tied_lora"]
    nothing = [dataclasses.replace(site, norm=0.0, effective_rank=0.0) for site in found.sites]
    empty = dataclasses.replace(found, sites=nothing, groups=[], factor_comparison=None, heads=[], directions=[])
    assert "does nothing yet" in empty.verdict[1]
    assert specs(page(empty))


def test_what_heads_give_is_drawn_for_every_row_and_head(inspections: dict[str, Inspection]):
    drawn = specs(page(inspections["hydralora"]))
    sites = [site for site in inspections["hydralora"].routers.outputs if site.points]
    points = [
        row
        for name, chart in drawn.items()
        if name.startswith("routers-")
        for row in chart["data"]["values"]
        if "x" in row
    ]
    assert len(points) == sum(len(site.points) for site in sites) > 0
