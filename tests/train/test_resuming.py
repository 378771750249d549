from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupting import Interrupt, weights
from safetensors.torch import load_file
from transformers import TrainerCallback

import weftlora
from weftlora.errors import AdapterError, ConfigError, RunError
from weftlora.runs.run import Run
from weftlora.train import checkpoint

Make = Callable[..., dict[str, Any]]
LENGTH = {"steps": 10, "save_every": 4, "num_threads": 1}  # six steps an epoch: the run goes on into a second one


def interrupted(given: dict[str, Any], step: int = 7) -> None:
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(step)])


def test_a_killed_run_ends_with_the_adapter_of_an_unkilled_one(recipe: Make, tmp_path: Path) -> None:
    adapter = {"recipe": "lora", "r": 4, "lora_dropout": 0.2}
    whole = weftlora.train(recipe(adapter=adapter, train=LENGTH, out=str(tmp_path / "whole")))
    after_a_step, at_a_checkpoint = (
        recipe(adapter=adapter, train=LENGTH, out=str(tmp_path / name)) for name in ("after_a_step", "at_a_checkpoint")
    )
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([[after_a_step, "step", 7], [at_a_checkpoint, "half", 8]]))
    script = Path(__file__).with_name("killed_run.py")
    done = subprocess.run([sys.executable, script, jobs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    half = tmp_path / "at_a_checkpoint" / "checkpoints" / "checkpoint-8"
    assert (half / "optimizer.pt").exists(), "Trainer alone would go on from this one"
    for given in (after_a_step, at_a_checkpoint):
        killed = Run.load(given["out"])
        assert killed.status == "interrupted"  # its lock went with its process
        assert not killed.adapter_folder.exists()
        assert [checkpoint.step_of(path) for path in checkpoint.marked(killed.checkpoints)] == [4]
        resumed = weftlora.train(given, resume=True)
        assert resumed.status == "complete"
        assert resumed.time["resumed_from"] == 4
        assert weights(resumed) == weights(whole)
        assert [row["step"] for row in resumed.history() if "loss" in row] == list(range(1, 11))


@pytest.mark.parametrize("adapter", ["lora", "hydralora", "tied_lora", "peft:lora"])
def test_every_structure_resumes_exactly(recipe: Make, tmp_path: Path, adapter: str) -> None:
    section = {"recipe": adapter, "r": 2, "lora_dropout": 0.1}
    train = LENGTH | {"eval_every": 3, "accumulation": 2, "batch_size": 4, "weight_decay": 0.1}
    whole = weftlora.train(recipe(adapter=section, train=train, out=str(tmp_path / "whole")))
    given = recipe(adapter=section, train=train, out=str(tmp_path / "cut"))
    interrupted(given)
    assert weights(weftlora.train(given, resume=True)) == weights(whole)


@pytest.mark.slow
def test_ranks_that_move_between_experts_resume_exactly(recipe: Make, tmp_path: Path) -> None:
    targets = {"target_modules": ["o_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    moves = {"first": 1, "every": 1, "max_rounds": 3, "move": 3, "rows": 4}
    section = {"recipe": "alora", "r": 4, "lora_dropout": 0.1, **moves, **targets}
    train = LENGTH | {"steps": 4, "save_every": 2, "batch_size": 2}
    whole = weftlora.train(recipe("mixture", adapter=section, train=train, out=str(tmp_path / "whole")))
    given = recipe("mixture", adapter=section, train=train, out=str(tmp_path / "cut"))
    interrupted(given, 3)
    resumed = weftlora.train(given, resume=True)
    assert resumed.time["resumed_from"] == 2
    assert weights(resumed) == weights(whole)
    saved = load_file(whole.adapter_folder / "adapter_model.safetensors")
    ranks = {n: mask.sum(-1).tolist() for n, mask in saved.items() if n.endswith("experts.down_proj.weft_site.mask")}
    assert len(ranks) == 2
    assert any(len(set(own)) > 1 for own in ranks.values())


@pytest.mark.parametrize("keys", [{"lora_plus_ratio": 16.0}, {"freeze_down": True}])
def test_groups_by_role_resume_exactly(recipe: Make, tmp_path: Path, keys: dict[str, Any]) -> None:
    section = {"recipe": "lora_dash", "r": 2, "after": 6, "lora_dropout": 0.1}
    train = LENGTH | {"batch_size": 4, "weight_decay": 0.1, **keys}
    whole = weftlora.train(recipe(adapter=section, train=train, out=str(tmp_path / "whole")))
    assert whole.recipe["train"] | keys == whole.recipe["train"]
    given = recipe(adapter=section, train=train, out=str(tmp_path / "cut"))
    interrupted(given)
    assert weights(weftlora.train(given, resume=True)) == weights(whole)
    plain = weftlora.train(
        recipe(adapter=section, train={k: v for k, v in train.items() if k not in keys}, out=str(tmp_path / "plain"))
    )
    assert weights(plain) != weights(whole)
    if "freeze_down" in keys:
        assert whole.parameters["trainable"] < plain.parameters["trainable"]
        assert whole.figures["trained"] == whole.parameters["trainable"]


def test_a_run_of_before_a_key_existed_is_continued(recipe: Make) -> None:
    given = recipe(adapter="lora", train=LENGTH)
    interrupted(given)
    path = Path(given["out"]) / "run.json"
    record = json.loads(path.read_text())
    for key in ("lora_plus_ratio", "freeze_down"):
        del record["recipe"]["train"][key]
    path.write_text(json.dumps(record))
    assert weftlora.train(given, resume=True).status == "complete"
    other = recipe(adapter="lora", train=LENGTH, out=str(path.parent.with_name("other")))
    interrupted(other)
    with pytest.raises(ConfigError, match=r"train\.freeze_down=False, not True"):
        weftlora.train(other, "train.freeze_down=true", resume=True)


def test_a_classifier_resumes_exactly(recipe: Make, tmp_path: Path) -> None:
    section = {"recipe": "lora", "r": 2, "lora_dropout": 0.1}
    whole = weftlora.train(recipe("bert", adapter=section, train=LENGTH, out=str(tmp_path / "whole")))
    given = recipe("bert", adapter=section, train=LENGTH, out=str(tmp_path / "cut"))
    interrupted(given)
    assert weights(weftlora.train(given, resume=True)) == weights(whole)


def test_without_a_checkpoint_it_starts_again(recipe: Make, tmp_path: Path) -> None:
    whole = weftlora.train(recipe(train=LENGTH, out=str(tmp_path / "whole")))
    given = recipe(train=LENGTH, out=str(tmp_path / "cut"))
    interrupted(given, step=2)
    resumed = weftlora.train(tmp_path / "cut", resume=True)  # a run folder names its own recipe
    assert resumed.time["resumed_from"] == 0
    assert weights(resumed) == weights(whole)


def test_a_complete_run_is_returned_as_it_is(recipe: Make) -> None:
    run = weftlora.train(recipe())
    stamp = (run.folder / "run.json").stat().st_mtime_ns
    assert weftlora.train(recipe(), resume=True) == run
    assert (run.folder / "run.json").stat().st_mtime_ns == stamp


def test_another_recipe_does_not_continue_a_run(recipe: Make) -> None:
    interrupted(recipe(train=LENGTH))
    with pytest.raises(ConfigError, match=r"train\.lr=0\.01, not 0\.5"):
        weftlora.train(recipe(train=LENGTH), "train.lr=0.5", resume=True)
    assert weftlora.train(recipe(train=LENGTH), "train.keep=1", resume=True).status == "complete"


def test_other_rows_do_not_continue_a_run(recipe: Make, tmp_path: Path) -> None:
    given = recipe(train=LENGTH)
    interrupted(given)
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(reversed(rows)))
    with pytest.raises(RunError, match=r"data .* changed"):
        weftlora.train(given, resume=True)


def test_another_base_does_not_continue_a_run(recipe: Make, tmp_path: Path) -> None:
    import tiny_bases as tiny

    given = recipe(train=LENGTH) | {"model": str(tiny.llama(tmp_path / "base"))}
    interrupted(given)
    tiny.llama(tmp_path / "base", seed=1)
    with pytest.raises(AdapterError, match="other weights"):
        weftlora.train(given, resume=True)


def test_there_must_be_a_run_to_resume(recipe: Make) -> None:
    with pytest.raises(RunError, match=r"no run\.json"):
        weftlora.train(recipe(), resume=True)


def test_a_run_killed_before_its_first_record_is_started_again(recipe: Make, tmp_path: Path) -> None:
    """There is nothing to resume, so the same command must do."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".run.json.weft-0123456789abcdef").write_text('{"format": 1, "fol')
    assert weftlora.train(recipe()).status == "complete"
    assert not (tmp_path / "run" / ".run.json.weft-0123456789abcdef").exists()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_folder_with_anything_else_is_not_taken_for_one(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "mine").mkdir(parents=True)
    with pytest.raises(RunError, match="not empty"):
        weftlora.train(recipe())


def test_adalora_says_that_it_cannot_be_resumed(recipe: Make) -> None:
    adapter = {"recipe": "peft:adalora", "r": 2, "tinit": 1, "tfinal": 1}
    given = recipe(adapter=adapter, train=LENGTH)
    interrupted(given)
    with pytest.raises(RunError, match="AdaLoRA"):
        weftlora.train(given, resume=True)


TIMES = {"time", "figures"}
"""What a run took; all else in run.json is the same, however often it was interrupted."""


@pytest.mark.parametrize("logging", [1, 3, 4, 10])
def test_numbers_do_not_depend_on_an_interruption(recipe: Make, tmp_path: Path, logging: int) -> None:
    """Killed between two logged losses, twice: each is the mean since the last one that was logged, not since the resume."""
    train = LENGTH | {"logging_every": logging, "save_every": 2, "eval_every": 5}
    found = {}
    for name, stops in {"whole": [], "cut": [3, 7]}.items():
        given = recipe(adapter="lora", train=train, out=str(tmp_path / name))
        for stop in stops:
            with pytest.raises(KeyboardInterrupt):
                weftlora.train(given, callbacks=[Interrupt(stop)], resume=(tmp_path / name).exists())
        run = weftlora.train(given, resume=bool(stops))
        rows = [{key: value for key, value in row.items() if key != "tokens_per_s"} for row in run.history()]
        record = {key: value for key, value in run.record().items() if key not in TIMES}
        record["recipe"] = record["recipe"] | {"out": ""}
        found[name] = (rows, record | {"folder": ""})
    assert found["cut"] == found["whole"]
    assert any("loss" in row for row in found["whole"][0])


@pytest.mark.parametrize("place", ["layer_search.begin", "make_trainer", "_announce", "resume_point", "_final"])
@pytest.mark.parametrize("resume", [False, True])
def test_interrupted_anywhere_a_run_does_not_say_that_it_is_running(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, place: str, resume: bool
) -> None:
    """By the file itself, which others read without asking whether somebody holds the lock."""
    given = recipe(train=LENGTH | {"steps": 4, "save_every": 2})
    if resume:
        interrupted(given, 3)

    def stop(*given: Any, **more: Any) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patched:
        patched.setattr(f"weftlora.train.loop.{place}", stop)
        if place == "resume_point" and not resume:
            weftlora.train(given)
        else:
            with pytest.raises(SystemExit):
                weftlora.train(given, resume=resume)
    file = Path(given["out"]) / "run.json"
    if not resume and place in ("layer_search.begin", "make_trainer"):
        assert not file.exists()  # taken back, as there was nothing to go on with
        return
    assert json.loads(file.read_text())["status"] == (
        "complete" if place == "resume_point" and not resume else "interrupted"
    )
    assert weftlora.train(given, resume=True).status == "complete"


def test_a_signal_after_the_last_record_does_not_take_it_back(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Run.save

    def and_stop(self: Run) -> None:
        save(self)
        if self.status == "complete":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "save", and_stop)
        with pytest.raises(KeyboardInterrupt):
            weftlora.train(given := recipe(train=LENGTH | {"steps": 2}))
    assert Run.load(given["out"]).status == "complete"


@pytest.mark.parametrize("how", ["read-only", "gone"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_folder_that_cannot_be_written_any_more_is_one_sentence(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    """Whatever touches it first: a checkpoint, its deletion, the record of the failure."""
    given = recipe(train=LENGTH | {"steps": 4, "save_every": 2, "keep": 1})
    out = Path(given["out"])

    class Trouble(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step != step:
                return
            if how == "gone":
                out.rename(tmp_path / "elsewhere")
                return
            (out / "checkpoints" / "checkpoint-9").mkdir()  # as an earlier kill leaves one
            for name in ("open", "unlink", "rmdir", "mkdir", "rename", "replace"):
                monkeypatch.setattr(os, name, read_only)

    def read_only(*given: Any, **more: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(given[0]))

    with monkeypatch.context(), pytest.raises(RunError, match=r"cannot write|removed or replaced"):
        weftlora.train(given, callbacks=[Trouble()])
    monkeypatch.undo()
    if how == "gone":
        shutil.rmtree(out, ignore_errors=True)
        (tmp_path / "elsewhere").rename(out)
    assert weftlora.train(given, resume=True).status == "complete"


def test_a_run_started_before_goes_on_with_the_rule_of_moving_ranks_that_it_was_started_with(
    recipe: Make, tmp_path: Path
) -> None:
    """Its recipe leaves the rule to a default, which has changed since; its record, of format 1, says which it was."""
    adapter = {"recipe": "alora", "r": 2, "first": 2, "every": 2, "max_rounds": 3, "score": "random"}
    given = recipe(adapter=adapter, train=LENGTH, data=None, out=str(tmp_path / "run")) | {}
    given["data"] = recipe()["data"] | {"validation_fraction": 0.2}
    interrupted(given)
    path = tmp_path / "run" / "run.json"
    record = json.loads(path.read_text())
    assert record["adapter"]["ranks"].pop("all_lost") == "go_on"
    record["adapter"]["format_version"] = 1
    path.write_text(json.dumps(record))
    resumed = weftlora.train(given, resume=True)
    saved = json.loads((resumed.adapter_folder / "adapter_config.json").read_text())
    assert saved["ranks"]["all_lost"] == resumed.adapter["ranks"]["all_lost"] == "end"
