"""What a run cost and how large its adapter is: counts are exact, sizes are those of real files, times are of the steps alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from interrupting import Interrupt
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

import weftlora
from weftlora.runs.run import Run
from weftlora.train import costs

Make = Callable[..., dict[str, Any]]
FILE = "adapter_model.safetensors"
MANY = {"steps": 3, "save_every": 1}
MOVED = {"recipe": "alora", "r": 2, "first": 1, "every": 1, "max_rounds": 2, "rows": 4, "move": 3}


def file_of(folder: Path) -> Path:
    return folder / FILE


def test_counts_are_exact_and_sizes_are_those_of_the_files(recipe: Make) -> None:
    run = weftlora.train(recipe(adapter={"recipe": "lora", "r": 4, "target_modules": ["q_proj"]}, train=MANY))
    found = Run.load(run.folder).figures
    assert found == run.figures == run.record()["figures"]
    assert found["trained"] == found["stored"] == 2 * (32 * 4 + 4 * 32)  # two blocks of width 32
    assert set(found) == {
        *("trained", "stored", "stored_bytes", "export_bytes", "peak_bytes"),
        *("train_seconds", "cpu_per_step", "tokens_per_s", "timed_steps"),
    }
    assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert found["timed_steps"] == 2
    assert found["train_seconds"] == run.time["train_seconds"]


@pytest.mark.parametrize(
    "adapter",
    [
        "lora",
        "tied_lora",
        {"recipe": "lora_tsd", "r": 2, "directions": 2, "after": 1},
        MOVED,
    ],
)
def test_the_export_is_as_large_as_was_said(recipe: Make, tmp_path: Path, adapter: Any) -> None:
    run = weftlora.train(recipe(adapter=adapter, train=MANY))
    export = weftlora.export_lora(run.folder, tmp_path / "stock", verify=False)
    assert (len(set(export.ranks.values())) > 1) == (adapter is MOVED), "only this one's ranks differ between sites"
    assert run.figures["stored_bytes"] == file_of(run.adapter_folder).stat().st_size
    assert run.figures["stored"] == sum(t.numel() for t in load_file(file_of(run.adapter_folder)).values())
    assert run.figures["export_bytes"] == file_of(tmp_path / "stock").stat().st_size


def test_tied_sites_are_stored_once_and_exported_apart(recipe: Make) -> None:
    sections = [{"recipe": name, "r": 4, "target_modules": ["q_proj"]} for name in ("tied_lora", "lora")]
    tied, plain = (weftlora.train(recipe(adapter=section), overwrite=True).figures for section in sections)
    a_and_b, u_and_v = 4 * 32 + 32 * 4, 4 + 32
    assert plain["stored"] == 2 * a_and_b
    assert tied["stored"] == tied["trained"] == a_and_b + 2 * u_and_v
    assert tied["export_bytes"] == plain["export_bytes"]


def test_a_routed_adapter_would_be_as_large_as_at_its_mean_gate(recipe: Make, tmp_path: Path) -> None:
    run = weftlora.train(recipe(adapter="hydralora", train=MANY))
    rows = str(tmp_path / "train.jsonl")
    weftlora.export_lora(run.folder, tmp_path / "stock", verify=False, approximate="mean-gate", data=rows)
    assert run.figures["export_bytes"] == file_of(tmp_path / "stock").stat().st_size


def test_a_head_is_stored_and_exported_and_not_counted_as_trained(recipe: Make, tmp_path: Path) -> None:
    run = weftlora.train(recipe("bert", adapter="lora", train=MANY))
    head = 2 * 32 + 2
    assert run.parameters["trainable"] - run.figures["trained"] == head
    assert run.figures["stored"] == run.figures["trained"] + head
    weftlora.export_lora(run.folder, tmp_path / "stock", verify=False)
    assert run.figures["export_bytes"] == file_of(tmp_path / "stock").stat().st_size


def test_a_stock_adapter_is_its_own_export(recipe: Make) -> None:
    found = weftlora.train(recipe(adapter="peft:lora")).figures
    assert found["export_bytes"] == found["stored_bytes"]


def test_a_search_is_told_apart_from_the_training(recipe: Make) -> None:
    section = {"recipe": "flexora", "r": 2, "val_size": 8, "outer_batches": 2, "steps": 2}
    found = weftlora.train(recipe(adapter=section, train=MANY)).figures
    assert found["search_steps"] > 0
    assert found["search_seconds"] > 0
    assert found["timed_steps"] == 2


# ---------------------------------------------------------------------- the stopwatch itself, with steps of known cost


class _Args:
    device = torch.device("cpu")


def steps(watch: costs.Stopwatch, state: TrainerState, works: list[Callable[[], Any]], tokens: int = 10) -> None:
    """Each work as one step of a training."""
    arguments: Any = (_Args(), state, None)
    watch.on_train_begin(*arguments)
    for work in works:
        watch.on_step_begin(*arguments)
        work()
        state.global_step += 1
        state.num_input_tokens_seen += tokens
        watch.on_step_end(*arguments)


def spin(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def hold(mebibytes: int) -> None:
    torch.ones(mebibytes * 2**18)


def nothing() -> None:
    """A step that does nothing."""


def test_cpu_seconds_are_those_of_the_steps_without_the_first_one() -> None:
    state = TrainerState(max_steps=9)
    steps(costs.Stopwatch(), state, [lambda: spin(0.3), lambda: spin(0.05), lambda: time.sleep(0.1)])
    sums = costs.timed(state)
    assert sums.steps == 2
    assert sums.tokens == 20
    assert 0.05 <= sums.cpu_seconds < 0.15
    assert sums.seconds >= 0.15
    assert sums.train_seconds >= 0.45


def test_what_lies_between_steps_is_not_timed() -> None:
    state, watch = TrainerState(max_steps=9), costs.Stopwatch()
    steps(watch, state, [nothing, nothing])
    arguments: Any = (_Args(), state, None)
    spin(0.1)  # an evaluation
    watch.on_step_begin(*arguments)
    watch.on_step_end(*arguments)
    watch.on_train_end(*arguments)
    sums = costs.timed(state)
    assert sums.steps == 2
    assert sums.cpu_seconds < 0.05
    assert sums.train_seconds > 0.1


@pytest.mark.skipif(not costs.forget_peak(torch.device("cpu")), reason="this machine tells no peak")
def test_the_peak_grows_with_what_a_step_holds_and_forgets_what_was_before() -> None:
    def peak(works: list[Callable[[], None]]) -> int:
        state = TrainerState(max_steps=9)
        steps(costs.Stopwatch(), state, works)
        found = costs.timed(state).peak_bytes
        assert found is not None
        return found

    hold(256)
    low, high = peak([nothing, nothing]), peak([nothing, lambda: hold(128), nothing])
    assert high - low == pytest.approx(128 * 2**20, rel=0.1)
    assert peak([lambda: hold(128)]) > low + 100 * 2**20, "the first step counts for memory"


def test_a_machine_that_cannot_reset_its_peak_tells_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was resident before the training would pass for its own."""
    monkeypatch.setattr(costs, "_RESET", "/proc/self/no_such_file")
    state = TrainerState(max_steps=9)
    steps(costs.Stopwatch(), state, [nothing, nothing])
    assert costs.timed(state).peak_bytes is None


def test_sums_of_another_device_are_dropped_and_the_whole_time_is_kept() -> None:
    state = TrainerState(max_steps=9)
    before = costs.Timed("a GPU", train_seconds=100.0, steps=50, cpu_seconds=1.0, seconds=1.0, tokens=9, peak_bytes=1)
    state.stateful_callbacks[costs.KEY] = vars(before)
    steps(costs.Stopwatch(), state, [nothing, nothing])
    sums = costs.timed(state)
    assert (sums.device, sums.steps) == ("cpu", 1)
    assert sums.train_seconds > 100


def test_a_measurement_that_will_take_long_says_how_long(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "weftlora")
    sums = costs.Timed(
        "cpu", steps=2, seconds=4.0, tokens=40
    )  # a tenth of a second a token, and half of that without a backward
    costs.announce_measuring(sums, Dataset.from_dict({"input_ids": [[1] * 100]}))
    costs.announce_measuring(sums, Dataset.from_dict({"input_ids": [[1] * 300] * 2}))
    assert [record.getMessage() for record in caplog.records] == ["measuring the validation loss on 2 rows: about 30 s"]


# ---------------------------------------------------------------------- resumed


class _Slow(TrainerCallback):
    """Steps that take a known time."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        spin(0.03)


def test_a_resumed_run_counts_each_of_its_steps_once(recipe: Make, tmp_path: Path) -> None:
    """Five steps, a checkpoint after three; then three more of six: the first of each process is not timed."""
    length = {"steps": 6, "save_every": 3}
    given = recipe(train=length)
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(given, callbacks=[_Slow(), Interrupt(5)])
    whole = weftlora.train(recipe(train=length, out=str(tmp_path / "whole")), callbacks=[_Slow()]).figures
    found = weftlora.train(given, resume=True, callbacks=[_Slow()]).figures
    assert whole["timed_steps"] == 5
    assert found["timed_steps"] == 2 + 2
    assert found["cpu_per_step"] == pytest.approx(whole["cpu_per_step"], rel=0.5)
    assert found["cpu_per_step"] > 0.03
    assert found["train_seconds"] > 6 * 0.03
    for same in ("trained", "stored", "stored_bytes", "export_bytes"):
        assert found[same] == whole[same]


def test_the_empty_step_after_the_last_is_not_timed(recipe: Make) -> None:
    given = recipe(train={"steps": 4, "save_every": 2})
    weftlora.train(given)
    run = Run.load(given["out"])
    (run.folder / "run.json").write_text((run.folder / "run.json").read_text().replace('"complete"', '"interrupted"'))
    again = weftlora.train(given, resume=True)
    assert again.time["resumed_from"] == 4
    assert again.figures["timed_steps"] == 3
    assert again.figures["cpu_per_step"] == run.figures["cpu_per_step"]


def test_a_run_that_is_not_complete_has_no_figures(recipe: Make) -> None:
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(recipe(), callbacks=[Interrupt(2)])
    assert Run.load(recipe()["out"]).figures == {}
