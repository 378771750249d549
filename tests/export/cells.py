"""Every adapter that can be merged, trained a few steps: on the demo model, and on small bases of every other family.

model, batches = CELLS["plain-kaiming-none-uniform-all"].trained(folder)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weftlora
from families import FAMILIES, randomise, trainable
from weftlora.data.demo import demo_model_path
from weftlora.host.attach import schedules

WHEN, STEPS = 2, 4
TARGETS = ["q_proj", "v_proj", "down_proj"]


def ids(rows: int, length: int = 8, seed: int = 1) -> Tensor:
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in ids(12, seed=2)]


def demo(_: Path, dtype: str = "float32") -> nn.Module:
    return cast(nn.Module, AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=dtype))


def family(name: str) -> Callable[[Path], nn.Module]:
    """A base of another family, saved to a folder and read from there, as a user has it."""

    def make(folder: Path) -> nn.Module:
        place = folder / f"base-{name}"
        base: Any = FAMILIES[name].build()
        if not place.exists():
            base.save_pretrained(place)
        options = {"num_labels": base.config.num_labels} if name == "bert" else {}
        return cast(nn.Module, type(base).from_pretrained(place, **options))

    return make


def steps(model: PeftModel, batch: dict[str, Tensor], count: int) -> PeftModel:
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=1e-2)
    for _ in range(count):
        optimizer.zero_grad()
        model.train()(**batch).loss.backward()
        optimizer.step()
    return model


@dataclass(frozen=True)
class Cell:
    """An adapter, its base, and what is done to it beyond training."""

    fields: Callable[[], dict[str, Any]]
    base: Callable[[Path], nn.Module] = demo
    batch: Callable[[], dict[str, Tensor]] = field(default=lambda: {"input_ids": ids(2), "labels": ids(2)})
    count: int = STEPS
    then: Callable[[PeftModel], PeftModel] = lambda model: model

    def trained(self, folder: Path) -> tuple[PeftModel, dict[str, Tensor]]:
        """The trained model in evaluation mode, and a batch to compare on."""
        torch.manual_seed(0)
        fields = {"r": 3, "target_modules": TARGETS, "lora_alpha": 5, **self.fields()}
        config = weftlora.WeftConfig(**fields)
        model = get_peft_model(self.base(folder), config)
        if isinstance(config.layers, weftlora.Search):
            selection = weftlora.search_layers(model, rows(), batch_size=2, accumulation=1, lr=1e-2)
            model = weftlora.second_stage(model, selection)
        if isinstance(config.ranks, weftlora.Reallocate):
            weftlora.attach(model, validation=rows())
        batch = self.batch()
        model = self.then(steps(model, batch, self.count))
        return model.eval(), batch


def second_adapter(model: PeftModel) -> PeftModel:
    """Another adapter of another method beside the first, both active."""
    model.add_adapter("second", weftlora.TiedLoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    model.base_model.set_adapter(["second"])
    randomise(model, size=0.05)
    model.base_model.set_adapter(["default", "second"])
    return model


def empty_sites(model: PeftModel) -> PeftModel:
    """Two sites lose all their slots, as ALoRA may do."""
    for name, module in model.named_modules():
        if name.endswith(("0.self_attn.q_proj.weft_site.default", "2.mlp.down_proj.weft_site.default")):
            module.mask.zero_()
    return model


def moved(model: PeftModel) -> PeftModel:
    assert [e["event"] for s in schedules(model).values() for e in s.events].count("reallocation") == 2
    return model


CHOICES: dict[str, dict[str, Callable[[], Any]]] = {
    "structure": {"plain": weftlora.Plain, "tied": lambda: weftlora.Tied(group="shape")},
    "start": {"kaiming": weftlora.Kaiming, "directions": lambda: weftlora.Directions(after=WHEN)},
    "boost": {"none": lambda: None, "dash": lambda: weftlora.Dash(directions=2, after=WHEN)},
    "ranks": {
        "uniform": weftlora.Uniform,
        "reallocate": lambda: weftlora.Reallocate(first=WHEN, every=1, max_rounds=2, move=2, rows=4),
    },
    "layers": {
        "all": weftlora.All,
        "only": lambda: weftlora.Only([1, 2]),
        "search": lambda: weftlora.Search(select="top_k", top_k=1, outer_batches=2, val_size=4, steps=2),
        "continue": lambda: weftlora.Search(
            select="top_k", top_k=2, outer_batches=2, val_size=4, steps=2, finetune="continue"
        ),
    },
}


def _allowed(axes: tuple[str, ...]) -> bool:
    try:
        weftlora.WeftConfig(**_given(axes))
    except weftlora.CombinationError:
        return False
    return True


def _given(axes: tuple[str, ...]) -> dict[str, Any]:
    return {axis: CHOICES[axis][name]() for axis, name in zip(CHOICES, axes, strict=True)}


GRID = [axes for axes in itertools.product(*CHOICES.values()) if _allowed(axes)]
"""Every allowed combination without a router."""

CELLS: dict[str, Cell] = {"-".join(axes): Cell(lambda axes=axes: _given(axes)) for axes in GRID}  # type: ignore[misc]
CELLS |= {
    "before the launch": Cell(lambda: {"boost": weftlora.Dash(directions=2, after=100)}),
    "before the switch": Cell(lambda: {"start": weftlora.Directions(after=100), "boost": weftlora.Dash(after=100)}),
    "without twins": Cell(lambda: {"start": weftlora.Directions(after=WHEN, mode="directions")}),
    "untrained": Cell(dict, count=0),
    "rslora": Cell(lambda: {"use_rslora": True, "r": 4, "boost": weftlora.Dash(directions=2, after=WHEN)}),
    "own ranks and scales": Cell(
        lambda: {"rank_pattern": {"q_proj": 5, r"layers\.1\..*v_proj": 1}, "alpha_pattern": {r"2\.mlp\.down_proj": 0.7}}
    ),
    "tied vera": Cell(lambda: {"structure": weftlora.Tied(train="vera")}),
    "tied fused_qkv": Cell(lambda: {"structure": weftlora.Tied(group="fused_qkv"), "target_modules": "all-linear"}),
    "rank-0 sites": Cell(
        lambda: {"ranks": weftlora.Reallocate(score="random", first=1, every=1, max_rounds=1, move=1)}, then=empty_sites
    ),
    "two adapters": Cell(lambda: {"boost": weftlora.Dash(directions=2, after=WHEN)}, then=second_adapter),
    "sixteen bits": Cell(dict, base=lambda folder: demo(folder, "bfloat16")),
}
CELLS |= {
    f"{name} {kind}": Cell(
        lambda fields=fields, name=name: {  # type: ignore[misc]
            "target_modules": "all-linear",
            "modules_to_save": list(FAMILIES[name].modules_to_save) or None,
            "task_type": FAMILIES[name].task_type,
            **fields(),
        },
        base=family(name),
        batch=FAMILIES[name].batch,
    )
    for name in ("gpt2", "gpt_neox", "phi3", "bert", "t5")
    for kind, fields in {
        "tsd": lambda: {"start": weftlora.Directions(after=WHEN), "boost": weftlora.Dash(directions=2, after=WHEN)},
        "tied": lambda: {"structure": weftlora.Tied()},
    }.items()
}
