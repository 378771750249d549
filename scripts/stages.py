"""Which part of its work a command of weftlora is in, told to whoever may kill it: a byte of a file that is mapped into memory.

    0            nothing has begun yet
    n            in the n-th of `NAMES`, and in none that is marked within it
    n + AFTER    the n-th is over, and what comes next is not marked

Functions are marked as their modules are imported, so `watch` comes before weftlora does. Nothing else changes in them, nothing heavy
is imported here, and until `tell` says where, nothing is told: every process that is forked or started has a byte of its own.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import mmap
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

MARKED = {
    "weftlora.runs.load:load_run": "opening the run and its base",
    "weftlora.data.loading:load": "reading rows",
    "weftlora.runs.scores:mean_loss": "measuring the loss",
    "weftlora.train.evaluation:_answers": "answering",
    "weftlora.train.prepare:prepare": "preparing rows, base and adapter",
    "weftlora.train.layer_search:make_search": "making the search",
    "weftlora.search.driver:LayerSearch.step": "a step of the search",
    "weftlora.search.driver:selection": "selecting layers",
    "weftlora.compare:load": "reading the runs",
    "weftlora.report.comparison.runs:gather": "looking into the adapters",
    "weftlora.report.comparison.page:page": "drawing the page",
    "weftlora.export.source:read": "opening the run and its base",
    "weftlora.export.lora:pairs": "taking the update apart",
    "weftlora.export.merged:add_updates": "adding the update to the weights",
    "weftlora.export.folder:save": "writing the folder's files",
    "weftlora.export.folder:save_model": "writing the folder's files",
    "weftlora.export.proof:run_jobs": "proving in another process",
    "weftlora.disk.files:write_folder": "putting the folder in place",
    "weftlora.disk.files:write_text": "writing the file",
    "weftlora.disk.files:Output.write": "writing the file",
}
NAMES = list(dict.fromkeys(MARKED.values()))
AFTER = 128
_told: list[mmap.mmap] = []


def tell(file: Path) -> None:
    """From now on this process says in the first byte of `file` where it is."""
    with file.open("r+b") as opened:
        _told[:] = [mmap.mmap(opened.fileno(), 1)]


def read(file: Path) -> str:
    """In words, where the process was that last told."""
    number = file.read_bytes()[0]
    if not number:
        return "starting"
    return NAMES[number - 1] if number < AFTER else f"after {NAMES[number - AFTER - 1]}"


def watch(marked: Mapping[str, str] = MARKED) -> None:
    """Mark these functions, `module:function` or `module:Class.method`, in modules that are imported from now on."""
    sys.meta_path.insert(0, _Finder(marked))


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, marked: Mapping[str, str]) -> None:
        self.marked = marked

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> Any:
        names = {key.partition(":")[2]: word for key, word in self.marked.items() if key.partition(":")[0] == fullname}
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target) if names else None
        if spec is None or spec.loader is None:
            return None
        carry_out = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            carry_out(module)
            for name, word in names.items():
                _mark(module, name, NAMES.index(word) + 1)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _mark(holder: Any, path: str, number: int) -> None:
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    function: Callable[..., Any] = getattr(holder, name)

    @functools.wraps(function)
    def marked(*given: Any, **more: Any) -> Any:
        if not _told:
            return function(*given, **more)
        [page] = _told
        before, page[0] = page[0], number
        try:
            return function(*given, **more)
        finally:
            page[0] = before if 0 < before < AFTER else number + AFTER

    setattr(holder, name, marked)
