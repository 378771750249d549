"""transformers' Trainer and trl's SFTTrainer train an adapter, and its checkpoint is the adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import weftlora

IDS = torch.arange(3, 19).reshape(2, 8)
ROWS = [{"input_ids": [3 + n, 4, 5, 6], "attention_mask": [1] * 4, "labels": [3 + n, 4, 5, 6]} for n in range(12)]
COMMON: dict[str, Any] = {
    "max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 3, "report_to": [], "use_cpu": True, "learning_rate": 1e-2,
    "disable_tqdm": True,
    "bf16": False, "remove_unused_columns": False,
}  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_plain_trainer(base: Path, tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("accelerate")
    config = weftlora.LoraTsdConfig(r=4, directions=2, after=0.5)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    args = TrainingArguments(str(tmp_path), **COMMON)
    Trainer(model, args, train_dataset=ROWS, callbacks=[weftlora.Callback()]).train()
    assert [e["event"] for s in weftlora.state_dict(model).values() for e in s["events"]]
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits(again), logits(model))


def test_sft_trainer_makes_the_adapter_itself(tmp_path: Path, needs: Callable[..., None]) -> None:
    needs("trl", "datasets")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from weftlora.data.demo import demo_model_path

    rows = Dataset.from_list([{"prompt": f"copy {n}", "completion": f" {n}"} for n in range(12)])
    args = SFTConfig(str(tmp_path), max_length=32, **{**COMMON, "remove_unused_columns": True})
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(demo_model_path()),
        args,
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(demo_model_path()),
        peft_config=weftlora.HydraLoraConfig(r=4),
        callbacks=[weftlora.Callback()],
    )
    trainer.train()
    plain = AutoModelForCausalLM.from_pretrained(demo_model_path())
    before = logits(plain)
    again = logits(PeftModel.from_pretrained(plain, str(tmp_path / "checkpoint-3")))
    assert not torch.equal(again, before)
    torch.testing.assert_close(again, logits(trainer.model), rtol=1e-3, atol=1e-3)


class Stop(TrainerCallback):
    """Interrupts training after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_logged_losses_do_not_depend_on_an_interruption(tmp_path: Path, needs: Callable[..., None]) -> None:
    """Interrupted between two losses that are logged, a step after a checkpoint."""
    needs("accelerate", "datasets")
    train = {"steps": 7, "batch_size": 4, "lr": 1e-2, "save_every": 2, "logging_every": 3}
    given = {"model": "demo", "data": "demo", "adapter": {"recipe": "lora", "r": 2}, "train": train}
    whole = weftlora.train({**given, "out": str(tmp_path / "whole")}, "data.validation_limit=4")
    cut = {**given, "out": str(tmp_path / "cut")}
    with pytest.raises(KeyboardInterrupt):
        weftlora.train(cut, "data.validation_limit=4", callbacks=[Stop(5)])
    run = weftlora.train(cut, "data.validation_limit=4", resume=True)
    losses = [[(row["step"], row["loss"]) for row in each.history() if "loss" in row] for each in (whole, run)]
    assert losses[1] == losses[0]
    assert [step for step, _ in losses[0]][:3] == [1, 3, 6]
    assert run.metrics == whole.metrics
