"""What an adapter's folder holds: each tensor once, no more bytes than the formula says, a config that comes back equal."""

from __future__ import annotations

import dataclasses
import json
import struct
import warnings
from pathlib import Path

import peft
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors import safe_open

import weftlora
from families import FAMILIES, STRUCTURES, logits, randomise, trainable
from weftlora.host.versions import saves_biases
from weftlora.schedule.rank_slots import move

D, KV, LAYERS, R, N = 32, 16, 2, 4, 3
PAIR = {
    "module_type": R * (2 * D) + 2 * R * (D + KV),
    "shape": R * (2 * D) + R * (D + KV),
    "fused": R * D + R * (D + 2 * KV),
}
VECTORS = D + 2 * KV
# structure: (trained, frozen but saved) for q, k, v of a Llama with 2 layers, hidden 32, key-value width 16, r = 4
COUNTS = {
    "plain": (LAYERS * PAIR["module_type"], 0),
    "hydra": (LAYERS * (3 * R * D + N * R * VECTORS + 3 * N * D), 0),
    "hydra_Ax": (LAYERS * (3 * R * D + N * R * VECTORS + 3 * N * R), 0),
    "tied_tl6": (PAIR["module_type"] + LAYERS * (3 * R + VECTORS), 0),
    "tied_tl5_shape": (PAIR["shape"], 0),
    "tied_tl6_fused": (PAIR["fused"] + LAYERS * (R + VECTORS), 0),
    "tied_vera": (LAYERS * (3 * R + VECTORS), PAIR["module_type"]),
    "tied_Bu": (R * VECTORS + LAYERS * 3 * R, 3 * R * D),
}
QKV = ["q_proj", "k_proj", "v_proj"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_tensor_is_trained_and_saved_once(structure: str, llama, tmp_path: Path) -> None:
    model = get_peft_model(llama, STRUCTURES[structure](r=R, target_modules=QKV))
    trained, frozen = COUNTS[structure]
    assert sum(p.numel() for p in trainable(model).values()) == trained
    assert model.get_nb_trainable_parameters()[0] == trained
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    with path.open("rb") as file:
        (header,) = struct.unpack("<Q", file.read(8))
    assert path.stat().st_size == 8 + header + 4 * (trained + frozen)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
    assert all(name.partition(".weft_site.structure.")[2] in {"A", "B", "u", "v", "router"} for name in names)
    assert {p.name for p in tmp_path.iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "README.md"}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_config_comes_back_equal_from_its_folder(structure: str, llama, tmp_path: Path) -> None:
    fields = {
        "r": 3,
        "task_type": "CAUSAL_LM",
        "lora_alpha": 5.5,
        "lora_dropout": 0.1,
        "target_modules": QKV,
        "rank_pattern": {"q_proj": 2},
    }
    model = get_peft_model(
        llama, STRUCTURES[structure](**fields, layers_to_transform=[0, 1], modules_to_save=["lm_head"])
    )
    model.save_pretrained(tmp_path)
    config, loaded = model.peft_config["default"], PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is weftlora.WeftConfig
    assert dataclasses.replace(loaded, inference_mode=False) == config
    assert dataclasses.replace(config, r=2).structure == config.structure
    assert weftlora.WeftConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_the_config_of_a_folder_from_the_future_is_refused_before_weights_are_read(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9, "weft_version": "7.0", "new": 1}))
    with pytest.raises(weftlora.AdapterError, match=r"format 9, written by weftlora 7\.0.*upgrade weftlora"):
        PeftConfig.from_pretrained(tmp_path)
    with pytest.raises(weftlora.AdapterError, match="upgrade weftlora"):
        FAMILIES["llama"].build().load_adapter(str(tmp_path))


def test_a_key_nobody_knows_in_a_saved_config_is_refused(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig()).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_drop_out": 0.5}))
    with pytest.raises(weftlora.ConfigError, match="did you mean 'lora_dropout'"):
        PeftConfig.from_pretrained(tmp_path)


def test_another_rank_is_said_and_not_another_base(llama, tmp_path: Path) -> None:
    get_peft_model(llama, weftlora.PlainLoraConfig(r=4)).save_pretrained(tmp_path)
    tensors = load_peft_weights(str(tmp_path), device="cpu")
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    with pytest.raises(
        weftlora.AdapterError, match=r"the file's adapter has rank 4 at .*q_proj and this one has 2"
    ) as error:
        set_peft_model_state_dict(model, tensors)
    assert "base model" not in str(error.value)
    assert "r=4" in str(error.value)


def test_tensors_of_another_size_are_passed_over_where_that_is_asked_for(llama, tmp_path: Path) -> None:
    model = get_peft_model(llama, weftlora.PlainLoraConfig(r=4, rank_pattern={"layers.1.self_attn.q_proj": 2}))
    randomise(model)
    model.save_pretrained(tmp_path)
    other = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=4))
    before = {name: p.clone() for name, p in trainable(other).items()}
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        set_peft_model_state_dict(other, load_peft_weights(str(tmp_path), device="cpu"), ignore_mismatched_sizes=True)
    theirs = trainable(model)
    for name, parameter in trainable(other).items():
        expected = before[name] if "layers.1.self_attn.q_proj" in name else theirs[name]
        assert torch.equal(parameter, expected), name


def test_an_error_of_ours_is_one_of_pefts_where_peft_has_one(llama) -> None:
    base = getattr(peft, "PeftError", weftlora.WeftError)
    assert issubclass(weftlora.WeftError, base)
    no_match = (
        getattr(peft.utils.error, "NoMatchingPeftModuleError", ValueError)
        if hasattr(peft.utils, "error")
        else ValueError
    )
    with pytest.raises(no_match):
        get_peft_model(llama, weftlora.PlainLoraConfig(target_modules=["nothing"]))
    with pytest.raises(base):
        get_peft_model(llama, weftlora.PlainLoraConfig(r=0))


@pytest.mark.parametrize(
    "fields",
    [
        {"boost": weftlora.Dash(directions=2, pair="drop")},
        {"start": weftlora.Directions()},
        {"ranks": weftlora.Reallocate()},
        {"structure": weftlora.Tied(train="vera")},
    ],
    ids=["dash", "init", "moved ranks", "frozen pair"],
)
def test_with_low_cpu_mem_usage_nothing_is_made_twice_and_nothing_stays_empty(
    fields: dict, llama, tmp_path: Path
) -> None:
    config = weftlora.WeftConfig(r=2, target_modules=QKV, **fields)
    model = get_peft_model(llama, config)
    randomise(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # saved before its launch
        model.save_pretrained(tmp_path)
    empty = get_peft_model(FAMILIES["llama"].build(), config, low_cpu_mem_usage=True)
    mine = {name: t for name, t in empty.state_dict().items() if ".weft_site." in name}
    assert {name for name, t in mine.items() if not t.is_meta} == {
        name for name, t in mine.items() if name.endswith(COUNTED)
    }
    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in loaded.state_dict().values())
    batch = FAMILIES["llama"].batch()
    assert torch.equal(logits(loaded, batch), logits(model, batch))


COUNTED = (".default.steps", ".rounds", ".ended", ".way")
"""Counts of an adapter as a whole: numbers, read before a file is."""


@pytest.mark.skipif(not saves_biases(), reason="peft does not save them")
@pytest.mark.parametrize(("bias", "count"), [("all", 13), ("lora_only", 4)])
def test_biases_of_the_base_are_trained_saved_and_refused_where_nothing_could_carry_them(
    bias: str, count: int, tmp_path: Path
) -> None:
    base, batch = FAMILIES["gpt_neox"], FAMILIES["gpt_neox"].batch()
    fields = {"r": 2, "target_modules": ["query_key_value", "dense"], "bias": bias}
    model = get_peft_model(base.build(), weftlora.TiedLoraConfig(**fields))
    stock = get_peft_model(base.build(), peft.LoraConfig(**fields))
    ours = {name for name in trainable(model) if "weft_" not in name}
    assert ours == {name for name in trainable(stock) if "lora_" not in name}
    assert len(ours) == count
    randomise(model)
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in trainable(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base.build(), tmp_path)
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(weftlora.AdapterError, match=f"trains biases of the base .bias='{bias}'"):
        weftlora.export_lora(model, tmp_path / "lora", base="memory")
    with pytest.raises(weftlora.MergeError, match="trains biases of the base"):
        model.add_weighted_adapter(["default"], [0.5], "half")
    with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
        model.add_adapter("second", weftlora.PlainLoraConfig(**fields))
    assert list(model.peft_config) == ["default"]
    assert torch.allclose(logits(model.merge_and_unload(), batch), logits(again, batch), atol=1e-6)


def moved(llama: torch.nn.Module, **fields: object) -> PeftModel:
    """An adapter of which k_proj of block 0 has lost all slots, q_proj one, and v_proj of block 1 has one more."""
    given = {
        "r": 2,
        "lora_alpha": 6,
        "target_modules": QKV,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"v_proj": 1.5},
    }
    model = get_peft_model(llama, weftlora.WeftConfig(**{**given, "ranks": weftlora.Reallocate(), **fields}))
    randomise(model)
    sites = {
        n.removesuffix(".weft_site.default"): m for n, m in model.named_modules() if n.endswith("weft_site.default")
    }
    for end, gone, made in (
        ("0.self_attn.k_proj", [0, 1], []),
        ("0.self_attn.q_proj", [1], []),
        ("1.self_attn.v_proj", [], [2]),
    ):
        site = next(site for name, site in sites.items() if name.endswith(end))
        move(site, gone, made, [torch.randn(D) for _ in made], 1)
    with torch.no_grad():
        site.structure.B[:, 2] = torch.randn(KV)
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_that_moved_are_written_back_and_read_by_stock_peft_and_by_us(
    rslora: bool, llama, tmp_path: Path
) -> None:
    batch = FAMILIES["llama"].batch()
    model = moved(llama, use_rslora=rslora)
    sites = {m.module_name: m.site("default") for m in model.modules() if hasattr(m, "weft_site")}
    before = logits(model, batch)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    stock = LoraConfig(**{k: told[k] for k in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")})
    for name, site in sites.items():  # as stock peft reads them
        r = stock.rank_pattern.get(get_pattern_key(stock.rank_pattern, name), stock.r)
        alpha = stock.alpha_pattern.get(get_pattern_key(stock.alpha_pattern, name), stock.lora_alpha)
        assert r == len(site.live())
        assert r == 0 or alpha / (r**0.5 if rslora else r) == pytest.approx(site.scale)
    assert sorted(told["rank_pattern"].values()) == [0, 3, 3]
    assert told["patterns_at_start"] == {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 1.5}}
    loaded = PeftModel.from_pretrained(FAMILIES["llama"].build(), tmp_path)
    assert torch.equal(logits(loaded, batch), before)
    again = {m.module_name: m.site("default") for m in loaded.modules() if hasattr(m, "weft_site")}
    assert {n: (s.initial_rank, s.scale, len(s.mask)) for n, s in again.items()} == {
        n: (s.initial_rank, s.scale, len(s.mask)) for n, s in sites.items()
    }
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text(encoding="utf-8"))
    assert {k: written[k] for k in told if "pattern" in k} == {k: told[k] for k in told if "pattern" in k}
    ranks = {site.site: site.rank for site in weftlora.inspect(tmp_path).sites}
    assert ranks == {name: len(site.live()) for name, site in sites.items()}


def test_ranks_that_have_not_moved_leave_the_config_as_it_was_given(llama, tmp_path: Path) -> None:
    model = get_peft_model(llama, weftlora.AllocLoraConfig(r=2, target_modules=QKV, rank_pattern={"q_proj": 3}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no round has come yet
        model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert told["rank_pattern"] == {"q_proj": 3}
    assert "patterns_at_start" not in told
