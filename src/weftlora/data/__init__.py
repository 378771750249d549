"""Rows in, tokens out: files, the demo tasks, splits and collation."""

from weftlora.data.collate import Collator
from weftlora.data.config import DataConfig, Fields
from weftlora.data.encode import IGNORE, encode_prompt
from weftlora.data.loading import Loaded, Task, load, texts
from weftlora.data.paths import resolve_path
from weftlora.data.prompts import GenerationPrompt, generation_prompts
from weftlora.data.tally import Counts

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
    "texts",
]
