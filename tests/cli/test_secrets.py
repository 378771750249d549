"""A token given in any way is nowhere afterwards: not in a file of the run, not in a page, not on the screen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Weft = Callable[..., Any]
TOKEN = "hf_" + "abcdEFGH1234" * 3


def nowhere(top: Path, *texts: str) -> None:
    for path in top.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    for text in texts:
        assert TOKEN not in text


@pytest.mark.parametrize(
    "override",
    [
        f"train.args.hub_token={TOKEN}",
        f"train.args.hub_model_id=me/{TOKEN}",
        f"train.args={{accelerator_config: {{password: {TOKEN}}}}}",
        f"train.hub_token={TOKEN}",
        f"hub_token={TOKEN}",
        f"model=https://me:{TOKEN}@example.org/model",
        f"model={{path: demo, token: {TOKEN}}}",
        f"data.train=https://{TOKEN}@example.org/rows.jsonl",
        f"train.steps={TOKEN}",
        f"{TOKEN}",
        "data.train=${HF_TOKEN}/rows.jsonl",
    ],
)
def test_a_token_in_a_setting_is_refused_and_not_repeated(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = weftlora("train", recipe_file, override)
    assert said.code == 1
    assert said.err.count("\n") == 1
    nowhere(tmp_path, said.err, said.out)
    assert not (tmp_path / "runs").exists()


def test_a_token_in_the_environment_is_not_captured(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    run = tmp_path / "runs" / "first"
    texts = []
    for given in (
        ("train", recipe_file, "train.save_every=1", "--json"),
        ("eval", run, "--json"),
        ("doctor", "--json"),
        ("report", run, "-o", tmp_path / "page.html", "--json"),
        ("inspect", run, "--html", tmp_path / "look.html", "--json"),
    ):
        said = weftlora(*given)
        assert said.code == 0, said.err
        texts += [said.out, said.err]
    assert list(run.rglob("training_args.bin"))
    nowhere(tmp_path, *texts)


def test_a_token_that_an_earlier_version_wrote_is_not_shown(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    weftlora("train", recipe_file)
    run = tmp_path / "runs" / "first"
    record = json.loads((run / "run.json").read_text())
    record["recipe"]["train"]["args"] = {"hub_token": TOKEN, "run_name": "kept"}
    (run / "run.json").write_text(json.dumps(record))
    weftlora("eval", run)
    said = weftlora("report", run, "-o", tmp_path / "page.html", "--json")
    assert said.code == 0, said.err
    again = weftlora("train", run, "--resume", "--json")
    (run / "run.json").unlink()
    nowhere(tmp_path, said.out, again.out, again.err)
