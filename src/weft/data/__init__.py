"""Rows in, tokens out: files, the demo tasks, splits and collation."""

from weft.data.collate import Collator
from weft.data.config import DataConfig, Fields
from weft.data.encode import IGNORE, encode_prompt
from weft.data.loading import Loaded, Task, load, texts
from weft.data.paths import resolve_path
from weft.data.prompts import GenerationPrompt, generation_prompts
from weft.data.tally import Counts

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
