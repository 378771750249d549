"""The README's plot is that of the committed record."""

import json

import bench_plot


def test_the_plot_is_made_from_the_committed_record() -> None:
    assert bench_plot.is_current(), "run python scripts/bench_plot.py"


def test_every_method_has_both_figures_at_both_dropouts() -> None:
    rows = bench_plot.rows(json.loads(bench_plot.RECORD.read_text()))
    assert {(row["method"], row["dropout"], row["what"]) for row in rows} == {
        (name, dropout, what)
        for name in bench_plot.NAMES.values()
        for dropout in ("dropout 0", "dropout 0.05")
        for what in ("step time", "saved activations")
    }
    assert {row["by"] for row in rows if "peft" in row["method"]} == {"stock peft"}
