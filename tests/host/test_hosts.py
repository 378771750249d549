"""One peft citizen: a fresh process, the adapter methods of transformers, heads, precision, generation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import weftlora
from families import FAMILIES, STRUCTURES, adapter_config, logits, randomise, trainable
from weftlora.adapted.layer import WeftLinear

BATCH = FAMILIES["llama"].batch()
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def trained(structure: str, family: str = "llama", **fields) -> PeftModel:
    model = get_peft_model(FAMILIES[family].build(), adapter_config(structure, family, **fields))
    randomise(model)
    return model.eval()


# ---------------------------------------------------------------------- a fresh process

RELOAD = """
import sys
from pathlib import Path
import torch
from families import FAMILIES, logits  # imports weftlora
from peft import PeftModel
from safetensors.torch import load_file
folder = Path(sys.argv[1])
torch.set_num_threads(1)
for name, expected in load_file(folder / "logits.safetensors").items():
    structure, family = name.split("-")
    model = PeftModel.from_pretrained(FAMILIES[family].build(), folder / name)
    assert torch.equal(logits(model, FAMILIES[family].batch()), expected), name
    print("equal", name)
"""


def test_a_fresh_process_gives_identical_logits(tmp_path: Path) -> None:
    cells = [(structure, family) for structure in STRUCTURES for family in ("llama", "bert")]
    expected = {}
    for structure, family in cells:
        model = trained(structure, family)
        model.save_pretrained(tmp_path / f"{structure}-{family}")
        expected[f"{structure}-{family}"] = logits(model, FAMILIES[family].batch())
    save_file(expected, tmp_path / "logits.safetensors")
    here = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path)], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(here), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.count("equal") == len(cells)


# ---------------------------------------------------------------------- the adapter methods of transformers


@every_structure
def test_transformers_own_methods_with_several_adapters(structure: str, tmp_path: Path) -> None:
    model = FAMILIES["llama"].build()
    base, outputs = logits(model, BATCH), {}
    for seed, name in enumerate(("one", "two")):
        model.add_adapter(adapter_config(structure, "llama"), name)
        assert torch.equal(logits(model, BATCH), base)
        assert {n.split(".weft_site.")[1].split(".")[0] for n in trainable(model)} == {name}
        randomise(model, seed=seed)
        outputs[name] = logits(model, BATCH)
        model.save_pretrained(tmp_path / name)
    model.set_adapter("one")
    assert torch.equal(logits(model, BATCH), outputs["one"])
    assert model.active_adapters() == ["one"]
    model.set_adapter(["one", "two"])
    assert not torch.equal(logits(model, BATCH), outputs["one"])
    model.disable_adapters()
    assert torch.equal(logits(model, BATCH), base)
    model.enable_adapters()
    model.delete_adapter("one")
    model.set_adapter("two")
    assert torch.equal(logits(model, BATCH), outputs["two"])

    fresh = FAMILIES["llama"].build()
    fresh.load_adapter(str(tmp_path / "one"), adapter_name="a")
    fresh.load_adapter(str(tmp_path / "two"), adapter_name="b", is_trainable=True)
    for name, saved in (("a", "one"), ("b", "two")):
        fresh.set_adapter(name)
        assert torch.equal(logits(fresh, BATCH), outputs[saved])
    assert torch.equal(
        logits(PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path / "one"), BATCH), outputs["one"]
    )
    model.delete_adapter("two")
    assert torch.equal(logits(model, BATCH), base)


def test_an_adapter_for_another_base_is_refused_by_transformers_too(tmp_path: Path) -> None:
    trained("plain").save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        FAMILIES["llama"].build(hidden_size=64).load_adapter(str(tmp_path))


def test_a_weft_adapter_can_be_active_beside_a_stock_lora(llama) -> None:
    base = logits(llama, BATCH)
    llama.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "stock")
    stock = logits(llama, BATCH)
    llama.add_adapter(adapter_config("plain", "llama", target_modules=["q_proj"]), "ours")
    assert torch.equal(logits(llama, BATCH), base)  # transformers activates the new one alone
    llama.set_adapter(["stock", "ours"])
    assert torch.equal(logits(llama, BATCH), stock)
    randomise(llama)
    llama.set_adapter("stock")
    only_stock = logits(llama, BATCH)
    llama.set_adapter(["stock", "ours"])
    assert not torch.equal(logits(llama, BATCH), only_stock)


# ---------------------------------------------------------------------- what peft prints and saves beside the adapter


def test_print_trainable_parameters(llama, capsys: pytest.CaptureFixture[str]) -> None:
    model = get_peft_model(llama, weftlora.PlainLoraConfig(r=4, target_modules=["q_proj"]))
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith("trainable params: 512 || all params:")


@every_structure
def test_a_head_in_modules_to_save_is_trained_saved_and_kept_apart(structure: str, bert, tmp_path: Path) -> None:
    batch = FAMILIES["bert"].batch()
    base = logits(bert, batch)
    model = get_peft_model(bert, adapter_config(structure, "bert"))
    assert {n for n in trainable(model) if "classifier" in n} == {
        f"base_model.model.classifier.modules_to_save.default.{p}" for p in ("weight", "bias")
    }
    randomise(model)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(FAMILIES["bert"].build(), tmp_path)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


def test_every_row_of_a_batch_can_have_another_adapter() -> None:
    """Whatever their structures, and with a head of each; every row is that of its adapter alone."""
    torch.manual_seed(0)
    model = trained("hydra", "bert")
    model.add_adapter("two", adapter_config("tied_tl6", "bert"))
    model.add_adapter("three", weftlora.PlainLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    for seed, name in enumerate(("two", "three")):
        model.set_adapter(name)
        randomise(model, seed)
    batch = {name: value.repeat(3, *[1] * (value.dim() - 1))[:5] for name, value in FAMILIES["bert"].batch().items()}
    rows = ["two", "__base__", "default", "three", "two"]
    alone = {}
    for name in ("default", "two", "three"):
        model.set_adapter(name)
        alone[name] = logits(model, batch)
    with model.disable_adapter():
        alone["__base__"] = logits(model, batch)
    model.set_adapter("default")
    mixed = logits(model, {**batch, "adapter_names": rows})
    for i, name in enumerate(rows):
        assert torch.allclose(mixed[i], alone[name][i], atol=1e-6), name
    assert not torch.allclose(alone["default"], alone["two"])
    assert torch.equal(logits(model, batch), alone["default"])  # and nothing of it stays


def test_a_mixed_batch_goes_through_beams() -> None:
    model = trained("plain", "llama")
    model.add_adapter("two", weftlora.HydraLoraConfig(r=2, heads=2))
    model.set_adapter("two")
    randomise(model, size=0.5)
    rows, found = {"input_ids": torch.tensor([[5, 6, 7], [5, 6, 7]])}, {}
    for name in ("default", "two"):
        model.set_adapter(name)
        found[name] = model.generate(**rows, num_beams=2, max_new_tokens=6, do_sample=False)[0]
    mixed = model.generate(**rows, num_beams=2, max_new_tokens=6, do_sample=False, adapter_names=["default", "two"])
    assert not torch.equal(found["default"], found["two"])
    for i, name in enumerate(("default", "two")):
        assert mixed[i].tolist() == found[name].tolist()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["default", "nope"], "adapter_names names 'nope'"),
        (["default"], "adapter_names has 1 names and .* reads 2 rows"),
        ("default", "is a list of an adapter per row"),
    ],
)
def test_names_of_a_mixed_batch_that_do_not_fit_are_refused(names, says) -> None:
    model = trained("plain")
    with pytest.raises(weftlora.AdapterError, match=says):
        model(**BATCH, adapter_names=names)
    with pytest.raises(weftlora.AdapterError, match=r"model\.eval\(\)"):
        model.train()(**BATCH, adapter_names=["default"] * 2)


def test_auto_classes_find_the_base_and_the_adapter(tmp_path: Path) -> None:
    FAMILIES["llama"].build().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, adapter_config("tied_tl6_fused", "llama"))
    randomise(model)
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert torch.equal(logits(auto.from_pretrained(tmp_path / "adapter"), BATCH), logits(model, BATCH))


@every_structure
def test_a_loaded_adapter_can_be_trained_on(structure: str, tmp_path: Path) -> None:
    model = trained(structure)
    model.save_pretrained(tmp_path)
    names = set(trainable(model))
    again = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, is_trainable=True).train()
    again(**BATCH).loss.backward()
    assert {n for n, p in again.named_parameters() if p.grad is not None and p.grad.any()} == names
    assert not trainable(PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path))


# ---------------------------------------------------------------------- precision


@every_structure
def test_a_bf16_base_with_fp32_adapters(structure: str) -> None:
    base = FAMILIES["llama"].build().bfloat16()
    expected = logits(base, BATCH)
    model = get_peft_model(base, adapter_config(structure, "llama"))
    sites = {n: t for n, t in model.state_dict().items() if ".weft_site." in n}
    assert {t.dtype for t in sites.values()} == {torch.float32}
    assert torch.equal(logits(model, BATCH), expected)
    randomise(model)
    out = model.train()(**BATCH)
    assert out.logits.dtype == torch.bfloat16
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trainable(model).values())


@every_structure
def test_a_bf16_base_with_bf16_adapters(structure: str) -> None:
    base = FAMILIES["llama"].build().bfloat16()
    model = get_peft_model(base, adapter_config(structure, "llama"), autocast_adapter_dtype=False)
    assert {t.dtype for n, t in model.state_dict().items() if ".weft_site." in n} == {torch.bfloat16}
    randomise(model)
    model.train()(**BATCH).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.any() for p in trainable(model).values())


@every_structure
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_computes_in_bf16_and_trains_fp32_adapters(structure: str, family: str) -> None:
    model, batch = trained(structure, family), FAMILIES[family].batch()
    full = logits(model, batch)
    seen = []
    for layer in (m for m in model.modules() if isinstance(m, WeftLinear)):
        layer.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = logits(model, batch)
        loss = model.train()(**batch).loss
    loss.backward()
    assert set(seen) == {torch.bfloat16}
    assert not torch.equal(half.float(), full)
    assert torch.allclose(half.float(), full, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trainable(model).values())


def test_autocast_keeps_the_routers_softmax_in_fp32() -> None:
    model = trained("hydra")
    with torch.autocast("cpu", dtype=torch.bfloat16), weftlora.routing(model) as routing:
        model(**BATCH)
    weights = [omega for calls in routing.omega.values() for omega in calls]
    assert {omega.dtype for omega in weights} == {torch.float32}
    assert all(torch.allclose(omega.sum(-1), torch.ones(()), atol=1e-6) for omega in weights)


# ---------------------------------------------------------------------- generation


@every_structure
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generation_with_the_cache_equals_generation_without(structure: str, family: str) -> None:
    model = trained(structure, family)
    ids = FAMILIES[family].batch()["input_ids"][:, :4]
    fields = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    fields |= {"eos_token_id": None, "pad_token_id": 0}
    with_cache = model.generate(**fields, use_cache=True)
    assert torch.equal(with_cache, model.generate(**fields, use_cache=False))
    assert with_cache.shape[1] >= 6
    with model.disable_adapter():
        base = model.generate(**fields, use_cache=True)
    assert not torch.equal(with_cache, base) or family == "t5"
