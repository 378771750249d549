"""An adapter without `import weftlora`: a stock LoRA folder, or the base with its update in the weights, proved before it is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weftlora.adapted.frozen_weights import Checkpoint
from weftlora.errors import ConfigError, suggest
from weftlora.export import lora as _lora
from weftlora.export import merged as _merged
from weftlora.export.folder import check_out, dtype_of
from weftlora.export.hub import Pushed
from weftlora.export.hub import push as _push
from weftlora.export.record import LoraExport, Merge
from weftlora.export.source import Inputs, checked, data_of, inputs_of, read

__all__ = ["LoraExport", "Merge", "Pushed", "export_lora", "merge", "push"]

Folder = str | Path
Batches = Iterable[Mapping[str, Any]]


def export_lora(
    model_or_folder: nn.Module | Folder,
    out: Folder,
    *,
    uniform: bool = False,
    server_ranks: bool = False,
    inputs: Batches | None = None,
    verify: bool = True,
    dtype: str | torch.dtype | None = None,
    adapter: str | Sequence[str] | None = None,
    approximate: str | None = None,
    data: Batches | Folder | None = None,
    rows: int = 256,
    base: Folder | None = None,
    base_name: str | None = None,
    overwrite: bool = False,
) -> LoraExport:
    """Write an adapter as a stock LoRA folder that peft, vLLM, SGLang and llama.cpp's converter load without weftlora.

    ΔW of every site is written in closed form (no SVD), every scale and gate folded into B. The folder is loaded with stock peft
    in a process where weftlora cannot be imported and must compute what the live adapter does.

    Args:
        model_or_folder: a model with weftlora adapters in it, a run folder or an adapter folder.
        out: the new folder. It is written beside and renamed last, so an interruption leaves nothing that looks finished.
        uniform: one rank, the largest, for all sites (the others padded with zeros), and no patterns. By default every site
            has its own rank, in `rank_pattern` and `alpha_pattern`.
        server_ranks: uniform, at the next rank that servers reserve room for: 8, 16, 32, 64, 128, 256, 320 or 512.
        inputs: batches (keyword arguments of a forward) to prove the export on; with `labels`, losses are measured too. By
            default rows of a run's own validation data, or numbers drawn from seed 0 where no run is known.
        verify: prove it. False for models that do not fit into memory twice; the card says so.
        dtype: of the file; float32, or bfloat16 or float16, whose loss is measured.
        adapter: which adapters of a model in memory: by default the active ones. Several become one LoRA, their slots side by
            side, which computes their sum.
        approximate: "mean-gate" fixes the routers of HydraLoRA at their mean output over `data`; nothing else is approximated.
        data: batches, or a data file (with a run or adapter folder), for the mean gates.
        rows: how many rows of a data file to take.
        base: where the base lies, if not where the model or run says; "memory" proves on the weights in memory, saved for the
            length of the proof.
        base_name: what adapter_config.json calls the base, such as a hub id. Folders of this machine are never written.
        overwrite: replace an earlier export in `out`; anything else that lies there is never replaced.

    Returns:
        What was written and measured; `.record()` is plain data.

    Raises:
        MergeError: a routed adapter without `approximate`.
        AdapterError: nothing to export, a rank above 512 with `server_ranks`, or the folder computes something else (nothing is
            left behind).
        ConfigError: an argument that cannot work.
        RunError: `out` holds something already, or cannot be written.
    """
    if approximate is not None and approximate != _lora.MEAN_GATE:
        raise ConfigError(
            f"approximate={approximate!r} is not an approximation: {suggest(str(approximate), [_lora.MEAN_GATE])}"
        )
    if (approximate is None) != (data is None):
        raise ConfigError(
            "approximate='mean-gate' and data belong together: the data is what the mean gates are measured on; give both or "
            "neither."
        )
    if rows < 1:
        raise ConfigError(f"rows={rows} leaves nothing to measure the mean gates on: give at least 1.")
    chosen = dtype_of(dtype) or torch.float32
    source, place = read(model_or_folder, adapter, base), Path(out)
    check_out(place, source.folder, overwrite, source.base)
    _lora.check_routed(source, approximate is not None)
    _lora.check_vocabulary(source)
    gates = None
    if data is not None:
        gates = (
            data_of(source, str(data), rows)
            if isinstance(data, (str, Path))
            else Inputs(checked(data), "the data given")
        )
    choices = _lora.Choices(uniform, server_ranks, verify, chosen, base_name)
    return _lora.export(source, place, choices, None if inputs is None else inputs_of(source, inputs), gates)


def merge(
    model_or_folder: nn.Module | Folder,
    out: Folder,
    dtype: str | torch.dtype | None = None,
    *,
    inputs: Batches | None = None,
    verify: bool = True,
    accept_loss: bool = False,
    adapter: str | Sequence[str] | None = None,
    original: Folder | None = None,
    base: Folder | None = None,
    overwrite: bool = False,
) -> Merge:
    """Write the base model with an adapter's update added to its weights, as a folder that transformers loads.

    The sum is made in fp32 from the weights as they are without any adapter and rounded once. What rounding loses of ‖ΔW‖ (per site
    and in all) and of the change of the logits is measured and in the record.

    Args:
        model_or_folder: a model with weftlora adapters in it (it stays as it is), a run folder or an adapter folder.
        out: the new folder; written beside and renamed last.
        dtype: float32, bfloat16 or float16; by default that of the weights in memory. A quantised base is dequantised for it, and
            without it the sums are quantised again, which loses far more.
        inputs: batches to measure on; by default as in `export_lora`.
        verify: load the folder with stock transformers in a process of its own and measure. False for models that do not fit
            into memory twice; then ‖ΔW‖ alone decides.
        accept_loss: write the folder even if more than a tenth of the adapter's change of the logits is lost.
        adapter: which adapters of a model in memory: by default the active ones; several are added up.
        original: folder of the unquantised checkpoint to merge into instead, for a base that is quantised in memory.
        base: where the base lies, if not where the run says.
        overwrite: replace an earlier export in `out`; anything else that lies there is never replaced.

    Returns:
        What was written and measured; `.record()` is plain data.

    Raises:
        MergeError: a routed adapter, a base that takes no update, or a loss above the limit (nothing is left behind).
        AdapterError, ConfigError, RunError: as in `export_lora`.
        ModelError: `original` is not the checkpoint of this base.
    """
    chosen = dtype_of(dtype)
    source, place = read(model_or_folder, adapter, base), Path(out)
    check_out(place, source.folder, overwrite, source.base)
    checkpoint = None if original is None else Checkpoint(original)
    choices = _merged.Choices(chosen, verify, accept_loss, checkpoint)
    return _merged.merge(source, place, choices, None if inputs is None else inputs_of(source, inputs))


def push(
    folder: Folder,
    repo: str,
    *,
    base_name: str | None = None,
    private: bool = True,
    message: str = "Upload with weftlora",
) -> Pushed:
    """Put an adapter or an export onto the hub, in a repository that is made for it unless it is there.

    A run's adapter is what goes there, not its checkpoints or logs. Nothing names a folder of this machine.

    Args:
        folder: a run folder, an adapter folder, or what `export_lora` or `merge` wrote.
        repo: owner/name.
        base_name: what the hub calls the base; needed where the adapter names a folder of this machine.
        private: of a repository that is made now.
        message: of the commit.

    Raises:
        AdapterError: there is no adapter.
        ConfigError: no such name, or a base that only this machine knows.
        RunError: the hub refuses it or cannot be reached. The token is the hub client's own: HF_TOKEN, or its login.
    """
    return _push(folder if isinstance(folder, Path) else Path(folder), repo, base_name, private, message)
