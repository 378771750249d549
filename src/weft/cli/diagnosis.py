"""What a machine has for weft, and what it lacks."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement


@dataclass(frozen=True)
class Diagnosis:
    """Versions, devices and settings; `problems` is empty where weft can run."""

    weft: str
    python: str
    packages: dict[str, str]
    """Required package → version, or "missing"."""
    windows: dict[str, str]
    """Required package → the versions weft is tested with."""
    devices: list[str]
    cores: int
    threads: int
    kernel: str
    """fused, or reference where WEFT_REFERENCE is set."""
    demo: bool
    """Whether the embedded model is there."""
    data: str | None
    """WEFT_DATA, where the real models and data lie."""
    free_gib: float
    """Free disk space in the working folder."""
    problems: list[str] = field(default_factory=list)

    def record(self) -> dict[str, object]:
        """The diagnosis as plain data."""
        return dataclasses.asdict(self)

    def facts(self) -> Iterator[tuple[str, str]]:
        """Name and value of everything found, to show."""
        yield "weft", self.weft
        yield "python", self.python
        for name, version in self.packages.items():
            yield name, f"{version}  (tested: {self.windows[name] or 'any'})"
        yield "devices", ", ".join(self.devices)
        yield "cores, torch threads", f"{self.cores}, {self.threads}"
        yield "kernel", self.kernel
        yield "demo model", "present" if self.demo else "absent"
        yield "WEFT_DATA", self.data or "not set"
        yield "free disk", f"{self.free_gib:.1f} GiB"


def diagnose(folder: Path) -> Diagnosis:
    """Look at this machine; `folder` is where runs would be written."""
    packages, windows, problems = _packages()
    devices, threads = _devices()
    demo = _demo_problem()
    reference = os.environ.get("WEFT_REFERENCE", "") not in ("", "0")
    return Diagnosis(
        weft=_version("weft") or "missing",
        python=platform.python_version(),
        packages=packages,
        windows=windows,
        devices=devices,
        cores=os.cpu_count() or 1,
        threads=threads,
        kernel="reference" if reference else "fused",
        demo=demo is None,
        data=os.environ.get("WEFT_DATA"),
        free_gib=round(shutil.disk_usage(folder).free / 2**30, 2),
        problems=[*problems, *([demo] if demo else [])],
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _packages() -> tuple[dict[str, str], dict[str, str], list[str]]:
    """What weft's own metadata requires, against what is installed."""
    packages, windows, problems = {}, {}, []
    for line in importlib.metadata.requires("weft") or []:
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        found = _version(needed.name)
        packages[needed.name], windows[needed.name] = found or "missing", str(needed.specifier)
        if found is None:
            problems.append(f"{needed.name} is not installed: pip install '{needed.name}{needed.specifier}'.")
        elif not needed.specifier.contains(found, prereleases=True):
            problems.append(
                f"{needed.name} {found} is outside the tested window: pip install '{needed.name}{needed.specifier}'."
            )
    return packages, windows, problems


def _devices() -> tuple[list[str], int]:
    import torch

    found = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"], torch.get_num_threads()


def _demo_problem() -> str | None:
    from weft.data.demo import demo_model_path
    from weft.errors import WeftError

    try:
        demo_model_path()
    except WeftError as error:
        return str(error)
    return None
