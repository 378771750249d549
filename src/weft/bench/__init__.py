"""Measured speed and memory, always beside the exactness of what was measured."""

from __future__ import annotations

from weft.bench.cases import Case, Shape
from weft.bench.goals import Target
from weft.bench.launch import LaunchBench, LaunchResult, launch
from weft.bench.record import CaseResult, StepBench
from weft.bench.rounds import step
from weft.bench.spread import Spread

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
