"""Adapters in the released HydraLoRA layout give, in evaluation, the function of the released layer."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import weftlora


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.down_proj(self.gate_proj(x).tanh())


class Released(nn.Module):
    """The released layer in evaluation, written from the paper: y = W x + (α/r) Σ_n softmax(Wg x)_n B_n A x."""

    def __init__(self, base, a, ups, route, scale):
        super().__init__()
        self.base, self.a, self.ups, self.route, self.scale = base, a, ups, route, scale

    def forward(self, x):
        gate = torch.softmax(x @ self.route.T, -1)
        return self.base(x) + self.scale * sum(
            gate[..., n, None] * (x @ self.a.T @ up.T) for n, up in enumerate(self.ups)
        )


def released_folder(path, heads, r=2, bin_file=False):
    torch.manual_seed(0)
    tensors = {}
    for name, fan_in, out in (("gate_proj", 6, 10), ("down_proj", 10, 6)):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(r, fan_in)
        tensors[f"base_model.model.{name}.lora_route.weight"] = torch.randn(heads, fan_in)
        for n in range(heads):
            tensors[f"base_model.model.{name}.lora_B{n}.weight"] = torch.randn(out, r)
    path.mkdir()
    if bin_file:
        torch.save(tensors, path / "adapter_model.bin")
    else:
        from safetensors.torch import save_file

        save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": 32, "lora_dropout": 0.05}))
    return tensors


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_imported_adapter_computes_the_released_function(tmp_path, heads, bin_file):
    tensors = released_folder(tmp_path / "official", heads, bin_file=bin_file)
    folder = weftlora.import_hydralora(tmp_path / "official", tmp_path / "weftlora")
    torch.manual_seed(1)
    base, x = Mlp(), torch.randn(4, 5, 6)

    def released(name):
        t = {key.split(f"{name}.")[1]: value for key, value in tensors.items() if f".{name}." in key}
        ups = [t[f"lora_B{n}.weight"] for n in range(heads)]
        return Released(getattr(base, name), t["lora_A.weight"], ups, t["lora_route.weight"], 32 / 2)

    expected = released("down_proj")(released("gate_proj")(x).tanh())
    model = PeftModel.from_pretrained(base, folder).eval()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-4)


def test_import_names_what_is_wrong(tmp_path):
    tensors = released_folder(tmp_path / "official", 3)
    from safetensors.torch import save_file

    broken = {key: value for key, value in tensors.items() if "down_proj.lora_B1" not in key}
    save_file(broken, tmp_path / "official" / "adapter_model.safetensors")
    with pytest.raises(weftlora.AdapterError, match="down_proj is incomplete"):
        weftlora.import_hydralora(tmp_path / "official", tmp_path / "weftlora")
    assert not (tmp_path / "weftlora").exists()
    (tmp_path / "official" / "adapter_model.safetensors").unlink()
    with pytest.raises(weftlora.AdapterError, match="weights are missing"):
        weftlora.import_hydralora(tmp_path / "official", tmp_path / "weftlora")


# ---------------------------------------------------------------------- LoRA-Dash


def released_dash(path, s=3, r=2, without=()):
    """The layout of the released LoRA-Dash code, in an order that is not the model's."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors = {}
    for name, fan_in, out in (("gate_proj", 6, 10), ("down_proj", 10, 6)):
        shapes = {
            "A.weight": (r, fan_in),
            "B.weight": (out, r),
            "index.weight": (1, s),
            "w_u": (out, s),
            "w_vt": (s, fan_in),
        }
        for part, shape in shapes.items():
            if part not in without:
                tensors[f"base_model.model.{name}.lora_{part}"] = torch.randn(shape)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"r": r, "lora_alpha": 8, "lora_dropout": 0.05}))
    return tensors


def test_an_imported_dash_adapter_computes_the_released_function(tmp_path):
    """y = W x + (α/r) B A x + Ū diag(g) V̄ᵀ x with the file's own directions, launched, and never chosen again."""
    tensors = released_dash(tmp_path / "official")
    folder = weftlora.import_lora_dash(tmp_path / "official", tmp_path / "weftlora")
    torch.manual_seed(1)
    base, x = Mlp(), torch.randn(4, 5, 6)

    def released(name, x):
        t = {key.split(f"{name}.lora_")[1]: value for key, value in tensors.items() if f".{name}." in key}
        dash = t["w_u"] @ torch.diag(t["index.weight"][0]) @ t["w_vt"]
        return getattr(base, name)(x) + x @ (8 / 2 * t["B.weight"] @ t["A.weight"] + dash).T

    expected = released("down_proj", released("gate_proj", x).tanh())
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    torch.testing.assert_close(model.eval()(x), expected, rtol=1e-5, atol=1e-4)

    before = {n: b.clone() for n, b in model.named_buffers() if n.endswith((".up", ".down"))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(x).square().mean().backward()
    optimizer.step()
    assert weftlora.state_dict(model)["default"]["steps"] == 101
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers() if n in before)


def test_a_dash_adapter_that_was_never_launched_is_plain_lora(tmp_path):
    tensors = released_dash(tmp_path / "official", without=("index.weight", "w_u", "w_vt"))
    folder = weftlora.import_lora_dash(tmp_path / "official", tmp_path / "weftlora")
    model = PeftModel.from_pretrained(Mlp(), folder)
    assert model.peft_config["default"].boost is None
    a = model.base_model.model.gate_proj.weft_site["default"].structure.A
    assert torch.equal(a, tensors["base_model.model.gate_proj.lora_A.weight"])


def test_gains_without_their_directions_are_refused(tmp_path):
    released_dash(tmp_path / "official", without=("w_u", "w_vt"))
    with pytest.raises(weftlora.AdapterError, match="has gains without their directions"):
        weftlora.import_lora_dash(tmp_path / "official", tmp_path / "weftlora")
    assert not (tmp_path / "weftlora").exists()


def test_directions_of_another_shape_are_refused(tmp_path):
    from safetensors.torch import save_file

    tensors = released_dash(tmp_path / "official")
    tensors["base_model.model.gate_proj.lora_w_u"] = torch.zeros(10, 2)
    save_file(tensors, tmp_path / "official" / "adapter_model.safetensors")
    with pytest.raises(weftlora.AdapterError, match="gate_proj: the shapes of A, B, the gains and the directions"):
        weftlora.import_lora_dash(tmp_path / "official", tmp_path / "weftlora")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list and no settings"),
        ('{"r": "two"}', "is not a number"),
        ('{"r": 2, "lora_dropout": null}', "is not a number"),
        ('{"r": 2, "use_rslora": true}', "use_rslora=True is nothing the released code has"),
        ('{"r": 2, "alpha_pattern": {"gate_proj": 4}}', "alpha_pattern"),
    ],
)
@pytest.mark.parametrize("convert", [weftlora.import_lora_dash, weftlora.import_hydralora])
def test_settings_that_cannot_be_meant_are_one_sentence(tmp_path, convert, settings, says):
    released_dash(tmp_path / "official")
    (tmp_path / "official" / "adapter_config.json").write_text(settings)
    with pytest.raises(weftlora.AdapterError, match=says):
        convert(tmp_path / "official", tmp_path / "weftlora")
    assert not (tmp_path / "weftlora").exists()


def test_factors_of_different_ranks_and_damaged_files_are_refused(tmp_path):
    from safetensors.torch import save_file

    tensors = released_dash(tmp_path / "official", without=("index.weight", "w_u", "w_vt"))
    tensors["base_model.model.gate_proj.lora_B.weight"] = torch.zeros(10, 5)
    save_file(tensors, tmp_path / "official" / "adapter_model.safetensors")
    with pytest.raises(weftlora.AdapterError, match=r"gate_proj: the shapes of A .* and B .* do not fit"):
        weftlora.import_lora_dash(tmp_path / "official", tmp_path / "weftlora")
    (tmp_path / "official" / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(weftlora.AdapterError, match="is damaged"):
        weftlora.import_lora_dash(tmp_path / "official", tmp_path / "weftlora")


@pytest.mark.parametrize("part", ["lora_A.weight", "lora_B0.weight", "lora_route.weight"])
@pytest.mark.parametrize(
    "value", [torch.zeros(()), torch.zeros(2), torch.zeros(2, 2, 2), torch.zeros(3, 5), torch.zeros(2, 6).int()]
)
def test_tensors_that_are_no_matrices_of_their_sizes_are_refused(tmp_path, part, value):
    from safetensors.torch import save_file

    tensors = released_folder(tmp_path / "official", heads=2)
    tensors[f"base_model.model.gate_proj.{part}"] = value
    save_file(tensors, tmp_path / "official" / "adapter_model.safetensors")
    with pytest.raises(weftlora.AdapterError, match=r"matrices of numbers|disagree"):
        weftlora.import_hydralora(tmp_path / "official", tmp_path / "weftlora")
    assert not (tmp_path / "weftlora").exists()
