"""What a machine has for weftlora, and what it lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from weftlora.data.paths import WORDS, locate
from weftlora.errors import WeftError
from weftlora.extras import EXTRAS, PURPOSES, install_line
from weftlora.host.versions import why_not
from weftlora.records import Record
from weftlora.version import __version__

ROWS = Path(__file__).resolve().parent.parent / "assets" / "matrix.json"
"""The rows of matrix.toml and what came of them; `scripts/matrix.py` writes it."""
UNKNOWN = "unknown, because torch does not load"
WHAT = {"mlp": "one node per gated MLP", "group": "one node per input", "linear": "a node each"}


@dataclass(frozen=True)
class Diagnosis(Record):
    """Versions, devices and settings; `problems` is empty where weftlora can run."""

    weftlora: str
    python: str
    packages: dict[str, str]
    """Required package → version, or "missing"."""
    windows: dict[str, str]
    """Required package → the versions that weftlora needs."""
    extras: dict[str, list[str]]
    """Extra → which of its packages are not installed; what is missing here is no problem until a call needs it."""
    devices: list[str]
    """Empty where torch does not load."""
    cores: int
    threads: int | None
    kernel: str | None
    """fused, or reference where WEFT_REFERENCE is set, and the nodes that are switched off; None where torch does not load."""
    demo: bool
    """Whether the bundled model is there."""
    models: dict[str, str]
    """Word for a real model → where its file is, or the line that installs it."""
    data: str | None
    """WEFT_DATA, where the real models and data lie."""
    free_gib: float
    """Free disk space in the working folder."""
    problems: list[str] = field(default_factory=list)
    nearest: dict[str, Any] | None = None
    """The row of matrix.toml that has the most of these versions: its name, host, outcome, and what differs from it."""
    nodes: dict[str, str] | None = None
    """For a run or adapter, what computes each adapted linear (`weftlora.adapted.fusion.nodes`)."""

    def facts(self) -> Iterator[tuple[str, str]]:
        """Name and value of everything found, to show."""
        yield "weftlora", self.weftlora
        yield "python", self.python
        for name, version in self.packages.items():
            yield name, f"{version}  (needs {self.windows[name] or 'any'})"
        if self.nearest is not None:
            yield (
                "nearest tested host",
                f"{self.nearest['host']} ({self.nearest['name']}): {_differences(self.nearest)}",
            )
        for extra, lacks in self.extras.items():
            found = f"no {', '.join(lacks)}: {install_line(extra)}" if lacks else "installed"
            yield f"extra {extra}", f"{found}  ({PURPOSES[extra]})"
        yield "devices", ", ".join(self.devices) or UNKNOWN
        yield "cores, torch threads", f"{self.cores}, {self.threads or UNKNOWN}"
        yield "kernel", self.kernel or UNKNOWN
        yield "demo model", "present" if self.demo else "absent"
        yield from ((f"model {word}", found) for word, found in self.models.items())
        yield "WEFT_DATA", self.data or "not set"
        yield "free disk", f"{self.free_gib:.1f} GiB"
        for node, names in self._by_node().items():
            examples = ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
            yield f"{len(names)} linears", f"{WHAT.get(node, node)}: {examples}"

    def _by_node(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, node in (self.nodes or {}).items():
            found.setdefault(node, []).append(name)
        return found


COMPARED = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub", "tokenizers")
"""What a row is compared by, the weightiest first."""


def nearest_row() -> dict[str, Any]:
    """The tested row that is nearest to this environment: the fewest packages differ, and those in the least weighty."""
    here = {name: (_version(name) or "none").partition("+")[0] for name in COMPARED}
    found = []
    for row in json.loads(ROWS.read_text(encoding="utf-8"))["rows"]:
        differs = {
            name: {"here": here[name], "row": wanted}
            for name in COMPARED
            if here[name] != (wanted := row["versions"].get(name, "none"))
        }
        found.append({"name": row["name"], "host": row["host"], "status": row["status"], "differs": differs})

    def distance(row: dict[str, Any]) -> tuple[int, int, bool]:
        weight = sum(2 ** (len(COMPARED) - COMPARED.index(name)) for name in row["differs"])
        return len(row["differs"]), weight, row["status"] != "passed"

    return min(found, key=distance)


def _differences(row: dict[str, Any]) -> str:
    differs = [f"{name} is {found['here']} here, {found['row']} there" for name, found in row["differs"].items()]
    return f"{row['status']}; {', '.join(differs) or 'the same versions'}"


def diagnose(folder: Path, adapted: Path | None = None) -> Diagnosis:
    """Look at this machine; `folder` is where runs would be written, `adapted` a run or an adapter to look at too."""
    packages, windows, problems = _packages()
    fails, reason = _failing_import()
    if fails and packages.get(fails) != "missing":
        problems.append(reason)
    devices, threads = ([], None) if fails == "torch" else _devices()
    if not fails and (refused := why_not()):
        problems.append(refused)
    if demo := _demo_problem():
        problems.append(demo)
    return Diagnosis(
        weftlora=__version__,
        python=platform.python_version(),
        packages=packages,
        windows=windows,
        extras=_extras(),
        devices=devices,
        cores=os.cpu_count() or 1,
        threads=threads,
        kernel=None if fails == "torch" else _kernel(),
        demo=demo is None,
        models={word: _model(word) for word in WORDS},
        data=os.environ.get("WEFT_DATA"),
        free_gib=round(shutil.disk_usage(folder).free / 2**30, 2),
        problems=problems,
        nearest=nearest_row(),
        nodes=None if adapted is None or fails else _nodes(adapted),
    )


def _failing_import() -> tuple[str, str]:
    """The first of what weftlora is built on that does not load here, and how it fails; two empty texts where all do."""
    for name in ("torch", "transformers", "peft"):  # each loads the one before
        try:
            importlib.import_module(name)
        except Exception as error:  # a package that is broken may raise anything
            reason = " ".join(str(error).split()).rstrip(".")
            return name, f"import {name} fails with {type(error).__name__}: {reason}."
    return "", ""


def _extras() -> dict[str, list[str]]:
    return {
        extra: [package for module, package in packages.items() if not _is_there(module)]
        for extra, packages in EXTRAS.items()
    }


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _kernel() -> str:
    from weftlora.kernel import current

    switches = current()
    if switches.reference:
        return "reference"
    off = [name for name, on in (("groups", switches.groups), ("mlp", switches.mlp)) if not on]
    triton = {None: "", True: "; Triton on every GPU", False: "; Triton on no GPU"}[switches.triton]
    return (f"fused, without {' and '.join(off)}" if off else "fused") + triton


def _nodes(adapted: Path) -> dict[str, str]:
    from weftlora.adapted.fusion import nodes
    from weftlora.train.evaluation import Source

    return nodes(Source.of(adapted, None).loaded().model)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What weftlora's own metadata requires, against what is installed."""
    packages, windows, problems = {}, {}, []
    try:
        required = importlib.metadata.requires("weftlora") or []
    except importlib.metadata.PackageNotFoundError:
        none = "weftlora is on the path but not installed, so its requirements cannot be checked: install it with pip."
        return {name: _version(name) or "missing" for name in COMPARED}, dict.fromkeys(COMPARED, ""), [none]
    for line in required:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        packages[needed.name], windows[needed.name] = found or "missing", str(needed.specifier)
        if found is None:
            problems.append(f"{needed.name} is not installed: pip install '{needed.name}{needed.specifier}'.")
        elif not needed.specifier.contains(found, prereleases=True):
            problems.append(
                f"{needed.name} {found} is not a version that weftlora runs with: pip install '{needed.name}{needed.specifier}'."
            )
    return packages, windows, problems


def _devices() -> tuple[list[str], int]:
    import torch

    found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"], torch.get_num_threads()


def _model(word: str) -> str:
    try:
        return locate(word, Path.cwd())
    except WeftError as error:
        return str(error)


def _demo_problem() -> str | None:
    from weftlora.data.demo import demo_model_path

    try:
        demo_model_path()
    except WeftError as error:
        return str(error)
    return None
