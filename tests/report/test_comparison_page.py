"""The page of a comparison as text: planted numbers in their places, each with a link to its runs."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import PLANTED, broken, changed, comparison, judged, renamed, write_runs
from pages import NASTY, Elements, Node, specs, tree

from weftlora.compare.record import Comparison
from weftlora.report.comparison.page import judged as judged_by
from weftlora.report.comparison.page import page
from weftlora.report.comparison.results import facts, overall, verdicts, warnings
from weftlora.report.comparison.runs import Evidence, gather, recipes
from weftlora.runs.recipe import apply


@pytest.fixture(scope="module")
def found() -> Comparison:
    return broken(comparison(5))


@pytest.fixture(scope="module")
def written(found: Comparison) -> str:
    return page(Evidence(found))


def results(text: str) -> dict[str, list[Node]]:
    """The cells of every method in the table of results."""
    (table,) = tree(text).find("table", id="results-table")
    lines = {row.attributes["data-name"]: row.find("td") for row in table.find("tbody")[0].find("tr")}
    return {str(name): cells for name, cells in lines.items()}


def test_equal_folders_give_equal_bytes(found: Comparison, tmp_path: Path):
    once = page(gather(write_runs(found, tmp_path / "a")))
    again = page(gather(write_runs(found, tmp_path / "b")))
    assert once.replace(str(tmp_path / "a"), "") == again.replace(str(tmp_path / "b"), "")


def test_the_verdict_stands_before_everything_else(written: str, found: Comparison):
    sections = [s.attributes["aria-labelledby"] for s in tree(written).find("section")]
    assert sections == ["verdict", "differences", "results", "quality", "curves", "domains", "runs", "recipes"]
    first = tree(written).find("section")[0]
    assert first.find("p", class_="overall")[0].text == overall(found)
    said = [item.text for item in first.find("li")]
    assert said[0].startswith("better hydralora : better by 0.003")
    assert "over 5 seeds" in said[0]
    assert [line.split()[-1] for line in said[-1:]] == ["training"]
    for fact in (
        found.budget,
        found.machine,
        "0, 1, 2, 3, 4",
        "lower is better",
        "false verdicts are expected",
        "torch 2.9.0",
    ):
        assert fact in first.text


def test_one_sentence_says_what_is_better(found: Comparison):
    assert re.fullmatch(
        r"hydralora is better than lora by 0\.00\d+ nats \[0\.00\d+, 0\.00\d+\], over 5 seeds\.", overall(found)
    )
    two = comparison(5, ("lora", "hydralora", "alora"))
    twice = dataclasses.replace(two, baseline="alora")
    assert overall(judged(twice)).startswith("2 of 2 methods are better than alora, over 5 seeds: hydralora by 0.00")
    alone = comparison(5, ("lora", "tied_lora", "lora_dash"))
    assert overall(alone) == "Nothing tried here is distinguishably better than lora, over 5 seeds."


def test_every_number_of_a_method_leads_to_its_runs(written: str, found: Comparison):
    page_tree = tree(written)
    ids = {node.attributes["id"] for node in page_tree.all() if node.attributes.get("id")}
    links = [node.attributes["href"] for node in page_tree.find("a")]
    assert {str(link)[1:] for link in links if link} <= ids
    for name, cells in results(written).items():
        (body,) = [
            b for b in page_tree.find("tbody") if b.attributes.get("id") == cells[0].find("a")[0].attributes["href"][1:]
        ]
        assert {a.attributes["href"] for cell in cells for a in cell.find("a")} == {f"#{body.attributes['id']}"}
        assert all(cell.text == "–" or cell.find("a") for cell in cells)
        assert all(outcome.folder in body.text for outcome in found.of(name))
    for key in ("curves", "domains"):
        (table,) = page_tree.find("table", id=f"{key}-table")
        values = [td for td in table.find("tbody")[0].find("td") if "." in td.text]
        assert values
        assert all(td.find("a") for td in values)


def test_planted_numbers_stand_in_the_results(written: str, found: Comparison):
    for row in found.rows:
        loss, difference, wins, *_ = results(written)[row.name]
        assert row.score is not None
        assert loss.text.startswith(f"{row.score.mean:.4f}")
        if row.gap is not None:
            assert (
                difference.text.replace("\N{MINUS SIGN}", "-")
                == f"{row.gap.mean:+.4f} {row.gap.low:+.4f} to {row.gap.high:+.4f}"
            )
            assert row.gap.mean == pytest.approx(PLANTED[row.name], abs=0.001)
            assert wins.text == f"{row.wins} of {row.gap.n}"
    heads = [th.text for th in tree(written).find("table", id="results-table")[0].find("thead")[0].find("th")]
    at = {head: n - 1 for n, head in enumerate(heads)}
    hydra = results(written)["hydralora"]
    assert hydra[at["trainable parameters"]].text == "146,001 \N{MINUS SIGN}0.3% of budget"
    assert hydra[at["step ratio CPU, to lora"]].text.startswith("1.28")
    assert hydra[at["tokens/s"]].text.startswith("6,923")
    assert hydra[at["export on disk"]].text == "598 KiB"
    assert hydra[at["rank"]].text == "16"


def test_no_mean_over_seeds_stands_without_its_interval(written: str, found: Comparison):
    alone = {row.name for row in found.rows if row.score is None or row.score.n < 2}  # one run, and no mean
    heads = tree(written).find("table", id="results-table")[0].find("thead")[0].find("th")
    for name, cells in results(written).items():
        for head, cell in zip(heads[1:], cells, strict=True):
            if (
                head.text.split()[0] in ("loss", "difference", "exact", "step", "tokens/s", "memory", "training")
                and cell.text != "–"
                and name not in alone
            ):
                assert " to " in cell.text or "seed" in cell.text, (name, head.text, cell.text)


def test_charts_have_the_numbers_of_the_record(written: str, found: Comparison):
    drawn = specs(written)
    rows = {row.name: row for row in found.rows}
    forest = drawn["differences-0"]["data"]["values"]
    for mark in forest:
        if mark["of"] == "mean":
            assert (mark["value"], mark["low"], mark["high"]) == dataclasses.astuple(rows[mark["name"]].gap)[:3]
    assert len([mark for mark in forest if mark["of"] == "seed"]) == 5 * 5 - 2  # two runs were lost
    points = {point["name"]: point for point in drawn["quality-0"]["data"]["values"]}
    assert points["tied_lora"]["x"] == 6240
    assert {name for name, point in points.items() if point["front"]} == {"tied_lora", "hydralora"}
    times = {point["name"]: point for point in drawn["quality-1"]["data"]["values"]}
    assert times["lora"]["x"] == pytest.approx(150 * 0.12, rel=0.03)
    assert times["flexora"]["x"] == pytest.approx((150 + 40) * 0.12, rel=0.03)  # its search is counted
    last = [p for p in drawn["curves-0"]["data"]["values"] if p["name"] == "tied_lora" and p["step"] == 150]
    assert [p["n"] for p in last] == [4, 4]
    assert {p["what"] for p in last} == {"training loss", "validation loss"}
    assert "none" not in points


def test_every_chart_has_words_and_a_table_has_its_numbers(written: str):
    assert all(spec["description"] and spec["data"]["values"] for spec in specs(written).values())
    for section in tree(written).find("section"):
        if section.find("figure") and section.attributes["aria-labelledby"] in ("curves", "domains"):
            assert section.find("details")[0].find("table")
    levels = [int(tag[1]) for tag, _ in Elements(written).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}
    ids = [a["id"] for _, a in Elements(written).tags if a.get("id")]
    assert len(ids) == len(set(ids))


def test_domains_are_shown_where_there_are_some(written: str, found: Comparison):
    rows = specs(written)["domains-0"]["data"]["values"]
    mean = {(row["domain"], row["name"]): row["value"] for row in rows if row["of"] == "mean"}
    assert mean["mill", "hydralora"] == pytest.approx(1.4 * mean["dock", "hydralora"])
    assert "domains-0" not in specs(page(Evidence(comparison(2, domains=False))))


def test_no_chart_of_a_cost_that_is_equal_by_design():
    equal = specs(page(Evidence(comparison(2, names=("lora", "hydralora", "flexora"), domains=False))))
    assert "CPU seconds" in json.dumps(equal["quality-0"])
    assert "quality-1" not in equal


def test_one_seed_has_no_verdict_and_no_interval():
    one = comparison(1)
    text = page(Evidence(one))
    assert overall(one).startswith("No verdict: with one seed")
    assert {each.kind for each in verdicts(one)} == {"no verdict", "frozen base"}
    assert text.count("One seed: no number has an interval") == 1
    assert "no interval" not in "".join(cell.text for row in results(text).values() for cell in row)
    assert "by chance" not in text
    assert not re.search("Means over seeds with|Bars are intervals|in bands of", text)
    assert re.search(r"its loss is 0\.00\d\d lower than lora's", verdicts(one)[0].sentence)
    for spec in specs(text).values():
        assert not any({"low", "y_low", "x_low"} & set(row) for row in spec["data"]["values"])
        assert not re.search(r'"field": "(y_|x_)?low"', json.dumps(spec))


def test_runs_that_were_lost_are_shown_with_their_reason(written: str, found: Comparison):
    runs = next(s for s in tree(written).find("section") if s.attributes["aria-labelledby"] == "runs")
    assert "The disk was full at step 80." in runs.text
    assert "The loss was not finite from step 31 on." in runs.text
    assert {td.text for td in runs.find("td") if "words" in str(td.attributes.get("class")) and "/" not in td.text} == {
        "complete", "failed", "diverged",
    }  # fmt: skip
    said = " ".join(warnings(found))
    assert "2 runs failed or diverged (tied_lora and alora)" in said
    assert "learning rate of tied_lora is the lowest or highest" in said
    assert ("note", "tied_lora: it cannot reach the budget.") in list(facts(found))


def test_a_comparison_in_which_nothing_is_complete_has_a_page():
    empty = comparison(2, ("lora", "alora"))
    lost = [
        dataclasses.replace(o, status="missing", scores={}, domains={}, figures={}, curve=[]) for o in empty.outcomes
    ]
    none = judged(dataclasses.replace(empty, outcomes=lost, complete=False))
    assert overall(none) == (
        "Unfinished, 5 of 5 runs missing (lora n = 0 of 2, alora n = 0 of 2, none n = 0 of 1). There is nothing to say yet: no method "
        "and lora have a complete run of the same seed."
    )
    assert warnings(none)[0] == (
        "To finish, give the command of top again: weftlora compare continues where it was stopped."
    )
    assert specs(page(Evidence(none))) == {}


def test_an_unfinished_comparison_says_so_before_anything_else_and_counts_its_own_seeds():
    """Five seeds were planned; what is claimed is claimed of those that there are."""
    whole = comparison(5, ("lora", "hydralora", "tied_lora"))
    gone: dict[str, Any] = {"status": "missing", "scores": {}, "domains": {}, "figures": {}, "curve": []}
    found = changed(changed(whole, "hydralora", 4, **gone), "hydralora", 3, **gone)
    assert not overall(whole).startswith("Unfinished")
    assert overall(found).startswith(
        "Unfinished, 2 of 16 runs missing (lora n = 5 of 5, hydralora n = 3 of 5, tied_lora n = 5 of 5, none n = 1 of 1). "
        "hydralora is better than lora by 0.00"
    )
    assert overall(found).endswith("over 3 seeds.")
    (headline,) = tree(page(Evidence(found))).find("p", class_="overall")
    assert headline.text == overall(found)


def test_figures_that_a_machine_cannot_tell_are_dashes(found: Comparison):
    bare = judged(dataclasses.replace(found, outcomes=[dataclasses.replace(o, figures={}) for o in found.outcomes]))
    text = page(Evidence(bare))
    assert results(text)["alora"][-1].text == "–"
    assert "quality-1" not in specs(text)


def test_no_interval_holds_what_cannot_be(found: Comparison):
    few = [
        dataclasses.replace(
            o, scores={**o.scores, "exact_match": float(o.seed == 1)}, figures={"tokens_per_s": 10.0**o.seed}
        )
        for o in found.outcomes
    ]
    cells = results(page(Evidence(judged(dataclasses.replace(found, outcomes=few)))))["hydralora"]
    assert cells[3].text.startswith("20.0 % 0.0 % to ")
    assert cells[-2].text.split()[:2] == ["2,222", "0"]
    sure = [dataclasses.replace(o, scores={**o.scores, "exact_match": 1 - o.seed / 100}) for o in found.outcomes]
    text = page(Evidence(judged_by(judged(dataclasses.replace(found, outcomes=sure)), None, "exact_match")))
    assert "to 100.0 %" in results(text)["hydralora"][0].text
    assert max(point["y_high"] for point in specs(text)["quality-0"]["data"]["values"]) == 100


def test_a_band_below_a_logarithmic_scale_ends_where_the_scale_does(found: Comparison):
    steep = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 0.01}]
    curves = [
        dataclasses.replace(o, curve=[steep[0], {**steep[1], "loss": 0.1 if o.seed else 1.0}]) for o in found.outcomes
    ]
    spec = specs(page(Evidence(dataclasses.replace(found, outcomes=curves))))["curves-0"]
    scale = spec["layer"][-1]["encoding"]["y"]["scale"]
    assert scale["type"] == "log"
    assert min(row["low"] for row in spec["data"]["values"] if "low" in row) == scale["domain"][0] > 0


def test_seconds_below_one_are_written_as_such(found: Comparison):
    quick = {
        o.method: dataclasses.replace(o, figures={"cpu_per_step": 0.0004 * (30 if o.method == "flexora" else 1)})
        for o in found.outcomes
        if o.status == "complete"
    }
    text = page(Evidence(judged(dataclasses.replace(found, outcomes=list(quick.values())))))
    (times,) = [each for each in specs(text).values() if "CPU seconds" in each["description"]]
    x = times["layer"][-1]["encoding"]["x"]
    assert (x["scale"]["type"], x["axis"]["format"]) == ("log", "~g")  # "~s" would write 0.06 as 60m


def test_a_number_that_is_not_finite_is_left_out(found: Comparison):
    figures = {"tokens_per_s": math.nan, "peak_bytes": math.inf, "cpu_per_step": 0.1}
    strange = changed(found, "hydralora", 2, figures=figures, curve=[{"step": 10, "loss": math.nan}])
    text = page(Evidence(strange))
    assert "nan" not in results(text)["hydralora"][-2].text.lower()
    assert "Infinity" not in json.dumps(specs(text))


@pytest.mark.parametrize("what", ["hydralora", "lora", "dock", "demo", "exact_match"])
def test_names_from_files_are_text_wherever_they_stand(what: str, tmp_path: Path):
    nasty = renamed(comparison(2), what, NASTY)
    text = page(Evidence(nasty), title=NASTY)
    elements = Elements(text)
    assert [tag for tag, _ in elements.tags if tag == "script"] == ["script"] * 4
    assert NASTY in "".join(elements.text)
    assert re.findall(r"<h1>(.*?)</h1>", text)[0].count("49") == 0
    if what != "exact_match":
        assert (
            json.dumps(NASTY, ensure_ascii=False)[1:-1] in json.dumps(specs(text), ensure_ascii=False) or what == "demo"
        )


def test_nothing_on_the_page_points_elsewhere(written: str):
    for tag, attributes in Elements(written).tags:
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
        assert not [name for name in attributes if name.startswith("on") or name == "style"]
    policy = next(a["content"] for tag, a in Elements(written).tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert policy.count("sha256-") == 3
    assert not re.search(r"script-src[^;]*unsafe", policy)


def test_a_recipe_and_its_commands_give_back_every_run(found: Comparison, tmp_path: Path):
    evidence = gather(write_runs(found, tmp_path))
    for recipe in recipes(evidence):
        runs = [evidence.runs[outcome.folder] for outcome in found.of(recipe.name)]
        commands = [shlex.split(line) for line in recipe.commands.splitlines()]
        if recipe.name == "none":
            assert commands == [["weftlora", "eval", "lora.yaml", "--adapter", "none"]]
            continue
        assert len(commands) == len(runs) == 5
        for run, (weftlora, train, file, *overrides) in zip(runs, commands, strict=True):
            assert (weftlora, train, file) == ("weftlora", "train", recipe.file)
            content: dict[str, Any] = yaml.safe_load(recipe.content)
            for override in overrides:
                content = apply(content, override)
            assert content == run.recipe
    assert "train.seed=3" in page(evidence)
    (chosen,) = [recipe.about for recipe in recipes(evidence) if recipe.name == "tied_lora"]
    assert "0.001 gave 0.5271, 0.003 gave 0.0500 and 0.01 gave 0.5729" in chosen


def test_another_metric_and_another_baseline_can_be_asked_for(found: Comparison):
    turned = judged_by(found, "hydralora", "exact_match")
    assert (turned.baseline, turned.metric, turned.higher_is_better) == ("hydralora", "exact_match", True)
    rows = {row.name: row for row in turned.rows}
    assert rows["tied_lora"].verdict.kind == "worse"
    assert rows["tied_lora"].gap is not None
    assert rows["tied_lora"].gap.mean == pytest.approx(-4 * 0.034, abs=0.01)
    text = page(Evidence(turned))
    assert "points of exact match" in text
    assert results(text)["tied_lora"][1].text.startswith("\N{MINUS SIGN}13.")
    assert (
        next(row["value"] for row in specs(text)["differences-0"]["data"]["values"] if row["name"] == "tied_lora") < -13
    )


def test_what_runs_answered_stands_on_the_page(found: Comparison, tmp_path: Path):
    evidence = gather(write_runs(found, tmp_path))
    run = next(run for folder, run in evidence.runs.items() if "hydralora" in folder)
    rows = [{"step": step, "prompt": NASTY, "text": f"answer {step}", "reference": "as asked"} for step in (10, 20, 30)]
    (run.folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page_tree = tree(page(evidence))
    (table,) = page_tree.find("table", id="samples-table")
    lines = [[cell.text for cell in row.find("td")] for row in table.find("tbody")[0].find("tr")]
    assert [(line[0], *line[2:]) for line in lines] == [(str(n), f"answer {n}", "as asked") for n in (10, 30)]
    assert not page(Evidence(found)).count("samples-table")
