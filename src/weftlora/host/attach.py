"""Giving an adapter its schedule, and telling a schedule what it cannot see: the length of the run, validation rows.

    weftlora.attach(model, total_steps=1000, steps_per_epoch=250, validation=rows, original="path/to/unquantised", cache="kept")

A bare loop, Trainer, SFTTrainer and accelerate need no call where times are optimiser steps. Times in fractions or epochs, and
scores of rank slots, need this one, before training; `weftlora train` makes it, and `weftlora.Callback` does in a Trainer of your own.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from weftlora.adapted.frozen_weights import Checkpoint, Decomposer, OriginalWeight
from weftlora.adapted.layer import WeftLayer, WeftLinear
from weftlora.adapted.targets import pattern_key
from weftlora.adapter.site import Site
from weftlora.adapter.spec import WeftConfig, encode_choice
from weftlora.errors import ConfigError
from weftlora.progress import Progress, ignore
from weftlora.schedule.direction_ranking import Ranker
from weftlora.schedule.launch import LaunchController, forget_moments
from weftlora.schedule.rank_slots import Scorer
from weftlora.schedule.reallocate import ReallocateController
from weftlora.schedule.schedule import Member, Schedule
from weftlora.scoring.rows import Rows, rows_of
from weftlora.scoring.scorer import Ablation, undisturbed
from weftlora.settings import is_number, is_whole
from weftlora.terms.events import Controller, Event, Launch, Length, SlotMoves, SlotScoring


@dataclass
class AdapterTimeline:
    """One adapter over time, as its choices see it when they are asked for their controllers (`weftlora.terms.events.Timeline`)."""

    members: list[Member]
    ranker: Ranker

    def launch(self, launch: Launch) -> Controller:
        """See `Timeline`: all launches share one ranking."""
        return LaunchController(launch, self.ranker)

    def move_slots(self, choice: SlotMoves) -> Controller:
        """See `Timeline`."""
        return ReallocateController(choice, self.members)

    def forget(self, parameter: nn.Parameter) -> None:
        """See `Timeline`."""
        forget_moments(parameter)


IN_TURN = ("start", "boost", "ranks", "structure", "layers")
"""The order in which axes act that are due after the same step."""


def make_schedule(layers: Sequence[WeftLayer], adapter_name: str, config: WeftConfig) -> None:
    """Hang a schedule on the first of the adapter's sites, if its config has anything that happens over time."""
    members = [member for layer in layers for member in layer.members(adapter_name)]
    timeline, choices = AdapterTimeline(members, Ranker(members, decompose=Decomposer())), config.choices()
    controllers = [c for axis in IN_TURN if axis in choices for c in choices[axis].controllers(timeline)]
    if controllers:
        said = {axis: encode_choice(choice) for axis, choice in choices.items()}
        described = json.dumps(said, sort_keys=True, default=str)
        members[0].held.schedule = Schedule(adapter_name, members, controllers, described=described)


def schedules(model: nn.Module) -> dict[str, Schedule]:
    """The schedules of all adapters in `model`, by adapter name."""
    found: dict[str, Schedule] = {}
    for layer in model.modules():
        if isinstance(layer, WeftLayer):
            for name, site in layer.weft_site.items():
                if isinstance(schedule := getattr(site, "schedule", None), Schedule):
                    found[name] = schedule
    return found


def await_copy(model: nn.Module, adapter_name: str, source: str) -> None:
    """Take over what `source` is beside its parameters, if they turn out to have been copied into `adapter_name`.

    Whoever needs an adapter twice adds one of the very same config and copies parameter after parameter, as trl's trainers make their
    reference policies. Masks, directions and frozen twins are buffers, which that leaves behind. So the first forward after the new
    adapter was added looks whether the two have equal parameters, and if so gives the new one the buffers too. An adapter that
    shares a config and no more starts afresh.

    Args:
        model: the model that the adapters are on, without peft's wrapper.
    """
    model.register_forward_pre_hook(functools.partial(_take_over, adapter_name, source), prepend=True)


def _take_over(adapter_name: str, source: str, model: nn.Module, _: Any) -> None:
    """The hook of `await_copy`, which looks once; a copy of the model has one of its own."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, functools.partial) and hook.func is _take_over and hook.args == (adapter_name, source):
            del model._forward_pre_hooks[key]
    layers = [module for module in model.modules() if isinstance(module, WeftLayer)]
    sites = [each.weft_site for each in layers if adapter_name in each.weft_site and source in each.weft_site]
    pairs = [(cast(Site, found[adapter_name]), cast(Site, found[source])) for found in sites]
    if not all(_equal(new, old) for new, old in pairs):
        return
    for new, old in pairs:
        new.awaits_search = old.awaits_search
        new.counters = set(old.counters)
        for mine, its in zip(new.modules(), old.modules(), strict=True):
            for name, buffer in its._buffers.items():
                mine._buffers[name] = None if buffer is None else buffer.detach().clone()


def _equal(new: Site, old: Site) -> bool:
    mine, its = dict(new.named_parameters()), dict(old.named_parameters())
    return mine.keys() == its.keys() and all(
        mine[name].shape == its[name].shape and bool((mine[name] == its[name]).all()) for name in mine
    )


def warn_of_missing(model: nn.Module, adapter_name: str | None = None, *, over: bool = False) -> None:
    """Warn if an adapter (all, without a name) is saved or has ended before its schedule did what its config asks for."""
    for name, schedule in schedules(model).items():
        if adapter_name in (None, name) and (sentence := schedule.missing(over=over)):
            warnings.warn(sentence, stacklevel=3)


def say_ranks(model: nn.Module, config: WeftConfig, adapter_name: str) -> None:
    """Let the patterns of an adapter whose rank slots have moved say each module's rank as it is now, as peft's AdaLoRA does, and with
    it the alpha that keeps its scale; `patterns_at_start` keeps what the adapter is loaded by.

    Called where it is saved. A config of which nothing has moved, or everything back, says what it was given.
    """
    members = [m for layer in model.modules() if isinstance(layer, WeftLayer) for m in layer.members(adapter_name)]
    sites = {member.name: member.site for member in members}
    if any(site.mask is None or site.mask.is_meta for site in sites.values()):
        return
    given = {name: config.at_start(name) for name in ("rank_pattern", "alpha_pattern")}
    ranks = {name: len(site.live()) for name, site in sites.items()}
    if all(ranks[name] == site.initial_rank for name, site in sites.items()):
        config.rank_pattern, config.alpha_pattern = given["rank_pattern"], given["alpha_pattern"]
        config.patterns_at_start = None
        return
    config.patterns_at_start = given
    keys = {name: pattern_key(name, sites) for name in sorted(sites)}
    config.rank_pattern = {keys[name]: ranks[name] for name in keys if ranks[name] != config.r}
    alphas = {n: sites[n].scale * (math.sqrt(ranks[n]) if config.use_rslora else ranks[n]) for n in keys if ranks[n]}
    config.alpha_pattern = {keys[name]: alpha for name, alpha in alphas.items() if alpha != config.lora_alpha}


def attach(
    model: nn.Module,
    *,
    total_steps: int | None = None,
    steps_per_epoch: float | None = None,
    on_event: Callable[[Event], None] | None = None,
    original: str | Path | None = None,
    cache: str | Path | None = None,
    validation: Any = None,
    tokens_per_step: float | None = None,
    begins: int | None = None,
    on_progress: Progress = ignore,
) -> None:
    """Tell the adapters of `model` what they cannot see: how long the run is, what to measure on, where the unquantised
    weights are.

    Args:
        total_steps: optimiser steps of the whole run, a resumed part included.
        steps_per_epoch: optimiser steps per pass over the training data.
        on_event: called with every event (a plain dict with "event", "step", "adapter" and its numbers).
        original: folder of the checkpoint that the base was made from. Directions are then ranked on its weights, read one
            at a time, instead of on those in memory, whose small singular values quantisation has overwritten.
        cache: folder that keeps the decompositions of weights for later runs; without it, the one that WEFT_CACHE names.
        validation: what rank slots are scored on, tokenised and not trained on: a sequence or dataset of rows (dicts with
            `labels`), a DataLoader (its dataset and collate_fn), or a list of batches.
        tokens_per_step: tokens that one optimiser step of all processes is taken on. `Reallocate(score="auto")` compares with it what
            scoring would cost; unknown, it takes the cheapest way.
        begins: the step after which a run goes on that had ended: times in fractions that are still to come are of the steps after it.
        on_progress: called with a `Tick` while rank slots are scored, and directions of weights ranked.

    Raises:
        ConfigError: the model has no weftlora adapter, a length is not a positive number, an event cannot happen in a run of
            this length (or, where a length is given, cannot be placed in it), or no adapter has directions to launch, or rank
            slots to score.
        ConfigError: also, directions would be ranked on quantised weights that cannot be read (`weftlora.adapted.quantised`).
        DataError: `validation` has no rows.
        ModelError: `original` is not the checkpoint of this base.
    """
    given = {"total_steps": total_steps, "steps_per_epoch": steps_per_epoch, "tokens_per_step": tokens_per_step}
    for name, value in given.items():
        if value is not None and not (is_number(value) and 0 < value < math.inf):
            raise ConfigError(
                f"{name}={value!r} is not a length: give the number of "
                + ("tokens." if name == "tokens_per_step" else "optimiser steps.")
            )
    if total_steps is not None and int(total_steps) != total_steps:
        raise ConfigError(f"total_steps={total_steps!r} is not a number of steps: use a whole number.")
    if begins is not None and not (is_whole(begins, 0) and (total_steps is None or begins < total_steps)):
        raise ConfigError(f"begins={begins!r} is not a step before the end of the run: give a smaller whole number.")
    if on_event is not None and not callable(on_event):
        raise ConfigError(f"on_event={on_event!r} cannot be called: give a function that takes one event.")
    if not any(isinstance(layer, WeftLayer) for layer in model.modules()):
        raise ConfigError("the model has no weftlora adapter to attach to: call weftlora.attach after get_peft_model.")
    found = schedules(model)
    if original is not None or cache is not None:
        _decompose(model, found, original, cache)
    for schedule in found.values():
        schedule.check_counted()
        _check_readable(model, schedule)
    if validation is not None:
        _score_on(model, found, validation)
    for schedule in found.values():
        before = schedule.length
        length = Length(
            total_steps or before.total_steps,
            steps_per_epoch or before.steps_per_epoch,
            tokens_per_step or before.tokens_per_step,
            before.begins if begins is None else begins,
        )
        schedule.check(length, may_grow=total_steps is None and steps_per_epoch is None)
        schedule.length = length
        schedule.on_event = on_event or schedule.on_event
        _settle(model, schedule, on_progress)
        schedule.prepare()


def _settle(model: nn.Module, schedule: Schedule, on_progress: Progress) -> None:
    """Let what is decided from counts be decided, and the config say so."""
    for controller in schedule.controllers:
        if isinstance(controller, LaunchController) and on_progress is not ignore:
            controller.ranker.on_progress = on_progress
        if isinstance(controller, ReallocateController):
            controller.on_progress = on_progress if on_progress is not ignore else controller.on_progress
            configs = getattr(unwrapped(model), "peft_config", {})
            controller.config = configs.get(schedule.adapter_name) if isinstance(configs, Mapping) else None
            controller.settle(schedule.length)


def _decompose(
    model: nn.Module, found: dict[str, Schedule], original: str | Path | None, cache: str | Path | None
) -> None:
    rankers = [c.ranker for schedule in found.values() for c in schedule.controllers if isinstance(c, LaunchController)]
    if not rankers:
        raise ConfigError(
            "original and cache are for adapters along directions of W (Dash, Directions), and the model has none: leave them out."
        )
    if cache is not None:
        for ranker in rankers:
            ranker.decompose = Decomposer(Path(cache))
    if original is not None:
        checkpoint = Checkpoint(original)
        layers = {(n, m.module_name): m for m in model.modules() if isinstance(m, WeftLinear) for n in m.weft_site}
        # checkpoints keep experts' matrices under other names than the model: those are ranked as they are in memory
        members = [(name, m) for name, schedule in found.items() for m in schedule.members if m.expert is None]
        weights = [OriginalWeight(layers[name, member.name], checkpoint) for name, member in members]
        for (_, member), weight in zip(members, weights, strict=True):
            member.weight, member.source, member.is_split = weight, "original", lambda: False


def _check_readable(model: nn.Module, schedule: Schedule) -> None:
    """Read a weight of every kind of quantised layer that directions will be ranked on: what cannot be read is an error now."""
    read = [member for member in schedule.members if member.source == "dequantised"]
    if not read or not any(isinstance(c, LaunchController) and not c.done() for c in schedule.controllers):
        return
    layers = {m.module_name: m.get_base_layer() for m in model.modules() if isinstance(m, WeftLinear)}
    seen: set[type] = set()
    for member in read:
        kind = type(layers[member.name])
        if kind not in seen:
            seen.add(kind)
            member.weight()


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, as compiled or wrapped for several processes: scoring runs on it."""
    while isinstance(inner := getattr(model, "_orig_mod", getattr(model, "module", None)), nn.Module):
        model = inner
    return model


def _score_on(model: nn.Module, found: dict[str, Schedule], validation: Any) -> None:
    rows, bare = rows_of(validation), unwrapped(model)
    layers = {(n, m.module_name): m for m in bare.modules() if isinstance(m, WeftLayer) for n in m.weft_site}
    taken = False
    for name, schedule in found.items():
        mine = Held(bare, [layer for (adapter, _), layer in layers.items() if adapter == name], name, rows)
        for controller in schedule.controllers:
            taken |= controller.take_rows(mine)
    if not taken:
        raise ConfigError(
            "validation rows decide where ranks=Reallocate(...) moves rank, and no adapter has it: leave validation out."
        )


@dataclass(frozen=True)
class Held:
    """The validation rows and the model to measure one adapter on (`weftlora.terms.events.Validation`)."""

    model: nn.Module
    layers: list[WeftLayer]
    adapter: str
    rows: Rows

    @property
    def count(self) -> int:
        """See `Validation`."""
        return len(self.rows.items)

    @property
    def tokens(self) -> float | None:
        """See `Validation`."""
        return self.rows.tokens

    def draw(self, count: int, seed: str) -> dict[str, Tensor]:
        """See `Validation`."""
        device = next(self.model.parameters()).device
        return {name: value.to(device) for name, value in self.rows.draw(count, seed).items()}

    def loss(self, batch: Mapping[str, Tensor]) -> float:
        """See `Validation`."""
        with undisturbed(self.model, [layer.site(self.adapter) for layer in self.layers]):
            return float(self.model(**batch).loss)

    def slots(self, choice: SlotScoring) -> Scorer:
        """See `Validation`."""
        return Ablation(self.model, self.layers, self.adapter, choice, self.rows)


def state_dict(model: nn.Module) -> dict[str, Any]:
    """What a bare loop saves beside the adapter folder and the optimiser's state: plain numbers, safe to write as JSON."""
    return {
        name: {
            "steps": schedule.steps,
            "total_steps": schedule.length.total_steps,
            "steps_per_epoch": schedule.length.steps_per_epoch,
            "events": copy.deepcopy(schedule.events),
        }
        for name, schedule in schedules(model).items()
    }


_SAVED = {"steps", "total_steps", "steps_per_epoch", "events"}


def load_state_dict(model: nn.Module, state: dict[str, Any]) -> None:
    """Continue from `state_dict`, after the adapter itself has been loaded.

    Raises:
        ConfigError: the state is none, belongs to other adapters, or was taken at another step than the loaded adapter.
    """
    found = schedules(model)
    if not isinstance(state, dict) or not all(isinstance(s, dict) and s.keys() >= _SAVED for s in state.values()):
        raise ConfigError(
            "this is not a state of schedules: give what weftlora.state_dict returned, read back as it was written."
        )
    if found.keys() != state.keys():
        raise ConfigError(
            f"the state is of adapters {sorted(state)}, the model's schedules are of {sorted(found)}: load the adapter that was "
            "saved with it, under the same name."
        )
    for name, schedule in found.items():  # all are right before one is changed
        saved = state[name]
        if saved["steps"] != schedule.steps:
            raise ConfigError(
                f"the state was taken after step {saved['steps']}, the adapter {name!r} after step {schedule.steps}: load the "
                "adapter folder that was saved together with this state."
            )
    for name, schedule in found.items():
        saved, now = state[name], schedule.length
        schedule.length = Length(
            saved["total_steps"] or now.total_steps,
            saved["steps_per_epoch"] or now.steps_per_epoch,
            now.tokens_per_step,
            now.begins,
        )
        schedule.events = copy.deepcopy(cast("list[Event]", saved["events"]))
        schedule.prepare()
