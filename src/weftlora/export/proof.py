"""Proof that a folder computes what the live adapter does: stock libraries load it in a process without weftlora.

    error = max |logit of the folder − logit of the live adapter| / max |logit of the live adapter|      fp32, over all batches

and beside it, so that a small error means something, how far the adapter itself moves the logits from the base, same measure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from weftlora.adapted.updates import base_of
from weftlora.errors import AdapterError
from weftlora.export import live, stock_process
from weftlora.export.folder import SCRATCH, save_model
from weftlora.export.live import Batch, Gates, Outputs, without_padding
from weftlora.export.record import Approximation, Proof
from weftlora.export.source import Inputs, Source
from weftlora.host.stock_lora import without_adapters
from weftlora.runs import quantisation

TOLERANCE = 1e-5
"""Of the error, in fp32."""


@dataclass(frozen=True)
class Job:
    """One folder to run: a model, or an adapter (`adapter`, with the rank of each of its sites) on `base`."""

    base: Path | str
    dtype: torch.dtype = torch.float32
    adapter: Path | None = None
    sites: Mapping[str, int] | None = None


class Stock:
    """Runs jobs on the same batches, on behalf of one live model; its files lie in `scratch`.

    Raises:
        AdapterError: transformers has no class of this model, so that no stock library can load it.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], scratch: Path):
        self.model, self.batches, self.scratch = base_of(model), batches, scratch
        kind = type(self.model)
        if getattr(transformers, kind.__name__, None) is not kind:
            raise AdapterError(
                f"a {kind.__name__} is not a model of transformers, so a process without your code cannot load it and the export "
                "cannot be proved: use verify=False."
            )

    def run(self, jobs: Sequence[Job]) -> list[Outputs]:
        """What each job computes.

        Raises:
            AdapterError: stock libraries cannot load a folder, or read it as another adapter.
        """
        self.scratch.mkdir(exist_ok=True)
        inputs = self.scratch / "inputs.safetensors"
        flat = {
            f"{i}.{key}": t.detach().cpu().contiguous().clone()
            for i, batch in enumerate(self.batches)
            for key, t in batch.items()
        }
        save_file(flat, inputs)
        given = [self._described(job, inputs, n) for n, job in enumerate(jobs)]
        found = []
        for job, problem, described in zip(jobs, run_jobs(given, self.scratch), given, strict=True):
            if problem is not None:
                what = "the exported adapter" if job.adapter is not None else "the merged model"
                raise AdapterError(
                    f"{what} was not written, because stock libraries do not read it as it was meant: {problem}"
                )
            found.append(outputs(Path(described["outputs"]), self.batches))
        return found

    def _described(self, job: Job, inputs: Path, number: int) -> dict[str, Any]:
        config: Any = self.model.config
        load: dict[str, Any] = {"attn_implementation": config._attn_implementation}
        if type(self.model).__name__.endswith("Classification"):
            load |= {"num_labels": config.num_labels, "ignore_mismatched_sizes": True}
        return {
            "base": str(job.base),
            "model_class": type(self.model).__name__,
            "load": load,
            "dtype": str(job.dtype).removeprefix("torch."),
            "pad_token_id": config.get_text_config().pad_token_id,
            "adapter": None if job.adapter is None else str(job.adapter),
            "sites": None if job.sites is None else dict(job.sites),
            "inputs": str(inputs),
            "outputs": str(self.scratch / f"outputs-{number}.safetensors"),
            "device": str(next(self.model.parameters()).device),
            "threads": torch.get_num_threads(),
        }


def run_jobs(jobs: Sequence[Mapping[str, Any]], scratch: Path) -> list[str | None]:
    """Run described jobs in one process of stock libraries: a sentence for each that failed, None for the others.

    Raises:
        AdapterError: the process itself came to nothing.
    """
    file = scratch / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    alive, held = os.pipe()  # nothing is ever written: its end closes with this process, however that ends
    try:
        done = subprocess.run(
            [sys.executable, "-I", stock_process.__file__, str(file), str(alive), json.dumps(_found_in())],
            capture_output=True,
            text=True,
            check=False,
            pass_fds=[alive],
        )
    finally:
        os.close(alive)
        os.close(held)
    try:
        if done.returncode:
            raise ValueError
        said: list[str | None] = json.loads(done.stdout.strip().splitlines()[-1])
    except (ValueError, IndexError):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise AdapterError(
            f"the process that loads the export with stock peft failed ({reason}): check that `import peft` works in a Python of "
            "its own, or use verify=False."
        ) from None
    return said


def _found_in() -> list[str]:
    """The folders that the stock libraries were imported from here, in the order in which Python looks through them.

    The isolated process would not see what PYTHONPATH names, and would prove the export with other versions, or find none.
    """
    names = {"torch", "transformers", "peft", *(module for module, _ in quantisation.PACKAGES.values())}
    tops = [sys.modules.get(name.partition(".")[0]) for name in names]
    folders = {str(Path(place).absolute().parent) for top in tops for place in getattr(top, "__path__", ())}
    return [folder for entry in sys.path if (folder := str(Path(entry).absolute())) in folders]


def outputs(file: Path, batches: Sequence[Batch]) -> Outputs:
    """What a job wrote."""
    found = load_file(file)
    logits = [without_padding(found[f"{i}.logits"], batch) for i, batch in enumerate(batches)]
    losses = [float(found[key]) for i in range(len(batches)) if (key := f"{i}.loss") in found]
    return Outputs(logits, losses)


@dataclass(frozen=True)
class Prover:
    """What a shell computes: the live adapter, its base, and the adapter as it can leave (its gates fixed, if it is routed)."""

    own: nn.Module
    source: Source
    inputs: Inputs
    live: Outputs
    base: Outputs
    exact: Outputs

    @classmethod
    def of(cls, own: nn.Module, source: Source, inputs: Inputs, gates: Gates) -> Prover:
        """Run the shell; afterwards its gates are fixed.

        Raises:
            AdapterError: a logit is not finite, or no stock library knows the model.
        """
        Stock(own, inputs.batches, Path())  # refuse what cannot be proved before anything is run
        first = live.forward_all(own, inputs.batches)
        with live.switched_off(own):
            base = live.forward_all(own, inputs.batches)
        if not gates:
            return cls(own, source, inputs, first, base, first)
        live.fix_gates(own, source.adapters, gates)
        return cls(own, source, inputs, first, base, live.forward_all(own, inputs.batches))

    def of_adapter(self, place: Path, ranks: Mapping[str, int]) -> Outputs:
        """What stock peft computes from a LoRA folder, on the base that the source names (saved anew, if it is only in memory).

        Raises:
            AdapterError: stock libraries cannot load it, or read it as another adapter.
        """
        if self.source.base is not None:
            dtype = getattr(base_of(self.source.model), "dtype", torch.float32)
            return self._run(Job(self.source.base, dtype, place, ranks), place)
        base = place / SCRATCH / "base"
        if not base.exists():
            self._save_base(base)
        return self._run(Job(base, adapter=place, sites=ranks), place)

    def of_model(self, place: Path) -> Outputs:
        """What stock transformers computes from a folder of merged weights. Raises AdapterError as `of_adapter`."""
        return self._run(Job(place), place)

    def _run(self, job: Job, place: Path) -> Outputs:
        return Stock(self.own, self.inputs.batches, place / SCRATCH).run([job])[0]

    def _save_base(self, place: Path) -> None:
        with live.shell(self.own, self.source.adapters) as bare:
            plain: Any = without_adapters(base_of(bare), trained=False)
            save_model(plain, place)

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
