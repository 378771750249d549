"""A comparison from its recipe to its record: paired seeds, the choice of a rate, what fails, who is in charge."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
import yaml
from comparing import quality, recipe

from weftlora.compare import Comparison, at_once, compare, load
from weftlora.compare.engine import BEGUN
from weftlora.compare.plan import Plan
from weftlora.compare.running import Standing
from weftlora.compare.workers import in_charge
from weftlora.disk.files import read_json, write_json
from weftlora.errors import ConfigError, DataError, RunError
from weftlora.runs.run import Run

pytestmark = pytest.mark.sharded

Tried = tuple[dict[str, Any], Comparison]


def test_every_run_is_complete_and_scored_and_the_base_is_measured_once(tried: Tried):
    _, found = tried
    assert {outcome.status for outcome in found.outcomes} == {"complete"}
    assert [len(found.of(method.name)) for method in found.methods] == [2, 2, 1]
    for outcome in found.outcomes:
        assert {"loss", "exact_match"} <= outcome.scores.keys()
        assert set(outcome.domains) == {"a", "b"}
        assert ("train_seconds" in outcome.figures) == (outcome.method != "none")
    assert found.complete
    assert json.loads((Path(found.folder) / "comparison.json").read_text(encoding="utf-8")) == found.record()


def test_runs_are_ordinary_run_folders(tried: Tried):
    _, found = tried
    for outcome in found.outcomes:
        if outcome.method != "none":
            run = Run.load(Path(found.folder) / outcome.folder)
            assert (run.status, run.seed) == ("complete", outcome.seed)
            assert run.recipe["train"]["lr"] == found.method(outcome.method).lr


def test_the_rate_is_that_of_the_lowest_mean_validation_loss_over_seeds_that_are_not_reported(tried: Tried):
    _, found = tried
    for method in found.methods[:-1]:
        assert {rate.seed for rate in method.rates} == {1000, 1001}
        mean = {lr: sum(r.validation_loss for r in method.rates if r.lr == lr) / 2 for lr in (1e-3, 1e-2, 3e-2)}
        assert method.lr == min(mean, key=mean.__getitem__)
        assert method.rate_at_edge == (method.lr != 1e-2)
        for rate in method.rates:
            folder = Path(found.folder) / "tuning" / method.name.replace("_", "-").replace(":", "-")
            run = Run.load(folder / f"lr{rate.lr:g}-s{rate.seed}")
            assert run.metrics["validation_loss"] == rate.validation_loss


@pytest.fixture
def copied(tried: Tried, tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The recipe and a copy of its comparison, to change."""
    made, found = tried
    shutil.copytree(found.folder, tmp_path / "copy")
    return made | {"out": str(tmp_path / "copy")}, tmp_path / "copy"


def plant(folder: Path, losses: dict[float, list[float]]) -> None:
    """Other validation losses of plain LoRA: {rate: by seed}."""
    for lr, values in losses.items():
        for seed, value in zip((1000, 1001), values, strict=True):
            file = folder / "tuning" / "lora" / f"lr{lr:g}-s{seed}" / "run.json"
            content = read_json(file)
            write_json(file, content | {"metrics": content["metrics"] | {"validation_loss": value}})


@pytest.mark.parametrize(
    ("losses", "lr", "edge"),
    [
        ({1e-3: [3.0, 3.0], 1e-2: [1.0, 2.9], 3e-2: [2.0, 2.0]}, 1e-2, False),
        ({1e-3: [1.0, 3.0], 1e-2: [2.0, 2.0], 3e-2: [3.0, 1.0]}, 1e-3, True),
        ({1e-3: [9.0, 9.0], 1e-2: [8.0, 8.0], 3e-2: [1.0, 1.0]}, 3e-2, True),
    ],
)
def test_of_planted_losses_the_lowest_mean_decides_and_of_equals_the_lower_rate(copied, losses, lr, edge):
    _, folder = copied
    plant(folder, losses)
    method = load(folder).method("lora")
    assert (method.lr, method.rate_at_edge) == (lr, edge)


def test_a_rate_that_diverged_with_one_seed_is_out(copied):
    _, folder = copied
    plant(folder, {1e-3: [2.0, 2.0], 1e-2: [1.0, 1.0], 3e-2: [3.0, 3.0]})
    write_json(folder / "tuning" / "lora" / "lr0.01-s1001" / "problem.json", {"status": "diverged", "problem": "nan"})
    method = load(folder).method("lora")
    assert method.lr == 1e-3
    assert [rate.validation_loss for rate in method.rates if rate.lr == 1e-2] == [1.0, None]


def test_a_method_of_which_every_rate_diverged_has_diverged(copied):
    made, folder = copied
    for path in (folder / "tuning" / "lora").iterdir():
        write_json(path / "problem.json", {"status": "diverged", "problem": "nan"})
    shutil.rmtree(folder / "runs" / "lora")
    found = compare(made, jobs=0)
    assert [(o.status, "none of the rates" in o.problem) for o in found.of("lora")] == [("diverged", True)] * 2
    assert found.complete


def test_while_a_run_that_tries_a_rate_has_failed_no_rate_is_chosen(copied):
    made, folder = copied
    failed = folder / "tuning" / "lora" / "lr0.01-s1001"
    write_json(failed / "problem.json", {"status": "failed", "problem": "the disk is full."})
    found = load(folder)
    assert found.method("lora").lr is None
    assert [(o.status, "lr0.01-s1001: the disk is full." in o.problem) for o in found.of("lora")] == [
        ("failed", True)
    ] * 2
    assert {outcome.status for outcome in compare(made, jobs=0).outcomes} == {"complete"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("eval-test.json", {}),
        ("eval-test.json", {"scores": 3, "domains": {}}),
        ("eval-test.json", {"scores": {"loss": "low"}, "domains": {}}),
        ("problem.json", {}),
        ("problem.json", {"status": "unheard of", "problem": ""}),
    ],
)
def test_a_damaged_file_is_named_in_a_sentence(copied, name: str, content: dict[str, Any]):
    _, folder = copied
    write_json(folder / "runs" / "lora" / "s0" / name, content)
    with pytest.raises(RunError, match=f"{name} is damaged: delete it"):
        load(folder)


def test_a_complete_comparison_is_not_run_again(copied, monkeypatch: pytest.MonkeyPatch):
    made, folder = copied
    monkeypatch.setattr("weftlora.compare.workers.carry_out", lambda *_: pytest.fail("a run was carried out"))
    before = (folder / "compare.json").read_bytes()
    again = compare(made, jobs=0)
    assert (folder / "compare.json").read_bytes() == before
    assert again == replace(load(folder), folder=again.folder)


def test_what_is_missing_is_run_and_nothing_else(copied, tried: Tried):
    made, folder = copied
    shutil.rmtree(folder / "runs" / "peft-adalora" / "s1")
    (folder / "runs" / "lora" / "s0" / "eval-test.json").unlink()
    kept = (folder / "runs" / "lora" / "s0" / "run.json").stat().st_mtime_ns
    told: list[Standing] = []
    found = compare(made, jobs=0, watch=told.append)
    assert quality(found.record()) == quality(tried[1].record())
    assert (folder / "runs" / "lora" / "s0" / "run.json").stat().st_mtime_ns == kept
    begun = [each.name for standing in told for each in standing.running if each.tick == BEGUN]
    assert begun == ["lora, seed 0", "peft:adalora, seed 1"]
    assert (told[-1].done, told[-1].total, told[-1].running) == (17, 17, [])
    assert told[-1].best["lora"][0] == 2


def test_a_comparison_does_not_go_on_with_other_rows(copied, tried: Tried, tmp_path: Path):
    made, folder = copied
    shutil.rmtree(folder / "runs" / "none")
    rows = tmp_path / "test.jsonl"
    shutil.copy(made["data"]["test"], rows)
    changed = read_json(folder / "compare.json")
    changed["recipe"]["data"]["test"] = str(rows)
    write_json(folder / "compare.json", changed)
    made = made | {"data": made["data"] | {"test": str(rows)}}
    rows.write_text("".join(rows.read_text(encoding="utf-8").splitlines(keepends=True)[:-1]), encoding="utf-8")
    with pytest.raises(RunError, match="have changed since this comparison began"):
        compare(made, jobs=0)
    shutil.copy(made["data"]["train"].replace("train", "test"), rows)
    assert quality(compare(made, jobs=0).record()) == quality(tried[1].record())


def test_a_comparison_goes_on_where_its_project_was_moved_to(tmp_path: Path):
    made = recipe(tmp_path / "before", seeds=1, methods=["none", "lora"], train={"steps": 2}, answers=False)
    made |= {"model": "llama", "data": {split: f"llama-{split}.jsonl" for split in ("train", "validation", "test")}}
    made["out"] = "out"
    (tmp_path / "before" / "compare.yaml").write_text(yaml.safe_dump(made), encoding="utf-8")
    compare(tmp_path / "before" / "compare.yaml", f"out={tmp_path / 'before' / 'out'}", jobs=0)
    (tmp_path / "before").rename(tmp_path / "after")
    shutil.rmtree(tmp_path / "after" / "out" / "runs" / "lora")
    found = compare(tmp_path / "after" / "compare.yaml", f"out={tmp_path / 'after' / 'out'}", jobs=0)
    assert [outcome.status for outcome in found.outcomes] == ["complete"] * 2


def test_adalora_starts_anew_where_it_was_stopped(copied, tried: Tried):
    """It cannot go on from a checkpoint, which is an error of `weftlora train --resume`."""
    made, folder = copied
    run = folder / "runs" / "peft-adalora" / "s0"
    content = read_json(run / "run.json")
    (run / "eval-test.json").unlink()
    write_json(run / "run.json", content | {"status": "running", "metrics": {}})
    assert list((run / "checkpoints").iterdir())
    assert quality(compare(made, jobs=0).record()) == quality(tried[1].record())


def test_another_recipe_in_the_folder_is_refused_by_its_first_difference(copied):
    made, _ = copied
    with pytest.raises(ConfigError, match=r"budget\.r=4, not 6: continue it as it was"):
        compare(made | {"budget": {"r": 6}}, jobs=0)


def test_a_comparison_of_before_a_key_existed_goes_on(copied, tried: Tried):
    made, folder = copied
    path = folder / "compare.json"
    plan = read_json(path)
    model, data, train = (dict(plan["recipe"][name]) for name in ("model", "data", "train"))
    del model["load_in_4bit"], data["max_length"], train["best"], plan["recipe"]["answers"]
    write_json(path, plan | {"recipe": plan["recipe"] | {"model": model, "data": data, "train": train}})
    assert quality(compare(made, jobs=0).record()) == quality(tried[1].record())
    with pytest.raises(ConfigError, match=r"model\.load_in_4bit=False, not True"):
        compare(made | {"model": model | {"load_in_4bit": True}}, jobs=0)


def test_more_seeds_go_into_the_same_folder_and_repeat_nothing(copied, tried: Tried):
    made, folder = copied
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/s?/run.json")}
    found = compare(made | {"seeds": 3}, jobs=0)
    assert found.seeds == [0, 1, 2]
    assert {outcome.seed for outcome in found.outcomes if outcome.status == "complete"} == {0, 1, 2}
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert [m.lr for m in found.methods] == [m.lr for m in tried[1].methods]
    assert quality(load(folder).record()) == quality(found.record())


@pytest.mark.parametrize("seeds", [1, [1, 2], [0, 1, 1000]], ids=["fewer", "others", "one that chose a rate"])
def test_other_seeds_are_refused(copied, seeds):
    made, _ = copied
    with pytest.raises(ConfigError, match=r"a comparison with seeds=2, not"):
        compare(made | {"seeds": seeds}, jobs=0)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("all of it")
    with pytest.raises(RunError, match=r"holds other files, such as thesis\.tex"):
        compare(recipe(tmp_path), jobs=0)
    with pytest.raises(RunError, match=r"holds other files, such as thesis\.tex"):
        compare(recipe(tmp_path), jobs=0, overwrite=True)


def test_a_second_comparison_in_the_folder_says_so(copied):
    made, folder = copied
    with in_charge(folder), pytest.raises(RunError, match=r"is in use by process \d+ on .* \(weftlora compare, since"):
        compare(made, jobs=0)


def test_a_comparison_waits_for_the_runs_of_one_that_was_killed(tmp_path: Path):
    """The first lock falls with the killed parent; the second is held by its runs until the last has gone."""
    told, go = os.pipe(), os.pipe()
    child = os.fork()
    if not child:
        held = os.open(tmp_path / "workers.lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(held, fcntl.LOCK_EX)
        os.write(told[1], b".")
        os.read(go[0], 1)
        (tmp_path / "last").write_text("written by the run that was left")
        os._exit(0)
    os.read(told[0], 1)
    os.write(go[1], b".")
    with in_charge(tmp_path):
        assert (tmp_path / "last").is_file()
    os.waitpid(child, 0)


def test_every_method_sees_the_same_rows_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, list[Any]] = {}
    step = transformers.Trainer.training_step

    def watched(self: Any, model: Any, inputs: dict[str, Any], *more: Any) -> Any:
        folder = Path(self.args.output_dir).parent
        seen.setdefault(f"{folder.parent.name}/{folder.name}", []).append(inputs["input_ids"].tolist())
        return step(self, model, inputs, *more)

    monkeypatch.setattr(transformers.Trainer, "training_step", watched)
    flexora = {"recipe": "flexora", "steps": 2, "val_size": 8, "outer_batches": 2}
    alora = {"recipe": "alora", "score": "random", "first": 1, "every": 1}
    methods = ["lora", {"recipe": "hydralora", "heads": 2}, "peft:adalora", alora, flexora]
    train = {"steps": 12, "save_every": 0}  # more than one pass over the rows, so that the second pass is compared, too
    compare(recipe(tmp_path, methods=methods, train=train, seeds=1), jobs=0)
    batches = seen["lora/s0"]
    assert len(batches) == 12
    assert batches[:2] != batches[10:]
    for name in ("hydralora", "peft-adalora", "alora", "flexora"):
        assert seen[f"{name}/s0"] == batches, name


def test_a_run_that_diverges_is_an_outcome_and_final(tmp_path: Path):
    made = recipe(tmp_path, methods=["lora", "peft:lora"], train={"lr": 1e30, "max_grad_norm": 0.0}, seeds=1)
    found = compare(made, jobs=0)
    assert [(o.status, o.scores) for o in found.outcomes] == [("diverged", {})] * 2
    assert all("diverged" in outcome.problem or "not numbers" in outcome.problem for outcome in found.outcomes)
    assert found.complete
    assert [row.score for row in found.rows] == [None, None]


def test_a_run_that_fails_is_an_outcome_and_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import weftlora.train

    train = weftlora.train.train
    made = recipe(tmp_path, seeds=1)

    def failing(given: Any, **more: Any) -> Run:
        if given.adapter["recipe"] == "hydralora":
            raise ValueError("a bug of ours")
        return train(given, **more)

    monkeypatch.setattr(weftlora.train, "train", failing)
    found = compare(made, jobs=0)
    assert [(o.method, o.status, o.problem) for o in found.outcomes] == [
        ("lora", "complete", ""),
        ("hydralora", "failed", "ValueError: a bug of ours"),
    ]
    trace = read_json(Path(found.folder) / "runs" / "hydralora" / "s0" / "problem.json")["trace"]
    assert "in failing" in trace
    monkeypatch.setattr(weftlora.train, "train", train)
    assert [outcome.status for outcome in compare(made, jobs=0).outcomes] == ["complete"] * 2


def test_overwrite_starts_anew(copied):
    made, folder = copied
    changed = made | {"methods": ["lora"], "rates": {"values": [1e-2]}, "seeds": 1}
    found = compare(changed, jobs=0, overwrite=True)
    assert len(found.outcomes) == 1
    assert not (folder / "tuning").exists()


def test_splits_that_are_needed_are_asked_for(tmp_path: Path):
    made = recipe(tmp_path)
    data = made["data"]
    with pytest.raises(DataError, match="decided on test rows"):
        compare(made | {"data": {key: data[key] for key in ("train", "validation")}}, jobs=0)
    no_validation = {key: data[key] for key in ("train", "test")} | {"validation_fraction": 0.0}
    with pytest.raises(DataError, match="rates are chosen on validation rows"):
        compare(made | {"data": no_validation, "rates": {"values": [1e-3, 1e-2]}, "train": {"steps": 2}}, jobs=0)
    assert not (tmp_path / "out").exists()


def test_runs_in_processes_say_what_those_here_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = recipe(tmp_path, seeds=1, train={"steps": 2}, answers=False)
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "gone.py")  # a process that imports the caller's script would fail
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr(at_once, "machine", lambda device: at_once.Machine(2, 2**40))
    said: list[Standing] = []
    apart = compare(made | {"out": str(tmp_path / "apart")}, jobs="auto", watch=said.append)
    here = compare(made | {"out": str(tmp_path / "here")}, jobs=0)
    assert quality(apart.record()) == quality(here.record())
    assert apart.machine.endswith("2 runs at once")
    assert said[0].said.startswith("2 runs at once: 2 cores at 1 a run, and 1024.0 GiB of memory free")
    assert Plan.load(tmp_path / "apart").at_once == said[0].said
    assert {tuple(outcome.scores) for outcome in apart.outcomes} == {("loss",)}


def test_a_run_whose_process_dies_has_failed_and_goes_on_the_next_time(tmp_path: Path):
    made = recipe(tmp_path, seeds=1, methods=["lora"], train={"steps": 200, "save_every": 5})
    killed: list[int] = []

    def kill(standing: Standing) -> None:
        if not killed and any(each.tick.phase == "train" for each in standing.running):
            [process] = multiprocessing.active_children()
            killed.append(process.pid or 0)
            os.kill(killed[0], signal.SIGKILL)

    [outcome] = compare(made, jobs=1, watch=kill).outcomes
    assert (outcome.status, outcome.problem) == (
        "failed",
        "its process was ended by SIGKILL, perhaps because memory ran out.",
    )
    again = compare(made, jobs=1)
    assert [outcome.status for outcome in again.outcomes] == ["complete"]
    assert "resumed_from" in Run.load(Path(again.folder) / "runs" / "lora" / "s0").time
