"""Pages as people open them, in headless Chromium: drawn, answering, quiet, legible in both colour schemes and on a phone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import DESK, MARKS, NASTY, PHONE, Open, contrast, luminance, opening, renamed, style

from weftlora.inspection.record import Inspection
from weftlora.report.inspection.page import write_page

NAMES = ["hydralora", "alora", "flexora", "lora_tsd", "tied_lora", "t5"]


@pytest.fixture(scope="module")
def files(inspections: dict[str, Inspection], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("pages")
    found = {**inspections, "nasty": renamed(inspections["hydralora"], NASTY)}
    for name, one in found.items():
        write_page(one, top / f"{name}.html")
    return {name: top / f"{name}.html" for name in found}


@pytest.fixture
def opened(browser: Any, files: dict[str, Path]) -> Iterator[Open]:
    with opening(browser, files) as open_:
        yield open_


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_charts_are_drawn_and_nothing_overflows_on_a_phone(name: str, scheme: str, opened: Open):
    page = opened(name, scheme, PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    charts = page.query_selector_all(".chart")
    assert charts
    for chart in charts:
        assert len(chart.query_selector_all(MARKS)) > 0, chart.get_attribute("id")
        box = chart.query_selector("svg").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= PHONE["width"]
        for title in chart.query_selector_all(".role-axis-title text"):
            words = title.bounding_box()
            assert box["x"] <= words["x"], title.inner_text()
            assert words["x"] + words["width"] <= box["x"] + box["width"], title.inner_text()
        legend = chart.query_selector(".role-legend")
        if legend is not None and (inner := legend.bounding_box()) is not None:
            assert inner["x"] + inner["width"] <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_colour_schemes(scheme: str, opened: Open):
    page = opened("hydralora", scheme)
    ground = style(page, "body", "backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    raised = style(page, "figure", "backgroundColor")
    for selector, what, behind in (
        ("h1", "color", ground),
        (".lead", "color", ground),
        ("nav a", "color", ground),
        (".tiles dt", "color", raised),
        (".chart .role-axis-label text", "fill", raised),
        (".chart .role-axis-title text", "fill", raised),
        (".chart .role-legend-label text", "fill", raised),
    ):
        assert contrast(style(page, selector, what), behind) >= 4.5, selector
    numbers = style(page, "#update-0 .mark-text.role-mark text", "fill")
    assert contrast(numbers, raised) >= 4.5


def test_tooltips_answer_to_the_pointer(opened: Open, inspections: dict[str, Inspection]):
    page = opened("hydralora")
    first = inspections["hydralora"].sites[0]
    page.locator("#update-0 .mark-rect.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.inner_text("#vg-tooltip-element")
    assert first.site in told
    assert f"{first.relative:.2%}" in told
    assert (
        contrast(style(page, "#vg-tooltip-element", "color"), style(page, "#vg-tooltip-element", "backgroundColor"))
        >= 4.5
    )
    page.mouse.move(2, 2)
    page.wait_for_selector("#vg-tooltip-element:not(.visible)", state="attached")


@pytest.mark.parametrize(
    ("name", "chart"), [("hydralora", "routers-0"), ("alora", "moves-0"), ("lora_tsd", "directions-0")]
)
def test_a_drop_down_list_changes_what_is_drawn(name: str, chart: str, opened: Open):
    page = opened(name)

    def drawn() -> list[str]:
        return page.eval_on_selector_all(f"#{chart} .role-mark path", "all => all.map(e => e.outerHTML)")

    before, select = drawn(), page.locator(f"#{chart} select").first
    options = select.locator("option").all_inner_texts()
    assert len(options) >= 2
    select.select_option(options[1])
    page.wait_for_function(
        "([id, before]) => [...document.querySelectorAll(`#${id} .role-mark path`)].map(e => e.outerHTML).join() !== before",
        arg=[chart, ",".join(before)],
    )
    assert drawn()


def test_shares_of_first_choices_are_a_list_away(opened: Open, inspections: dict[str, Inspection]):
    page = opened("hydralora")
    first = next(site for site in inspections["hydralora"].routers.sites if max(site.whole.top1) > 0)
    drawn = "e => e.getBBox().width"
    page.locator("#routers-0 select").last.select_option("first choices")
    page.wait_for_timeout(100)
    bars = page.locator("#routers-0 .role-mark path").all()
    widths = [bar.evaluate(drawn) for bar in bars[: len(first.whole.top1)]]
    assert [w / sum(widths) for w in widths] == pytest.approx(first.whole.top1, abs=0.01)


def test_labels_of_columns_lean_only_where_they_must(opened: Open):
    for viewport, level in ((DESK, True), (PHONE, False)):
        labels = opened("hydralora", viewport=viewport).locator("#update-0 .role-axis-label text").all()
        assert any("rotate" in str(label.get_attribute("transform")) for label in labels) != level


def test_a_click_in_the_legend_picks_a_line_out(opened: Open):
    page = opened("alora")
    page.locator("#moves-0 .role-legend-label text").first.click()
    page.wait_for_function(
        "() => new Set([...document.querySelectorAll('#moves-0 .mark-line.role-mark path')].map(e => "
        "e.getAttribute('opacity') ?? '1')).size > 1"
    )


def test_the_numbers_are_there_as_tables_by_keyboard(opened: Open, inspections: dict[str, Inspection]):
    page = opened("hydralora")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    summary = page.locator("summary").first
    summary.focus()
    page.keyboard.press("Enter")
    rows = page.locator("details[open] tbody tr")
    assert rows.count() == len(inspections["hydralora"].sites)
    assert page.eval_on_selector_all(".chart", "all => all.every(e => e.getAttribute('aria-label'))")


def test_names_in_an_adapter_run_nothing(opened: Open):
    page = opened("nasty")
    assert NASTY in page.inner_text("h1") + page.inner_text(".origin")
    page.locator("#update-0 .mark-rect.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert NASTY in page.inner_text("#vg-tooltip-element")
    assert page.locator("#vg-tooltip-element script").count() == 0


def test_print_is_dark_on_white_whatever_the_scheme(opened: Open):
    page = opened("hydralora", "dark")
    page.emulate_media(media="print")
    assert style(page, "body", "backgroundColor") == "rgb(255, 255, 255)"
    assert contrast(style(page, ".chart .role-axis-label text", "fill"), "rgb(255, 255, 255)") >= 4.5
    assert not page.is_visible("nav")
