"""Adapters in the released HydraLoRA layout give, in evaluation, the function of the released layer."""

import json

import pytest
import torch
from peft import PeftModel
from torch import nn

import weft


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
    folder = weft.import_hydralora(tmp_path / "official", tmp_path / "weft")
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
    with pytest.raises(weft.AdapterError, match="down_proj is incomplete"):
        weft.import_hydralora(tmp_path / "official", tmp_path / "weft")
    assert not (tmp_path / "weft").exists()
    (tmp_path / "official" / "adapter_model.safetensors").unlink()
    with pytest.raises(weft.AdapterError, match="weights are missing"):
        weft.import_hydralora(tmp_path / "official", tmp_path / "weft")
