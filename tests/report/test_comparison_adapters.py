"""What the page of a comparison says of adapters: means over the seeds of what `weftlora.inspect` finds, from folders alone."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparisons import comparison, renamed, write_runs
from pages import specs

import weftlora
from weftlora.compare.record import Outcome
from weftlora.inspection.record import Inspection
from weftlora.report.comparison.adapters import adapter_differences
from weftlora.report.comparison.page import page
from weftlora.report.comparison.runs import Evidence, gather


@pytest.fixture(scope="module")
def evidence(alora_run: Path, flexora_run: Path, hydra_run: Path) -> Evidence:
    """Three methods, a trained run each."""
    runs = {"alora": alora_run, "flexora": flexora_run, "hydralora": hydra_run}
    bare = comparison(1, tuple(runs))
    outcomes = [dataclasses.replace(bare.of(name)[0], folder=run.name) for name, run in runs.items()]
    return gather(dataclasses.replace(bare, folder=str(alora_run.parent), outcomes=outcomes, baseline="alora"))


@pytest.fixture(scope="module")
def drawn(evidence: Evidence) -> dict[str, list[dict[str, Any]]]:
    """The values of every chart by the first words of its caption."""
    (part,) = adapter_differences(evidence)
    return {chart.caption.partition(",")[0].split(" of ")[0]: chart.spec["data"]["values"] for chart in part.charts}


def look(run: Path) -> Inspection:
    return weftlora.inspect(run, base=False, spectra=0)


def test_sizes_and_ranks_are_those_of_the_adapters(drawn: Any, alora_run: Path, hydra_run: Path):
    for name, run in (("alora", alora_run), ("hydralora", hydra_run)):
        shown = {row["site"]: row["value"] for row in drawn["‖ΔW‖"] if row["pick"] == name}
        assert shown == {site.site: site.norm for site in look(run).sites}
    ranks = {row["site"]: row["value"] for row in drawn["Live rank slots"]}
    assert ranks == {site.site: site.rank for site in look(alora_run).sites}
    assert {row["pick"] for row in drawn["Live rank slots"]} == {"alora"}  # the ranks of the others cannot move


def test_selected_blocks_are_counted_over_seeds(drawn: Any, evidence: Evidence, flexora_run: Path):
    chosen = {candidate.name.split(".")[-1] for candidate in look(flexora_run).layers.candidates if candidate.selected}
    rows = drawn["How often each block is adapted"]
    assert {row["method"] for row in rows} == {"flexora"}
    assert {row["block"] for row in rows if row["value"] == 1} == chosen
    assert len({row["block"] for row in rows}) > len(chosen)


def test_heads_are_compared_where_there_are_some(drawn: Any, hydra_run: Path):
    shown = {row["site"]: row["value"] for row in drawn["Mean cosine between the heads"]}
    assert shown == {head.site: head.mean for head in look(hydra_run).heads if head.mean is not None}


def test_several_seeds_are_averaged_with_their_spread(evidence: Evidence, hydra_run: Path):
    one = look(hydra_run)
    other = dataclasses.replace(one, sites=[dataclasses.replace(site, norm=3 * site.norm) for site in one.sites])
    (part,) = adapter_differences(dataclasses.replace(evidence, looks={"hydralora": [one, other]}))
    first = part.charts[0].spec["data"]["values"][0]
    assert first["value"] == pytest.approx(2 * one.sites[0].norm)
    assert first["spread"] == f"{one.sites[0].norm:.3g} to {3 * one.sites[0].norm:.3g}"
    assert first["seeds"] == 2


def test_gains_of_dash_are_means_over_directions(saved: Callable[[str], Path], evidence: Evidence):
    found = look(saved("lora_tsd"))
    (part,) = adapter_differences(dataclasses.replace(evidence, looks={evidence.found.methods[0].name: [found]}))
    gains = next(chart for chart in part.charts if "gains of Dash" in chart.caption).spec["data"]["values"]
    site = found.directions[0]
    expected = statistics.fmean(abs(c.gain) for c in site.chosen if c.gain is not None)
    assert next(row["value"] for row in gains if row["site"] == site.site) == pytest.approx(expected)


def test_routers_are_run_over_rows_only_when_asked(evidence: Evidence, drawn: Any, hydra_run: Path):
    assert evidence.routers == {}
    (part,) = adapter_differences(gather(evidence.found, routers=True))
    shown = {chart.caption: chart.spec["data"]["values"] for chart in part.charts}
    apart = shown["How differently each domain uses the heads (hydralora)"]
    assert len({row["domain"] for row in apart}) > 1
    gates = [row for row in shown["How much of every head is used, by block (hydralora)"] if row["rows"] == "all rows"]
    assert sum(row["mean"] for row in gates) == pytest.approx(len(look(hydra_run).heads))


def test_an_adapter_that_cannot_be_looked_into_is_named_once(tmp_path: Path):
    found = write_runs(renamed(comparison(2, ("lora", "alora")), "alora", "peft:adalora"), tmp_path)
    for outcome in found.of("peft:adalora"):
        adapter = tmp_path / outcome.folder / "adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text('{"peft_type": "ADALORA"}')
    evidence = gather(found)
    assert len(evidence.left_out) == 1
    assert "Inside peft:adalora" in evidence.left_out[0]
    assert evidence.looks == {}
    assert page(evidence)


def test_a_run_folder_that_is_gone_leaves_its_numbers(tmp_path: Path):
    found = write_runs(comparison(2, ("lora", "alora")), tmp_path)
    gone = Outcome("alora", 1, "runs/nowhere", "complete", scores=found.of("alora")[1].scores)
    outcomes = [gone if (o.method, o.seed) == ("alora", 1) else o for o in found.outcomes]
    evidence = gather(dataclasses.replace(found, outcomes=outcomes))
    assert len(evidence.runs) == len(outcomes) - 1
    assert "runs/nowhere" in page(evidence)
    assert specs(page(evidence))
