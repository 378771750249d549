"""The search loop, its state between two outer steps, and what it comes to so far.

    for t in range(T):
        for k in range(K):   θ ← OPT_θ(θ, ∇_θ R_train(θ, α))          α stands still; θ is never reset
        g ← hypergradient of R_val at the new θ                        `weftlora.search.hypergradient`, or its direct term only
        α ← OPT_α(α, g);  gates ← α̂(α)                                 θ, its gradients and its optimiser untouched

The state is all that the next outer step depends on, as tensors and plain values. Random states are those of every process,
because each draws its own dropout; everything else is the same on all.

Source: Algorithm 1 of Flexora, arXiv 2408.10774, as its released code runs it.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import math
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from weftlora.adapter.shards import is_piece, is_shard
from weftlora.adapter.spec import encode_choice
from weftlora.errors import ConfigError, DataError, RunError
from weftlora.schedule import processes
from weftlora.search.batches import Batch, Collate, Cycle, Idle, Loss, Passes, Random, Rows, counted, split, stack
from weftlora.search.groups import Gates, groups_of
from weftlora.search.hypergradient import (
    Inner,
    InnerLoop,
    InnerStep,
    adjoint,
    by_differences,
    by_double_backward,
    check_exact,
)
from weftlora.search.selection import Candidate, Selection
from weftlora.settings import is_number, is_whole
from weftlora.terms.layers import SearchedLayers, Weighed

log = logging.getLogger(__name__)

Listener = Callable[[dict[str, Any]], None]
LARGEST = 2**53
"""Beyond any count of a search, and below what a float or a seed can hold."""


def state_of(job: LayerSearch) -> dict[str, Any]:
    """The state; all processes call it together and get the same.

    Raises:
        RunError: the model is split among processes, each of which has but a part of it.
    """
    if job.passes.in_lockstep:
        raise RunError(
            "the layer search of a model that is split among processes cannot be saved half-way: run it to its end."
        )
    return {
        "alpha": job.alpha.detach().clone(),
        "alpha_optimizer": job.alpha_optimizer.state_dict(),
        "theta": {name: p.detach().clone() for name, p in job.named.items()},
        "inner": job.loop.state_dict(),
        "positions": {name: cycle.position for name, cycle in job.cycles.items()},
        "splits": _splits(job),
        "random": _random(job),
        "norms": job.norms.clone(),
        "done": job.done,
        "skipped": job.skipped,
        "unlabelled": job.unlabelled,
        "last_move": job.last_move,
        "seconds": job.seconds,
        "rough": job.rough,
        "history": [dict(row) for row in job.history],
    }


def restore(job: LayerSearch, state: dict[str, Any]) -> None:
    """Continue from `state_of`.

    Raises:
        RunError: it is of another model or other rows, or no state of a search. Nothing of the job has changed then.
    """
    own = state_of(job)
    state = {"rough": 0.0, **state} if isinstance(state, dict) else {}  # a search saved by 0.1.0rc1 has none
    for key in ("theta", "alpha"):
        if (wrong := _misfit(own[key], state.get(key), key)) is not None:
            raise RunError(
                f"the saved search is of another adapter ({wrong}): resume it with the config that it was started with."
            )
    if (wrong := _damage(job, own, state)) is not None:
        raise RunError(f"the saved search is damaged ({wrong}): delete it, and the search starts again.")
    if state["splits"] != own["splits"]:
        raise RunError(
            "the rows or the seed of the search have changed since it was saved: resume it on the same rows."
        )
    with torch.no_grad():
        job.alpha.copy_(state["alpha"])
        for name, p in job.named.items():
            p.copy_(state["theta"][name])
    for optimizer, saved in (
        (job.alpha_optimizer, state["alpha_optimizer"]),
        (job.loop.optimizer, state["inner"]["optimizer"]),
    ):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})  # its settings are the config's
    for name in ("taken", "skipped", "unlabelled"):
        setattr(job.loop, name, state["inner"][name])
    for name, cycle in job.cycles.items():
        cycle.position = state["positions"][name]
    job.norms = state["norms"].clone()
    for name in ("done", "skipped", "unlabelled", "last_move", "seconds", "rough"):
        setattr(job, name, state[name])
    job.history = [dict(row) for row in state["history"]]
    job.gates.write(job.search.gates(job.alpha.detach()))
    if len(state["random"]) == processes.world():
        mine, here = state["random"][processes.rank()], own["random"][0]["cuda"]
        Random(mine["cpu"], mine["cuda"] if len(mine["cuda"]) == len(here) else []).set()
    else:
        warnings.warn(
            f"the search was saved by {len(state['random'])} processes and continues in {processes.world()}: its rows are the same, "
            "its dropout is drawn again.",
            stacklevel=3,
        )


def _misfit(own: Any, found: Any, name: str) -> str | None:
    """What of a saved value is not of the form of this search's own, in words; None where it fits.

    Tensors have the shape and dtype of its own and hold numbers, mappings have its keys, numbers are no smaller than 0. What is in
    lists is for `_damage`.
    """
    if isinstance(own, Tensor):
        same = isinstance(found, Tensor) and (found.shape, found.dtype, found.layout) == (
            own.shape,
            own.dtype,
            own.layout,
        )
        return None if same and bool(found.isfinite().all()) else f"{name} is not a tensor like its own"
    if isinstance(own, dict):
        if not isinstance(found, dict) or found.keys() != own.keys():
            return f"{name} has other parts than its own"
        return next((wrong for key in own if (wrong := _misfit(own[key], found[key], f"{name}.{key}"))), None)
    if isinstance(own, int):
        return None if is_whole(found, 0) and found < LARGEST else f"{name} is not a count"
    if isinstance(own, float):
        return None if is_number(found) and found >= 0 else f"{name} is not a number"
    return None if isinstance(found, type(own)) else f"{name} is not of type {type(own).__name__}"


def _damage(job: LayerSearch, own: dict[str, Any], state: dict[str, Any]) -> str | None:
    """Why a state of the same adapter is none to go on from, in words; None where it is one."""
    optimizers = {"alpha_optimizer": job.alpha_optimizer, "inner": job.loop.optimizer}
    saved = {"alpha_optimizer": state.get("alpha_optimizer"), "inner": state.get("inner")}
    if isinstance(saved["inner"], dict):
        saved["inner"] = saved["inner"].get("optimizer")
        inner = {**state["inner"], "optimizer": {}}
    else:
        inner = {}
    formed = {**own, "alpha_optimizer": {}, "inner": {**own["inner"], "optimizer": {}}}
    if (wrong := _misfit(formed, {**state, "alpha_optimizer": {}, "inner": inner}, "state")) is not None:
        return wrong
    for name, optimizer in optimizers.items():
        if (wrong := _optimizer_misfit(optimizer, saved[name], name)) is not None:
            return wrong
    rows, random = state["history"], own["random"][0]
    if len(rows) != state["done"] or state["done"] > job.steps or not all(map(_is_step, rows)):
        return "its history has another number of steps"
    if not all(is_whole(n) for rows in state["splits"].values() for n in rows):
        return "its rows have no numbers"
    for each in state["random"]:
        try:
            torch.Generator().set_state(each["cpu"])
            pairs = [(random["cpu"], each["cpu"]), *zip(random["cuda"], each["cuda"], strict=False)]
            fits = all(_misfit(mine, saved, "random") is None for mine, saved in pairs)
        except (RuntimeError, TypeError, KeyError):
            fits = False
        if not fits:
            return "its random state is none"
    return None


def _is_step(row: Any) -> bool:
    """Whether this is what `LayerSearch.step` says of one."""
    try:
        numbers = [row[name] for name in ("step", "loss", "validation_loss", "sum_alpha", "max_alpha_hat")]
        return all(map(is_number, [*numbers, *row["alpha"]])) and isinstance(row["skipped"], bool)
    except (TypeError, KeyError):
        return False


def _optimizer_misfit(optimizer: torch.optim.Optimizer, saved: Any, name: str) -> str | None:
    """What of an optimiser's saved state it cannot go on from, in words. Its settings are not looked at: they are the config's."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(states, dict) or any(not is_whole(n, 0) or n >= len(params) for n in states):
        return f"{name} is not a state of its optimiser"
    adam = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    for number, state in states.items():
        if not isinstance(state, dict) or (
            state and state.keys() != ({"step", "exp_avg", "exp_avg_sq"} if adam else {})
        ):
            return f"{name} is not a state of its optimiser"
        if not state:
            continue
        moments = ("exp_avg", "exp_avg_sq")
        own = {key: params[number].detach() for key in moments}
        if (wrong := _misfit(own, {key: state[key] for key in moments}, name)) is not None:
            return wrong
        steps = (
            state["step"].item() if isinstance(state["step"], Tensor) and state["step"].dim() == 0 else state["step"]
        )
        if not is_number(steps) or not 1 <= steps < LARGEST:
            return f"{name} has taken no number of steps"
    return None


def _splits(job: LayerSearch) -> dict[str, list[int]]:
    return {name: list(getattr(job.splits, name)) for name in ("train", "validation")}


def _random(job: LayerSearch) -> list[dict[str, Any]]:
    now, device = Random.now(), job.passes.device
    cpu, cuda = processes.gathered(now.cpu, device), [processes.gathered(state, device) for state in now.cuda]
    return [{"cpu": mine, "cuda": [each[rank] for each in cuda]} for rank, mine in enumerate(cpu)]


def selection(job: LayerSearch) -> Selection:
    """What the rule selects from α as it is now.

    Raises:
        RunError: no step on α or none on θ was ever possible, or fewer are selected than `min_layers` and that is to be an
            error.
    """
    _check_learned(job)
    alpha = job.alpha.detach().clone()
    processes.take_over([alpha], job.passes.device)
    asked, norms = job.search, (job.norms / max(1, job.loop.taken)).tolist()
    chosen = asked.choose(Weighed(tuple(alpha.tolist()), tuple(norms), job.last_move))
    alpha_hat = asked.alpha_hat(alpha).tolist()
    candidates = [
        Candidate(
            name=group.name,
            block=group.block,
            modules=tuple(group.sites),
            alpha=float(alpha[i]),
            alpha_hat=alpha_hat[i],
            distance=chosen.distance[i],
            selected=i in chosen.selected,
            near=i in chosen.near,
            filled=i in chosen.filled,
            gradient_norm=norms[i],
        )
        for i, group in enumerate(job.gates.groups)
    ]
    settings = encode_choice(asked) or {}, dataclasses.asdict(job.inner)
    return Selection(tuple(candidates), asked.granularity, job.adapter_config, *settings, _record(job), job.seconds)


def _check_learned(job: LayerSearch) -> None:
    """Refuse to select from an α that no step has moved, or that moved beside a θ that none has."""
    for what, steps, skipped, unlabelled in (
        ("validation", job.done, job.skipped, job.unlabelled),
        ("training", job.loop.taken, job.loop.skipped, job.loop.unlabelled),
    ):
        if steps and skipped == steps:
            advice = (
                "none of their rows has a label that counts: look at how they are labelled and cut to length"
                if unlabelled == steps
                else f"lower lr, or look at the {what} rows"
            )
            raise RunError(
                f"none of the {steps} {what} losses of the search was finite, so it learned nothing about the layers: {advice}."
            )


def _record(job: LayerSearch) -> dict[str, Any]:
    return {
        "steps": job.done,
        "cost_in_steps": round(job.done * _cost(job), 3),
        "skipped_steps": job.skipped,
        "skipped_inner_steps": job.loop.skipped,
        "unlabelled_steps": job.unlabelled,
        "unlabelled_inner_steps": job.loop.unlabelled,
        "seed": job.seed,
        "rows": {name: len(getattr(job.splits, name)) for name in ("train", "validation")},
        "repeated_rows": job.splits.repeated,
        **({} if job.search.hypergrad == "direct" else {"rough": round(job.rough, 4)}),
        **{name: _last(job, name) for name in ("loss", "validation_loss", "sum_alpha", "max_alpha_hat")},
    }


def _last(job: LayerSearch, name: str) -> float | None:
    """The last value that is a number: a step that was skipped has no loss."""
    return next((row[name] for row in reversed(job.history) if math.isfinite(row[name])), None)


def _cost(job: LayerSearch) -> float:
    inner = job.inner
    return cost_of_step(job.search, inner.batch_size * inner.accumulation, job.sizes["validation"])


def cost_of_step(search: SearchedLayers, rows: int, outer_rows: int) -> float:
    """Of one step on α, in training steps of `rows` rows: rows through forward and backward, and twice those of a double backward.

    Args:
        outer_rows: rows of an outer micro-batch.
    """
    unrolled = 0 if search.hypergrad == "direct" else 2 * (search.unroll_steps or search.inner_steps)
    return search.inner_steps + unrolled + outer_rows * search.outer_batches / rows


class LayerSearch:
    """A search in progress, one outer step at a time; `weftlora.search_layers` runs one from its start to its end.

    Args:
        model: a PeftModel; its adapter `adapter` has layers=`search`, and is the active one.
        max_samples: rows used at most; None takes what the search says.
    """

    def __init__(
        self,
        model: PeftModel,
        search: SearchedLayers,
        inner: Inner,
        train: Rows,
        validation: Rows | None = None,
        *,
        adapter: str = "default",
        collate: Collate | None = None,
        loss: Loss | None = None,
        seed: int = 0,
        max_samples: int | None = None,
        training: int | None = None,
    ):
        """`training`: steps of the training that it is the search of, where there is one: a bound of its cost is a share of these."""
        if list(model.active_adapters) != [adapter]:
            raise ConfigError(
                f"adapter {adapter!r} is to be searched, but active is {', '.join(model.active_adapters) or 'none'}: the steps "
                f"would train that; call model.set_adapter({adapter!r}) first."
            )
        self.model, self.search, self.seed = model, search, seed
        optimizer = search.inner_optimizer or inner.optimizer
        self.inner = dataclasses.replace(inner, optimizer=optimizer, lr=search.inner_lr or inner.lr)
        self.adapter_config: dict[str, Any] = model.peft_config[adapter].to_dict()
        if search.hypergrad == "direct" and search.inner_steps > 1:
            log.warning("the direct hypergradient ignores all of the %d inner steps: it is biased", search.inner_steps)
        self.splits = split(train, validation, search, seed, max_samples)
        self._rows = {"train": train, "validation": train if validation is None else validation}
        self._collate = collate or stack
        self.sizes = {"train": inner.batch_size, "validation": self._outer_size()}
        if search.hypergrad == "unrolled_exact":
            check_exact(model)
        self.gates = Gates(groups_of(model, adapter, search.granularity))
        search.check_groups(len(self.gates.groups))  # before the search, not after
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.passes = Passes(model, list(self.named.values()), self.gates, loss)
        held = [b for site in self.gates.sites for b in site.buffers()]
        if not self.passes.in_lockstep and any(is_shard(p) for p in model.parameters()):
            raise ConfigError(
                "the base is split in its forward (tensor parallel), where a search would run other batches on each process: use "
                "processes that each hold the whole model, or a model that FSDP splits."
            )
        if any(is_piece(p) for p in self.passes.params):
            raise ConfigError("a model that FSDP1 splits cannot be searched: split it by FSDP2 (fsdp_version: 2).")
        theta = [] if self.passes.in_lockstep else self.passes.params  # what is split is of one whole already
        processes.take_over([*theta, *held], self.passes.device)  # what is random and frozen too
        self.steps = search.steps or self._default_steps(training)
        self.alpha = torch.zeros(len(self.gates.groups), dtype=torch.float64, requires_grad=True)
        self.alpha_optimizer = search.optimizer(self.alpha)
        self._reach = max(float(group["lr"]) for group in self.alpha_optimizer.param_groups)  # how far a step moves α
        self.loop = InnerLoop(model, self.passes, self.inner, self.steps * search.inner_steps, self._reach)
        self.cycles = {
            "train": Cycle(len(self.splits.train), seed),
            "validation": Cycle(len(self.splits.validation), seed + 1),
        }
        self.done, self.skipped, self.unlabelled, self.last_move, self.seconds = 0, 0, 0, 0.0, 0.0
        self.rough = 0.0
        """Of the unrolled hypergradients so far, the largest `weftlora.search.hypergradient.Unrolled.rough`."""
        self.history: list[dict[str, Any]] = []
        self.norms = torch.zeros_like(self.alpha.detach())

    def _default_steps(self, training: int | None) -> int:
        """`search_epochs`, or as many as `max_share` of the training pays for."""
        steps = max(1, int(self.search.search_epochs * len(self.splits.train) / self._rows_per_step))
        if training is None or self.search.max_share is None:
            return steps
        return max(1, min(steps, int(self.search.max_share * training / _cost(self))))

    @property
    def _rows_per_step(self) -> int:
        return self.inner.batch_size * self.inner.accumulation * self.search.inner_steps

    def _outer_size(self) -> int:
        """Rows of a validation micro-batch: batch_size, or as many as one step on α can have without repeating any."""
        there, count = len(self.splits.validation), self.search.outer_batches
        if there < count:
            raise DataError(
                f"a step of the layer gates takes at least outer_batches={count} validation rows, and "
                f"there are {there}: hold out more "
                "(val_size), or lower outer_batches."
            )
        return min(self.inner.batch_size, there // count)

    # ------------------------------------------------------------------ one outer step

    def step(self) -> dict[str, Any]:
        """K inner steps and one step on α; what happened, as plain numbers."""
        started = time.perf_counter()
        sites = self.gates.sites
        waiting = [site.awaits_search for site in sites]
        try:
            for site in sites:
                site.awaits_search = False
            losses, taken = self._inner_steps()
            loss, moved = self._outer_step(taken)
        finally:
            for site, was in zip(sites, waiting, strict=True):
                site.awaits_search = was
        self.done += 1
        self.seconds += time.perf_counter() - started
        alpha_hat = self.search.alpha_hat(self.alpha.detach())
        row = {
            "step": self.done,
            "loss": losses[-1],
            "validation_loss": loss,
            "skipped": not moved,
            "alpha": self.alpha.detach().tolist(),
            "sum_alpha": float(self.alpha.detach().sum()),
            "max_alpha_hat": float(alpha_hat.max()),
        }
        self.history.append(row)
        return row

    def _inner_steps(self) -> tuple[list[float], list[InnerStep]]:
        k, unrolled = self.search.inner_steps, self.search.hypergrad != "direct"
        window = (self.search.unroll_steps or k) if unrolled else 0
        losses, taken = [], []
        for i in range(k):
            batches = self._batches("train", self.inner.accumulation)
            passed, kept = self.loop.step(batches, keep=i >= k - window)
            losses.append(passed.loss)
            if kept is not None:
                taken.append(kept)
            if passed.finite:
                by_id = {id(p): g for p, g in zip(self.passes.params, passed.theta, strict=True)}
                self.norms += self.gates.gradient_norms(by_id)
        return losses, taken

    def _outer_step(self, taken: Sequence[InnerStep]) -> tuple[float, bool]:
        loss, gradient = self.hypergradient(taken)
        if gradient is None:
            self.skipped += 1
            return loss, False
        before = self.alpha.detach().clone()
        self.alpha.grad = gradient
        self.alpha_optimizer.step()
        self.alpha.grad = None
        self.last_move = float((self.alpha.detach() - before).abs().max())
        self.gates.write(self.search.gates(self.alpha.detach()))
        return loss, True

    def hypergradient(self, taken: Sequence[InnerStep] = ()) -> tuple[float, Tensor | None]:
        """The validation loss of the next outer batch and its gradient [N] fp64 for α; None where one is no number.

        That is so where all labels of the batch are ignored, too: there is no loss then, which `unlabelled` counts.
        """
        batches = self._batches("validation", self.search.outer_batches)
        passed = self.passes.backward(batches, training=False, summed=self.search.summed)
        if not passed.labelled:
            self.unlabelled += 1
            if self.unlabelled == 1:
                log.warning(
                    "all labels of a validation batch are ignored: its step on α is skipped (further ones are only counted)"
                )
        if not passed.finite:
            return passed.loss, None
        gradient = self.search.gradient(passed.h, self.alpha)
        if taken:
            exact = self.search.hypergrad == "unrolled_exact"
            product = (
                by_double_backward(self.passes, self.search, self.alpha)
                if exact
                else by_differences(self.passes, self.search, self.alpha)
            )
            unrolled = adjoint(taken, passed.theta, gradient, product, self._reach)
            gradient, self.rough = unrolled.gradient, max(self.rough, unrolled.rough)
        return passed.loss, gradient if bool(gradient.isfinite().all()) else None

    def _batches(self, part: str, count: int) -> list[Batch]:
        """This process's share of the next `count` micro-batches of a split, on the model's device."""
        size = self.sizes[part]
        at = self.cycles[part].take(count * size)
        indices = getattr(self.splits, part)
        mine = [at[i * size : (i + 1) * size] for i in range(count)]
        if not self.passes.in_lockstep:
            mine = mine[processes.rank() :: processes.world()]
        device = self.passes.device

        def collate() -> list[Batch]:
            return [self._collate([self._rows[part][indices[j]] for j in chosen]) for chosen in mine]

        batches = processes.attempt(collate, "collating rows of the search", device)
        batches = [{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in batches]
        return self._even(batches) if self.passes.in_lockstep else batches

    def _even(self, batches: Sequence[Batch]) -> list[Batch]:
        """This process's share of all micro-batches, as many as every other's: who has one less runs another's beside it."""
        labelled = [batch for batch in batches if counted(batch, self.passes.causal)]
        mine = labelled[processes.rank() :: processes.world()]
        short = -(-len(labelled) // processes.world()) - len(mine)
        return [*mine, *(Idle(labelled[0]) for _ in range(short))]

    # ------------------------------------------------------------------ the whole search

    def run(self, on_step: Listener | None = None) -> Selection:
        """The steps that are left, then the selection; `on_step` is called with what each step did."""
        while self.done < self.steps:
            row = self.step()
            if on_step is not None:
                on_step(row)
        return self.selection()

    def selection(self) -> Selection:
        """What the rule selects from α as it is now. Raises RunError as `weftlora.search.driver.selection` does."""
        return selection(self)

    # ------------------------------------------------------------------ resuming

    def state_dict(self) -> dict[str, Any]:
        """All that the next outer step depends on; taken between outer steps. All processes call it together."""
        return state_of(self)

    def load_state_dict(self, found: dict[str, Any]) -> None:
        """Continue from `state_dict`. Raises RunError if it is of another model or other rows."""
        restore(self, found)

    def save(self, path: str | Path) -> None:
        """Write `state_dict`, from the main process, to a file that holds tensors and plain values only. All call it."""
        found = self.state_dict()
        if processes.rank() == 0:
            written = (
                io.BytesIO()
            )  # torch itself says of a disk that refuses a file no more than where in its source it was
            torch.save(found, written)
            Path(path).write_bytes(written.getbuffer())

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote. Raises RunError if it is damaged, or of another model or other rows."""
        try:
            found = torch.load(path, weights_only=True)
        except Exception as error:  # the unpickler, and the reader of torch's archives, have errors of many kinds
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RunError(
                f"{path} is a damaged state of a search ({said}): delete it, and the search starts again."
            ) from None
        self.load_state_dict(found)
