"""Measured speed and memory, always beside the exactness of what was measured."""

from __future__ import annotations

from weftlora.bench.cases import Case, Shape
from weftlora.bench.dash_launch import LaunchBench, LaunchResult, launch
from weftlora.bench.record import CaseResult, Spread, StepBench, Target
from weftlora.bench.rounds import step

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
