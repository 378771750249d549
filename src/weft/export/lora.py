"""A weft adapter as a stock LoRA folder.

read ─ closed forms ─ layout ─ config resolved again ─┬─ written beside ─ proved by stock peft ─ card ─ renamed
                    └─ the live adapter's logits ─────┘
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from weft.compat import REFUSED
from weft.errors import AdapterError, ConfigError, MergeError, suggest
from weft.export import card, folder, live
from weft.export.factors import Pair, closed_form, combined, common_rank
from weft.export.gates import Gates, mean_gates
from weft.export.live import Outputs
from weft.export.proof import TOLERANCE, Job, Stock
from weft.export.record import Approximation, LoraExport, Proof, Rounding
from weft.export.source import Inputs, Source, inputs_of
from weft.glue.stock import HOST, stock_config, trained_modules, without_adapters
from weft.glue.updates import base_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEAN_GATE = "mean-gate"


@dataclass(frozen=True)
class Choices:
    """How to write the folder; see `weft.export.export_lora`."""

    uniform: bool
    server_ranks: bool
    verify: bool
    dtype: torch.dtype
    base_name: str | None

    @property
    def layout(self) -> str:
        """In words, as the record has it."""
        return "server ranks" if self.server_ranks else "uniform" if self.uniform else "pattern"


def export(source: Source, out: Path, choices: Choices, inputs: Inputs | None, gates: Inputs | None) -> LoraExport:
    """Write the folder; see `weft.export.export_lora`. `gates`: what mean gates are measured on, None for an exact export."""
    check_routed(source, gates is not None)
    with live.shell(source.model, source.adapters) as own:
        inputs = inputs if inputs is not None or not choices.verify else inputs_of(source, None)
        measured = mean_gates(own, source.adapters, gates.batches) if gates is not None else {}
        found = pairs(source, measured)
        sites = {name: pair for name, pair in found.items() if pair.rank}
        if not sites:
            raise AdapterError(
                "no site of the adapter has a live rank slot, so there is nothing to export: use the base as it is."
            )
        if choices.uniform or choices.server_ranks:
            rank = common_rank(sites, choices.server_ranks)
            sites = {name: pair.padded(rank) for name, pair in sites.items()}
        config = config_of(source, {name: pair.rank for name, pair in sites.items()}, choices.base_name)
        heads = trained_modules(base_of(source.model), source.adapters)
        done: list[LoraExport] = []

        def fill(place: Path) -> None:
            save(place, config, sites, heads, torch.float32)
            truth = None if inputs is None or not choices.verify else Truth.of(own, source, inputs, measured)
            export_now = LoraExport(
                folder=out,
                adapters=source.adapters,
                layout=choices.layout,
                dtype=name_of(choices.dtype),
                ranks={name: pair.rank for name, pair in sites.items()},
                left_out=sorted(found.keys() - sites.keys()),
                parameters=sum(p.a.numel() + p.b.numel() for p in sites.values()),
                trained_modules=sorted({name.rpartition(".")[0] for name in heads}),
                proof=None if truth is None else truth.prove(own, source, place, sites),
                approximation=None if truth is None or gates is None else truth.approximation(gates, measured),
                rounding=None,
            )
            if choices.dtype != torch.float32:
                save(place, config, sites, heads, choices.dtype)
                export_now = rounded(export_now, own, source, place, sites, truth, choices.dtype)
            (place / "README.md").write_text(card.lora(export_now, source, config), encoding="utf-8")
            done.append(export_now)

        folder.write(out, fill)
    return done[0]


def check_routed(source: Source, approximate: bool) -> None:
    """Refuse a routed adapter without `approximate`, and `approximate` without one.

    Raises:
        MergeError: exact, and an adapter is routed.
        ConfigError: approximate, and none is.
    """
    routed = [
        n for layer in source.layers for n in source.adapters if n in layer.weft_site and not layer.site(n).mergeable
    ]
    if routed and not approximate:
        raise MergeError(
            f"adapter {routed[0]!r} is HydraLoRA, and {REFUSED['Hydra', 'merge']}, so there is no exact export: serve it with "
            f"weft, or take an approximation whose error is measured (approximate={MEAN_GATE!r} with data; --approximate "
            f"{MEAN_GATE} --data FILE)."
        )
    if approximate and not routed:
        raise ConfigError(
            f"approximate={MEAN_GATE!r} is for routed adapters, and this one exports exactly: leave it out."
        )


def pairs(source: Source, gates: Gates) -> dict[str, Pair]:
    """Every site's update as one pair; several adapters side by side."""
    found = {}
    for layer in source.layers:
        mine = [name for name in source.adapters if name in layer.weft_site]
        name = layer.module_name
        found[name] = combined(closed_form(layer.site(a), gates.get(a, {}).get(name)) for a in mine)
    return found


def config_of(source: Source, ranks: Mapping[str, int], base_name: str | None) -> LoraConfig:
    """The stock config, resolved again by peft's own rules.

    Raises:
        AdapterError: stock peft would read it as another adapter.
    """
    configs = [config for name in source.adapters if (config := _peft_config(source.model, name)) is not None]
    saved = sorted({module for config in configs for module in config.modules_to_save or []})
    base = base_of(source.model)
    layers = {layer.module_name: type(layer.get_base_layer()).__name__ for layer in source.layers}
    return stock_config(
        _module_names(base, set(layers)),
        ranks,
        fan_in_fan_out=any(layers[name] == "Conv1D" for name in ranks),
        task_type=configs[0].task_type if configs else None,
        modules_to_save=saved or None,
        base_model_name_or_path=base_name or _hub_id(source.base),
    )


def _peft_config(model: nn.Module, adapter: str) -> Any:
    return getattr(model, "peft_config", {}).get(adapter)


def _hub_id(base: str | None) -> str | None:
    """The base's name where it means the same on every machine; a folder's path is nobody else's business."""
    return base if base is not None and not Path(base).exists() and not Path(base).is_absolute() else None


def _module_names(base: nn.Module, sites: set[str]) -> list[str]:
    """Names of the modules that the base has without adapters."""
    inside = tuple(f"{name}." for name in sites)
    return [name for name, _ in base.named_modules() if name and not name.startswith(inside)]


def save(
    place: Path, config: LoraConfig, sites: Mapping[str, Pair], heads: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """adapter_config.json and adapter_model.safetensors as stock peft writes them.

    Raises:
        AdapterError: a value does not fit into `dtype`.
    """
    tensors = {f"{HOST}{name}.lora_A.weight": pair.a.to(dtype) for name, pair in sites.items()}
    tensors |= {f"{HOST}{name}.lora_B.weight": pair.b.to(dtype) for name, pair in sites.items()}
    if wrong := next((name for name, value in tensors.items() if not torch.isfinite(value).all()), None):
        raise AdapterError(
            f"{wrong} has values that {name_of(dtype)} cannot hold, so nothing was exported: use float32, or an adapter that has "
            "not diverged."
        )
    tensors |= {f"{HOST}{name}": value.detach().to("cpu", dtype) for name, value in heads.items()}
    config.save_pretrained(str(place))
    written = place / "adapter_config.json"
    content = json.loads(written.read_text(encoding="utf-8"))
    if isinstance(names := content["target_modules"], list):  # peft writes a set: the same export is the same file
        content["target_modules"] = sorted(names)
    written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()},
        place / "adapter_model.safetensors",
        {"format": "pt"},
    )


@dataclass(frozen=True)
class Truth:
    """The live adapter's outputs, the base's, and those of the adapter as it can be exported (its gates fixed, if it is routed)."""

    inputs: Inputs
    live: Outputs
    base: Outputs
    exact: Outputs

    @classmethod
    def of(cls, own: nn.Module, source: Source, inputs: Inputs, gates: Gates) -> Truth:
        """Run the shell; afterwards its gates are fixed."""
        first = live.run(own, inputs.batches)
        with live.switched_off(own):
            base = live.run(own, inputs.batches)
        if not gates:
            return cls(inputs, first, base, first)
        live.fix_gates(own, source.adapters, gates)
        return cls(inputs, first, base, live.run(own, inputs.batches))

    def prove(self, own: nn.Module, source: Source, place: Path, sites: Mapping[str, Pair]) -> Proof:
        """Hold the fp32 folder against the adapter.

        Raises:
            AdapterError: it is further away than `TOLERANCE`.
        """
        stock = run_stock(own, source, place, sites, self.inputs)
        proof = Proof(self.inputs.what, self.exact.furthest(stock), self.exact.furthest(self.base), TOLERANCE)
        if not proof.error <= TOLERANCE:
            raise AdapterError(
                f"the exported adapter differs from the live one by {proof.error:.2g} of the largest logit (allowed: "
                f"{TOLERANCE:g}), so it was not kept: if {_named(source.base)} is not what this model was made from, say "
                "base='memory' or the right folder; otherwise please report it."
            )
        return proof

    def approximation(self, gates: Inputs, measured: Gates) -> Approximation:
        """What fixing the gates cost."""
        moved = max(self.live.distance(self.base), 1e-30)
        return Approximation(
            gates.what,
            self.live.furthest(self.exact),
            self.live.distance(self.exact) / moved,
            self.live.loss(),
            self.exact.loss(),
            self.base.loss(),
            {name: gate.tolist() for adapter in measured.values() for name, gate in adapter.items()},
        )


def run_stock(own: nn.Module, source: Source, place: Path, sites: Mapping[str, Pair], inputs: Inputs) -> Outputs:
    """What stock peft computes from the folder, on the base that the source names (saved anew, if it is only in memory)."""
    stock = Stock(own, inputs.batches, place / folder.SCRATCH)
    base: str | Path | None = source.base
    dtype = getattr(base_of(source.model), "dtype", torch.float32)
    if base is None:
        base = place / folder.SCRATCH / "base"
        if not base.exists():
            save_base(own, source, base)
    return stock.run([Job(base, dtype, place, {name: pair.rank for name, pair in sites.items()})])[0]


def save_base(own: nn.Module, source: Source, place: Path) -> None:
    """The base model of a shell, as transformers saves it; the shell stays as it is."""
    with live.shell(own, source.adapters) as bare:
        plain: Any = without_adapters(base_of(bare), trained=False)
        plain.save_pretrained(place)


def rounded(
    exported: LoraExport,
    own: nn.Module,
    source: Source,
    place: Path,
    sites: Mapping[str, Pair],
    truth: Truth | None,
    dtype: torch.dtype,
) -> LoraExport:
    """The record with what the dtype of the file costs, against the proved fp32 one."""
    lost = whole = 0.0
    for pair in sites.values():
        less = Pair(*(t.to(dtype).double() for t in (pair.a, pair.b)))
        lost += float((less.delta() - pair.delta()).square().sum())
        whole += float(pair.delta().square().sum())
    error = None if truth is None else truth.exact.furthest(run_stock(own, source, place, sites, truth.inputs))
    found = Rounding(name_of(dtype), math.sqrt(lost / whole) if whole else 0.0, error)
    return LoraExport(**{**vars(exported), "rounding": found})


def _named(base: str | None) -> str:
    return "the base in memory" if base is None else f"the base {base}"


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype from what the user wrote. Raises ConfigError on any other than float32, bfloat16 and float16."""
    if name is None or name in DTYPES.values():
        return name  # type: ignore[return-value]
    if str(name) not in DTYPES:
        raise ConfigError(f"dtype={name!r} is no dtype to write: {suggest(str(name), DTYPES)}")
    return DTYPES[str(name)]


def name_of(dtype: torch.dtype) -> str:
    """float32, bfloat16, ..."""
    return str(dtype).removeprefix("torch.")


def given_inputs(source: Source, inputs: Iterable[Mapping[str, Any]] | Sequence[Any] | None) -> Inputs | None:
    """The caller's batches; None where there are none."""
    return None if inputs is None else inputs_of(source, inputs)
