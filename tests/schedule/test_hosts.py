"""accelerate, Trainer and SFTTrainer launch Dash after step N without a call of weftlora."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dashing import adam, batch, dash, launch_step, launched, loss_of, steps, tensors, terms
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import weftlora
from families import FAMILIES

N = 3


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 64, (6,), generator=draw) for _ in range(count)]
    return [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]


def llama(after: Any = N, **fields: Any) -> PeftModel:
    torch.manual_seed(0)
    config = weftlora.LoraDashConfig(after=after, r=2, directions=2, target_modules=["q_proj", "v_proj"], **fields)
    return get_peft_model(FAMILIES["llama"].build(), config)


def arguments(folder: Path, **fields: Any) -> TrainingArguments:
    given = {"per_device_train_batch_size": 2, "max_steps": 5, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    return TrainingArguments(str(folder), **{**given, **quiet, **fields})


class Watch(TrainerCallback):
    """Step, count and phase at the end of every step of Trainer."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append((state.global_step, steps(model), launched(model)))


EXPECTED = [(n, n, n >= N) for n in range(1, 6)]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_trainer(tmp_path: Path, accumulation: int, optim: str) -> None:
    """With evaluation in between: at every step."""
    model, watch = llama(), Watch()
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, optim=optim, eval_strategy="steps", eval_steps=1
    )
    Trainer(model, args, train_dataset=rows(40), eval_dataset=rows(4), callbacks=[watch]).train()
    assert watch.seen == EXPECTED
    assert launch_step(model) == N
    assert all(torch.count_nonzero(term.gain) for term in terms(model))


@pytest.mark.parametrize("reentrant", [True, False])
def test_trainer_with_checkpointing_and_autocast(tmp_path: Path, reentrant: bool) -> None:
    model, watch = llama(), Watch()
    args = arguments(
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        bf16=True,
        gradient_accumulation_steps=2,
    )
    Trainer(model, args, train_dataset=rows(40), callbacks=[watch]).train()
    assert watch.seen == EXPECTED


def test_trainer_resumes_its_own_checkpoint_exactly(tmp_path: Path) -> None:
    """Before the launch, at its step and after it."""
    args = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "save_total_limit": 9}
    model = llama(lora_dropout=0.1)
    Trainer(model, arguments(tmp_path, **args), train_dataset=rows(40)).train()
    for step in (N - 1, N, N + 1):
        again = llama(lora_dropout=0.1)
        trainer = Trainer(again, arguments(tmp_path / "again", **args), train_dataset=rows(40))
        trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert steps(again) == 5
        one, other = tensors(model), tensors(again)
        assert [n for n in one if not torch.equal(one[n], other[n])] == []


def test_sft_trainer(tmp_path: Path) -> None:
    """The adapter is made by SFTTrainer itself."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    vocabulary = {t: n for n, t in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    args = SFTConfig(
        str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=5,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        max_length=16,
    )
    watch = Watch()
    trainer = SFTTrainer(
        FAMILIES["llama"].build(),
        args,
        train_dataset=Dataset.from_dict({"text": ["a b c d", "e f g h", "a c e g"] * 8}),
        processing_class=fast,
        peft_config=weftlora.LoraDashConfig(
            after=N, r=2, directions=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ),
        callbacks=[watch],
    )
    trainer.train()
    assert watch.seen == EXPECTED


@pytest.mark.parametrize("accumulation", [1, 3])
def test_accelerate(accumulation: int) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    model = dash(after=N)
    prepared, optimizer = accelerator.prepare(model, adam(model))
    for micro in range(5 * accumulation):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, batch(micro)))
            optimizer.step()
            optimizer.zero_grad()
        assert steps(model) == (micro + 1) // accumulation
    assert launch_step(model) == N


def test_a_fraction_without_attach_is_an_error_of_the_first_step(tmp_path: Path) -> None:
    trainer = Trainer(llama(after=0.5), arguments(tmp_path), train_dataset=rows(20))
    with pytest.raises(
        weftlora.ConfigError, match=r"due at 0\.5, which needs .* call weftlora\.attach\(model, total_steps="
    ):
        trainer.train()
    assert trainer.state.global_step == 0
