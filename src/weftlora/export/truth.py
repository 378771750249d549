"""The live adapter's outputs on some inputs, and a folder's held against them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weftlora.errors import AdapterError
from weftlora.export import live
from weftlora.export.folder import SCRATCH
from weftlora.export.gates import Gates
from weftlora.export.live import Outputs
from weftlora.export.proof import TOLERANCE, Job, Stock
from weftlora.export.record import Approximation, Proof
from weftlora.export.source import Inputs, Source
from weftlora.glue.stock import without_adapters
from weftlora.glue.updates import base_of


@dataclass(frozen=True)
class Truth:
    """What a shell computes: the live adapter, its base, and the adapter as it can leave (its gates fixed, if it is routed)."""

    own: nn.Module
    source: Source
    inputs: Inputs
    live: Outputs
    base: Outputs
    exact: Outputs

    @classmethod
    def of(cls, own: nn.Module, source: Source, inputs: Inputs, gates: Gates) -> Truth:
        """Run the shell; afterwards its gates are fixed.

        Raises:
            AdapterError: a logit is not finite, or no stock library knows the model.
        """
        Stock(own, inputs.batches, Path())  # refuse what cannot be proved before anything is run
        first = live.run(own, inputs.batches)
        with live.switched_off(own):
            base = live.run(own, inputs.batches)
        if not gates:
            return cls(own, source, inputs, first, base, first)
        live.fix_gates(own, source.adapters, gates)
        return cls(own, source, inputs, first, base, live.run(own, inputs.batches))

    def of_adapter(self, place: Path, ranks: Mapping[str, int]) -> Outputs:
        """What stock peft computes from a LoRA folder, on the base that the source names (saved anew, if it is only in memory).

        Raises:
            AdapterError: stock libraries cannot load it, or read it as another adapter; the base in memory is quantised.
        """
        if getattr(base_of(self.source.model), "is_quantized", False):
            raise AdapterError(
                "the base in memory is quantised, and the proof is in float32: save the adapter and export its folder, for which "
                "the base is loaded as it is stored, or use verify=False (the matrices of an export are exact whatever the base "
                "is)."
            )
        base: str | Path | None = self.source.base
        if base is None:
            base = place / SCRATCH / "base"
            if not base.exists():
                self._save_base(base)
        dtype = getattr(base_of(self.source.model), "dtype", torch.float32)
        return self._run(Job(base, dtype, place, ranks), place)

    def of_model(self, place: Path) -> Outputs:
        """What stock transformers computes from a folder of merged weights. Raises AdapterError as `of_adapter`."""
        return self._run(Job(place), place)

    def _run(self, job: Job, place: Path) -> Outputs:
        return Stock(self.own, self.inputs.batches, place / SCRATCH).run([job])[0]

    def _save_base(self, place: Path) -> None:
        with live.shell(self.own, self.source.adapters) as bare:
            plain: Any = without_adapters(base_of(bare), trained=False)
            plain.save_pretrained(place)

    def prove(self, place: Path, ranks: Mapping[str, int]) -> Proof:
        """Hold the fp32 LoRA folder against the adapter.

        Raises:
            AdapterError: it is further away than `TOLERANCE`.
        """
        proof = self.compared(self.of_adapter(place, ranks), TOLERANCE)
        if not proof.error <= TOLERANCE:
            named = "the base in memory" if self.source.base is None else f"the base {self.source.base}"
            raise AdapterError(
                f"the exported adapter differs from the live one by {proof.error:.2g} of the largest logit (allowed: "
                f"{TOLERANCE:g}), so it was not kept: if {named} is not what this model was made from, say base='memory' or the "
                "right folder; otherwise please report it."
            )
        return proof

    def compared(self, folder: Outputs, tolerance: float | None) -> Proof:
        """The record of a comparison."""
        return Proof(self.inputs.what, self.exact.furthest(folder), self.exact.furthest(self.base), tolerance)

    def lost(self, folder: Outputs) -> float:
        """‖folder − live‖ / ‖live − base‖ over logits; 0 where the adapter changes nothing, so that nothing can be lost."""
        change = self.live.distance(self.base)
        return self.live.distance(folder) / change if change else 0.0

    def lost_change(self, after: Outputs, before: Outputs) -> float:
        """‖(after − before) − (live − base)‖ / ‖live − base‖ over logits; 0 where the adapter changes nothing."""
        whole = self.live.distance(self.base)
        wanted = [a - b + c for a, b, c in zip(after.logits, self.live.logits, self.base.logits, strict=True)]
        return Outputs(wanted, []).distance(before) / whole if whole else 0.0

    def approximation(self, gates: Inputs, measured: Gates) -> Approximation:
        """What fixing the gates cost."""
        return Approximation(
            gates.what,
            self.live.furthest(self.exact),
            self.lost(self.exact),
            self.live.loss(),
            self.exact.loss(),
            self.base.loss(),
            {name: gate.tolist() for adapter in measured.values() for name, gate in adapter.items()},
        )
