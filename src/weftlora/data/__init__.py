"""Rows in, tokens out: files, the demo tasks, splits and collation. Each name is loaded when it is first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weftlora.extras import needs
from weftlora.settings import IGNORE

if TYPE_CHECKING:
    from weftlora.data.collate import Collator
    from weftlora.data.config import DataConfig, Fields, Task
    from weftlora.data.encode import GenerationPrompt, encode_prompt, generation_prompts
    from weftlora.data.loaded import Counts, Loaded, sampled, shown
    from weftlora.data.loading import load
    from weftlora.data.paths import resolve_path
    from weftlora.data.sources import texts

_LAZY = {
    "Collator": "collate",
    **dict.fromkeys(("DataConfig", "Fields", "Task"), "config"),
    **dict.fromkeys(("GenerationPrompt", "encode_prompt", "generation_prompts"), "encode"),
    **dict.fromkeys(("Counts", "Loaded", "sampled", "shown"), "loaded"),
    "load": "loading",
    "texts": "sources",
    "resolve_path": "paths",
}

__all__ = [
    "IGNORE",
    "Collator",
    "Counts",
    "DataConfig",
    "Fields",
    "GenerationPrompt",
    "Loaded",
    "Task",
    "encode_prompt",
    "generation_prompts",
    "load",
    "resolve_path",
    "sampled",
    "shown",
    "texts",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'weftlora.data' has no attribute {name!r}")
    with needs("train", f"weftlora.data.{name}"):
        value = globals()[name] = getattr(importlib.import_module(f"weftlora.data.{_LAZY[name]}"), name)
    return value
