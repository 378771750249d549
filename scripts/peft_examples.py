"""What peft's documentation shows LoRA with, rebuilt with tiny models: each runs with stock LoRA and, one line changed, with weftlora.

    python scripts/peft_examples.py [--only NAME ...]

Each function below is one of its subjects and uses the name LoraConfig, which the import below makes stock LoRA's. The file is run
twice: as it is, and with that one line naming weftlora's config instead. What came out is written to evidence/peft-examples.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

# isort: off
from peft import LoraConfig  # the one line that is changed
from peft import (
    PeftConfig,
    PeftModel,
    TaskType,
    get_layer_status,
    get_model_status,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
# isort: on

CHANGED = ("from peft import LoraConfig  #", "from weftlora import WeftConfig as LoraConfig  #")
RESULTS = Path(__file__).resolve().parent.parent / "evidence" / "peft-examples.json"
COMMAND = "python scripts/peft_examples.py"

SIZE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IDS = torch.arange(24).reshape(4, 6) % 60


def llama(**more: Any) -> Any:
    """A decoder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SIZE, "pad_token_id": 0, **more})
    return transformers.LlamaForCausalLM(config).eval()


def bert(kind: str, **more: Any) -> Any:
    """An encoder with the head of a task."""
    torch.manual_seed(0)
    return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**SIZE, **more)).eval()


def trained(model: Any, steps: int = 3, rate: float = 1e-2, **batch: Any) -> float:
    """A loop of its own, as the examples have it; the loss must fall."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    model.eval()
    assert losses[-1] < losses[0], losses
    return losses[-1]


@torch.no_grad()
def same(one: Any, other: Any, at: float = 1e-5, **batch: Any) -> bool:
    """Whether two models compute the same logits."""
    return torch.allclose(one.eval()(**batch).logits, other.eval()(**batch).logits, atol=at)


# ---------------------------------------------------------------------- the subjects


def quicktour_trainer(folder: Path) -> None:
    """A causal model with Trainer, saved and loaded by AutoPeftModel's config."""
    config = LoraConfig(task_type=TaskType.CAUSAL_LM, inference_mode=False, r=4, lora_alpha=8, lora_dropout=0.1)
    model = get_peft_model(llama(), config)
    model.print_trainable_parameters()
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        str(folder / "out"), max_steps=3, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    model.save_pretrained(folder / "adapter")
    assert PeftConfig.from_pretrained(folder / "adapter").r == 4
    again = PeftModel.from_pretrained(llama(), folder / "adapter")
    assert same(model, again, input_ids=IDS)
    assert not same(again, llama(), input_ids=IDS)


def sequence_classification(folder: Path) -> None:
    """An encoder with a head that is trained in full."""
    model = get_peft_model(
        bert("SequenceClassification", num_labels=3),
        LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, lora_dropout=0.1),
    )
    trained(model, steps=8, input_ids=IDS, labels=torch.tensor([0, 1, 2, 0]))
    model.save_pretrained(folder)
    assert same(model, PeftModel.from_pretrained(bert("SequenceClassification", num_labels=3), folder), input_ids=IDS)


def token_classification(folder: Path) -> None:
    """A label per token, all-lora biases included."""
    model = get_peft_model(
        bert("TokenClassification", num_labels=5),
        LoraConfig(task_type=TaskType.TOKEN_CLS, r=8, lora_alpha=16, bias="all"),
    )
    trained(model, input_ids=IDS, labels=IDS % 5)
    model.save_pretrained(folder)
    assert same(model, PeftModel.from_pretrained(bert("TokenClassification", num_labels=5), folder), input_ids=IDS)


def question_answering(folder: Path) -> None:
    """A span of the input."""
    model = get_peft_model(
        bert("QuestionAnswering"), LoraConfig(task_type="QUESTION_ANS", r=4, target_modules=["query", "value"])
    )
    begins, ends = torch.tensor([0, 1, 2, 3]), torch.tensor([2, 3, 4, 5])
    trained(model, steps=8, input_ids=IDS, start_positions=begins, end_positions=ends)


def sequence_to_sequence(folder: Path) -> None:
    """T5 that is trained and generates."""

    def base() -> Any:
        torch.manual_seed(0)
        sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()

    model = get_peft_model(base(), LoraConfig(task_type=TaskType.SEQ_2_SEQ_LM, r=4, target_modules=["q", "v"]))
    trained(model, steps=5, input_ids=IDS, labels=IDS)
    model.save_pretrained(folder)
    again = PeftModel.from_pretrained(base(), folder).eval()
    wanted = {"input_ids": IDS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(**wanted), again.generate(**wanted))


def image_classification(folder: Path) -> None:
    """ViT, its classifier trained in full by name."""
    sizes = {name: SIZE[name] for name in SIZE if name != "vocab_size"}
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)
    ).eval()
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        lora_dropout=0.1,
        bias="none",
        modules_to_save=["classifier"],
    )
    model = get_peft_model(copy.deepcopy(base), config)
    images = torch.randn(4, 3, 16, 16)
    trained(model, steps=8, pixel_values=images, labels=torch.tensor([0, 1, 2, 0]))
    model.save_pretrained(folder)
    assert same(model, PeftModel.from_pretrained(base, folder), pixel_values=images)


def semantic_segmentation(folder: Path) -> None:
    """A head of several modules that is trained in full, and only biases of adapted modules."""
    torch.manual_seed(0)
    small = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
    )  # fmt: skip
    base = transformers.SegformerForSemanticSegmentation(small).eval()
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], bias="lora_only", modules_to_save=["decode_head"])
    model = get_peft_model(copy.deepcopy(base), config)
    images = torch.randn(2, 3, 16, 16)
    trained(model, steps=5, pixel_values=images, labels=torch.randint(0, 3, (2, 16, 16)))
    model.save_pretrained(folder)
    assert same(model, PeftModel.from_pretrained(base, folder), pixel_values=images)


def speech_recognition(folder: Path) -> None:
    """Whisper, in a loop of its own."""
    torch.manual_seed(0)
    sizes = {
        f"{part}_{name}": n
        for part in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))
    }
    small = transformers.WhisperConfig(
        **sizes, vocab_size=64, d_model=16, num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, begin_suppress_tokens=None, suppress_tokens=None,
    )  # fmt: skip
    base = transformers.WhisperForConditionalGeneration(small).eval()
    model = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, bias="none")
    )
    trained(model, steps=5, input_features=torch.randn(4, 8, 32), labels=IDS)


def feature_extraction(folder: Path) -> None:
    """Embeddings of sentences, whose similarity is trained."""
    torch.manual_seed(0)
    base = transformers.BertModel(transformers.BertConfig(**SIZE), add_pooling_layer=False).eval()
    model = get_peft_model(
        base, LoraConfig(task_type=TaskType.FEATURE_EXTRACTION, r=4, target_modules=["key", "query", "value"])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    far = []
    for _ in range(6):
        vectors = nn.functional.normalize(model(input_ids=IDS).last_hidden_state.mean(1), dim=-1)
        loss = (1 - vectors[0] @ vectors[1]) + (vectors[0] @ vectors[2]).clamp(min=0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        far.append(float(loss))
    assert far[-1] < far[0]


def several_adapters(folder: Path) -> None:
    """Adapters that are added, chosen, left out, deleted and loaded beside each other."""
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, init_lora_weights=False))
    first = model.eval()(input_ids=IDS).logits
    model.set_adapter("second")
    second = model(input_ids=IDS).logits
    assert not torch.allclose(first, second)
    with model.disable_adapter():
        assert torch.allclose(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
    model.save_pretrained(folder)
    model.delete_adapter("first")
    model.load_adapter(folder / "first", adapter_name="first")
    model.set_adapter("first")
    assert torch.allclose(model(input_ids=IDS).logits, first, atol=1e-6)


def merged_adapters(folder: Path) -> None:
    """Weighted sums, by concatenation and by a decomposition."""
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=4, init_lora_weights=False))
    model.add_weighted_adapter(adapters=["a", "b"], weights=[0.7, 0.3], adapter_name="cat", combination_type="cat")
    model.add_weighted_adapter(["a", "b"], [0.7, 0.3], adapter_name="svd", combination_type="svd", svd_rank=8)
    model.set_adapter("cat")
    cat = model.eval()(input_ids=IDS).logits
    model.set_adapter("svd")
    assert torch.allclose(cat, model(input_ids=IDS).logits, atol=1e-4)


def merged_into_the_base(folder: Path) -> None:
    """Merged, unmerged, and unloaded for good."""
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False)).eval()
    before = model(input_ids=IDS).logits
    model.merge_adapter()
    assert torch.allclose(model(input_ids=IDS).logits, before, atol=1e-5)
    model.unmerge_adapter()
    alone = model.merge_and_unload(safe_merge=True)
    assert type(alone).__name__ == "LlamaForCausalLM"
    assert torch.allclose(alone(input_ids=IDS).logits, before, atol=1e-5)
    alone.save_pretrained(folder)


def mixed_batches(folder: Path) -> None:
    """An adapter per row of a batch, also while generating."""
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False))
    model.add_adapter("other", LoraConfig(r=2, init_lora_weights=False))
    names = ["__base__", "default", "other", "default"]
    model.eval()
    mixed = model(input_ids=IDS, adapter_names=names).logits
    alone = model(input_ids=IDS).logits
    assert torch.allclose(mixed[1], alone[1], atol=1e-5)
    assert torch.allclose(mixed[0], llama()(input_ids=IDS).logits[0], atol=1e-5)
    model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=3, do_sample=False)


class Perceptron(nn.Module):
    """A model of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2), nn.LogSoftmax(dim=-1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.seq(x)


def custom_models(folder: Path) -> None:
    """Modules named by their places, the last one trained in full."""
    torch.manual_seed(0)
    base = Perceptron()
    model = get_peft_model(
        copy.deepcopy(base), LoraConfig(target_modules=["seq.0", "seq.2"], modules_to_save=["seq.4"])
    )
    x, labels = torch.randn(16, 20), torch.randint(0, 2, (16,))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    before = float(nn.functional.nll_loss(model(x), labels))
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.nll_loss(model(x), labels).backward()
        optimizer.step()
    assert float(nn.functional.nll_loss(model(x), labels)) < before
    model.save_pretrained(folder)
    assert torch.allclose(PeftModel.from_pretrained(base, folder).eval()(x), model.eval()(x))


def low_level(folder: Path) -> None:
    """The adapter put into a model that stays what it is."""
    config = LoraConfig(r=4, target_modules=["seq.0", "seq.2"], init_lora_weights=False)
    torch.manual_seed(0)
    base = Perceptron()
    model = inject_adapter_in_model(config, copy.deepcopy(base))
    assert type(model) is Perceptron
    tensors = get_peft_model_state_dict(model)
    other = inject_adapter_in_model(copy.deepcopy(config), copy.deepcopy(base))
    set_peft_model_state_dict(other, tensors)
    x = torch.randn(3, 20)
    assert torch.allclose(model.eval()(x), other.eval()(x))
    assert not torch.allclose(model(x), base(x))


def compiled(folder: Path) -> None:
    """torch.compile around an adapted model."""
    model = get_peft_model(llama(), LoraConfig(r=4, init_lora_weights=False)).eval()
    quick = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(quick(input_ids=IDS).logits, model(input_ids=IDS).logits, atol=1e-4)
    torch.compiler.reset()


def new_tokens(folder: Path) -> None:
    """The rows of a few tokens trained beside the adapter."""
    base = llama()
    base.resize_token_embeddings(66, mean_resizing=False)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices=[64, 65]))
    ids = IDS.clone()
    ids[:, 0], ids[:, 1] = 64, 65
    before = base.get_input_embeddings().weight[64].clone()
    trained(model, input_ids=ids, labels=ids)
    assert not torch.equal(base.get_input_embeddings().weight[64], before)
    model.save_pretrained(folder)


def tied_embeddings(folder: Path) -> None:
    """Embeddings that a model ties, trained in full as one."""
    base = llama(tie_word_embeddings=True)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(base, config)
    trained(model, input_ids=IDS, labels=IDS)
    inputs, outputs = base.get_input_embeddings(), base.get_output_embeddings()
    assert inputs.modules_to_save["default"].weight is outputs.modules_to_save["default"].weight


def ranks_and_layers(folder: Path) -> None:
    """Some blocks, ranks and scales by name, rank-stabilised."""
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", exclude_modules=["down_proj"], rank_pattern={"q_proj": 8},
        alpha_pattern={"v_proj": 32}, use_rslora=True,
    )  # fmt: skip
    model = get_peft_model(llama(), config)
    q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
    assert (q_proj.r["default"], q_proj.scaling["default"]) == (8, 8 / 8**0.5)
    assert not any("down_proj" in name for name in model.targeted_module_names)
    few = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], layers_to_transform=[1]))
    assert few.targeted_module_names == ["model.layers.1.self_attn.q_proj"]


def in_transformers(folder: Path) -> None:
    """transformers' own methods for adapters."""
    model = llama()
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False), adapter_name="one")
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False), adapter_name="two")
    model.set_adapter("one")
    assert model.active_adapters() == ["one"]
    with torch.no_grad():
        one = model(input_ids=IDS).logits
        model.disable_adapters()
        assert torch.allclose(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
        model.enable_adapters()
        model.save_pretrained(folder)
        again = llama()
        again.load_adapter(str(folder))
        assert torch.allclose(again(input_ids=IDS).logits, one, atol=1e-6)


def gradient_checkpointing(folder: Path) -> None:
    """Activations computed again in the backward pass."""
    base = llama()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained(model, input_ids=IDS, labels=IDS)


def troubleshooting(folder: Path) -> None:
    """What a model says of its adapters."""
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.add_adapter("other", LoraConfig(r=2, target_modules=["k_proj"]))
    status = get_model_status(model)
    assert (status.num_adapter_layers, status.active_adapters, status.available_adapters) == (
        6,
        ["default"],
        ["default", "other"],
    )
    assert {layer.name for layer in get_layer_status(model)} == {
        f"model.model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qkv"
    }


EXAMPLES = (
    quicktour_trainer, sequence_classification, token_classification, question_answering, sequence_to_sequence, image_classification,
    semantic_segmentation, speech_recognition, feature_extraction, several_adapters, merged_adapters, merged_into_the_base,
    mixed_batches, custom_models, low_level, compiled, new_tokens, tied_embeddings, ranks_and_layers, in_transformers,
    gradient_checkpointing, troubleshooting,
)  # fmt: skip


def ran(name: str) -> dict[str, Any]:
    """What comes of one example in this process: "runs", or what it said."""
    torch.manual_seed(0)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            next(each for each in EXAMPLES if each.__name__ == name)(Path(folder))
        except Exception as error:
            return {"outcome": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    return {"outcome": "runs", "seconds": round(time.process_time() - began, 1)}


def changed() -> dict[str, Any]:
    """This file's names, run with the one line changed."""
    source = Path(__file__).read_text(encoding="utf-8")
    assert source.count(f"\n{CHANGED[0]}") == 1
    names: dict[str, Any] = {"__name__": "peft_examples_changed", "__file__": __file__}
    sys.modules["peft_examples_changed"] = type(sys)("peft_examples_changed")
    exec(compile(source.replace(f"\n{CHANGED[0]}", f"\n{CHANGED[1]}"), __file__, "exec"), names)
    return names


def main() -> None:
    """Run all of them in both ways and write down what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of examples; nothing is written")
    args = parser.parse_args()
    ours, found = changed(), {}
    for each in EXAMPLES:
        name = each.__name__
        if args.only is None or name in args.only:
            found[name] = {
                "what": (each.__doc__ or "").strip(),
                "stock": ran(name)["outcome"],
                "weftlora": ours["ran"](name)["outcome"],
            }
            print(name, found[name]["stock"], "|", found[name]["weftlora"], flush=True)
    if args.only is None:
        versions = {name: version(name) for name in ("peft", "transformers", "torch")}
        record = {
            "command": COMMAND,
            "versions": versions,
            "line": [line.removesuffix("  #") for line in CHANGED],
            "examples": found,
        }
        RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
