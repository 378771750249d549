"""The machinery of `make evidence-llm`: the plan becomes stages, stages commands, runs records, and records a section of the page."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from statistics import stdev
from typing import Any

import evidence_llm
import llm_page
import llm_plan
import pytest
from llm_plan import (
    CONTRASTS,
    FORMS,
    Contrast,
    Form,
    Stage,
    hours_left,
    is_done,
    judge,
    smallest_effect,
    stages,
    steps_of,
)

import weftlora
from weftlora.compare.methods import contenders
from weftlora.compare.recipe import CompareRecipe

HYDRA, TIED = CONTRASTS[0], CONTRASTS[1]


def planted(contrast: Contrast, *gaps: float, **more: Any) -> dict[str, Any]:
    """A record in which ours is worse than the control by these differences, seed by seed."""
    pairs = [
        (name, seed, 1.0 + gap * (name == contrast.ours))
        for seed, gap in enumerate(gaps)
        for name in (contrast.control, contrast.ours)
    ]
    method = {"parameters": 1000, "lr": 1e-3, "rate_at_edge": False, "rates": [{"lr": 1e-3}]}
    return {
        "outcomes": [
            {"method": m, "seed": s, "status": "complete", "scores": {"loss": loss}, "domains": {}}
            for m, s, loss in pairs
        ],
        "methods": [{"name": name, **method} for name in (contrast.control, contrast.ours)],
        "runs_done": len(pairs) + 6,
        "seconds": 120.0 * (len(pairs) + 6),
        "versions": {"torch": "2.0"},
        "machine": "cpu, 1 thread a run",
    } | more


# ---------------------------------------------------------------------- the plan


def test_the_order_is_the_plans() -> None:
    found = [(stage.recipe, stage.seeds) for stage in stages()]
    names = ["hydra", "tied", "flexora", "alora", "dash"]
    assert found[:10] == [(name, 2) for name in names] + [(name, 8) for name in names]
    assert {seeds for _, seeds in found[10:]} == {3}
    assert found[10][0] == "hydra-controls"


@pytest.mark.parametrize("stage", [s for s in stages() if s.seeds != 2], ids=lambda stage: stage.recipe)
def test_every_recipe_is_there_in_every_form_and_says_what_the_plan_says(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEFT_DATA", "/data")
    for form in FORMS.values():
        recipe = CompareRecipe.read(llm_plan.RECIPES / f"{llm_plan.file_of(stage.recipe)}.yaml", *form.of(stage.recipe))
        names = [each.name for each in contenders(recipe.methods)]
        assert recipe.answers is False
        assert steps_of(stage.recipe, form) > 0
        if stage.primary:
            assert {stage.contrast.ours, stage.contrast.control} == set(names)
            assert recipe.baseline == stage.contrast.control
        if form.name == "plan":
            assert recipe.all_seeds == list(range(stage.seeds))
            assert recipe.rates is not None
            assert (recipe.rates.values, recipe.rates.seeds) == ([5e-4, 1.3e-3, 3e-3], 1)
            assert recipe.train.batch_size == 4
    domain = stage.recipe.removeprefix("hydra-domain-")
    if domain != stage.recipe:
        assert f"data.train=../../runs/llm-rows/{domain}-train.jsonl" in FORMS["plan"].of(stage.recipe)


def test_the_table_of_the_plan_and_the_contrasts_say_the_same() -> None:
    text = (llm_plan.ROOT / "evidence" / "plan.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| ([\w-]+):.*\| (?:margin )?([\d.]+) nats \|$", text, re.MULTILINE)
    assert [(int(n), paper, float(effect)) for n, paper, effect in rows] == [
        (n, c.paper, c.effect) for n, c in enumerate(CONTRASTS, start=1)
    ]


# ---------------------------------------------------------------------- what numbers say


def test_the_power_is_the_one_the_plan_states() -> None:
    assert smallest_effect(8) == pytest.approx(1.16, abs=0.005)
    assert smallest_effect(100) == pytest.approx((1.96 + 0.84) / 10, rel=0.02)  # the normal's, at many seeds


def test_a_contrast_has_no_verdict_before_its_last_seed_and_says_what_it_can_see() -> None:
    gaps = (-0.10, -0.06)
    said = judge(HYDRA, planted(HYDRA, *gaps))
    assert said.verdict == "no verdict: 2 of 8 seeds"
    assert said.seen == pytest.approx(smallest_effect(8) * stdev(gaps))
    assert said.underpowered
    assert judge(HYDRA, planted(HYDRA, -0.1)).underpowered is None
    assert judge(HYDRA, planted(HYDRA, *[-0.1 + 0.001 * n for n in range(8)])).underpowered is False


@pytest.mark.parametrize(
    ("contrast", "middle", "says"),
    [
        (HYDRA, -0.1, "better"),
        (HYDRA, 0.1, "worse"),
        (HYDRA, 0.0, "not distinguishable"),
        (TIED, 0.03, "not worse by the margin"),  # worse, and by less than the margin
        (TIED, 0.05, "not decided"),
        (TIED, 0.2, "worse by more than the margin"),
    ],
)
def test_verdicts(contrast: Contrast, middle: float, says: str) -> None:
    said = judge(contrast, planted(contrast, *[middle + 0.004 * (n - 3.5) for n in range(8)]))
    assert said.verdict.startswith(says)
    low, high = said.interval or (0.0, 0.0)
    assert (low + high) / 2 == pytest.approx(middle)
    assert (high - low) / 2 == pytest.approx(2.3646 * said.spread / 8**0.5, rel=1e-4)  # t at 7 degrees


def test_a_run_that_diverged_counts_with_its_last_finite_loss_and_is_named() -> None:
    record = planted(HYDRA, 0.0, 0.0)
    record["outcomes"][3] |= {"status": "diverged", "scores": {}, "last_loss": 3.0}
    said = judge(HYDRA, record)
    assert said.gaps == {0: 0.0, 1: 2.0}
    assert said.diverged == ["hydralora, seed 1"]


def test_what_is_missing_is_no_pair() -> None:
    record = planted(HYDRA, 0.0, 0.0, 0.0)
    record["outcomes"][4] |= {"status": "missing", "scores": {}}
    assert list(judge(HYDRA, record).gaps) == [0, 1]
    assert is_done(Stage("hydra", 2, HYDRA), {"hydra": record})
    assert not is_done(Stage("hydra", 3, HYDRA), {"hydra": record})


def test_hours_are_those_of_steps_that_were_timed() -> None:
    form = FORMS["plan"]
    left = hours_left(form, {"hydra": planted(HYDRA, 0.0, 0.0)}, [HYDRA])
    assert left["hydra"] == pytest.approx((22 - 10) * 120 / 3600)
    assert left["hydra-domain-arc"] == pytest.approx(6 * 120 * 25 / 150 / 3600)
    assert hours_left(form, {}, [HYDRA])["hydra"] == pytest.approx(22 * 150 * 2.5 / 3600)


# ---------------------------------------------------------------------- the page


def test_the_section_says_what_was_reached_and_what_was_not(tmp_path: Path) -> None:
    point = {"cosine": 0.96, "entropy": 0.98, "balance": 0.99, "information": 0.01, "domains": {"arc": 0.97}}
    record = planted(HYDRA, -0.10, -0.06)
    record["outcomes"][1]["heads"] = [{"step": 30, **point}, {"step": 60, **point, "cosine": None}]
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "hydra.json").write_text(json.dumps(record))
    untuned = planted(dataclasses.replace(HYDRA, ours="gain 8"), -0.3)
    untuned["methods"] = [untuned["methods"][1] | {"rates": []}]
    (tmp_path / "short" / "hydra-start.json").write_text(json.dumps(untuned))
    text = "\n".join(llm_page.section(tmp_path))
    row = next(line for line in text.splitlines() if line.startswith("| HydraLoRA |"))
    assert "**underpowered**" in row
    assert "-0.0800" in row
    assert "no verdict: 2 of 8 seeds" in row
    assert "| hydralora | 30 | 1 | 0.960 | 0.980 | 0.010 | arc 0.97 |" in text
    assert "| hydralora | 60 | 1 |  | 0.980 |" in text
    assert "| gain 8 | 1,000 | 0.001 | 1 | 0.7000 | not compared: its rate is not tuned |" in text
    assert text.count("**Not reached:**") == 2  # of the plan everything, of the short form the rest
    assert "`python scripts/evidence_llm.py --form short` goes on" in text


# ---------------------------------------------------------------------- running


def test_time_that_is_up_starts_nothing(tmp_path: Path) -> None:
    ran: list[list[str]] = []
    evidence_llm.part(
        FORMS["plan"], CONTRASTS, 0, 1, (), tmp_path / "runs", tmp_path / "kept", lambda c, s: ran.append(c) or 0
    )
    assert not ran
    assert not (tmp_path / "kept").exists()


def test_a_command_that_takes_too_long_is_interrupted() -> None:
    patient = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(130)); time.sleep(60)"
    assert evidence_llm.for_some_time([evidence_llm.sys.executable, "-c", patient], 0.5) in (130, -2)


TRIAL = Form(
    "trial",
    "two steps on the demo",
    (
        "model=demo",
        "data={train: demo, max_length: 64, validation_limit: 6, test_limit: 6}",
        "train={steps: 2, batch_size: 2, eval_every: 1, follow_heads: true, save_every: 0}",
        "rates={values: [1e-3, 5e-3], seeds: 1}",
        "budget.r=4",
    ),
)


@pytest.mark.slow
def test_a_part_leaves_records_and_the_next_goes_on_behind_them(tmp_path: Path) -> None:
    def run(command: list[str], seconds: float) -> int:
        weftlora.compare(llm_plan.ROOT / command[4], *command[5 : command.index("--jobs")], jobs=0)
        return 0

    runs, kept = tmp_path / "runs", tmp_path / "kept"
    evidence_llm.part(TRIAL, [HYDRA], 1e-3, 1, (), runs, kept, run)
    record = json.loads((kept / "trial" / "hydra.json").read_text())
    assert record["runs_done"] == 2 * (2 + 2)
    assert record["seconds"] > 0
    assert record["command"].startswith("weftlora compare evidence/llm/hydra.yaml")
    assert str(tmp_path) not in json.dumps(record)
    assert judge(HYDRA, record).n == 2
    heads = [o["heads"] for o in record["outcomes"] if "heads" in o]
    assert [[point["step"] for point in series] for series in heads] == [[1, 2], [1, 2]]
    asked: list[list[str]] = []
    evidence_llm.part(TRIAL, [HYDRA], 60, 1, (), runs, kept, lambda c, s: asked.append(c) or 0)
    assert "seeds=8" in asked[0]  # the pilot is there, and is not run again
    assert "hydra-controls.yaml" in asked[1][4]


def test_a_packed_model_comes_back_whole_and_a_lost_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    for name in evidence_llm.NEEDED:
        (data / "tasks" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "tasks" / name).write_text("rows of " + name)
    model = tmp_path / "some.gguf"
    model.write_bytes(b"GGUF" + bytes(range(250)))
    rows = tmp_path / "runs" / "llm-rows"
    rows.mkdir(parents=True)
    (rows / "train.jsonl").write_text("{}\n")
    (rows / "test.jsonl").write_text("{}\n")
    monkeypatch.setenv("WEFT_DATA", str(data))
    monkeypatch.setattr(evidence_llm, "PART", 100)
    monkeypatch.setattr(evidence_llm.real_tasks, "SIX", rows)
    monkeypatch.setattr(evidence_llm.real_tasks, "six_domains", dict)
    packed = tmp_path / "packed"
    assert evidence_llm.pack(packed, model) == 3 + 4 + 2 + 1
    assert max(path.stat().st_size for path in packed.glob("model.gguf.*")) == 100
    (rows / "train.jsonl").unlink()
    [override] = evidence_llm.take(packed)
    assert Path(override.removeprefix("model=")).read_bytes() == model.read_bytes()
    assert (rows / "train.jsonl").read_text() == "{}\n"
    assert evidence_llm.os.environ["WEFT_DATA"] == str(packed)
    (packed / "model.gguf.1").unlink()
    with pytest.raises(SystemExit, match=r"model\.gguf\.1"):
        evidence_llm.take(packed)


def test_what_the_page_of_hydralora_says_of_its_heads_is_in_the_records() -> None:
    page = re.sub(r"\s+", " ", (llm_plan.ROOT / "docs" / "methods" / "hydralora.md").read_text(encoding="utf-8"))
    found = llm_plan.records(llm_plan.RECIPES, "short")
    said = {}
    for name, method in (("hydra", "hydralora"), ("hydra-start", "gain 8"), ("hydra-start", "gain 32")):
        last = [o["heads"][-1] for o in found[name]["outcomes"] if o["method"] == method and "heads" in o]
        assert {point["step"] for point in last} == {60}
        said[method] = [sum(point[key] for point in last) / len(last) for key in ("cosine", "information")]
    cosines, told = zip(*said.values(), strict=True)
    assert "heads' B is {:.2f} as released, {:.2f} with a gain of 8 and {:.2f} with 32".format(*cosines) in page
    assert "of its head is {:.3f}, {:.3f} and {:.3f} of ln 3".format(*told) in page
