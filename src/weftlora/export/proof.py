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

from weftlora.errors import AdapterError
from weftlora.export import stock
from weftlora.export.live import Batch, Outputs, real
from weftlora.glue.updates import base_of

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
                f"a {kind.__name__} is no model of transformers, so a process without your code cannot load it and the export "
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
            [sys.executable, "-I", stock.__file__, str(file), str(alive)],
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
            f"the process that loads the export with stock peft failed ({reason}): install peft and transformers where this Python "
            "finds them without PYTHONPATH, or use verify=False."
        ) from None
    return said


def outputs(file: Path, batches: Sequence[Batch]) -> Outputs:
    """What a job wrote."""
    found = load_file(file)
    logits = [real(found[f"{i}.logits"], batch) for i, batch in enumerate(batches)]
    losses = [float(found[key]) for i in range(len(batches)) if (key := f"{i}.loss") in found]
    return Outputs(logits, losses)
