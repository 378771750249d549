"""The README's plot is that of the committed record."""

import json

import plots


def test_the_plot_is_made_from_the_committed_record() -> None:
    assert all(map(plots.is_current, plots.PLOTS)), "run python scripts/plots.py"


def test_every_method_has_both_figures_at_both_dropouts() -> None:
    rows = plots.rows(json.loads(plots.PLOTS["step"][0].read_text()))
    assert {(row["method"], row["dropout"], row["what"]) for row in rows} == {
        (name, dropout, what)
        for name in plots.NAMES.values()
        for dropout in ("dropout 0", "dropout 0.05")
        for what in ("step time", "saved activations")
    }
    assert {row["by"] for row in rows if "peft" in row["method"]} == {"stock peft"}
