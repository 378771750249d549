"""`weftlora compare` at the prompt: a plan, a result, a sentence for what cannot work."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparing import recipe

from weftlora.cli import main
from weftlora.cli.compare import quality_table, result, standing_table, watching
from weftlora.cli.output import Screen
from weftlora.compare import Comparison, Interval, Method, Outcome, Row, Verdict
from weftlora.compare.running import Running, Standing
from weftlora.progress import Tick


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("compare")
    (top / "compare.yaml").write_text(yaml.safe_dump(recipe(top, seeds=1, methods=["lora", "none"])), encoding="utf-8")
    return top / "compare.yaml"


def test_a_dry_run_shows_the_methods_and_writes_nothing(file: Path, capsys: pytest.CaptureFixture[str]):
    assert run(str(file), "budget.r=3", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "+0.0%" in shown
    assert "plain LoRA at r = 3" in shown
    assert "2 runs: seeds 0, all at lr 0.01." in shown
    assert not (file.parent / "out").exists()


def test_a_dry_run_as_json_is_the_plan(file: Path, capsys: pytest.CaptureFixture[str]):
    assert run(str(file), "--dry-run", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert [method["rank"] for method in plan["methods"]] == [4, None]


def test_the_result_as_json_is_the_record(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import weftlora.compare

    call = weftlora.compare.compare
    given: dict[str, Any] = {}

    def here(*arguments: Any, **options: Any) -> Comparison:
        given.update(options)
        return call(*arguments, **options | {"jobs": 0})

    monkeypatch.setattr(weftlora.compare, "compare", here)
    out = tmp_path / "out"
    assert run(str(file), "--out", str(out), "--json", "--jobs", "3", "--overwrite") == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    assert printed.err == ""
    assert (given["jobs"], given["overwrite"]) == (3, True)


def test_what_cannot_work_is_a_sentence(file: Path, capsys: pytest.CaptureFixture[str]):
    assert run(str(file), "budgte.r=3") == 1
    assert capsys.readouterr().err == "weftlora: the comparison has no key 'budgte': did you mean 'budget'?\n"
    assert run("nowhere.yaml") == 1
    assert capsys.readouterr().err == "weftlora: there is no comparison file 'nowhere.yaml'.\n"


def found(**more: Any) -> Comparison:
    """Plain LoRA and a method that is better in five seeds; one of its runs has failed."""
    methods = [
        Method("lora", {"recipe": "lora"}, 8, 16, 1000, 0.0, 10, 1e-3, rate_at_edge=True),
        Method("other [x]", {}, note="Odd."),
    ]
    outcomes = [
        Outcome(m.name, seed, f"runs/{m.name}/s{seed}", "complete", {"loss": 1.0}) for m in methods for seed in range(5)
    ]
    outcomes[-1] = Outcome("other [x]", 4, "runs/other/s4", "failed", problem="the disk is full.")
    rows = [
        Row("lora", Interval(1.0, 0.9, 1.1, 5), None, 0, Verdict("baseline", "what the others are compared with")),
        Row(
            "other [x]",
            Interval(0.5, 0.4, 0.6, 4),
            Interval(-0.5, -0.6, -0.4, 4),
            4,
            Verdict("better", "better by 0.5 nats"),
        ),
    ]
    plain = {
        "model": "m",
        "data": "d",
        "task": "causal",
        "metric": "loss",
        "higher_is_better": False,
        "baseline": "lora",
    }
    return Comparison("here", **plain, seeds=list(range(5)), budget="Equal.", methods=methods, outcomes=outcomes, rows=rows,
                      versions={}, machine="cpu", complete=True, **more)  # fmt: skip


def test_a_result_says_verdict_interval_edge_failure_and_what_is_false_by_chance(capsys: pytest.CaptureFixture[str]):
    console = Screen(file=io.StringIO(), width=100)
    console.print(result(found()))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.index("better by 0.5 nats") < shown.index("loss, n = 5")
    for words in (
        "0.5000 [0.4000, 0.6000] (n = 4)",
        "-0.5000 [-0.6000, -0.4000]",
        "4 of 4",
        "other [x]",
        "A better rate may be outside those that were tried: lora (0.001).",
        "other [x]: Odd.",
        "runs/other/s4: failed: the disk is full.",
        "Give the same command again to retry what failed",
        "With 1 comparison, 0.05 false verdicts are expected",
    ):
        assert words in shown


def test_no_number_is_cut_off_where_a_terminal_is_narrow():
    made = found()
    methods = [replace(made.methods[0], parameters=123_456_789), made.methods[1]]
    console = Screen(file=io.StringIO(), width=40)
    console.print(result(replace(made, methods=methods)))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in shown


def test_a_share_has_its_unit_once():
    made = found()
    console = Screen(file=io.StringIO(), width=100)
    console.print(quality_table(replace(made, metric="accuracy")))
    assert "-50.0 [-60.0, -40.0] %" in console.file.getvalue()  # type: ignore[attr-defined]


def test_what_went_wrong_alike_is_said_once():
    made = found()
    lost = [replace(run, status="diverged", problem="No.") for run in made.outcomes if run.method == "lora"]
    console = Screen(file=io.StringIO(), width=100)
    console.print(result(replace(made, outcomes=lost)))
    assert "runs/lora/s0, s1, s2, s3, s4: diverged: No." in console.file.getvalue()  # type: ignore[attr-defined]


def standing(**more: Any) -> Standing:
    at_work = [Running("lora, seed 1", Tick("train", 3, 10))]
    return Standing(
        **{"done": 1, "total": 4, "running": at_work, "best": {"lora": (1, 0.5)}, "metric": "loss"}
        | {"seconds_left": 75.0}
        | more
    )


def test_the_live_table_shows_what_is_done_at_work_and_left():
    console = Screen(file=io.StringIO(), width=80)
    console.print(standing_table(standing()))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("0.5000", "lora, seed 1: train 3/10", "1 of 4 runs", "1:15 left"):
        assert words in shown


def test_without_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]):
    times = iter([0.0, 5.0, 11.0])
    assert not sys.stderr.isatty()
    with watching(True, lambda: next(times)) as watch:
        watch(standing())
        watch(standing(done=2))
        watch(standing(done=3, seconds_left=3700.0))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "1 of 4 runs  1:15 left  lora, seed 1: train 3/10",
        "3 of 4 runs  1:01:40 left  lora, seed 1: train 3/10",
    ]
