"""Uniform: every site keeps the rank it starts with; no mask is allocated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Uniform:
    """Every rank slot of every site is live for the whole run (plain LoRA's allocation)."""
