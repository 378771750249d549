"""A paper's name is a recipe: a constructor that returns one `WeftConfig` and holds no mechanism."""

from __future__ import annotations

from collections.abc import Callable

from peft import PeftConfig

from weftlora.recipes.alora import AllocLoraConfig
from weftlora.recipes.controls import peft_adalora, peft_lora
from weftlora.recipes.flexora import FlexoraConfig
from weftlora.recipes.hydralora import HydraLoraConfig
from weftlora.recipes.lora import PlainLoraConfig
from weftlora.recipes.lora_dash import LoraDashConfig
from weftlora.recipes.lora_init import LoraInitConfig
from weftlora.recipes.lora_tsd import LoraTsdConfig
from weftlora.recipes.tied_lora import TiedLoraConfig

RECIPES: dict[str, Callable[..., PeftConfig]] = {
    "lora": PlainLoraConfig,
    "hydralora": HydraLoraConfig,
    "tied_lora": TiedLoraConfig,
    "lora_dash": LoraDashConfig,
    "lora_init": LoraInitConfig,
    "lora_tsd": LoraTsdConfig,
    "alora": AllocLoraConfig,
    "flexora": FlexoraConfig,
    "peft:lora": peft_lora,
    "peft:adalora": peft_adalora,
}
"""Recipe name → its constructor; what a recipe file names under `adapter`. The controls of stock peft are here too."""

__all__ = [
    "RECIPES",
    "AllocLoraConfig",
    "FlexoraConfig",
    "HydraLoraConfig",
    "LoraDashConfig",
    "LoraInitConfig",
    "LoraTsdConfig",
    "PlainLoraConfig",
    "TiedLoraConfig",
    "peft_adalora",
    "peft_lora",
]
