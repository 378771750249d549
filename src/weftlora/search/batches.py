"""The rows of a search, and passes over them that leave nothing behind.

Rows are two disjoint splits, each read in an endless seeded order. Over micro-batches,

    R = Σ_b (c_b / Σ c) R_b          c_b: what R_b is a mean over (answer tokens; rows of a classifier)

A micro-batch with c_b = 0, all of whose labels are ignored, is left out: its R_b is 0/0, no number. With Σ c = 0 there is no R.

In several processes every one takes its share of the micro-batches, and losses and gradients are summed over all, so the
result is that of one process with the same micro-batches, to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weftlora.adapted.hooks import in_mode
from weftlora.adapted.routing import routing
from weftlora.adapter.shards import is_shard, number
from weftlora.errors import ConfigError, DataError
from weftlora.schedule import processes
from weftlora.search.groups import Gates
from weftlora.settings import IGNORE
from weftlora.terms.layers import SearchedLayers

Rows = Sequence[Any]
Collate = Callable[[list[Any]], Mapping[str, Any]]


@dataclass(frozen=True)
class Splits:
    """Which rows the search trains on and which it measures on, as indices; disjoint in content too.

    `repeated`: training rows left out because an equal row is in the validation part.
    """

    train: list[int]
    validation: list[int]
    repeated: int


def split(
    train: Rows, validation: Rows | None, search: SearchedLayers, seed: int, max_samples: int | None = None
) -> Splits:
    """At most `max_samples` rows, by default as many as the search says; without validation rows `search.val_size` are held out.

    Raises:
        DataError: too few rows, or validation rows that are training rows too.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    order = order[: search.max_search_samples if max_samples is None else max_samples]
    if validation is not None:
        held = {digest(validation[i]) for i in range(len(validation))}
        if leaked := sum(digest(train[i]) in held for i in order):
            raise DataError(
                f"{leaked} of the {len(order)} training rows of the search are validation rows too, so it would judge layers "
                "by rows that it has trained on: take them out of one of the two."
            )
        return _checked(Splits(order, list(range(len(validation))), 0))
    if len(order) <= search.val_size:
        raise DataError(
            f"the search has {len(order)} rows and is to hold out val_size={search.val_size} of them: give more rows, a smaller "
            "val_size, or validation rows of their own."
        )
    held_out, rest = order[: search.val_size], order[search.val_size :]
    seen = {digest(train[i]) for i in held_out}
    kept = [i for i in rest if digest(train[i]) not in seen]
    return _checked(Splits(kept, sorted(held_out), len(rest) - len(kept)))


def _checked(splits: Splits) -> Splits:
    for name in ("train", "validation"):
        if not getattr(splits, name):
            raise DataError(
                f"the layer search has no {name} rows: it needs some to train the adapter on, and others to judge layers by."
            )
    return splits


def digest(row: Any) -> bytes:
    """A hash of a row's content; equal rows have equal ones, whatever holds their numbers."""
    return hashlib.blake2b(repr(_plain(row)).encode(), digest_size=16).digest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return [(str(key), _plain(value[key])) for key in sorted(value, key=str)]
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def stack(rows: list[Any]) -> dict[str, Tensor]:
    """Rows of equal shapes as one batch. Raises DataError where they differ: they need padding, which is collate's work."""
    try:
        return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in rows[0]}
    except (RuntimeError, TypeError, ValueError) as error:
        raise DataError(
            f"the rows cannot be stacked into a batch ({error}): give collate=function of a list of rows."
        ) from None


class Cycle:
    """Indices 0 … n−1 for ever, every pass in another order of its own seed; `position` is all of its state."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.position = n, seed, 0
        self._turn, self._order = -1, list[int]()

    def take(self, count: int) -> list[int]:
        """The next `count` indices."""
        found = [self._at(self.position + i) for i in range(count)]
        self.position += count
        return found

    def _at(self, position: int) -> int:
        turn, place = divmod(position, self.n)
        if self._turn != turn:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
            self._turn, self._order = turn, torch.randperm(self.n, generator=generator).tolist()
        return self._order[place]


Batch = Mapping[str, Any]
Loss = Callable[[nn.Module, Batch], Tensor]


class Idle(dict[str, Any]):
    """A micro-batch of another process, run beside it where a pass takes all of them; it counts for nothing."""


@dataclass(frozen=True)
class Passed:
    """What passes over some micro-batches gave: the loss, ∇_θ in the order of the parameters, and h [N] fp64.

    `labelled`: whether any micro-batch of any process had a label; without one the loss is NaN.
    """

    loss: float
    theta: list[Tensor]
    h: Tensor
    labelled: bool = True

    @property
    def finite(self) -> bool:
        """Whether everything is a number."""
        return (
            math.isfinite(self.loss)
            and bool(self.h.isfinite().all())
            and all(math.isfinite(number(g.abs().sum())) for g in self.theta)
        )


class Passes:
    """Gradients of the mean loss of micro-batches.

    Args:
        params: the trained parameters θ.
        loss: (model, batch) → mean loss; None takes the `.loss` that the model returns.
    """

    def __init__(self, model: nn.Module, params: Sequence[nn.Parameter], gates: Gates, loss: Loss | None = None):
        self.model, self.params, self.gates = model, list(params), gates
        self._loss = loss or model_loss
        self._balanced = any(site.balance > 0 for site in gates.sites)
        self.causal = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.in_lockstep = any(is_shard(p) for p in self.params)
        """Whether a pass takes all processes: each then has as many micro-batches, and the wrapper averages gradients over them."""

    def loss(self, batch: Batch) -> Tensor:
        """R_b of one micro-batch; in training with the load-balance term of routers that have one."""
        if not (self._balanced and self.model.training):
            return self._loss(self.model, batch)
        with routing(self.model) as record:
            loss = self._loss(self.model, batch)
        return loss + record.balance_loss(batch.get("attention_mask"), together=False)

    def shares(self, batches: Sequence[Batch], summed: bool = False) -> tuple[list[tuple[Batch, float]], bool]:
        """The labelled ones of this process's micro-batches, each with its weight in the mean over those of all processes (1
        each for a sum), and whether any process has one."""
        counts = [(batch, float(count)) for batch in batches if (count := counted(batch, self.causal))]
        total = torch.tensor([sum(0 if isinstance(batch, Idle) else count for batch, count in counts)]).double()
        processes.sum_up([total], self.device)
        shares = [(batch, 1.0 if summed else count / float(total)) for batch, count in counts]
        return [(batch, 0.0 if isinstance(batch, Idle) else share) for batch, share in shares], bool(total)

    @property
    def device(self) -> torch.device:
        """Where the first trained parameter lies."""
        return self.params[0].device

    def backward(self, batches: Sequence[Batch], *, training: bool, summed: bool = False) -> Passed:
        """Loss and gradients; `.grad` of every parameter, the mode of the model and its state are as they were."""
        shares, labelled = self.shares(batches, summed)
        total = torch.zeros(1, dtype=torch.float64)
        with in_mode(self.model, training), self.without_gradients(), self.gates.watched():
            processes.attempt(
                lambda: self._accumulate(shares, total),
                "a pass of the search",
                self.device,
                lockstep=self.in_lockstep,
            )
            theta = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
            h = self.gates.read()
        if not self.in_lockstep:
            processes.sum_up([total, h, *theta], self.device)
        elif self.gates.factors is not None:  # h is read from gradients that are those of all
            processes.sum_up([total], self.device)
        else:
            processes.sum_up([total, h], self.device)
            h = h / processes.world()
        return Passed(float(total) if labelled else math.nan, theta, h, labelled)

    def _accumulate(self, shares: Sequence[tuple[Batch, float]], total: Tensor) -> None:
        for batch, share in shares:
            loss = self.loss(batch)
            if loss.dim():
                raise ConfigError(
                    f"the loss has shape {tuple(loss.shape)}: return one number, the mean over the batch."
                )
            (loss * (share * (processes.world() if self.in_lockstep else 1))).backward()
            total += float(loss.detach()) * share

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """`.grad` of every parameter is empty at the start of the block, and what it was after it."""
        held = [p.grad for p in self.params]
        try:
            for p in self.params:
                p.grad = None
            yield
        finally:
            for p, gradient in zip(self.params, held, strict=True):
                p.grad = gradient


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model returns for a batch with labels."""
    loss = getattr(model(**batch), "loss", None)
    if not isinstance(loss, Tensor):
        raise ConfigError(
            "the model returns no loss for this batch: add labels, or give loss=function of (model, batch)."
        )
    return loss


def counted(batch: Batch, causal: bool) -> int:
    """How many things the mean loss of a batch is a mean over: labelled tokens, or rows, which −100 takes out too."""
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() in (1, 2) and not labels.is_floating_point():
        return int((labels[:, 1:] if causal and labels.dim() == 2 else labels).ne(IGNORE).sum())
    first = next((value for value in batch.values() if isinstance(value, Tensor)), None)
    return 1 if first is None or not first.dim() else len(first)


@dataclass(frozen=True)
class Random:
    """The state of the random generators before a pass, so that dropout can be repeated."""

    cpu: Tensor
    cuda: list[Tensor]

    @classmethod
    def now(cls) -> Random:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
        return cls(torch.get_rng_state(), cuda)

    def set(self) -> None:
        """Continue from this state."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Random numbers of this state inside the block, undisturbed ones after it."""
        outside = Random.now()
        self.set()
        try:
            yield
        finally:
            outside.set()


def math_attention() -> Any:
    """Attention whose derivative has a derivative; fused kernels have none."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if hasattr(SDPBackend, "MATH") else nullcontext()
