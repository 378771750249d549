"""What an export says of itself: plain numbers for the screen and `--json`, and the model card of its folder.

The card says how the adapter was trained, how to load it and what was measured. No path of this machine.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from peft import LoraConfig

from weftlora.adapted.updates import base_of
from weftlora.adapter.spec import encode_choice
from weftlora.disk.ownership import EXPORTED
from weftlora.export.folder import hub_id
from weftlora.export.source import Source
from weftlora.foreign_text import for_markdown, in_code, visible
from weftlora.records import Record
from weftlora.runs.identity import Origin, origin_of
from weftlora.terms.axes import AXES
from weftlora.version import __version__


@dataclass(frozen=True)
class Proof:
    """How far the folder is from the live adapter, as measured through stock libraries alone. Logits in fp32."""

    inputs: str
    """What it was measured on, in words."""
    error: float
    """max |folder − live| / max |live|, over logits."""
    adapter_effect: float
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
class LoraExport(Record):
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
class Merge(Record):
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


def lora(export: LoraExport, source: Source, config: LoraConfig) -> str:
    """README.md of a LoRA folder."""
    ranks = Counter(export.ranks.values())
    shown = ", ".join(f"{rank} ({count} {'site' if count == 1 else 'sites'})" for rank, count in sorted(ranks.items()))
    facts = {
        "layout": export.layout,
        "ranks": shown,
        "scale": "1 (lora_alpha = r; every scale and gate is folded into B)",
        "numbers": f"{export.parameters:,} in A and B, {export.dtype}",
        "modules left out": f"{len(export.left_out)} without a live rank slot" if export.left_out else None,
        "in full": ", ".join(export.whole_modules) or None,
    }
    sections = [
        _head(
            export.adapters,
            source,
            ["lora", "peft", "weftlora"],
            config.base_model_name_or_path,
            "A stock LoRA: it loads without `import weftlora`.",
        ),
        _table(facts),
        "## Loading it\n\n" + _loading(source, config, export.layout == "uniform"),
        "## How it was trained\n\n" + _training(source),
        "## What was measured\n\n" + "\n\n".join([_proof(export.proof), *_costs(export)]),
        _versions(),
    ]
    return "\n\n".join(sections) + "\n"


def merged(export: Merge, source: Source) -> str:
    """README.md of a folder of merged weights."""
    lost = f"‖ΔW‖ lost to rounding into {export.dtype}: {export.lost:.3%} over all modules"
    nf4 = "" if export.lost_logits_nf4 is None else f" and {export.lost_logits_nf4:.1%} of the change of the logits"
    logits = "" if export.lost_logits is None else f"; of the change of the logits: {export.lost_logits:.3%}"
    facts = {
        "weights": f"{export.dtype}; added in float32 to {export.weights}, rounded once",
        "modules merged": str(len(export.sites)),
        "lost": lost + logits + (" (accepted when it was exported)" if export.accepted else ""),
        "if quantised to NF4 from here": f"{export.lost_nf4:.1%} of ‖ΔW‖{nf4} would be lost (blocks of 64)",
    }
    kind = type(base_of(source.model)).__name__
    snippet = f"from transformers import {kind}\n\nmodel = {kind}.from_pretrained('path/to/this/folder')"
    sections = [
        _head(
            export.adapters,
            source,
            ["weftlora"],
            None,
            "The base model with the adapter's update added to its weights: it loads without `import weftlora`, and without peft.",
        ),
        _table(facts),
        f"## Loading it\n\n```python\n{snippet}\n```",
        "## How it was trained\n\n" + _training(source),
        "## What was measured\n\n" + _proof(export.proof),
        _versions(),
    ]
    return "\n\n".join(sections) + "\n"


def base_name(source: Source) -> str:
    """The base in a word or two: its hub id, or the last part of its folder."""
    kind = type(base_of(source.model)).__name__
    if source.base is None:
        return f"a {kind} that was only in memory"
    if (origin := origin_of(source.base)) is not None:
        return f"{origin.file} ({kind})"
    return hub_id(source.base) or f"{Path(source.base).name} ({kind})"


def _head(adapters: tuple[str, ...], source: Source, tags: list[str], base: str | None, first: str) -> str:
    """The metadata, the first line that a reader sees, and the title."""
    front = [f"base_model: {_in_yaml(base)}"] if base else []
    front += ["library_name: peft"] if "peft" in tags else ["library_name: transformers"]
    front += ["tags:", *(f"- {tag}" for tag in tags)]
    what = " + ".join(_method(source, adapter) for adapter in adapters)
    title = f"# {for_markdown(what)} on {for_markdown(base_name(source))}"
    return "---\n" + "\n".join(front) + f"\n---\n\n{first}\n\n{title}"


def _in_yaml(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) is not None
    return text if plain else yaml.safe_dump(visible(text), default_style='"', width=10**6, allow_unicode=True).strip()


def _method(source: Source, adapter: str) -> str:
    if source.run is not None and (recipe := source.run.recipe["adapter"].get("recipe")):
        return str(recipe)
    config = _config(source, adapter)
    return "a weftlora adapter" if config is None else config.structure.title


def _config(source: Source, adapter: str) -> Any:
    return getattr(source.model, "peft_config", {}).get(adapter)


def _loading(source: Source, config: LoraConfig, uniform: bool) -> str:
    kind = type(base_of(source.model)).__name__
    base = config.base_model_name_or_path or "path/to/the/base/model"
    labels = f", num_labels={base_of(source.model).config.num_labels}" if kind.endswith("Classification") else ""  # type: ignore[union-attr]
    origin = None if source.base is None else origin_of(source.base)
    if origin is not None:
        base = "path/to/its/folder"
        labels += f", gguf_file={origin.file!r}"
    lines = [
        "from peft import PeftModel",
        f"from transformers import {kind}",
        "",
        f"base = {kind}.from_pretrained({base!r}{labels})",
        "model = PeftModel.from_pretrained(base, 'path/to/this/folder')",
    ]
    return "```python\n" + "\n".join(lines) + "\n```" + ("" if origin is None else "\n\n" + _quantised(origin, uniform))


def _quantised(origin: Origin, uniform: bool) -> str:
    """What a reader should know of a base that was a quantised file."""
    llama = (
        "llama.cpp applies this LoRA to that very file, once its `convert_lora_to_gguf.py` has made a GGUF file of it."
        if uniform
        else "llama.cpp takes one rank for all modules: for it, export with `--uniform`."
    )
    return (
        f"The base is the file {in_code(origin.file)} (SHA-256 {in_code(origin.sha256)}), whose weights were dequantised to bfloat16 "
        f"for training. {llama}"
    )


def _training(source: Source) -> str:
    parts = []
    if (run := source.run) is not None:
        facts = {
            "recipe": str(run.recipe["adapter"].get("recipe", "axes, as below")),
            "base": run.base["kind"],
            "taken from": None if source.is_outcome or source.folder is None else f"{source.folder.name} of the run",
            "optimiser steps": str(run.steps) if source.is_outcome else None,
            "seed": str(run.seed),
            "trainable parameters": f"{run.parameters.get('trainable', 0):,}",
            "data": ", ".join(
                f"{Path(name).name} (sha256 {digest[:12]})" for name, digest in run.data.get("hashes", {}).items()
            )
            or None,
            **{
                name.replace("_", " "): _number(value)
                for name, value in sorted(run.metrics.items())
                if source.is_outcome
            },
            "versions": ", ".join(f"{name} {version}" for name, version in sorted(run.versions.items())),
        }
        parts.append(_table(facts))
    for adapter in source.adapters:
        if (config := _config(source, adapter)) is not None:
            parts.append(_axes(adapter, config))
    return "\n\n".join(parts) or "How it was trained is not known."


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _axes(adapter: str, config: Any) -> str:
    facts = {axis: _choice(encode_choice(getattr(config, axis))) for axis in AXES}
    facts |= {"r": str(config.r), "lora_alpha": str(config.lora_alpha), "use_rslora": str(config.use_rslora)}
    return f"Adapter `{in_code(adapter)}`:\n\n" + _table(facts)


def _choice(encoded: Any) -> str:
    if encoded is None:
        return "none"
    fields = dict(encoded)
    kind = fields.pop("kind")
    return f"{kind}({', '.join(f'{key}={value!r}' for key, value in fields.items())})"


def _proof(proof: Proof | None) -> str:
    if proof is None:
        return "Not verified: it was exported with `verify=False`, so nothing compared it with the live adapter."
    inputs = for_markdown(proof.inputs)
    bound = "" if proof.tolerance is None else f" (allowed: {proof.tolerance:g})"
    return (
        f"Run by stock libraries in a process without weftlora, in float32, on {inputs}: the largest difference of a logit from "
        f"the live adapter is {proof.error:.2g} of the largest logit{bound}. The adapter itself moves logits by "
        f"{proof.adapter_effect:.2g} of it."
    )


def _costs(export: LoraExport) -> list[str]:
    parts = []
    if (found := export.rounding) is not None:
        error = (
            ""
            if found.error is None
            else f"; the largest difference of a logit becomes {found.error:.2g} of the largest logit"
        )
        parts.append(
            f"The measurement above is of the float32 values; the file holds them in {found.dtype}, which loses {found.lost:.3%} "
            f"of the update{error}."
        )
    if (fixed := export.approximation) is not None:
        losses = {"live": fixed.loss_live, "this export": fixed.loss_fixed, "no adapter": fixed.loss_base}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
        parts.append(
            "**An approximation.** The adapter is HydraLoRA, whose heads are mixed differently for every token; here they are fixed "
            f"at their mean weights over {for_markdown(fixed.gates)}. Against the live adapter the largest difference of a logit is "
            f"{fixed.error:.2g} of the largest logit, and {fixed.lost:.1%} of the adapter's change of the logits is lost"
            + (f" (loss: {shown})." if shown else ".")
            + " The measurement above compares the folder with the adapter at these fixed weights."
        )
    return parts


def _versions() -> str:
    versions = {
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{EXPORTED} {__version__}, {shown}, Python {platform.python_version()}."


def _table(facts: Mapping[str, str | None]) -> str:
    rows = "\n".join(f"| {for_markdown(name)} | {for_markdown(value)} |" for name, value in facts.items() if value)
    return f"| | |\n|---|---|\n{rows}"
