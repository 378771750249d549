"""A recipe as a line in another trainer's file. The trainers themselves are run by `make hosts`; here theirs is a stand-in."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

import weftlora
from families import FAMILIES
from weftlora.errors import ConfigError
from weftlora.integrations import config_for, rows_to_score_on

ROOT = Path(__file__).parents[1]


def test_a_recipe_and_the_hosts_own_names_make_one_config() -> None:
    config = config_for(
        {"recipe": "hydralora", "heads": 2}, {"r": ("lora_r", 16), "lora_alpha": ("lora_alpha", None)}, "it"
    )
    assert (config.r, config.structure, config.task_type) == (16, weftlora.Hydra(heads=2), "CAUSAL_LM")
    assert config.lora_alpha == 32  # the recipe's own default


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"recipe": "hydralora", "r": 8}, r"weft\.r=8 and lora_r=16 both say what r is"),
        ({"recipe": "hydralroa"}, "hydralora"),
        ({"recipe": "hydralora", "haeds": 2}, "heads"),
        ({"recipe": "flexora"}, "searches its layers before training, which it has no place for: run weftlora search"),
        ({"recipe": "peft:lora"}, "use it's own adapter, or one of alora, hydralora"),
        ({"recipe": "none"}, "use it's own adapter"),
    ],
)
def test_what_cannot_work_is_one_sentence(section: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_for(section, {"r": ("lora_r", 16)}, "it")


def test_rows_are_for_adapters_that_measure_on_them() -> None:
    def adapted(config: weftlora.WeftConfig) -> SimpleNamespace:
        return SimpleNamespace(peft_config={"default": config})

    assert rows_to_score_on(adapted(weftlora.HydraLoraConfig()), [1]) is None
    assert rows_to_score_on(adapted(weftlora.AllocLoraConfig()), [1]) == [1]
    assert rows_to_score_on(object(), [1]) is None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts modules of a host in its place, and has ours imported afresh."""

    def put(ours: str, **modules: dict[str, Any]) -> ModuleType:
        for name, content in modules.items():
            parts = name.split("__")
            for end in range(1, len(parts) + 1):
                dotted = ".".join(parts[:end])
                monkeypatch.setitem(sys.modules, dotted, sys.modules.get(dotted) or ModuleType(dotted))
            vars(sys.modules[".".join(parts)]).update(content)
        monkeypatch.delitem(sys.modules, f"weftlora.integrations.{ours}", raising=False)
        return importlib.import_module(f"weftlora.integrations.{ours}")

    return put


@dataclasses.dataclass(frozen=True)
class Capabilities:
    name: str
    lora_like: bool


class Settings(dict[str, Any]):
    """axolotl's config: a key that is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def axolotl(stand_in: Any) -> ModuleType:
    content = {"AdapterCapabilities": Capabilities, "BasePlugin": object}
    return stand_in("axolotl", axolotl__integrations__base=content)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"adapter": "lora", "weft": {"recipe": "hydralora"}}, "write adapter: weft"),
        ({"adapter": "weft"}, "needs to know which"),
        ({"adapter": "weft", "weft": {"recipe": "lora_dash"}, "loraplus_lr_ratio": 16}, r"weft\.lora_plus_ratio"),
        ({"adapter": "weft", "weft": {"recipe": "lora_dash"}, "merge_lora": True}, "weftlora export --merge"),
        ({"adapter": "weft", "weft": {"recipe": "lora_dash", "r": 4}, "lora_r": 8}, "both say what r is"),
        (
            {"adapter": "weft", "weft": {"recipe": "lora"}, "lora_target_linear": True, "lora_target_modules": ["q"]},
            "leave one",
        ),
    ],
)
def test_axolotls_file_is_refused_while_it_is_read(axolotl: ModuleType, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        axolotl.WeftArgs.model_validate(given)


def test_axolotl_gets_an_adapter_of_its_file_and_a_saved_one_again(axolotl: ModuleType, tmp_path: Path) -> None:
    plugin, cfg = (
        axolotl.WeftPlugin(),
        Settings(adapter="weft", weft={"recipe": "hydralora", "lora_plus_ratio": 4}, lora_r=2),
    )
    cfg["lora_target_modules"] = ["q_proj"]
    model, config = plugin.load_adapter(FAMILIES["llama"].build(), cfg)
    assert isinstance(model, PeftModel)
    assert config.r == 2
    assert plugin.load_adapter(None, cfg, config_only=True)[0] is None
    assert plugin.load_adapter(None, Settings(adapter="lora")) is None
    model.save_pretrained(tmp_path)
    again, _ = plugin.load_adapter(FAMILIES["llama"].build(), Settings(adapter="weft", lora_model_dir=str(tmp_path)))
    assert all(p.requires_grad for name, p in again.named_parameters() if "weft_site" in name)


def test_axolotls_optimiser_has_rates_by_role(axolotl: ModuleType) -> None:
    class Trainer:
        model, _ = axolotl.WeftPlugin().load_adapter(
            FAMILIES["llama"].build(), Settings(adapter="weft", weft={"recipe": "lora"}, lora_target_modules=["q_proj"])
        )
        args = Settings(weight_decay=0.1)
        eval_dataset = None
        optimizer: Any = None

        def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module) -> Any:
            return torch.optim.AdamW, {"lr": 1e-3, "eps": 1e-6}

    trainer, plugin = Trainer(), axolotl.WeftPlugin()
    plugin.post_trainer_create(Settings(adapter="weft", weft={"recipe": "lora"}), trainer)
    assert trainer.optimizer is None  # axolotl makes its own
    plugin.post_trainer_create(Settings(adapter="weft", weft={"recipe": "lora", "lora_plus_ratio": 4}), trainer)
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == pytest.approx([1e-3, 4e-3])
    assert {group["eps"] for group in trainer.optimizer.param_groups} == {1e-6}
    assert isinstance(plugin.add_callbacks_post_trainer(Settings(adapter="weft"), trainer)[0], weftlora.Callback)
    assert plugin.add_callbacks_post_trainer(Settings(adapter="lora"), trainer) == []


def test_axolotl_finds_the_plug_in_by_itself() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["axolotl.plugins"] == {"weft": "weftlora.integrations.axolotl:WeftPlugin"}


def test_ms_swift_knows_every_recipe_and_what_its_arguments_say(stand_in: Any) -> None:
    class PeftTuner:
        pass

    class Other:
        pass

    tuners: dict[str, Any] = {"lora_llm": Other}
    callbacks: dict[str, Any] = {}
    swift = stand_in(
        "ms_swift",
        swift__callbacks={"callbacks_map": callbacks},
        swift__tuner_plugin={"PeftTuner": PeftTuner, "tuners_map": tuners},
    )
    assert {"hydralora", "tied_lora", "lora_dash", "alora"} <= tuners.keys()
    assert not {"flexora", "lora"} & tuners.keys()
    assert issubclass(callbacks["weft"], weftlora.Callback)
    with pytest.raises(ConfigError, match="a tuner 'lora_llm' of its own"):
        swift.register("hydralora", name="lora_llm")
    swift.register("hydralora", name="two", heads=2)

    @dataclasses.dataclass
    class Arguments:
        lora_rank: int = 8
        lora_alpha: int = 32
        target_modules: list[str] = dataclasses.field(default_factory=lambda: ["all-linear"])
        task_type: str = "causal_lm"

    model = tuners["two"].prepare_model(Arguments(lora_rank=4, target_modules=["q_proj"]), FAMILIES["llama"].build())
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.structure.heads) == (
        4,
        8,
        2,
    )  # alpha is left at its default: the recipe's


def test_the_record_is_of_the_hosts_that_are_listed() -> None:
    hosts = tomllib.loads((ROOT / "hosts.toml").read_text(encoding="utf-8"))["host"]
    record = json.loads((ROOT / "evidence" / "hosts.json").read_text(encoding="utf-8"))
    assert [each["name"] for each in record["hosts"]] == [host["name"] for host in hosts]
    for host, each in zip(hosts, record["hosts"], strict=True):
        assert each["host"] == (host["packages"] or [f"{host['name']}=={each['versions'][host['name']]}"])[0].replace(
            "==", " "
        )
        assert each["ran"]
        assert each["did"]
