"""Decompositions are kept by the bytes of the weight, and directions are ranked on the checkpoint that is named."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import weftlora
from families import FAMILIES
from weftlora import change_rates
from weftlora.adapted import frozen_weights
from weftlora.adapted.frozen_weights import Checkpoint, Decomposer, weight_key
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import ConfigError, ModelError
from weftlora.host.attach import schedules


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per decomposition that was really computed."""
    calls: list[int] = []
    real = change_rates.spectrum

    def spectrum(w: torch.Tensor) -> change_rates.Spectrum:
        calls.append(w.numel())
        return real(w)

    monkeypatch.setattr(frozen_weights.change_rates, "spectrum", spectrum)
    return calls


def same(one: change_rates.Spectrum, other: change_rates.Spectrum) -> bool:
    return torch.equal(one.sigma, other.sigma) and torch.equal(one.side, other.side) and one.tall == other.tall


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_the_second_look_at_a_weight_is_the_first_bit_for_bit(tmp_path: Path, counted: list[int], shape):
    w = torch.randn(shape)
    first = Decomposer(tmp_path)("q", w)
    second = Decomposer(tmp_path)("other name", w.clone())
    assert len(counted) == 1
    assert same(first, second)
    assert same(first, change_rates.spectrum(w))


def test_the_key_is_the_bytes_the_dtype_and_the_shape():
    w = torch.randn(4, 6)
    near = w.clone()
    near[3, 5] = torch.nextafter(near[3, 5], torch.tensor(9.0))
    keys = {weight_key(t) for t in (w, near, w.reshape(6, 4), w.double(), w.bfloat16())}
    assert len(keys) == 5
    assert weight_key(w.T.contiguous().T) == weight_key(w), "memory layout is not content"


def test_nothing_is_written_unless_a_folder_is_named(tmp_path: Path, counted: list[int], monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WEFT_CACHE", raising=False)
    Decomposer()("q", torch.randn(4, 4))
    Decomposer()("q", torch.randn(4, 4))
    assert len(counted) == 2
    assert not list(tmp_path.rglob("*"))


def test_the_environment_names_the_folder_and_an_argument_wins(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WEFT_CACHE", str(tmp_path / "environment"))
    w = torch.randn(4, 4)
    Decomposer()("q", w)
    Decomposer(tmp_path / "argument")("q", w)
    kept = [p.relative_to(tmp_path).parts for p in sorted(tmp_path.rglob("*.safetensors"))]
    assert kept == [(folder, f"{weight_key(w)}.safetensors") for folder in ("argument", "environment")]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def somebody_elses(path: Path) -> None:
    save_file({"sigma": torch.ones(4), "side": torch.eye(4)}, path)


def another_weights(path: Path) -> None:
    Decomposer(path.parent)("q", torch.randn(4, 4))
    next(p for p in path.parent.iterdir() if p != path).replace(path)


def another_form(path: Path) -> None:
    """All that is right for its own content, which is of no 4 by 4 matrix."""
    found = change_rates.spectrum(torch.randn(3, 5))
    frozen_weights.save(path, path.stem, found)


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, empty, somebody_elses, another_weights, another_form])
def test_a_damaged_or_foreign_file_is_computed_again_and_replaced(tmp_path: Path, counted: list[int], caplog, damage):
    w = torch.randn(4, 4)
    right = Decomposer(tmp_path)("q", w)
    damage(tmp_path / f"{weight_key(w)}.safetensors")
    counted.clear()
    with caplog.at_level(logging.WARNING, "weftlora"):
        assert same(Decomposer(tmp_path)("q", w), right)
    assert len(counted) == 1
    assert "computed again" in caplog.text
    assert same(Decomposer(tmp_path)("q", w), right)
    assert len(counted) == 1, "the file was not replaced"


def test_a_write_that_fails_leaves_no_half_file_and_is_a_warning(tmp_path: Path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(frozen_weights.os, "fsync", full)
    w = torch.randn(4, 4)
    with pytest.warns(UserWarning, match="No space left"):
        found = Decomposer(tmp_path)("q", w)
    assert same(found, change_rates.spectrum(w))
    assert not list(tmp_path.iterdir())


def test_a_weight_that_is_not_finite_is_named():
    w = torch.randn(4, 4)
    w[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"layers\.3\.q"):
        Decomposer()("layers.3.q", w)


def test_time_per_layer_is_logged(caplog):
    with caplog.at_level(logging.DEBUG, "weftlora"):
        Decomposer()("layers.3.q", torch.randn(4, 6))
    assert "layers.3.q [4, 6]: decomposed in 0." in caplog.text


# ---------------------------------------------------------------------- through a launch


def launched(family: str, *, base: nn.Module | None = None, **attached) -> nn.Module:
    """A model two steps after which Dash has launched."""
    torch.manual_seed(1)
    model = get_peft_model(base or FAMILIES[family].build(), weftlora.LoraDashConfig(r=2, directions=3, after=2))
    if attached:
        weftlora.attach(model, **attached)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(**FAMILIES[family].batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def sites_of(model: nn.Module) -> dict[str, dict]:
    return schedules(model)["default"].events[0]["sites"]


def test_a_launch_with_a_cache_is_the_launch_without_one(tmp_path: Path, counted: list[int]):
    plain = launched("llama").state_dict()
    sites = len(counted)
    for _ in range(2):
        kept = launched("llama", cache=tmp_path).state_dict()
        assert all(torch.equal(plain[name], kept[name]) for name in plain)
    assert len(counted) == 2 * sites, "the third launch decomposed what the second had kept"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_directions_are_ranked_on_the_original_where_it_is_named(tmp_path: Path, family: str):
    """The base in memory is rounded to four bits or so; the original's own spectrum must come out."""
    base = FAMILIES[family].build()
    base.save_pretrained(tmp_path)
    original = {name: p.detach().clone() for name, p in base.named_parameters()}
    with torch.no_grad():
        for p in base.parameters():
            step = p.abs().max() / 7
            p.copy_((p / step).round() * step)
    model = launched(family, base=base, original=tmp_path)
    for name, site in sites_of(model).items():
        w = original[f"{name}.weight"].double()
        sigma = torch.linalg.svdvals(w)
        assert site["ranked_on"] == "original"
        torch.testing.assert_close(torch.tensor(site["sigma"]).double(), sigma[site["index"]], rtol=1e-6, atol=1e-12)
    for name, layer in model.named_modules():
        if isinstance(layer, WeftLinear):
            term = layer.site("default").boost
            w = (
                original[f"{layer.module_name}.weight"].T
                if family == "gpt2"
                else original[f"{layer.module_name}.weight"]
            )
            torch.testing.assert_close(w @ term.down.T, term.up * term.sigma, rtol=1e-3, atol=1e-6, msg=name)


def test_the_record_says_in_memory_without_one(tmp_path: Path):
    assert {site["ranked_on"] for site in sites_of(launched("llama")).values()} == {"in memory"}


class FewBits(nn.Linear):
    """A linear layer that keeps its weight in int8, as quantisation libraries do."""

    def __init__(self, whole: nn.Linear):
        super().__init__(whole.in_features, whole.out_features, bias=False)
        self.step = whole.weight.detach().abs().max() / 7
        self.weight = nn.Parameter((whole.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.float() * self.step).T


def quantise(base: nn.Module) -> nn.Module:
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            base.set_submodule(name, FewBits(module))
    return base


def test_a_quantised_base_is_noted_and_warned_of_and_its_original_used_where_named(tmp_path: Path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"14 modules .* dequantised base"):
        blurred = sites_of(launched("llama", base=quantise(FAMILIES["llama"].build())))
    assert {site["ranked_on"] for site in blurred.values()} == {"dequantised"}
    sharp = sites_of(launched("llama", base=quantise(FAMILIES["llama"].build()), original=tmp_path))
    assert {site["ranked_on"] for site in sharp.values()} == {"original"}
    assert sharp["model.layers.0.self_attn.q_proj"]["sigma"] != blurred["model.layers.0.self_attn.q_proj"]["sigma"]


def test_a_copy_of_the_model_reads_its_own_weights_and_the_same_original(tmp_path: Path):
    FAMILIES["llama"].build().save_pretrained(tmp_path)
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.LoraDashConfig(r=2, directions=3, after=2))
    weftlora.attach(model, original=tmp_path)
    twin = copy.deepcopy(model)
    (own,) = schedules(twin).values()
    layers = [layer for layer in twin.modules() if isinstance(layer, WeftLinear)]
    assert [member.weight.layer for member in own.members] == layers


def test_another_models_checkpoint_is_refused(tmp_path: Path):
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.LoraDashConfig(r=2, directions=3, after=2))
    with pytest.raises(ModelError, match="no model weights"):
        weftlora.attach(model, original=tmp_path)
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"one weight for model.layers.0.* none"):
        weftlora.attach(model, original=tmp_path / "gpt2")
    wide = FAMILIES["llama"].build(intermediate_size=64)
    wide.save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"gate_proj is \[64, 32\]"):
        weftlora.attach(model, original=tmp_path / "wide")
    torch.manual_seed(7)
    for p in wide.parameters():
        torch.nn.init.normal_(p)
    other = FAMILIES["llama"].build()
    for p in other.parameters():
        torch.nn.init.normal_(p)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="differs from the weight in memory"):
        launched("llama", original=tmp_path / "other")


def test_original_without_directions_to_launch_is_refused(tmp_path: Path):
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    with pytest.raises(ConfigError, match="the model has none: leave them out"):
        weftlora.attach(model, original=tmp_path)


def test_names_with_and_without_the_whole_models_name_in_front(tmp_path: Path):
    save_file({"h.0.q.weight": torch.eye(2), "h.10.q.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    found = Checkpoint(tmp_path)
    assert found.key("transformer.h.0.q") == found.key("h.0.q") == "h.0.q.weight"
    assert found.key("transformer.h.10.q") == "h.10.q.weight"
    with pytest.raises(ModelError, match="several"):
        found.key("q")
    assert torch.equal(found.read("transformer.h.0.q"), load_file(tmp_path / "model.safetensors")["h.0.q.weight"])


def test_several_at_once_may_keep_the_same_weight(tmp_path: Path):
    """As the processes of one run do: each reads a whole file or none, and no half-written one stays."""
    w = torch.randn(24, 24)
    right = change_rates.spectrum(w)

    def keep_and_forget(_: int) -> bool:
        found = Decomposer(tmp_path)("q", w)
        for path in tmp_path.glob("*.safetensors"):
            path.unlink(missing_ok=True)
        return same(found, right)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(keep_and_forget, range(40)))
    assert not list(tmp_path.glob("*.part"))
