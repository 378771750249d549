"""Data-parallel training on two processes over gloo: `ddp_worker.py FOLDER`, see `pairing`."""

from __future__ import annotations

import warnings

import torch
from pairing import run_pair
from peft import PeftModel, get_peft_model
from torch.nn.parallel import DistributedDataParallel

from families import FAMILIES, STRUCTURES, adapter_config, randomise, trainable

IDS = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(3))


def model_of(structure: str, reentrant: bool | None = None) -> PeftModel:
    """A tiny Llama with a moved adapter, checkpointing as asked (None: without)."""
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config(structure, "llama")).train()
    randomise(model)
    if reentrant is not None:
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model


def two_steps(run: torch.nn.Module, model: PeftModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """The adapter after two SGD steps."""
    optimizer = torch.optim.SGD(trainable(model).values(), lr=0.1)
    for _ in range(2):
        run(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in trainable(model).items()}


def worker(rank: int) -> dict[str, dict[str, float | str]]:
    """Train every structure in all modes on this rank's half of the batch: largest difference to one process, or the error."""
    warnings.simplefilter("ignore")
    seen: dict[str, dict[str, float | str]] = {"none": {}, "False": {}, "True": {}}
    for structure in STRUCTURES:
        alone = model_of(structure)
        expected = two_steps(alone, alone, IDS)
        for mode, reentrant in (("none", None), ("False", False), ("True", True)):
            model = model_of(structure, reentrant)
            try:
                parallel = DistributedDataParallel(model, find_unused_parameters=False)
                got = two_steps(parallel, model, IDS[2 * rank : 2 * rank + 2])
                seen[mode][structure] = max((got[n] - t).abs().max().item() for n, t in expected.items())
            except Exception as error:
                seen[mode][structure] = f"{type(error).__name__}: {error}"
    return seen


if __name__ == "__main__":
    run_pair(worker)
