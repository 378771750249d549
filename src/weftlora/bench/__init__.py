"""Measured speed and memory, always beside the exactness of what was measured."""

from __future__ import annotations

from weftlora.bench.cases import Case, Shape
from weftlora.bench.goals import Target
from weftlora.bench.launch import LaunchBench, LaunchResult, launch
from weftlora.bench.record import CaseResult, StepBench
from weftlora.bench.rounds import step
from weftlora.bench.spread import Spread

__all__ = [
    "Case",
    "CaseResult",
    "LaunchBench",
    "LaunchResult",
    "Shape",
    "Spread",
    "StepBench",
    "Target",
    "launch",
    "step",
]
