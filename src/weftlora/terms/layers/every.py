"""All: every targeted module is adapted; no layer gate is allocated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class All:
    """Every targeted module carries an adapter at full strength."""
