"""The README's plot is that of the committed record."""

import json

import plots


def test_the_plot_is_made_from_the_committed_record() -> None:
    assert all(map(plots.is_current, plots.PLOTS)), "run python scripts/plots.py"


def test_every_method_has_both_figures_at_both_dropouts() -> None:
    rows = plots.rows(json.loads(plots.PLOTS["step"].records[0].read_text()))
    assert {(row["method"], row["dropout"], row["what"]) for row in rows} == {
        (name, dropout, what)
        for name in plots.NAMES.values()
        for dropout in ("dropout 0", "dropout 0.05")
        for what in ("step time", "saved activations")
    }
    assert {row["by"] for row in rows if "peft" in row["method"]} == {"stock peft"}


def test_every_chart_of_a_method_has_a_point_per_comparison_of_the_evidence_page() -> None:
    for claim in plots.claims.CLAIMS:
        plot = plots.PLOTS[f"measured-{claim.card}"]
        drawn = plot.draw({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in plot.records})
        values = [value for panel in drawn["vconcat"] for value in panel["data"]["values"]]
        assert len(values) == len(claim.contrasts)
        assert len({(value["where"], value["against"]) for value in values}) == len(values), "two points in one place"


def test_a_method_page_says_what_it_is_for_before_its_mathematics() -> None:
    pages = sorted((plots.ROOT / "docs" / "methods").glob("*.md"))
    assert pages
    for page in pages:
        headings = [line[3:] for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]
        assert headings[:4] == ["Recipe", "Cost", "What was measured", "The mathematics"], page.name
