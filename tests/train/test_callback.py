"""weftlora.Callback in a Trainer of the user's own: the length of the run is told, checkpoints count when they are complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dashing import launch_step, steps, tensors, terms
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import weftlora
from families import FAMILIES
from weftlora.train import checkpoint, newest_checkpoint

DASH = {"r": 2, "directions": 2, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 64, (6,), generator=draw) for _ in range(count)]
    return [{"input_ids": i, "labels": i} for i in ids]


def llama(after: Any = 3, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(FAMILIES["llama"].build(), weftlora.LoraDashConfig(after=after, **{**DASH, **fields}))


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 2, "max_steps": 6, "learning_rate": 1e-2, "save_steps": 1}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), **{**given, **quiet, **fields})


def trainer(
    folder: Path, model: Any = None, callbacks: Any = None, count: int = 40, args: Any = None, **fields: Any
) -> Trainer:
    """Ours is first among the callbacks unless they are given."""
    return Trainer(
        llama() if model is None else model,
        args or arguments(folder, **fields),
        train_dataset=rows(count),
        eval_dataset=rows(4),
        callbacks=[weftlora.Callback()] if callbacks is None else callbacks,
    )


class Stop(TrainerCallback):
    """Ends a run by an exception after a step, its checkpoint included."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stopped(at: int, folder: Path, **given: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(folder, callbacks=[weftlora.Callback(), Stop(at)], **given).train()


@pytest.mark.parametrize(
    ("after", "fields", "step"),
    [
        (0.5, {}, 3),
        (0.3, {"max_steps": 10}, 3),
        (0.5, {"max_steps": -1, "num_train_epochs": 2}, 7),  # 13 rows, 2 a batch: 7 steps an epoch
        (weftlora.epochs(0.6), {"max_steps": 8}, 4),
        (weftlora.epochs(1), {"max_steps": 6, "gradient_accumulation_steps": 2}, 4),  # 7 batches: 4 steps
    ],
)
def test_times_in_fractions_and_epochs_are_steps_of_this_trainer(
    tmp_path: Path, after: Any, fields: dict[str, Any], step: int
) -> None:
    model = llama(after=after)
    trainer(tmp_path, model, count=13, save_strategy="no", **fields).train()
    assert launch_step(model) == step


@pytest.mark.parametrize(
    ("after", "words"), [(6, "after step 6, but the run ends after 6"), (weftlora.epochs(2), "step 40")]
)
def test_what_cannot_happen_is_an_error_before_the_first_step(tmp_path: Path, after: Any, words: str) -> None:
    mine = trainer(tmp_path, llama(after=after), save_total_limit=2)
    with pytest.raises(weftlora.ConfigError, match=words):
        mine.train()
    assert (mine.state.global_step, mine.args.save_total_limit) == (0, 2)


class Enough(TrainerCallback):
    """Ends a run early and in order, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


def test_a_run_that_ends_before_the_launch_says_so(tmp_path: Path) -> None:
    mine = trainer(tmp_path, llama(after=0.5), callbacks=[weftlora.Callback(), Enough(2)], save_strategy="no")
    with pytest.warns(UserWarning, match=r"has trained 2 steps and is still without the launch of Dash"):
        mine.train()


def test_epochs_of_a_stream_without_a_length_must_be_told(tmp_path: Path) -> None:
    from datasets import IterableDataset

    def stream(model: PeftModel) -> Trainer:
        data = IterableDataset.from_generator(lambda: iter(rows(20)))
        return Trainer(
            model, arguments(tmp_path, save_strategy="no"), train_dataset=data, callbacks=[weftlora.Callback()]
        )

    model = llama(after=weftlora.epochs(0.5))
    with pytest.raises(weftlora.ConfigError, match=r"weftlora\.attach\(model, steps_per_epoch="):
        stream(model).train()
    weftlora.attach(model, steps_per_epoch=4)
    stream(model).train()
    assert launch_step(model) == 2


def test_without_it_a_fraction_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        weftlora.ConfigError, match=r"weftlora\.attach\(model, total_steps=.*callbacks=\[weftlora\.Callback\(\)\]"
    ):
        trainer(tmp_path, llama(after=0.5), callbacks=[]).train()


def test_a_second_run_of_the_same_adapter_counts_from_where_the_first_ended(tmp_path: Path) -> None:
    model = llama(after=6)
    trainer(tmp_path / "first", model, max_steps=5, callbacks=[]).train()
    again = trainer(tmp_path / "second", model, max_steps=5)
    again.train()
    assert (launch_step(model), steps(model)) == (6, 10)
    resumed = llama(after=6)
    trainer(tmp_path / "third", resumed, max_steps=5).train(
        resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-2")
    )
    assert tensors(resumed).keys() == tensors(model).keys()
    assert steps(resumed) == 10


def test_events_are_told_and_come_back_on_resume(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    model = llama()
    trainer(tmp_path, model, callbacks=[weftlora.Callback(on_event=told.append, cache=tmp_path / "cache")]).train()
    assert [(e["event"], e["step"]) for e in told] == [("dash_launch", 3)]
    assert list((tmp_path / "cache").iterdir()), "decompositions are kept there"
    again = llama()
    trainer(tmp_path, again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert weftlora.state_dict(again) == weftlora.state_dict(model)


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_a_run_stopped_in_any_phase_resumes_exactly(tmp_path: Path, at: int) -> None:
    """Adapter with its count, gains and directions, and the optimiser's moments."""
    whole = trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    stopped(at, tmp_path / "cut", max_steps=6)
    last = newest_checkpoint(tmp_path / "cut")
    assert last is not None
    assert checkpoint.step_of(last) == at
    again = trainer(tmp_path / "cut", max_steps=6)
    again.train(resume_from_checkpoint=last)
    mine, expected = tensors(again.model), tensors(whole.model)
    assert [n for n in expected if not torch.equal(mine[n], expected[n])] == []
    assert steps(again.model) == 6
    assert all(term.launched and term.gain.count_nonzero() for term in terms(again.model))
    moments = [t.optimizer.state_dict()["state"] for t in (again, whole)]
    assert moments[0].keys() == moments[1].keys()
    for key, values in moments[1].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(moments[0][key][n])) for n, v in values.items())


def test_only_marked_checkpoints_count(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none yet") is None
    trainer(tmp_path, save_steps=2).train()
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    for step in (6, 4):
        checkpoint.unmark(tmp_path / f"checkpoint-{step}")
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    checkpoint.unmark(tmp_path / "checkpoint-2")
    assert newest_checkpoint(tmp_path) is None, "our own, half-written"


def test_a_trainer_without_it_leaves_none_that_could_be_trusted(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[], save_steps=2).train()
    with pytest.raises(weftlora.RunError, match=r"checkpoint-6 was written without weftlora\.Callback"):
        newest_checkpoint(tmp_path)


def test_checkpoints_of_an_earlier_run_no_longer_count(tmp_path: Path) -> None:
    """They would be resumed, or written over in place while they are marked."""
    trainer(tmp_path).train()
    stopped(2, tmp_path)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


class Seen(TrainerCallback):
    """Complete checkpoints at every save, before ours has marked the new one."""

    def __init__(self) -> None:
        self.steps: list[list[int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append([checkpoint.step_of(path) for path in checkpoint.marked(Path(args.output_dir))])


@pytest.mark.parametrize("limit", [1, 2])
def test_the_limit_holds_and_the_previous_one_stays_until_the_next_is_complete(tmp_path: Path, limit: int) -> None:
    seen = Seen()
    mine = trainer(tmp_path, callbacks=[seen, weftlora.Callback()], save_total_limit=limit)
    mine.train()
    assert seen.steps == [[n for n in range(step - limit, step) if n > 0] for step in range(1, 7)]
    assert [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path)] == list(range(7 - limit, 7))
    assert mine.args.save_total_limit == limit


def test_the_limit_survives_a_run_that_failed(tmp_path: Path) -> None:
    args = arguments(tmp_path, save_total_limit=1)
    stopped(3, tmp_path, args=args)
    trainer(tmp_path, args=args).train(resume_from_checkpoint=newest_checkpoint(tmp_path))
    assert len(checkpoint.folders(tmp_path)) == args.save_total_limit == 1


class Scores(TrainerCallback):
    """An evaluation that likes step `best` most."""

    def __init__(self, best: int) -> None:
        self.best = best

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        metrics["eval_loss"] = float(abs(state.global_step - self.best))


@pytest.mark.parametrize("best", [2, 4])
@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path, limit: int | None, best: int) -> None:
    """From after the launch to before it, too: the adapter is then the one of that step, and says so."""
    mine = trainer(
        tmp_path,
        callbacks=[weftlora.Callback(), Scores(best)],
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=limit,
    )
    if best < 3:
        with pytest.warns(UserWarning, match="still without the launch of Dash"):
            mine.train()
    else:
        mine.train()
    assert steps(mine.model) == best
    assert {bool(term.launched) for term in terms(mine.model)} == {best >= 3}
    expected = {None: list(range(1, 7)), 1: [best], 2: [best, 6]}[limit]
    assert [checkpoint.step_of(path) for path in checkpoint.folders(tmp_path)] == expected


def test_a_trial_of_a_search_is_left_alone(tmp_path: Path) -> None:
    """Its checkpoints lie elsewhere, and Trainer deletes them."""
    mine = trainer(tmp_path, save_total_limit=1)
    mine.train()
    mine.state.is_hyper_param_search = True
    folder, limit = newest_checkpoint(tmp_path), mine.args.save_total_limit
    given = (mine.args, mine.state, mine.control)
    mine.state.global_step = 0
    for event in ("on_train_begin", "on_save", "on_train_end"):
        mine.callback_handler.call_event(event, *given)
    assert (newest_checkpoint(tmp_path), mine.args.save_total_limit) == (folder, limit)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resumed_at_its_last_step_a_run_takes_no_step_too_many(tmp_path: Path, accumulation: int) -> None:
    """Trainer alone takes one within an epoch; killed while it saves its result, a run must end as it would have."""
    fields = {"lr_scheduler_type": "constant", "gradient_accumulation_steps": accumulation, "save_total_limit": 1}
    whole = trainer(tmp_path, **fields)
    whole.train()
    last = newest_checkpoint(tmp_path)
    assert last is not None
    stamp = (last / checkpoint.MARKER).stat().st_mtime_ns
    again = trainer(tmp_path, **fields)
    again.train(resume_from_checkpoint=last)
    assert (again.state.global_step, again.state.epoch) == (whole.state.global_step, whole.state.epoch)
    assert (last / checkpoint.MARKER).stat().st_mtime_ns == stamp, "nothing was written over"
    assert checkpoint.folders(tmp_path) == [last]
    mine, expected = tensors(again.model), tensors(whole.model)
    assert [n for n in expected if not torch.equal(mine[n], expected[n])] == []


def test_rows_to_score_on_come_by_the_callback_or_by_attach(tmp_path: Path) -> None:
    """Times are fractions, so attach alone cannot place the rounds; the callback brings the length."""
    fields = {"r": 2, "first": 0.5, "every": 0.25, "max_rounds": 1, "rows": 4, "target_modules": ["q_proj", "v_proj"]}
    told = []
    for way in ("callback", "attach"):
        torch.manual_seed(0)
        model = get_peft_model(FAMILIES["llama"].build(), weftlora.AllocLoraConfig(**fields))
        if way == "attach":
            weftlora.attach(model, validation=rows(8))
        callback = weftlora.Callback(validation=rows(8) if way == "callback" else None)
        trainer(tmp_path / way, model, [callback], save_strategy="no").train()
        [event] = weftlora.state_dict(model)["default"]["events"]
        told.append({key: value for key, value in event.items() if key != "seconds"})
    assert told[0] == told[1]
    assert (told[0]["event"], told[0]["step"]) == ("reallocation", 3)


def test_a_model_of_stock_peft_is_marked_too(tmp_path: Path) -> None:
    from peft import LoraConfig

    model = get_peft_model(FAMILIES["llama"].build(), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer(tmp_path, model, max_steps=2).train()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.name == "checkpoint-2"
