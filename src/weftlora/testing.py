"""The door that every term passes, weftlora's own and those of other packages: `check_term` runs the whole contract on it.

    from weftlora.testing import check_term

    def test_top2_keeps_the_contract():
        check_term(Top2(after=2), card="docs/top2.md")

The term is put into a tiny Llama of random weights. No network, no pytest; a failed check is an `AssertionError` whose message says
which part of the contract is broken. A term that acts over time is given with times within the first `STEPS` steps.
"""

from __future__ import annotations

import base64
import copy
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, TaskType, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weftlora
from weftlora.adapted.layer import WeftLayer
from weftlora.adapter import site
from weftlora.adapter.spec import WeftConfig, decode_choice, encode_choice, read_config
from weftlora.errors import ConfigError, MergeError, WeftError
from weftlora.host.attach import schedules
from weftlora.kernel.switches import use_reference
from weftlora.terms import registry
from weftlora.terms.layers import SearchedLayers
from weftlora.terms.structure import OutsideTerm

__all__ = ["STEPS", "Checked", "check_processes", "check_term"]

STEPS = 8
"""Optimiser steps of a check's training; what a term does over time must be due within them."""
SECONDS = 240
"""How long the two processes of `check_processes` may take together."""
LR = 1e-2
TO_FILL_IN = re.compile(r"\bTODO\b|\bFILL IN\b", re.IGNORECASE)


@dataclass(frozen=True)
class Checked:
    """What was found: the parts of the contract that were held, and what the term has to say for itself."""

    term: str
    axis: str
    held: tuple[str, ...]
    notes: dict[str, str] = field(default_factory=dict)
    """"events": what happened in the training; "merge", "export": why the term does neither, where it does not; "reference": that it
    runs outside the kernel; "training": what has to come before it."""


def check_term(
    term: Any,
    *,
    card: str | Path | None = None,
    processes: bool = True,
    targets: Sequence[str] = ("q_proj", "down_proj"),
    **fields: Any,
) -> Checked:
    """Run the whole contract on a term.

        a frozen dataclass of plain data     through JSON and back it is the same; unknown fields are refused
        identity at the start                the adapted model computes what the base does, bit for bit
        search, where one comes first        gates start at 1, their gradient is theirs, what is chosen is there, and again the same
        training                             the loss falls; gradients reach all that trains, and nothing else moves
        events                               each is plain data, and none is left undone
        reference                            the fast path computes what the equation says, gradients too
        saving                               its tensors are those that it names; from_pretrained, load_adapter and transformers'
                                             load_adapter give equal logits
        copying                              a copy by parameters, as trl makes a reference, by state dict and by deepcopy gives
                                             equal logits
        resuming                             a run that was stopped and continued ends in the same adapter
        merging, export                      are exact, or refused with the term's own reason
        two processes                        data-parallel training ends in the adapter of one process
        the card                             its page names the term and its equation, and leaves nothing to fill in

    Args:
        term: an instance, with times that come within the first `STEPS` optimiser steps.
        card: the term's page. Without one it is not checked.
        processes: also train in two processes of their own, which import the term's module (half a minute).
        targets: the modules that are adapted.
        fields: of `WeftConfig`, the other axes among them.

    Returns:
        What was checked, and the reasons that the term gave.

    Raises:
        AssertionError: a part of the contract is broken.
        ConfigError: the term goes into no config.
    """
    trial = _Trial(term, tuple(targets), fields)
    axis = trial.axis
    held: list[str] = []
    notes: dict[str, str] = {}
    checks: list[tuple[str, Callable[[_Trial, dict[str, str]], None]]] = [
        ("a frozen dataclass of plain data", _check_plain),
        ("identity at the start", _check_identity),
        *([("search", _check_search)] if trial.search is not None else []),
        ("training", _check_training),
        ("reference", _check_reference),
        ("saving", _check_saving),
        ("copying", _check_copying),
        ("resuming", _check_resuming),
        ("merging", _check_merging),
        ("export", _check_export),
    ]
    for name, check in checks:
        with _about(trial, name):
            check(trial, notes)
        held.append(name)
    if processes:
        check_processes([term], targets=targets, **fields)
        held.append("two processes")
    if card is not None:
        with _about(trial, "the card"):
            _check_card(trial, Path(card))
        held.append("the card")
    return Checked(str(trial.encoded["kind"]), axis, tuple(held), notes)


@contextmanager
def _about(trial: _Trial, part: str) -> Iterator[None]:
    """Say of a failure which term and which part of the contract it is about."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{type(trial.term).__name__}, {part}: {error}") from error


def _require(condition: bool, sentence: str) -> None:
    if not condition:  # assert vanishes under -O
        raise AssertionError(sentence)


# ---------------------------------------------------------------------- what a term is tried in


@dataclass
class _Trial:
    """A term in a config, and everything that a check needs to try it."""

    term: Any
    targets: tuple[str, ...]
    fields: Mapping[str, Any]
    _trained: PeftModel | None = None

    @property
    def axis(self) -> str:
        axis = registry.axis_of(type(self.term))
        if axis is None:
            raise ConfigError(
                f"{type(self.term).__name__} is not a choice of any axis: inherit from the class of its axis, such as "
                "weftlora.terms.structure.Structure."
            )
        return axis

    @property
    def search(self) -> SearchedLayers | None:
        return self.config().layers.search

    @property
    def encoded(self) -> dict[str, Any]:
        return cast("dict[str, Any]", encode_choice(self.term))

    def config(self) -> WeftConfig:
        settings = {"r": 4, "target_modules": list(self.targets), "task_type": TaskType.CAUSAL_LM, **self.fields}
        return WeftConfig(**{**settings, self.axis: self.term})

    def adapted(self) -> PeftModel:
        """A fresh base with a fresh adapter, both the same every time."""
        base = _base()
        torch.manual_seed(0)
        return cast(PeftModel, get_peft_model(base, self.config()))

    def ready(self, total: int = STEPS) -> PeftModel:
        """The same, after what has to come before training, told how long it will be and given rows to measure on."""
        model = self.adapted()
        if _waits(model):
            model = cast(PeftModel, weftlora.second_stage(model, _searched(model)))
        _attach(model, total)
        return model

    def trained(self) -> PeftModel:
        """An adapter whose run is over, in evaluation mode. Checks may use it and must leave it as it is."""
        if self._trained is None:
            model = self.ready()
            _train(model, _optimizer(model), range(STEPS))
            self._trained = model.eval()
        return self._trained


def _base() -> LlamaForCausalLM:
    """A tiny Llama, the same every time: 2 layers, hidden 32, grouped-query attention."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cast(LlamaForCausalLM, LlamaForCausalLM(LlamaConfig(**size, **heads, **special)).eval())


def _ids(rows: int, seed: int) -> Tensor:
    return torch.randint(3, 64, (rows, 7), generator=torch.Generator().manual_seed(seed))


def _batch() -> dict[str, Tensor]:
    ids = _ids(4, 1)
    return {"input_ids": ids, "labels": ids}


def _rows() -> list[dict[str, Tensor]]:
    return [{"input_ids": row, "labels": row} for row in _ids(12, 2)]


def _logits(model: nn.Module) -> Tensor:
    training = model.training
    model.eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=_batch()["input_ids"]).logits
    model.train(training)
    return out


def _params(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".weft_site." not in name}


def _waits(model: nn.Module) -> bool:
    """Whether training is refused before a search."""
    return any(found.awaits_search for found in _sites(model))


def _searched(model: nn.Module) -> weftlora.Selection:
    torch.manual_seed(0)
    return weftlora.search_layers(model, _rows(), batch_size=2, accumulation=1, lr=LR)


def _sites(model: nn.Module) -> list[site.Site]:
    layers = [module for module in model.modules() if isinstance(module, WeftLayer)]
    return [cast(site.Site, found) for layer in layers for found in layer.weft_site.values()]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weftlora.param_groups(model, lr=LR))


def _attach(model: nn.Module, total: int) -> None:
    found = schedules(model)
    if not found:
        return
    needs = any(_takes_rows(config) for config in cast(Any, model).peft_config.values())
    weftlora.attach(model, total_steps=total, steps_per_epoch=total, validation=_rows() if needs else None)


def _takes_rows(config: WeftConfig) -> bool:
    return config.ranks.needs_data


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Sequence[int], run: nn.Module | None = None,
           batch: dict[str, Tensor] | None = None) -> list[float]:  # fmt: skip
    """Train these steps of a run on one batch; what a step draws depends on its number alone. The losses."""
    losses, batch = [], batch or _batch()
    model.train()
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        loss = (run or model)(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _adapter(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor of the adapter, by name."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if ".weft_site." in name}


def _differing(a: Mapping[str, Tensor], b: Mapping[str, Tensor], tolerance: float = 0.0) -> list[str]:
    """The names of tensors that are not the same in both."""
    shared = a.keys() & b.keys()
    apart = [name for name in shared if not _close(a[name], b[name], tolerance)]
    return sorted([*(a.keys() ^ b.keys()), *apart])


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    if not tolerance or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=0.0, atol=tolerance)


# ---------------------------------------------------------------------- the contract


def _check_plain(trial: _Trial, notes: dict[str, str]) -> None:
    registry.check_form(type(trial.term))
    about = vars(type(trial.term)).get("__doc__") or ""
    _require(bool(about) and not about.startswith(f"{type(trial.term).__name__}("), "its class says nothing of itself.")
    try:
        trial.term.label()
    except AttributeError as error:
        raise AssertionError(f"its headline names a field that it does not have ({error}).") from None
    trial.config()  # from now on its name is known here
    through = json.loads(json.dumps(trial.encoded))
    _require(
        decode_choice(trial.axis, through) == trial.term,
        f"{trial.term!r} is read back from {through} as another term: convert fields in __post_init__.",
    )
    try:
        decode_choice(trial.axis, {**through, "no_such_field": 1})
    except ConfigError:
        pass
    else:
        raise AssertionError("a field that it does not have is taken without a word.")
    with tempfile.TemporaryDirectory() as folder:
        trial.config().save_pretrained(folder)
        _require(
            getattr(read_config(folder), trial.axis) == trial.term, "adapter_config.json is read back as another term."
        )


def _check_identity(trial: _Trial, notes: dict[str, str]) -> None:
    model, expected = trial.adapted(), _logits(_base())
    for found in _sites(model):
        _require(
            isinstance(found.structure, OutsideTerm) == found.outside,
            "the class of its sites inherits from OutsideTerm and it does not say so, or the other way round: write outside = True in "
            "the choice exactly where its sites have an update of their own.",
        )
    _require(torch.equal(_logits(model), expected), "a fresh adapter does not compute exactly what the base does.")
    if _waits(model):
        notes["training"] = "a search comes first"
        return
    with torch.no_grad():
        trained = model.train()(input_ids=_batch()["input_ids"]).logits
    _require(torch.equal(trained, expected), "in training mode a fresh adapter is not exactly the base.")


def _check_search(trial: _Trial, notes: dict[str, str]) -> None:
    search = cast(SearchedLayers, trial.search)
    model = trial.adapted()
    _require(_waits(model), "it has a search, and training does not wait for it.")
    start = search.gates(torch.zeros(5, dtype=torch.float64))
    _require(torch.equal(start, torch.ones_like(start)), f"its gates start at {start.tolist()}, not at 1 where α = 0.")
    alpha = torch.tensor([0.3, -0.2, 0.0, 0.5, -0.6], dtype=torch.float64, requires_grad=True)
    slope = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=torch.float64)
    gates = search.gates(alpha)
    [expected] = torch.autograd.grad((gates * slope).sum(), alpha)
    with torch.no_grad():
        h, nothing = gates * slope, torch.zeros_like(slope)
        given = search.gradient(h, alpha) - search.gradient(nothing, alpha)
    _require(
        _close(given, expected, 1e-9),
        f"its gradient is not that of its gates: {given.tolist()} where autograd gives {expected.tolist()}.",
    )
    first = _searched(model)
    _require(bool(first.chosen), "its search selects nothing.")
    _require(_searched(trial.adapted()).layers == first.layers, "the same search again selects something else.")
    try:
        told = search.selecting(1).selects
    except ConfigError:
        return
    _require(told == 1, f"made to select one group, it says that it selects {told}.")


def _check_training(trial: _Trial, notes: dict[str, str]) -> None:
    model = trial.ready()
    params, before = _params(model), _base_tensors(model)
    _require(bool(params), "nothing of it is trained.")
    if strange := [name for name in params if ".weft_site." not in name]:
        raise AssertionError(f"{strange[0]} is trained, and is not a tensor of the adapter.")
    optimizer, reached, losses = _optimizer(model), set(), []
    for step in range(STEPS):
        losses += _train(model, optimizer, [step])
        reached |= {name for name, p in params.items() if p.grad is not None and bool(p.grad.any())}
        others = [name for name, p in model.named_parameters() if name not in params and p.grad is not None]
        _require(not others, f"a gradient reaches {others[:1]}, which is frozen.")
    if missed := sorted(params.keys() - reached):
        raise AssertionError(f"no gradient reaches {missed[0]} in {STEPS} steps: freeze it (a buffer), or use it.")
    _require(all(torch.isfinite(p).all() for p in params.values()), "a parameter is not a number any more.")
    _require(losses[-1] < losses[0] - 1e-3, f"the loss does not fall: {losses[0]:.4f} to {losses[-1]:.4f}.")
    if moved := _differing(before, _base_tensors(model)):
        raise AssertionError(f"training has changed {moved[0]} of the base.")
    _check_events(model, notes)


def _check_events(model: nn.Module, notes: dict[str, str]) -> None:
    told: list[str] = []
    for schedule in schedules(model).values():
        waiting = [controller.what for controller in schedule.pending()]
        _require(
            not waiting, f"{' and '.join(waiting)} has not happened in {STEPS} steps: give the term times within them."
        )
        for event in schedule.events:
            _require(json.loads(json.dumps(event)) == event, f"the event {event!r} is not plain data.")
            told.append(str(event["event"]))
    if told:
        notes["events"] = ", ".join(dict.fromkeys(told))


def _check_reference(trial: _Trial, notes: dict[str, str]) -> None:
    model = trial.trained()
    found = {}
    for name, on in (("node", False), ("reference", True)):
        model.zero_grad()
        with use_reference(on):
            out = model(**_batch())
            out.loss.backward()
        grads = {n: p.grad.clone() for n, p in _params(model).items() if p.grad is not None}
        found[name] = (out.logits.detach(), grads)
    model.zero_grad()
    _check_said_once(model, notes)
    (node, node_grads), (reference, reference_grads) = found["node"], found["reference"]
    _require(_close(node, reference, 2e-5), f"the fast path is {_apart(node, reference):.1e} from the equation.")
    if apart := _differing(node_grads, reference_grads, 2e-5):
        raise AssertionError(f"the gradient of {apart[0]} on the fast path is not that of the equation.")


def _check_said_once(model: nn.Module, notes: dict[str, str]) -> None:
    """What runs beside the kernel says so, once."""
    site._say_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _logits(model)
        _logits(model)
    said = [str(w.message) for w in caught if "outside the equation" in str(w.message)]
    outside = any(s.outside for s in _sites(model))
    _require(len(said) == int(outside), f"that it runs beside the kernel is said {len(said)} times, not once.")
    if said:
        notes["reference"] = said[0]


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def _check_saving(trial: _Trial, notes: dict[str, str]) -> None:
    model = trial.trained()
    expected = _logits(model)
    _require(not torch.equal(expected, _logits(_base())), "a trained adapter computes what the base does.")
    _check_names(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for name, load in _PATHS.items():
            torch.manual_seed(123)  # what is drawn and not saved would now be drawn differently
            loaded = load(folder)
            _require(torch.equal(_logits(loaded), expected), f"{name} gives other logits than were saved.")
            if apart := _differing(_nameless(_adapter(model)), _nameless(_adapter(loaded))):
                raise AssertionError(f"{name} gives another {apart[0]} than was saved.")


def _check_copying(trial: _Trial, notes: dict[str, str]) -> None:
    model = copy.deepcopy(trial.trained())
    expected = _logits(model)
    peft = cast(PeftModel, model)
    _require(torch.equal(_logits(copy.deepcopy(model)), expected), "a deep copy gives other logits.")
    peft.add_adapter("ref", peft.peft_config["default"])
    for name, parameter in model.named_parameters():  # as trl's trainers do
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    peft.set_adapter("ref")
    _require(torch.equal(_logits(model), expected), "a copy by parameters gives other logits.")
    peft.add_adapter("fresh", peft.peft_config["default"])
    peft.set_adapter("fresh")
    _require(torch.equal(_logits(model), _logits(_base())), "another adapter of the same config does not start afresh.")
    set_peft_model_state_dict(peft, get_peft_model_state_dict(peft, adapter_name="default"), adapter_name="fresh")
    _require(torch.equal(_logits(model), expected), "a copy by state dict gives other logits.")


def _check_names(model: nn.Module) -> None:
    """Every tensor of the adapter is one that a choice says it keeps, and the structure's are all there."""
    for config in cast("dict[str, WeftConfig]", cast(Any, model).peft_config).values():
        structure = config.structure
        kept = set().union(*(found.structure.state_dict() for found in _sites(model)))
        _require(
            kept == structure.tensors() <= set(structure.saves),
            f"its sites keep {', '.join(sorted(kept))}, and it says {', '.join(sorted(structure.tensors()))} of "
            f"{', '.join(sorted(structure.saves))}: saves, tensors() and what build makes must agree.",
        )
        said = {"steps"}.union(*(choice.saves.keys() | choice.counts.keys() for choice in config.choices().values()))
        there = {name.rpartition(".")[2] for name in _adapter(model)}
        _require(
            there <= said,
            f"the adapter keeps {', '.join(sorted(there - said))}, which no choice names: add it to `saves`, or to `counts` if the "
            "first site keeps it for all.",
        )


def _nameless(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by module and place in the site: hosts call adapters differently, and wrap the model or not."""
    plain = {re.sub(r"\.weft_site\.[^.]+\.", ".weft_site.", name): tensor for name, tensor in tensors.items()}
    return {name.removeprefix("base_model.model."): tensor for name, tensor in plain.items()}


def _by_from_pretrained(folder: str) -> nn.Module:
    return cast(nn.Module, PeftModel.from_pretrained(_base(), folder))


def _by_load_adapter(folder: str) -> nn.Module:
    model = get_peft_model(_base(), WeftConfig(target_modules=["v_proj"]))
    model.load_adapter(folder, "other")
    model.set_adapter("other")
    model.delete_adapter("default")
    return cast(nn.Module, model)


def _by_transformers(folder: str) -> nn.Module:
    model = _base()
    model.load_adapter(folder)
    return model


_PATHS: dict[str, Callable[[str], nn.Module]] = {
    "PeftModel.from_pretrained": _by_from_pretrained,
    "load_adapter": _by_load_adapter,
    "transformers' load_adapter": _by_transformers,
}


def _check_resuming(trial: _Trial, notes: dict[str, str]) -> None:
    expected = _adapter(trial.trained())
    for stopped in (1, STEPS // 2, STEPS - 1):  # before, between and after what happens
        model = trial.ready()
        optimizer = _optimizer(model)
        _train(model, optimizer, range(stopped))
        with tempfile.TemporaryDirectory() as folder:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is not yet what it will be
                model.save_pretrained(folder)
            torch.save(optimizer.state_dict(), Path(folder) / "optimizer.pt")
            state = json.loads(json.dumps(weftlora.state_dict(model)))
            torch.manual_seed(123)
            again = PeftModel.from_pretrained(_base(), folder, is_trainable=True)
            _attach(again, STEPS)
            if state:
                weftlora.load_state_dict(again, state)
            continued = _optimizer(again)
            continued.load_state_dict(torch.load(Path(folder) / "optimizer.pt", weights_only=True))
        _train(again, continued, range(stopped, STEPS))
        if apart := _differing(expected, _adapter(again)):
            raise AssertionError(
                f"a run that was stopped after step {stopped} and continued ends with another {apart[0]}: what must survive a "
                "restart belongs into a buffer."
            )


def _check_merging(trial: _Trial, notes: dict[str, str]) -> None:
    model = trial.trained()
    expected = _logits(model)
    try:
        model.merge_adapter()
    except MergeError as error:
        notes["merge"] = _reason(error)
        return
    try:
        merged = _logits(model)
    finally:
        model.unmerge_adapter()
    _require(_close(merged, expected, 1e-4), f"merged, it is {_apart(merged, expected):.1e} from what it was.")
    _require(torch.equal(_logits(model), expected), "after unmerging it is not what it was.")


def _check_export(trial: _Trial, notes: dict[str, str]) -> None:
    model = trial.trained()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "exported"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                weftlora.export_lora(model, out, base="memory", verify=False)
        except MergeError as error:
            notes["export"] = _reason(error)
            _require(not out.exists(), "a refused export leaves a folder behind.")
            return
        stock = PeftModel.from_pretrained(_base(), out)
        _require(
            not any(isinstance(module, WeftLayer) for module in stock.modules()), "the export is not a stock LoRA."
        )
        apart = _apart(_logits(stock), _logits(model))
        _require(apart < 1e-4, f"stock peft computes something else with the export: {apart:.1e} apart.")


def _reason(error: WeftError) -> str:
    sentence = " ".join(str(error).split())
    _require(len(sentence) > 30, f"the refusal gives no reason: {sentence!r}.")
    return sentence


def _check_card(trial: _Trial, path: Path) -> None:
    _require(path.is_file(), f"there is no page {path}.")
    text = path.read_text(encoding="utf-8")
    name = type(trial.term).__name__
    _require(name in text, f"{path} does not say how to write the term: {name}.")
    _require("```" in text, f"{path} shows neither the equation nor an example in a code block.")
    _require(
        not TO_FILL_IN.search(type(trial.term).__doc__ or ""), "the docstring of its class is still to be filled in."
    )
    if found := TO_FILL_IN.search(text):
        line = text[: found.start()].count("\n") + 1
        raise AssertionError(f"{path} line {line} is still to be filled in.")


# ---------------------------------------------------------------------- two processes


def check_processes(
    terms: Sequence[Any], *, targets: Sequence[str] = ("q_proj", "down_proj"), seconds: float = SECONDS, **fields: Any
) -> None:
    """Train each of the terms data-parallel in two processes over gloo: both must end in the adapter that one process ends in.

    The processes are started anew and import the modules of the terms, so that these must be in files.

    Raises:
        AssertionError: the processes differ, fail, or take longer than `seconds`.
    """
    try:
        sent = base64.b64encode(pickle.dumps([_Trial(term, tuple(targets), fields) for term in terms])).decode()
    except (pickle.PicklingError, AttributeError) as error:
        raise AssertionError(
            f"two processes: the term cannot be sent to another process ({error}): put its class into a module of its own."
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([*[entry for entry in sys.path if entry], os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        (Path(folder) / "terms").write_text(sent, encoding="ascii")
        command = [sys.executable, "-c", "from weftlora.testing import _be; _be()", folder]
        logs = [open(Path(folder) / f"{rank}.log", "w+", encoding="utf-8") for rank in (0, 1)]  # noqa: SIM115
        began = [
            subprocess.Popen([*command, str(rank)], env=env, stdout=logs[rank], stderr=subprocess.STDOUT)
            for rank in (0, 1)
        ]
        try:
            codes = _ended(began, seconds)
        finally:
            for process in began:
                process.kill()
                process.wait()
            said = []
            for log in logs:
                log.seek(0)
                said.append(log.read()[-1500:])
                log.close()
        if codes is None:
            heard = " ".join(text for text in said if text) or "Neither has said anything."
            raise AssertionError(f"two processes: they have not ended after {seconds:g} seconds. {heard}")
        if any(codes):
            failed = next(rank for rank, code in enumerate(codes) if code)
            raise AssertionError(f"two processes: one has failed. {said[failed] or max(said, key=len)}")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    for rank, problems in enumerate(found):
        for name, problem in problems.items():
            raise AssertionError(f"{name}, two processes: in process {rank} {problem}")


def _ended(began: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int] | None:
    """The exit codes of the processes, of which the first that fails ends the wait for the others: they would wait for it until they
    are told not to. None if they are still at work after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in began]
        if any(codes) or None not in codes:
            return [code or 0 for code in codes]
        time.sleep(0.05)
    return None


def _be() -> None:
    """Be one of the two processes: FOLDER RANK."""
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    if (
        sys.platform == "linux"
    ):  # gloo would ask a name server for this machine's name, and talk to itself through its network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    trials = pickle.loads(base64.b64decode((folder / "terms").read_text(encoding="ascii")))
    alone = [_adapter(trial.trained()) for trial in trials]  # before the group: what one process ends in
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    problems: dict[str, str] = {}
    for trial, expected in zip(trials, alone, strict=True):
        model = trial.ready()
        half = {name: rows[2 * rank : 2 * rank + 2] for name, rows in _batch().items()}
        parallel = DistributedDataParallel(model)
        _train(model, _optimizer(model), range(STEPS), parallel, half)
        mine = _adapter(model)
        theirs = [None, None]
        dist.all_gather_object(theirs, mine)
        name = type(trial.term).__name__
        if apart := _differing(cast(Any, theirs[1 - rank]), mine):
            problems[name] = f"{apart[0]} is not what it is in the other: both must draw and decide alike."
        elif apart := _differing(expected, mine, 2e-3):
            problems[name] = f"{apart[0]} is not what one process ends in."
    (folder / f"{rank}.json").write_text(json.dumps(problems), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()
