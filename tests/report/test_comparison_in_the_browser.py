"""The page of a comparison as people use it, in headless Chromium: drawn, sorted, filtered, printed, quiet, and offline."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from comparisons import broken, comparison, judged, renamed, write_runs
from pages import MARKS, NASTY, PHONE, Open, contrast, luminance, opening, style

from weftlora.compare.record import Comparison
from weftlora.report.comparison.page import page
from weftlora.report.comparison.runs import Evidence, gather
from weftlora.report.web import write

PAPER = {"width": 703, "height": 1000}
"""Paper is A4 between its margins, in CSS pixels."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return write_runs(broken(comparison(5)), tmp_path_factory.mktemp("compared"))


def scored(found: Comparison) -> Comparison:
    """With all the scores that answers can have."""
    more = {"bleu": 45.1234, "rouge_l": 60.1234}
    outcomes = [dataclasses.replace(o, scores={**o.scores, **(more if o.scores else {})}) for o in found.outcomes]
    return judged(dataclasses.replace(found, outcomes=outcomes))


@pytest.fixture(scope="module")
def files(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    top = tmp_path_factory.mktemp("reports")
    long = comparison(2, (*tuple(f"a method of a rather long name, the {n}th of many" for n in range(12)), "lora"))
    made = {
        "five": gather(found),
        "one": Evidence(comparison(1)),
        "scored": Evidence(scored(comparison(5))),
        "many": Evidence(long),
        "nasty": Evidence(renamed(comparison(2, domains=False), "hydralora", NASTY)),
        "odd": Evidence(
            renamed(renamed(comparison(2), "hydralora", "__proto__"), "tied_lora", f"a\u2028{'long ' * 90}")
        ),
    }
    for name, evidence in made.items():
        write(page(evidence), top / f"{name}.html")
    return {name: top / f"{name}.html" for name in made}


@pytest.fixture
def opened(browser: Any, files: dict[str, Path]) -> Iterator[Open]:
    with opening(browser, files) as open_:
        yield open_


def shown(page: Any) -> list[str]:
    """The methods in the table of results, from top to bottom."""
    rows = "rows => rows.filter(row => !row.hidden).map(row => row.dataset.name)"
    return list(page.eval_on_selector_all("#results-table tbody tr", rows))


def gaps(found: Comparison) -> dict[str, float]:
    return {row.name: row.gap.mean for row in found.rows if row.gap is not None}


@pytest.mark.parametrize(("name", "scheme"), [("five", "light"), ("five", "dark"), ("one", "light"), ("many", "light")])
def test_charts_are_drawn_and_nothing_overflows_on_a_phone(name: str, scheme: str, opened: Open):
    page = opened(name, scheme, PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    assert page.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('#results-table').parentElement)")
    charts = page.query_selector_all(".chart")
    assert len(charts) >= 3
    for chart in charts:
        where = chart.get_attribute("id")
        assert chart.get_attribute("aria-label"), where
        assert len(chart.query_selector_all(MARKS)) > 0, where
        box = chart.query_selector("svg").bounding_box()
        assert box["x"] + box["width"] <= PHONE["width"], where
        for legend in chart.query_selector_all(".role-legend-label text, .role-axis-title text, .role-axis-label text"):
            words = legend.bounding_box()
            assert words["x"] >= 0, (where, legend.inner_text())
            assert words["x"] + words["width"] <= PHONE["width"], (where, legend.inner_text())
            assert words["y"] >= box["y"] - 1, (where, legend.inner_text())


@pytest.mark.parametrize("name", ["five", "many", "scored"])
@pytest.mark.parametrize("width", [1280, 1920])
def test_the_results_fit_a_wide_screen_with_every_method_and_every_cost(name: str, width: int, opened: Open):
    page = opened(name, "light", {"width": width, "height": 900})
    shape = "e => [e.scrollWidth - e.clientWidth, e.scrollHeight - e.clientHeight, e.getBoundingClientRect().right]"
    over, under, right = page.eval_on_selector("#results-table", f"t => ({shape})(t.parentElement)")
    assert (over, under) == (0, 0)
    assert right <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heads = page.eval_on_selector_all("#results-table thead th", "all => all.map(each => each.innerText)")
    assert len(heads) >= 14
    assert "memory" in heads[-1]
    letters = page.eval_on_selector_all("#results-table td small", "all => all.map(each => each.clientHeight)")
    assert max(letters) < 90  # broken between words, not within


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_in_both_colour_schemes(scheme: str, opened: Open):
    page = opened("five", scheme)
    ground, raised = style(page, "body", "backgroundColor"), style(page, "figure", "backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    for selector, what, behind in (
        (".overall", "color", ground),
        (".badge.better", "color", ground),
        (".badge.worse", "color", ground),
        (".badge.not-settled", "color", ground),
        (".warning", "color", raised),
        (".numbers small", "color", raised),
        ("td.better a", "color", raised),
        ("td.worse a", "color", raised),
        (".problem td", "color", raised),
        ("#differences-0 .role-axis-label text", "fill", raised),
    ):
        assert contrast(style(page, selector, what), behind) >= 4.5, selector
    pressed = ".chips button[aria-pressed=true]"
    assert contrast(style(page, pressed, "color"), style(page, pressed, "backgroundColor")) >= 4.5


def test_tooltips_tell_the_difference_and_its_interval(opened: Open, found: Comparison):
    page = opened("five")
    page.locator("#differences-0 .mark-symbol.role-mark").last.locator("path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    told = page.inner_text("#vg-tooltip-element").replace("\N{MINUS SIGN}", "-")
    best = min(gaps(found), key=gaps(found).__getitem__)
    assert best in told
    assert f"{gaps(found)[best]:+.4f}" in told
    assert " to -0.00" in told
    page.mouse.move(2, 2)
    page.wait_for_selector("#vg-tooltip-element:not(.visible)", state="attached")


@pytest.mark.parametrize("how", ["mouse", "Enter", "Space"])
def test_a_heading_sorts_by_mouse_and_by_keyboard(how: str, opened: Open, found: Comparison):
    page = opened("five")
    button = page.get_by_role("button", name="difference to lora")

    def press() -> None:
        if how == "mouse":
            button.click()
        else:
            button.focus()
            page.keyboard.press(how)

    expected = sorted(gaps(found), key=gaps(found).__getitem__)
    press()
    assert shown(page)[: len(expected)] == expected
    assert set(shown(page)[len(expected) :]) == {"lora", "none"}  # without a difference: last, both ways
    heading = page.locator("#results-table th[aria-sort]")
    assert heading.get_attribute("aria-sort") == "ascending"
    press()
    assert shown(page)[: len(expected)] == expected[::-1]
    assert set(shown(page)[len(expected) :]) == {"lora", "none"}
    assert heading.get_attribute("aria-sort") == "descending"
    assert heading.count() == 1
    page.get_by_role("button", name="method", exact=True).click()
    assert shown(page) == sorted(shown(page))


def test_the_filter_answers_to_the_keyboard(opened: Open):
    page = opened("five")
    page.locator("#filter").focus()
    page.keyboard.type("LoRA_")
    assert shown(page) == ["lora_dash"]
    assert page.inner_text("#shown") == "1 of 7 shown"
    for _ in range(5):
        page.keyboard.press("Backspace")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.dataset.kind") == "better"
    page.keyboard.press("Space")
    assert shown(page) == ["hydralora"]


def test_the_filter_answers_to_the_mouse(opened: Open, found: Comparison):
    page = opened("five")
    page.locator(".chips button", has_text="worse").click()
    assert set(shown(page)) == {row.name for row in found.rows if row.verdict.kind == "worse"}
    assert page.locator(".chips button[aria-pressed=true]").all_inner_texts() == ["worse"]
    page.locator(".chips button", has_text="all").click()
    assert len(shown(page)) == len(found.rows)


def test_a_number_leads_to_its_runs_and_a_name_to_its_recipe(opened: Open):
    page = opened("five")
    before = style(page, "#runs-1 td", "backgroundColor")
    page.locator("#results-table tr[data-name=hydralora] td a").first.click()
    page.wait_for_function("() => location.hash === '#runs-1'")
    assert "runs/hydralora/seed-4" in page.inner_text("#runs-1")
    assert style(page, "#runs-1 td", "backgroundColor") != before
    in_view = "() => (y => 0 <= y && y < innerHeight)(document.getElementById('runs-1').getBoundingClientRect().y)"
    page.wait_for_function(in_view)
    page.locator("#runs-1 a").click()
    page.wait_for_selector("#recipe-1[open]")
    assert "recipe: hydralora" in page.inner_text("#recipe-1")


def test_a_recipe_is_copied_or_at_least_selected(opened: Open):
    page = opened("five")
    page.locator("#recipe-0 summary").click()
    page.locator("#recipe-0 .copy").last.click()
    page.wait_for_function("() => document.querySelector('#recipe-0 .code:last-child .copy').textContent !== 'Copy'")
    if page.locator("#recipe-0 .copy").last.inner_text() != "Copied":
        assert "recipe: lora" in page.evaluate("getSelection().toString()")


def test_a_method_is_picked_by_the_list_and_by_the_legend(opened: Open):
    page = opened("five")
    lines = "#curves-0 .mark-line.role-mark path"
    assert page.locator(lines).count() == 6
    page.locator("#curves-0 select").last.focus()
    page.keyboard.type("hyd")
    page.wait_for_function(f"() => document.querySelectorAll('{lines}').length === 2")  # and the baseline
    page.locator("#curves-0 select").last.select_option("all")
    page.wait_for_function(f"() => document.querySelectorAll('{lines}').length === 6")
    for name in ("hydralora", "flexora"):
        page.locator("#curves-0 .role-legend-label text", has_text=name).first.click()
    faded = (
        f"[...document.querySelectorAll('{lines}')].filter(e => Number(e.getAttribute('opacity') ?? 1) < 0.5).length"
    )
    page.wait_for_function(f"() => {faded} === 4")


def test_paper_has_everything_and_cuts_nothing(opened: Open):
    page = opened("five", viewport=PAPER)
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert style(page, "#results-table thead th", "whiteSpace") == "normal"  # or many columns are wider than the paper
    for selector in (".filter", ".vega-bindings", ".copy", "nav"):
        assert style(page, selector, "display") == "none"
    assert page.locator("details:not([open])").count() == 0
    assert page.locator(".code pre").first.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PAPER["width"]
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll, pre')].every(e => e.scrollHeight <= e.clientHeight + 1)"
    )
    assert luminance(style(page, "body", "backgroundColor")) == pytest.approx(1)
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0


def test_names_of_methods_run_nothing(opened: Open):
    page = opened("nasty")
    assert NASTY in page.inner_text(".overall") + page.inner_text(".verdicts")
    page.locator("#results-table thead button").first.click()
    page.locator("#curves-0 select").last.select_option(NASTY)
    page.locator("#differences-0 .mark-symbol.role-mark").last.locator("path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert NASTY in page.inner_text("#vg-tooltip-element")


def test_every_name_can_be_drawn_and_leaves_room_for_numbers(opened: Open):
    page = opened("odd", viewport=PHONE)
    assert page.locator(".chart.failed").count() == 0
    assert page.evaluate("document.querySelector('#results-table tbody th').clientWidth") < PHONE["width"] / 2
