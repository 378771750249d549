"""Going on: a run for longer than it was to be, an adapter on new rows, and the best of a run instead of its last."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
import torch
from interrupting import Interrupt, weights
from safetensors.torch import load_file
from transformers import TrainerCallback

import weftlora
from weftlora.compare import load
from weftlora.errors import AdapterError, ConfigError, RunError
from weftlora.runs.run import Run
from weftlora.train import checkpoint

Make = Callable[..., dict[str, Any]]


def events(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "events.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def short(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of four steps with checkpoints, in which Dash has launched."""
    folder = tmp_path_factory.mktemp("short")
    return weftlora.train(
        {
            "model": str(bases["llama"]),
            "data": {"train": str(tiny.write_rows(folder / "rows.jsonl", tiny.answers()))},
            "adapter": {"recipe": "lora_dash", "r": 4, "after": 2, "directions": 2},
            "train": {"steps": 4, "batch_size": 8, "lr": 1e-2, "save_every": 2, "logging_every": 1, "warmup": 0.25},
            "out": str(folder / "run"),
        }
    )


def test_a_longer_run_goes_on_from_the_last_checkpoint_and_names_what_it_extends(short: Run) -> None:
    run = weftlora.train(short.folder, "train.steps=12", extend=True)
    assert run.folder == short.folder.with_name("run-12")
    assert (run.status, run.steps) == ("complete", 12)
    assert run.extends == {"run": str(short.folder.resolve()), "step": 4}
    assert Run.load(run.folder) == run
    happened = [event["event"] for event in events(run)]
    assert happened.count("start") == 2
    assert [event["step"] for event in events(run) if event["event"] == "dash_launch"] == [2]
    (said,) = [event["said"] for event in events(run) if event["event"] == "extend"]
    assert "the linear schedule begins again at 0.01 over the 8 added steps" in said
    assert "not the run that train.steps=12 would have been" in said
    rates = {row["step"]: row["lr"] for row in run.history() if "loss" in row}
    assert list(rates) == list(range(1, 13))
    before = {row["step"]: row for row in short.history()}
    assert [row for row in run.history() if row["step"] <= 4] == list(before.values())
    # Warm-up is a quarter of the added steps: 0, 1/2, 1 and then down. The logged rate is that of the step just taken or the next,
    # as the version of transformers has it, so only its shape is held.
    added = [rates[step] for step in range(5, 13)]
    assert max(added) == pytest.approx(1e-2)
    assert added.index(max(added)) in (1, 2)
    assert added[-1] < 2.5e-3
    assert weights(run) != weights(short)


class StopAfter(TrainerCallback):
    """Ends training early, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step


@pytest.mark.filterwarnings("ignore:adapter 'default' has trained")
def test_what_is_still_to_come_counts_its_fraction_over_the_added_steps(short: Run, tmp_path: Path) -> None:
    late = {**short.recipe, "adapter": {**short.recipe["adapter"], "after": 0.75}, "out": str(tmp_path / "late")}
    stopped = weftlora.train(late, "train.steps=8", callbacks=[StopAfter(4)])
    assert [event for event in events(stopped) if event["event"] == "dash_launch"] == []
    longer = weftlora.train(stopped.folder, "train.steps=12", extend=True)
    assert [event["step"] for event in events(longer) if event["event"] == "dash_launch"] == [
        10
    ]  # 4 + 3/4 of 8, not of 12
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(
            stopped.folder, "train.steps=12", f"out={tmp_path / 'cut'}", extend=True, callbacks=[Interrupt(9)]
        )
    assert weights(weftlora.train(tmp_path / "cut", resume=True)) == weights(longer)


def test_an_extended_run_is_not_the_run_of_so_many_steps(short: Run, tmp_path: Path) -> None:
    whole = weftlora.train({**short.recipe, "out": str(tmp_path / "whole")}, "train.steps=8")
    longer = weftlora.train(short.folder, "train.steps=8", f"out={tmp_path / 'longer'}", extend=True)
    assert weights(whole) != weights(longer)
    found = load([whole.folder, longer.folder])
    assert len(found.methods) == 2


def test_the_first_added_step_has_the_optimiser_of_the_checkpoint(short: Run, tmp_path: Path) -> None:
    class Looks(TrainerCallback):
        moments: torch.Tensor | None = None

        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            if self.moments is None:
                bare = getattr(optimizer, "optimizer", optimizer)
                self.moments = torch.cat([value["exp_avg"].flatten() for value in bare.state.values()])

    looks = Looks()
    weftlora.train(short.folder, "train.steps=5", f"out={tmp_path / 'one'}", extend=True, callbacks=[looks])
    kept = torch.load(short.checkpoints / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    expected = torch.cat([value["exp_avg"].flatten() for value in kept.values()])
    assert looks.moments is not None
    assert torch.equal(looks.moments, expected)


def test_an_extended_run_resumes_exactly(short: Run, tmp_path: Path) -> None:
    whole = weftlora.train(short.folder, "train.steps=10", f"out={tmp_path / 'whole'}", extend=True)
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(short.folder, "train.steps=10", f"out={tmp_path / 'cut'}", extend=True, callbacks=[Interrupt(7)])
    resumed = weftlora.train(tmp_path / "cut", resume=True)
    assert resumed.extends == whole.extends
    assert weights(resumed) == weights(whole)
    lines = [
        [{k: v for k, v in row.items() if k != "tokens_per_s"} for row in one.history()] for one in (whole, resumed)
    ]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["train.steps=4"], "has 4 steps already: give train.steps more than that"),
        ([], "set train.steps"),
        (["train.steps=8", "train.lr=0.5"], r"was trained with train\.lr=0\.01"),
        (["train.steps=8", "adapter.r=2"], r"adapter\.r=4"),
    ],
)
def test_what_is_no_extension_is_refused_and_leaves_nothing(
    short: Run, overrides: list[str], says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        weftlora.train(short.folder, *overrides, f"out={tmp_path / 'never'}", extend=True)
    assert not (tmp_path / "never").exists()


def test_the_base_is_that_of_the_run_to_the_last_value(short: Run, tmp_path: Path) -> None:
    """Also where all of it looks the same: of the weights a fingerprint knows some values only."""
    other = Run.load(shutil.copytree(short.folder, tmp_path / "other"))
    other.base["weights"] = dict.fromkeys(short.base["weights"], "0" * 64)
    other.save()
    for given in ({"extend": True}, {}):
        recipe = (
            other.folder if given else {**short.recipe, "train": {**short.recipe["train"], "from": str(other.folder)}}
        )
        with pytest.raises(AdapterError, match="was trained on other weights"):
            weftlora.train(recipe, "train.steps=5", f"out={tmp_path / 'more'}", overwrite=True, **given)
    del other.recipe["train"]
    other.save()
    with pytest.raises(RunError, match=r"is damaged: it has no recipe\.train"):
        weftlora.train(other.folder, "train.steps=6", extend=True)


def test_resume_refuses_other_steps_and_names_the_way(short: Run, recipe: Make) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps=4, not 8: .*--extend train\.steps=8"):
        weftlora.train(short.folder, "train.steps=8", resume=True)
    with pytest.raises(ConfigError, match="give one of them"):
        weftlora.train(short.folder, "train.steps=8", resume=True, extend=True)
    run = weftlora.train(recipe())  # without checkpoints
    with pytest.raises(RunError, match=r"has no checkpoint to extend .*train\.from"):
        weftlora.train(run.folder, "train.steps=8", extend=True)


# ---------------------------------------------------------------------- from an adapter


@pytest.mark.parametrize("adapter", ["lora", "hydralora", "peft:lora"])
def test_training_begins_where_an_adapter_is(recipe: Make, tmp_path: Path, adapter: str) -> None:
    first = weftlora.train(
        recipe(adapter=adapter, train={"steps": 4, "lr": 2e-2, "save_every": 0}, out=str(tmp_path / "first"))
    )
    for name in (first.folder, first.adapter_folder):
        made = recipe(
            adapter=adapter, train={"steps": 1, "lr": 1e-12, "save_every": 0}, out=str(tmp_path / name.name / "second")
        )
        made["train"]["from"] = str(name)
        again = weftlora.train(made)
        assert again.parameters == first.parameters
        before, after = (load_file(one.adapter_folder / "adapter_model.safetensors") for one in (first, again))
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor, atol=1e-6, rtol=1e-5)
    other = made | {"adapter": {"recipe": adapter, "r": 2}, "out": str(tmp_path / "never")}
    with pytest.raises(ConfigError, match=r"has r=4, and the recipe's adapter has r=2"):
        weftlora.train(other)
    assert not (tmp_path / "never").exists()


def test_going_on_from_an_adapter_resumes_exactly(recipe: Make, tmp_path: Path) -> None:
    first = weftlora.train(recipe(adapter="lora", out=str(tmp_path / "first")))
    more = {"steps": 6, "save_every": 2, "from": str(first.folder)}
    whole = weftlora.train(recipe(adapter="lora", train=more, out=str(tmp_path / "whole")))
    given = recipe(adapter="lora", train=more, out=str(tmp_path / "cut"))
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(3)])
    assert weights(weftlora.train(given, resume=True)) == weights(whole)


def test_an_adapter_of_another_base_or_of_none_is_refused(recipe: Make, tmp_path: Path) -> None:
    first = weftlora.train(recipe(adapter="lora", out=str(tmp_path / "first")))
    made = recipe(adapter="lora", out=str(tmp_path / "second"))
    made["train"]["from"] = str(first.folder)
    with pytest.raises(AdapterError, match="other weights"):
        weftlora.train(made | {"model": str(tiny.llama(tmp_path / "other", seed=1))})
    with pytest.raises(AdapterError, match="is not an adapter"):
        weftlora.train(made, f"train.from={tmp_path / 'nowhere'}")
    assert not (tmp_path / "second").exists()


# ---------------------------------------------------------------------- the best of a run


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the loss on validation rows be what is given, measurement by measurement."""
    from weftlora.runs.scores import Measured
    from weftlora.train import trainer

    def plan(*losses: float) -> None:
        left = list(losses)
        monkeypatch.setattr(trainer, "mean_loss", lambda *given: Measured(left.pop(0), 1, []))

    return plan


def test_the_best_adapter_is_kept(recipe: Make, measured: Callable[..., None]) -> None:
    measured(3.0, 1.0, 2.0, 2.5)
    run = weftlora.train(recipe(adapter="lora", train={"steps": 4, "eval_every": 1, "best": True, "save_every": None}))
    assert (run.metrics["best_step"], run.metrics["last_step"]) == (2, 4)
    saved = run.checkpoints / "checkpoint-2" / "adapter_model.safetensors"
    assert (run.adapter_folder / "adapter_model.safetensors").read_bytes() == saved.read_bytes()


def test_a_run_stops_early_and_a_resumed_one_counts_what_it_had_counted(
    recipe: Make, tmp_path: Path, measured: Callable[..., None]
) -> None:
    train = {"steps": 9, "eval_every": 1, "early_stopping": 2, "save_every": None}
    measured(3.0, 1.0, 2.0, 2.5)
    run = weftlora.train(recipe(adapter="lora", train=train, out=str(tmp_path / "whole")))
    assert (run.metrics["best_step"], run.metrics["last_step"], run.steps) == (2, 4, 9)
    given = recipe(adapter="lora", train=train, out=str(tmp_path / "cut"))
    measured(3.0, 1.0, 2.0)
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[Interrupt(4)])
    measured(2.5)
    resumed = weftlora.train(given, resume=True)
    assert resumed.metrics == run.metrics
    assert weights(resumed) == weights(run)


def test_what_cannot_be_measured_has_no_best(recipe: Make) -> None:
    made = recipe(train={"best": True, "save_every": None})
    made["data"]["validation_fraction"] = 0
    with pytest.raises(ConfigError, match="the data has no validation rows"):
        weftlora.train(made)
    with pytest.raises(ConfigError, match="save_every=0 makes none"):
        weftlora.train(recipe(train={"early_stopping": 2}))
    with pytest.raises(ConfigError, match="is not a multiple"):
        weftlora.train(recipe(train={"best": True, "save_every": 3, "eval_every": 2}))
    assert checkpoint.newest(Path(made["out"]) / "checkpoints") is None
