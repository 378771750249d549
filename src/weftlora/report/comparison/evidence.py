"""What the page is made of: the comparison, and what its run folders hold beyond it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from weftlora.compare.record import Comparison
from weftlora.errors import AdapterError, RunError
from weftlora.report.inspecting import inspect
from weftlora.report.result import Inspection
from weftlora.train.run import Run


@dataclass(frozen=True)
class Evidence:
    """A comparison with its run folders."""

    found: Comparison
    runs: dict[str, Run] = field(default_factory=dict)
    """By the folder of the outcome; a run that never started has none."""
    looks: dict[str, list[Inspection]] = field(default_factory=dict)
    """What is inside the adapters of each method's complete runs, by seed."""
    routers: dict[str, Inspection] = field(default_factory=dict)
    """The first run of each method with heads, its routers measured; empty unless that was asked for."""
    left_out: list[str] = field(default_factory=list)
    """What could not be looked into and why, a sentence each."""


def gather(found: Comparison, routers: bool = False) -> Evidence:
    """Read the run folders of a comparison.

    Args:
        routers: also measure the routers of one run per method that has heads, over the run's validation rows. This loads the
            base; all else is read from the folders alone.
    """
    evidence = Evidence(found)
    for method in found.methods:
        for outcome in found.of(method.name):
            try:
                run = Run.load(Path(found.folder) / outcome.folder)
            except RunError:  # it never started, or was killed before its first record: its outcome says so
                continue
            evidence.runs[outcome.folder] = run
            if outcome.status == "complete" and (run.adapter_folder / "adapter_config.json").is_file():
                _look(evidence, method.name, run)
                if routers and method.name not in evidence.routers:
                    _route(evidence, method.name, run)
    return evidence


def _look(evidence: Evidence, name: str, run: Run) -> None:
    """Look into the adapter of a run; one that cannot be looked into is named once per method."""
    try:
        found = inspect(run.folder, base=False, spectra=0)
    except AdapterError as error:
        if not any(sentence.startswith(f"Inside {name}: ") for sentence in evidence.left_out):
            evidence.left_out.append(f"Inside {name}: {error}")
    else:
        evidence.looks.setdefault(name, []).append(found)


def _route(evidence: Evidence, name: str, run: Run) -> None:
    """Measure the routers of a run that has heads."""
    if any(look.heads for look in evidence.looks.get(name, [])):
        found = inspect(run.folder, spectra=0)
        evidence.routers[name] = found
        if found.routers is None:
            evidence.left_out.extend(found.left_out)
