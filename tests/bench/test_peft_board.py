"""Our methods as experiments of peft's method comparison, and a small run of it on the bundled model."""

from __future__ import annotations

import copy
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from peft import PeftConfig

import weftlora
from weftlora.bench.peft_board import FORMS, check_result, experiments, is_right, number_in, peft
from weftlora.cli import main
from weftlora.errors import ConfigError, DataError, RunError
from weftlora.recipes import RECIPES
from weftlora.runs.base_model import Wanted, find


def file_of(path: Path, rows: list[dict[str, str]]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


@pytest.fixture
def rows(tmp_path: Path) -> dict[str, str]:
    sums = [{"question": f"{n} + 1 = ?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(24)]
    train = file_of(tmp_path / "sums.jsonl", sums)
    test = file_of(tmp_path / "test.jsonl", [{"query": each["question"], "response": each["answer"]} for each in sums])
    texts = file_of(tmp_path / "texts.jsonl", [{"text": "once upon a time"}])
    return {"train": train, "validation": train, "test": test, "texts": texts}


def test_every_method_is_an_experiment_that_peft_reads(tmp_path: Path) -> None:
    found = peft(tmp_path)
    methods = [each.name.partition("/")[0].removeprefix("weft_") for each in found.experiments]
    assert methods == [name for name in RECIPES if not name.startswith("peft:")]
    expected = experiments(FORMS["full"][0], 50)
    for each in found.experiments:
        config = PeftConfig.from_pretrained(str(tmp_path / "experiments" / each.name))
        assert isinstance(config, weftlora.WeftConfig)
        assert config.to_dict() == expected[each.name].to_dict()
        assert json.loads((tmp_path / "experiments" / each.name / "training_params.json").read_text()) == {}
    assert found.less == {}
    called = (tmp_path / "full.sh").read_text().partition("for method in ")[2].partition(";")[0].split()
    assert called == methods


@pytest.fixture
def ran(tmp_path: Path, rows: dict[str, str]) -> tuple[Path, Any]:
    return tmp_path, peft(tmp_path, run="reduced", only=["lora_dash"], model="demo", scale=0.34, **rows)


def test_a_reduced_run_has_the_shape_of_a_result_and_cannot_be_taken_for_one(
    ran: tuple[Path, Any], rows: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, found = ran
    file = place / "reduced" / "weft_lora_dash--demo-rank32.json"
    content = json.loads(file.read_text())
    assert not (place / "results").exists()
    assert content["reduced"]["model_id"] == "demo"
    assert content["reduced"]["max_steps"] == content["run_info"]["train_config"]["max_steps"] == 4
    last = content["train_info"]["metrics"][-1]
    assert last["test accuracy"] is None
    assert last["test loss"] < last["test loss before"]
    assert content["run_info"]["peft_config"]["boost"]["kind"] == "dash"
    assert found.experiments[0].loss == last["test loss"]
    for wrong, says in (
        (("reduced",), "not marked as reduced"),
        (("train_info", "file_size"), "has no train_info.file_size"),
        (("run_info", "train_config", "model_id"), "has no run_info.train_config.model_id"),
    ):
        damaged = copy.deepcopy(content)
        *way, key = wrong
        part = damaged
        for name in way:
            part = part[name]
        del part[key]
        with pytest.raises(RunError, match=says):
            check_result(damaged, file)
    monkeypatch.setattr("weftlora.bench.peft_board._one", None)  # what has a result is not run again
    given = {"run": "reduced", "only": ["lora_dash"], "model": "demo", "scale": 0.34, **rows}
    assert peft(place, **given).experiments == found.experiments  # type: ignore[arg-type]
    with pytest.raises(RunError, match="is of another experiment"):
        peft(place, **{**given, "scale": 0.25})  # type: ignore[arg-type]


def test_rows_are_scored_on_and_searched_on_and_answers_are_counted(tmp_path: Path, rows: dict[str, str]) -> None:
    # the full protocol at a size at which it takes no time: 4 steps, short answers
    small = {"model": "demo", "scale": 0.0008, **rows}
    found = peft(tmp_path, run="full", only=["alora", "flexora"], **small)  # type: ignore[arg-type]
    assert [each.failed for each in found.experiments] == [None, None]
    assert [each.accuracy is not None for each in found.experiments] == [True, True]
    kept = json.loads((tmp_path / "reduced" / "weft_flexora--demo-rank32.json").read_text())
    assert kept["run_info"]["peft_config"]["layers"]["kind"] == "only"
    assert kept["train_info"]["metrics"][0]["valid accuracy"] is not None


def test_what_fails_leaves_its_reason_and_the_command_says_it(
    tmp_path: Path, rows: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weftlora.bench.peft_board.get_peft_model", lambda *a, **k: 1 / 0)
    words = [part for name, file in rows.items() for part in (f"--{name}", file)]
    line = ["bench", "peft", str(tmp_path), "--run", "reduced", "--only", "lora", "--model", "demo", "--scale", "0.1"]
    with pytest.raises(SystemExit) as leave:
        main([*line, *words, "-q"])
    assert leave.value.code == 1
    assert "weft_lora/demo-rank32 did not end: ZeroDivisionError" in capsys.readouterr().err
    content = json.loads((tmp_path / "reduced" / "weft_lora--demo-rank32.json").read_text())
    assert content["train_info"]["status"] == "canceled"


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"run": "complete"}, ConfigError, "not a form of the comparison"),
        ({"scale": 0.0}, ConfigError, "not a share of the protocol"),
        ({"only": ["hydralor"]}, ConfigError, "did you mean 'hydralora'"),
        ({"run": "reduced", "model": "demo", "train": "none.jsonl"}, DataError, "there is no file"),
    ],
)
def test_bad_input_is_one_sentence(given: dict[str, Any], error: type[Exception], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        peft(tmp_path, **given)


def test_a_row_without_an_answer_is_named(tmp_path: Path, rows: dict[str, str]) -> None:
    rows["test"] = file_of(tmp_path / "bad.jsonl", [{"question": "1 + 1?"}])
    with pytest.raises(DataError, match=r"bad\.jsonl has no response or answer"):
        peft(tmp_path, run="reduced", model="demo", **rows)


def test_the_number_of_an_answer_is_what_follows_its_last_marker() -> None:
    assert number_in("We add.\n#### 14.") == 14
    assert number_in("The answer is: 1/2. No. The answer is: 20/40") == Fraction(1, 2)
    assert number_in("The answer is $50%$.") == 50
    assert number_in("The answer is: x + 1") == "x + 1"
    assert number_in("nothing") is None
    assert is_right("so\nThe answer is: 0.5", "half\n#### 1/2")
    assert not is_right("no idea", "#### 2")
    assert not is_right("no idea", "nor I")


def test_only_a_rows_solution_is_labelled(rows: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from weftlora.bench import peft_board

    protocol, sources = FORMS["reduced"]
    sources = peft_board.Rows(rows["train"], rows["validation"], 4, rows["test"], 2, rows["texts"], 1)
    tokenizer = find(Wanted("demo"), Path.cwd()).tokenizer
    found = peft_board._tokens(tokenizer, protocol, sources)
    first = found.test[0]
    solution = [label for label in first["labels"] if label != -100]
    assert tokenizer.decode(solution[:-1]).strip() == "It is 1.\n#### 1"
    assert solution[-1] == tokenizer.eos_token_id
    assert len(found.train) == 20  # the four that are validated on are held out
    assert not {tuple(row["input_ids"]) for row in found.validation} & set(map(tuple, found.train))


def test_the_committed_results_are_what_the_board_reads() -> None:
    record = json.loads((Path(__file__).parents[2] / "evidence" / "peft-board.json").read_text(encoding="utf-8"))
    names = {}
    for form in ("full", "reduced"):
        for content in record[form]:
            check_result(content, Path(form))
        names[form] = {content["run_info"]["experiment_name"].partition("/")[0] for content in record[form]}
        assert all(content["reduced"]["note"] == "not a row of the board" for content in record[form])
    assert (
        names["full"] == names["reduced"] == {f"weft_{recipe}" for recipe in RECIPES if not recipe.startswith("peft:")}
    )
