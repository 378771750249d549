"""`weftlora auto` at the prompt: what it says while it runs and in the end, and one sentence for what cannot work."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weftlora.auto import Found, Left, Tried, running
from weftlora.auto.pages import page
from weftlora.auto.plan import AutoPlan, Profile, Size
from weftlora.auto.recipe import AutoRecipe
from weftlora.auto.running import Standing, _choice
from weftlora.cli.auto import progress, result, watching
from weftlora.cli.output import Screen
from weftlora.compare import Comparison, Interval, Method, Outcome, Row, Verdict
from weftlora.compare.running import Running
from weftlora.errors import MergeError
from weftlora.progress import Tick

BASELINE = Row("lora", Interval(0.26, 0.22, 0.30, 5), None, 0, Verdict("baseline", "what the others are compared with"))
CLEAR = Row(
    "alora",
    Interval(0.20, 0.18, 0.22, 5),
    Interval(-0.06, -0.08, -0.04, 5),
    5,
    Verdict("better", "better by 0.060 nats [0.040, 0.080]"),
)
MORE = replace(CLEAR, name="hydralora", gap=Interval(-0.07, -0.1, -0.03, 5))
WORSE = replace(CLEAR, name="tied_lora", verdict=Verdict("worse", "worse by 0.1 nats [0.05, 0.15]"))
METHODS = [Method(name, {"recipe": name}, 8, 16, 100, lr=7e-3) for name in ("lora", "alora", "hydralora", "tied_lora")]

FOUND = Found(
    folder="runs/auto",
    model="demo",
    data="<b>rows</b>.jsonl",
    serve="vllm",
    metric="loss",
    method="alora",
    adapter={"recipe": "alora"},
    lr=7e-3,
    rank=8,
    parameters=73216,
    steps=60,
    seed=3,
    run="finalists/runs/alora/s3",
    recipe="recipe.yaml",
    export="export",
    export_error=6.6e-7,
    export_note="",
    why="alora is better by 0.060 nats [0.040, 0.080] than plain LoRA, over 5 paired seeds.",
    ended="complete",
    budget=1800,
    spent=1410,
    stages={"rates": 300.0},
    runs=22,
    tried=[
        Tried("rates", "lora", 7e-3, {"60": 0.3179}, "complete"),
        Tried("methods", "tied_lora", 0.014, {"20": None}, "failed", "it broke."),
        Tried("methods", "alora", 7e-3, {"20": 1.06}, "stopped"),
    ],
    left_out=[Left("hydralora", "vLLM runs stock LoRA.")],
    seeds=5,
    methods=METHODS,
    rows=[BASELINE, CLEAR],
)


def shown(content: Any) -> str:
    screen = Screen(file=io.StringIO(), width=160)
    screen.print(content)
    return screen.file.getvalue()  # type: ignore[attr-defined]


def test_the_end_says_why_and_where_everything_is():
    said = shown(result(FOUND))
    assert said.startswith("alora is better by 0.060 nats")
    assert "adapter: runs/auto/finalists/runs/alora/s3/adapter" in said
    assert "export:  runs/auto/export, 6.6e-07 from the live adapter" in said
    assert "left out: hydralora: vLLM runs stock LoRA." in said
    assert "22 runs in 1,410 of 1,800 s" in said


def test_the_page_shows_what_was_tried_and_escapes_what_is_not_ours():
    made = page(FOUND, has_finalists=True)
    for text in ("alora is better by 0.060", "it broke.", "stopped at 20", "1.0600 after 20", "finalists.html", "5m"):
        assert text in made
    assert "<b>rows" not in made


def test_while_it_runs_it_says_the_stage_the_time_and_what_was_decided(capsys: pytest.CaptureFixture[str]):
    at_work = [Running("lora, lr 0.007", Tick("train", 3, 60))]
    standing = Standing("rates", 1, 4, at_work, 90.0, 1800.0)
    assert progress(standing) == "rates: 1 of 4 runs  90 of 1,800 s  lora, lr 0.007: train 3/60"
    with watching(True, clock=lambda: 0.0) as watch:
        watch(standing)
        watch(standing)
        watch(replace(standing, said="plain LoRA's rate is 0.007"))
    assert capsys.readouterr().err.splitlines() == [progress(standing), "rates: plain LoRA's rate is 0.007"]


@pytest.mark.parametrize(
    ("rows", "chosen", "why"),
    [
        ([BASELINE, CLEAR, MORE], "hydralora", "over 5 paired seeds"),  # the larger of two that are better
        ([BASELINE, WORSE], "lora", "Plain LoRA at lr 0.007 is enough: tied_lora: worse by 0.1 nats"),
        ([BASELINE], "lora", "nothing else was left to compare it with"),
    ],
)
def test_plain_lora_stays_unless_another_is_better(
    rows: list[Row], chosen: str, why: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(running, "_best_run", lambda comparison, name, folder: f"runs/{name}/s0")
    plan = AutoPlan(
        {"budget": "1h"}, "", 8, {}, [], [], 60, {}, 1e-3, {}, Size(3, 3, 1, 2, 3), Profile(1, 1, {}, 1, 1, 1), 1.0, 1
    )
    methods = [method for method in METHODS if method.name in {row.name for row in rows}]
    outcomes = [Outcome(method.name, 0, "", "complete") for method in methods]
    comparison = Comparison(
        "f", "m", "d", "causal", "loss", False, "lora", [0], "", methods, outcomes, rows, {}, "", True
    )
    found = _choice(comparison, [], plan, True, None, None)  # type: ignore[arg-type]
    assert found[:2] == (chosen, f"finalists/runs/{chosen}/s0")
    assert why in found[2]


@pytest.mark.parametrize(
    ("serve", "note"), [("any", "It is an approximation"), ("vllm", "its router cannot be merged")]
)
def test_a_router_leaves_as_its_approximation_only_where_no_server_is_named(
    serve: str, note: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asked: list[Any] = []

    def export(folder: Path, out: Path, **options: Any) -> str:
        asked.append(options.get("approximate"))
        if asked[-1] is None:
            raise MergeError("its router cannot be merged.")
        return "made"

    monkeypatch.setattr(running, "export_lora", export)
    recipe = AutoRecipe.read({"data": "demo", "budget": "1h", "serve": serve})
    search: Any = SimpleNamespace(recipe=recipe, folder=tmp_path)
    made, said = running._Auto._export(search, SimpleNamespace(folder=tmp_path))  # type: ignore[arg-type]
    assert said.startswith(note)
    assert (made, asked) == (("made", [None, "mean-gate"]) if serve == "any" else (None, [None]))


def test_what_cannot_work_is_one_sentence(weftlora: Callable[..., Any]):
    said = weftlora("auto", "data=demo", "budget=never")
    assert (said.code, said.err) == (
        1,
        "weftlora: budget='never' is not a time: give hours, minutes or seconds, such as 2h, 45m or 1h30m.\n",
    )
    for jobs in ("many", "0", "-1", "1.5"):
        said = weftlora("compare", "nothing.yaml", "--jobs", jobs)
        assert (said.code, "is not a number of runs" in " ".join(said.err.split())) == (2, True), said.err
    said = weftlora("compare", "nothing.yaml", "--store", "s3://bucket/prefix")
    assert (said.code, "give --worker or --engine ray with it" in " ".join(said.err.split())) == (1, True)
    said = weftlora("compare", "s3://bucket/prefix", "--fetch")
    assert (said.code, "the folder to bring it to" in said.err) == (1, True)
    said = weftlora("compare", "nothing.yaml", "--worker", "--jobs", "2")
    assert (said.code, "takes no --jobs 2" in said.err) == (1, True)
    said = weftlora("compare", "nothing.yaml", "--worker")
    assert (said.code, "nothing.yaml" in said.err) == (1, True)
