"""Measured speed and memory, always beside the exactness of what was measured."""

from __future__ import annotations

from weft.bench.cases import Case, Shape
from weft.bench.launch import LaunchBench, LaunchResult, launch
from weft.bench.record import CaseResult, Spread, StepBench, Target
from weft.bench.rounds import step

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
