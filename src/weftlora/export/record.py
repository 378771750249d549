"""What an export says of itself: plain numbers, for the screen, for `--json` and for the card in the folder."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Proof:
    """How far the folder is from the live adapter, as measured through stock libraries alone. Logits in fp32."""

    inputs: str
    """What it was measured on, in words."""
    error: float
    """max |folder − live| / max |live|, over logits."""
    moved: float
    """max |live − base| / max |live|: how much there was to get wrong."""
    tolerance: float | None
    """What `error` had to stay below; None where rounding is measured instead."""


@dataclass(frozen=True)
class Approximation:
    """What fixing the gates of a router at their means costs, against the live adapter on the same inputs."""

    gates: str
    """What the gates were measured on, in words."""
    error: float
    """max |fixed − live| / max |live|, over logits."""
    lost: float
    """‖fixed − live‖ / ‖live − base‖, over logits: 0 loses nothing, 1 is as far off as no adapter."""
    loss_live: float | None
    """Mean loss of the live adapter; None where the inputs have no labels."""
    loss_fixed: float | None
    loss_base: float | None
    mean_gate: dict[str, list[float]]
    """Site → mean weight of each head."""


@dataclass(frozen=True)
class Rounding:
    """What a dtype costs: ‖rounded − exact‖ / ‖exact‖ of the factors' products; and the error it leaves on logits."""

    dtype: str
    lost: float
    error: float | None


@dataclass(frozen=True)
class LoraExport:
    """A stock LoRA folder that was written."""

    folder: Path
    adapters: tuple[str, ...]
    layout: str
    """"pattern" (a rank per site), "uniform" or "server ranks"."""
    dtype: str
    ranks: dict[str, int]
    """Site → rank in the folder."""
    left_out: list[str]
    """Sites without a live slot: they are no targets."""
    parameters: int
    whole_modules: list[str]
    """What is in the folder in full, by name: trained heads, and parts that the base's checkpoint does not have."""
    proof: Proof | None = None
    """None: verify=False."""
    approximation: Approximation | None = None
    rounding: Rounding | None = None
    """None in fp32."""

    def record(self) -> dict[str, Any]:
        """Plain data, as `--json` shows it."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True)
class SiteLoss:
    """What rounding leaves of one site's update. 0 loses nothing; 1 is as far off as no update at all."""

    site: str
    norm: float
    """‖ΔW‖_F."""
    lost: float
    """‖(round(W + ΔW) − round(W)) − ΔW‖ / ‖ΔW‖ in the dtype that was written."""
    lost_nf4: float
    """The same if the merged weight is quantised to NF4 (blocks of 64) afterwards."""


@dataclass(frozen=True)
class Merge:
    """A folder of merged weights that was written."""

    folder: Path
    adapters: tuple[str, ...]
    dtype: str
    weights: str
    """Which W the update was added to, in words."""
    sites: list[SiteLoss]
    lost: float
    """Over all sites: the norm of what was lost / the norm of all updates."""
    lost_nf4: float
    lost_logits: float | None = None
    """‖merged − live‖ / ‖live − base‖ over logits; None: verify=False."""
    lost_logits_nf4: float | None = None
    """How far the change of the logits is off, by the same measure, where the adapted weights are in NF4 before and after."""
    proof: Proof | None = None
    accepted: bool = False
    """Whether a loss above the limit was accepted."""

    def record(self) -> dict[str, Any]:
        """Plain data, as `--json` shows it."""
        return dataclasses.asdict(self) | {"folder": str(self.folder)}
