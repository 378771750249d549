"""Another adapter into the tensors of one that is there: same function as a fresh load, nothing compiled again, nothing half done."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch._dynamo.testing import CompileCounter

import weftlora
from families import FAMILIES, STRUCTURES, randomise

plain = FAMILIES["plain"]
TARGETS = ["q_proj", "k_proj", "v_proj"]
IN_TIME = {
    "dash": {"boost": weftlora.Dash(directions=2, after=1)},
    "init": {"start": weftlora.Directions(after=1)},
    "dash that drops A and B": {"boost": weftlora.Dash(directions=2, after=1, pair="drop")},
    "moved ranks": {"ranks": weftlora.Reallocate()},
}
LAUNCHED = IN_TIME.keys() - {"moved ranks"}
CELLS = {**{name: (lambda name=name, **f: STRUCTURES[name](**f)) for name in STRUCTURES}} | {
    name: (lambda fields=fields, **f: weftlora.WeftConfig(**fields, **f)) for name, fields in IN_TIME.items()
}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def trained(cell: str, seed: int, **fields) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(plain.build(), CELLS[cell](target_modules=TARGETS, **fields))
    randomise(model, seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2 if cell in LAUNCHED else 0):  # launched, then trained
        optimizer.zero_grad()
        model.train()(**plain.batch()).loss.backward()
        optimizer.step()
    if cell == "moved ranks":
        layer = model.base_model.model.layers[0].q_proj.weft_site["default"]
        layer.mask[0] = 0
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**plain.batch()).logits


@pytest.mark.parametrize("cell", CELLS)
def test_a_swap_computes_what_the_folder_does(cell: str, tmp_path: Path) -> None:
    model, other = trained(cell, 0, r=4, lora_alpha=8), trained(cell, 1, r=2, lora_alpha=4)
    other.save_pretrained(tmp_path / "other")
    assert not torch.allclose(logits(model), logits(other), atol=1e-4)
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    weftlora.hotswap(model, tmp_path / "other")
    assert torch.allclose(logits(model), logits(other), atol=1e-6)
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == tensors
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(plain.build(), tmp_path / "again").eval()
    assert torch.allclose(logits(again), logits(other), atol=1e-6)


@pytest.mark.parametrize("cell", ["plain", "hydra", "tied_tl6", "init"])
def test_another_scale_goes_into_a_factor(cell: str, tmp_path: Path) -> None:
    model, other = trained(cell, 0, r=4, lora_alpha=8), trained(cell, 1, r=3, lora_alpha=5, use_rslora=True)
    other.save_pretrained(tmp_path)
    weftlora.hotswap(model, tmp_path)
    assert torch.allclose(logits(model), logits(other), atol=1e-5)
    assert model.peft_config["default"].lora_alpha == 8


def test_nothing_is_compiled_again(tmp_path: Path) -> None:
    torch.compiler.reset()
    model, other = trained("hydra", 0, r=4, lora_alpha=8), trained("hydra", 1, r=2, lora_alpha=6)
    other.save_pretrained(tmp_path)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    logits(compiled)
    frames = counter.frame_count
    weftlora.hotswap(compiled, tmp_path)
    assert torch.allclose(logits(compiled), logits(other), atol=1e-5)
    assert counter.frame_count == frames
    torch.compiler.reset()


REFUSED = [
    ("larger", "plain", {"r": 8}, {}, "has rank 8 at .*q_proj, and the model's has room for 4"),
    ("structure", "hydra", {"r": 4}, {}, "has structure=Hydra"),
    ("elsewhere", "plain", {"r": 4, "target_modules": [*TARGETS, "mlp"]}, {}, "also adapts .*mlp, which"),
    ("fewer", "plain", {"r": 4, "target_modules": ["q_proj"]}, {}, "adapts layers.0.k_proj and the folder's does not"),
    ("no such adapter", "plain", {"r": 4}, {"adapter_name": "defualt"}, "did you mean 'default'"),
    ("trained in full", "plain", {"r": 4, "modules_to_save": ["head"]}, {}, r"\(base_model.model.head.* trains modules, tokens"),
    ("its scale", "tied_tl5_shape", {"r": 4, "lora_alpha": 5}, {}, "cannot be rescaled in place"),
]  # fmt: skip


@pytest.mark.parametrize(("cell", "fields", "call", "says"), [pytest.param(*row[1:], id=row[0]) for row in REFUSED])
def test_what_does_not_fit_is_said_before_a_value_is_changed(
    cell: str, fields: dict, call: dict, says: str, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    get_peft_model(plain.build(), STRUCTURES[cell](**{"target_modules": TARGETS, **fields})).save_pretrained(tmp_path)
    model = trained(cell if cell.startswith("tied") else "plain", 0, r=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(weftlora.AdapterError, match=says):
        weftlora.hotswap(model, tmp_path, **call)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_without_an_adapter_a_merged_one_and_a_damaged_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(weftlora.AdapterError, match="make one with get_peft_model"):
        weftlora.hotswap(plain.build(), tmp_path)
    model = trained("plain", 0, r=4)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(weftlora.AdapterError, match="is merged into the base"):
        weftlora.hotswap(model, tmp_path)
    model.unmerge_adapter()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(weftlora.AdapterError, match="that can be read"):
        weftlora.hotswap(model, tmp_path)
