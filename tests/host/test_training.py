"""Training under other people's loops: Trainer with resume, SFTTrainer, both kinds of checkpointing, DDP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from pairing import both_of
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import weftlora
from families import FAMILIES, STRUCTURES, adapter_config, logits, randomise, trainable

pytestmark = pytest.mark.sharded

every_structure = pytest.mark.parametrize("structure", STRUCTURES)
ROWS = 16 * FAMILIES["llama"].batch()["input_ids"][:1].tolist()  # one text to learn by heart: the loss falls at once
ARGUMENTS = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "logging_steps": 1,
    "seed": 11,
}


# ---------------------------------------------------------------------- Trainer and SFTTrainer


def adapter_of(model: PeftModel) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items() if ".weft_site." in n}


def run_trainer(structure: str, out: Path, resume: str | None = None, **arguments) -> tuple[Trainer, PeftModel]:
    torch.manual_seed(0)
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config(structure, "llama", lora_dropout=0.1))
    data = Dataset.from_list([{"input_ids": row, "labels": row} for row in ROWS])
    arguments = TrainingArguments(output_dir=str(out), max_steps=4, **ARGUMENTS, **arguments)
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, model


@every_structure
def test_trainer_saves_the_adapter_and_resumes_to_the_same_weights(structure: str, tmp_path: Path) -> None:
    trainer, model = run_trainer(structure, tmp_path / "whole", save_steps=2)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {p.name for p in checkpoint.iterdir()}
    _, resumed = run_trainer(structure, tmp_path / "resumed", resume=str(checkpoint), save_strategy="no")
    expected = adapter_of(model)
    assert all(torch.equal(t, expected[n]) for n, t in adapter_of(resumed).items())
    last = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path / "whole" / "checkpoint-4")
    batch = FAMILIES["llama"].batch()
    assert torch.equal(logits(last, batch), logits(model, batch))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(61))])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@every_structure
def test_sft_trainer_takes_the_config_as_peft_config(structure: str, tokenizer, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row} for row in ROWS])
    args = SFTConfig(output_dir=str(tmp_path), max_steps=3, max_length=16, save_steps=3, bf16=False, **ARGUMENTS)
    base = FAMILIES["llama"].build()
    untouched = {n: t.clone() for n, t in base.state_dict().items()}
    trainer = SFTTrainer(
        model=base,
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter_config(structure, "llama"),
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert all(".weft_site." in n for n in trainable(trainer.model))
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    after = trainer.model.unload().state_dict()
    assert all(torch.equal(after[n], t) for n, t in untouched.items())
    weftlora.WeftConfig.from_pretrained(tmp_path / "checkpoint-3")


# ---------------------------------------------------------------------- gradient checkpointing


def gradients(structure: str, kind: bool | None) -> dict[str, Tensor]:
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config(structure, "llama", lora_dropout=0.3)).train()
    randomise(model)
    if kind is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": kind})
        model.enable_input_require_grads()
        assert model.base_model.model.model.layers[0].gradient_checkpointing
    torch.manual_seed(42)
    model(**FAMILIES["llama"].batch()).loss.backward()
    return {n: p.grad for n, p in trainable(model).items()}


@every_structure
@pytest.mark.parametrize("reentrant", [True, False])
def test_both_kinds_of_checkpointing_give_the_gradients_of_none_with_dropout_on(
    structure: str, reentrant: bool
) -> None:
    expected, got = gradients(structure, None), gradients(structure, reentrant)
    assert expected.keys() == got.keys()
    for name, gradient in expected.items():
        assert gradient.any()
        assert torch.allclose(got[name], gradient, atol=1e-7), name


def test_per_head_masks_are_replayed_by_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    config = weftlora.HydraLoraConfig(r=2, per_head_dropout=True, lora_dropout=0.4, target_modules=["0"])
    model = get_peft_model(nn.Sequential(nn.Linear(6, 5)), config).train()
    randomise(model)
    x, found = torch.randn(3, 6), []
    for kind in (None, True, False):
        torch.manual_seed(1)
        x_in = x.clone().requires_grad_()
        y = model(x_in) if kind is None else checkpoint(model, x_in, use_reentrant=kind)
        model.zero_grad()
        y.square().sum().backward()
        found.append([y.detach(), x_in.grad, *(p.grad.clone() for p in trainable(model).values())])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# ---------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the first of two processes saw: mode of checkpointing → structure → difference to one process, or the error."""
    return both_of(str(Path(__file__).with_name("ddp_worker.py")), tmp_path_factory.mktemp("ddp"))[0]


@pytest.mark.slow
@every_structure
@pytest.mark.parametrize("mode", ["none", "False", "True"], ids=["plain", "nonreentrant", "reentrant"])
def test_two_processes_equal_one_with_the_same_global_batch(structure: str, mode: str, seen: dict) -> None:
    shares_trained_factors = structure.startswith("tied") and structure != "tied_vera"
    if mode == "True" and shares_trained_factors:
        assert seen[mode][structure].startswith("ConfigError: Tied-LoRA with reentrant gradient checkpointing")
        assert "'use_reentrant': False" in seen[mode][structure]
    else:
        assert seen[mode][structure] < 1e-5


def test_a_shared_factor_under_reentrant_checkpointing_is_fine_in_one_process() -> None:
    assert not torch.distributed.is_initialized()
    assert all(g.isfinite().all() for g in gradients("tied_tl5_shape", True).values())
