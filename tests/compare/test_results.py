"""Run folders that no comparison made, as a comparison."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from weftlora.compare import Comparison, load
from weftlora.disk.files import read_json, write_json
from weftlora.errors import ConfigError, RunError


@pytest.fixture
def folders(tried: tuple[dict, Comparison], tmp_path: Path) -> list[Path]:
    """Copies of the runs of plain LoRA and AdaLoRA, two seeds each."""
    found, made = tried[1], []
    for outcome in found.outcomes:
        if outcome.method in ("lora", "peft:adalora"):
            made.append(tmp_path / outcome.folder.replace("/", "-"))
            shutil.copytree(Path(found.folder) / outcome.folder, made[-1])
    return made


def test_runs_that_differ_in_seed_and_folder_only_are_one_method(folders: list[Path], tried):
    found, whole = load(folders), tried[1]
    assert [method.name for method in found.methods] == ["lora", "peft:adalora"]
    assert (found.baseline, found.metric, found.seeds) == ("lora", "loss", [0, 1])
    for name in ("lora", "peft:adalora"):
        assert [o.scores for o in found.of(name)] == [o.scores for o in whole.of(name)]
        assert found.method(name).rank == whole.method(name).rank
    gaps = [next(row.gap for row in made.rows if row.name == "peft:adalora") for made in (found, whole)]
    assert gaps[0] == gaps[1]
    assert all((Path(found.folder) / outcome.folder / "run.json").is_file() for outcome in found.outcomes)


def test_methods_of_one_recipe_are_told_apart(folders: list[Path]):
    content = read_json(folders[1] / "run.json")
    recipe = content["recipe"] | {"train": content["recipe"]["train"] | {"lr": 0.5}}
    write_json(folders[1] / "run.json", content | {"recipe": recipe})
    names = [method.name for method in load(folders[:2]).methods]
    assert len(set(names)) == 2
    assert names[1].endswith("lr = 0.5")


def test_a_head_that_is_trained_in_full_is_not_counted(folders: list[Path]):
    content = read_json(folders[0] / "run.json")
    beside = content["parameters"] | {"trainable": content["figures"]["trained"] + 1000}
    write_json(folders[0] / "run.json", content | {"parameters": beside})
    assert load(folders[0]).methods[0].parameters == content["figures"]["trained"]


def test_one_run_is_a_comparison_without_a_verdict(folders: list[Path]):
    found = load(folders[0])
    assert [outcome.folder for outcome in found.outcomes] == ["."]
    assert found.rows[0].score.n == 1


def test_a_run_that_was_not_measured_says_how(folders: list[Path]):
    (folders[0] / "eval-test.json").unlink()
    found = load(folders)
    assert [o.status for o in found.of("lora")] == ["missing", "complete"]
    assert "weftlora eval" in found.of("lora")[0].problem
    assert not found.complete


def test_the_same_run_twice_is_refused(folders: list[Path]):
    with pytest.raises(ConfigError, match="are the same run"):
        load([folders[0], folders[0]])


def test_runs_of_other_rows_are_refused(folders: list[Path]):
    content = read_json(folders[1] / "run.json")
    write_json(folders[1] / "run.json", content | {"data": content["data"] | {"hashes": {"x": "y"}}})
    with pytest.raises(RunError, match="trained on other rows than"):
        load(folders)


def test_a_folder_that_is_neither_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="not a run folder"):
        load(tmp_path)
    with pytest.raises(RunError, match="nothing to compare"):
        load([])


def test_scores_that_are_damaged_are_one_sentence(folders: list[Path]):
    write_json(folders[0] / "eval-test.json", {"scores": 3})
    with pytest.raises(RunError, match=r"eval-test\.json is damaged: delete it"):
        load(folders)


def test_a_comparison_among_run_folders_is_told_from_a_run(folders: list[Path], tmp_path: Path):
    write_json(tmp_path / "compare.json", {})
    with pytest.raises(RunError, match="is a comparison: give it alone, or run folders only"):
        load([tmp_path, *folders])
