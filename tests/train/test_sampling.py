"""Samples during training: prompts answered at every measurement, as the finished run answers them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
from interrupting import Interrupt, weights

import weftlora
from weftlora.errors import ConfigError
from weftlora.runs.run import SAMPLES, Run
from weftlora.train import sampling

Make = Callable[..., dict[str, Any]]


def sampled(recipe: Make, folder: Path, *overrides: str, **more: Any) -> Run:
    made = recipe(train={"steps": 4, "batch_size": 8, "lr": 1e-2, "save_every": 2, "eval_every": 2}, out=str(folder))
    return weftlora.train(made, *overrides, **more)


def test_rows_are_answered_at_every_measurement_and_disturb_nothing(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    whole = sampling.asked
    monkeypatch.setattr(sampling, "asked", lambda prepared: asked.append(1) or whole(prepared))
    plain = sampled(recipe, tmp_path / "plain", "adapter.lora_dropout=0.1")
    run = sampled(recipe, tmp_path / "run", "adapter.lora_dropout=0.1", "train.samples=2", "train.sample_tokens=5")
    assert plain.samples() == []
    assert not (plain.folder / SAMPLES).exists()
    assert weights(run) == weights(plain)
    rows = run.samples()
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert rows[0]["prompt"] == rows[2]["prompt"] != rows[1]["prompt"]
    assert all(row["reference"] for row in rows)
    last = weftlora.generate(run, rows[3]["prompt"], max_new_tokens=5)
    assert (last.text, last.finished) == (rows[3]["text"], rows[3]["finished"])
    assert len(asked) == 2, "prompts are made once a run"


def test_a_resumed_run_answers_every_measurement_once(recipe: Make, tmp_path: Path) -> None:
    whole = sampled(recipe, tmp_path / "whole", "train.samples=1")
    with pytest.raises(KeyboardInterrupt):
        sampled(recipe, tmp_path / "cut", "train.samples=1", callbacks=[Interrupt(4)])
    resumed = weftlora.train(tmp_path / "cut", resume=True)
    assert resumed.samples() == whole.samples()
    longer = weftlora.train(resumed.folder, "train.steps=6", extend=True)
    assert [row["step"] for row in longer.samples()] == [2, 4, 6]


@pytest.mark.parametrize(
    ("data", "samples", "says"),
    [
        ({"validation_fraction": 0}, 2, "the data has none: set data.validation_fraction"),
        ({"prompt_template": "{a} and {b}"}, ["one text"], "made of the columns a, b"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    recipe: Make, tmp_path: Path, data: dict[str, Any], samples: Any, says: str
) -> None:
    rows = (
        [{"a": str(n), "b": "x", "completion": "y"} for n in range(12)] if "prompt_template" in data else tiny.answers()
    )
    file = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    made = recipe(data={"train": str(file), **data}, out=str(tmp_path / "never"))
    with pytest.raises(ConfigError, match=says):
        weftlora.train(made | {"train": {"steps": 2, "samples": samples}})
    assert not (tmp_path / "never").exists()


def test_plain_text_is_asked_only_what_one_gives(recipe: Make, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {n} of it"}) + "\n" for n in range(12)))
    made = recipe(
        data={"train": str(file)}, train={"steps": 1, "batch_size": 2, "sample_tokens": 2}, out=str(tmp_path / "run")
    )
    with pytest.raises(ConfigError, match="rows of plain text have none"):
        weftlora.train(made, "train.samples=2")
    assert [row["prompt"] for row in weftlora.train(made, "train.samples=[line]").samples()] == ["line"]


def test_every_checkpoint_says_how_it_is_loaded_and_asked(recipe: Make, tmp_path: Path) -> None:
    run = sampled(recipe, tmp_path / "run", "adapter={recipe: lora, r: 2}")
    first, second = (run.checkpoints / f"checkpoint-{step}" for step in (2, 4))
    card = (first / "README.md").read_text()
    assert card == (second / "README.md").read_text(), "peft's template is filled in once"
    assert "import weftlora" in card
    assert json.loads((second / "prompts.json").read_text())["format"] == "prompt_completion"
    assert "prompts.json" in json.loads((second / "complete.json").read_text())["files"]
