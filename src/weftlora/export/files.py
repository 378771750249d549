"""The two files of a stock LoRA folder, and the number formats they may have."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from weftlora.errors import AdapterError, ConfigError, suggest
from weftlora.export.factors import Pair
from weftlora.export.source import Source
from weftlora.glue.stock import HOST, stock_config
from weftlora.glue.updates import base_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def config_of(source: Source, ranks: Mapping[str, int], drawn: Sequence[str], base_name: str | None) -> LoraConfig:
    """The stock config, resolved again by peft's own rules.

    Args:
        drawn: names of modules that leave in full beside those that were trained so.

    Raises:
        AdapterError: stock peft would read it as another adapter.
    """
    configs = [config for name in source.adapters if (config := _peft_config(source.model, name)) is not None]
    saved = sorted({*drawn, *(module for config in configs for module in config.modules_to_save or [])})
    kinds = {layer.module_name: type(layer.get_base_layer()).__name__ for layer in source.layers}
    inside = tuple(f"{name}." for name in kinds)
    modules = [name for name, _ in base_of(source.model).named_modules() if name and not name.startswith(inside)]
    return stock_config(
        modules,
        ranks,
        fan_in_fan_out=any(kinds[name] == "Conv1D" for name in ranks),
        task_type=configs[0].task_type if configs else None,
        modules_to_save=saved or None,
        base_model_name_or_path=base_name or hub_id(source.base),
    )


def _peft_config(model: nn.Module, adapter: str) -> Any:
    return getattr(model, "peft_config", {}).get(adapter)


def hub_id(base: str | None) -> str | None:
    """The base's name where it means the same on every machine; a folder's path is nobody else's business."""
    return base if base is not None and _HUB_ID.fullmatch(base) and not Path(base).exists() else None


_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def save(
    place: Path, config: LoraConfig, sites: Mapping[str, Pair], heads: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """adapter_config.json and adapter_model.safetensors as stock peft writes them.

    Args:
        heads: {name in the base model: value} of what was trained in full.

    Raises:
        AdapterError: a value does not fit into `dtype`.
    """
    tensors = {f"{HOST}{name}.lora_A.weight": pair.a.to(dtype) for name, pair in sites.items()}
    tensors |= {f"{HOST}{name}.lora_B.weight": pair.b.to(dtype) for name, pair in sites.items()}
    tensors |= {f"{HOST}{name}": value.detach().to("cpu", dtype) for name, value in heads.items()}
    if wrong := next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None):
        raise AdapterError(
            f"{wrong} has values that {name_of(dtype)} cannot hold, so nothing was exported: use float32, or an adapter that has "
            "not diverged."
        )
    config.save_pretrained(str(place))
    written = place / "adapter_config.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    if isinstance(names := content["target_modules"], list):  # peft writes a set: the same export is the same file
        content["target_modules"] = sorted(names)
    written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    own = {name: t.contiguous().clone() for name, t in tensors.items()}  # safetensors takes no shared memory
    save_file(own, place / "adapter_model.safetensors", {"format": "pt"})


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from what the user wrote. Raises ConfigError on any other than float32, bfloat16 and float16."""
    if name is None or name in DTYPES.values():
        return cast("torch.dtype | None", name)
    if str(name) not in DTYPES:
        raise ConfigError(f"dtype={name!r} is no dtype to write: {suggest(str(name), DTYPES)}")
    return DTYPES[str(name)]


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")
