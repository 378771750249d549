"""The network under many ablations at once, with no block computed twice for nothing, and its loss by row.

- Replicas: the batch is repeated K times, and each repetition has gates of its own (`Factors.keep`).
- Kept prefix: without a slot of block l, or with it alone, blocks before l compute what the whole model, or the base, does. What
  they gave once is handed on in their place.
- Head on labels: positions whose label does not count are taken out before the output embedding.

Which list of modules the blocks are, and whether they hand one tensor from each to the next, is seen in a forward pass.
A model of another form is run in full.

The loss is cross-entropy from logits, in the way that the model itself computes its own:

    token models     ℓ = Σ over label tokens of −log p, divided by the number of label tokens of the whole batch
    classifiers      ℓ = −log p(label), divided by the number of rows

log p in fp32 (fp64 for fp64 logits), sums in fp64, so that neither chunks nor processes show in it. Whether labels are
shifted by one token is found by comparing with the model's own loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn

from weftlora.adapted.layer import WeftLayer
from weftlora.adapter.shards import outermost
from weftlora.errors import ConfigError
from weftlora.scoring.rows import Batch
from weftlora.settings import IGNORE

Kind = Literal["classes", "tokens", "next tokens"]


@dataclass(frozen=True)
class RowLoss:
    """`kind`: which labels belong to which logits; `count`: how many labels the batch has."""

    kind: Kind
    count: int

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """logits [rows, (tokens,) classes], labels [rows(, tokens)] → [rows] fp64, which sum to the loss of the batch."""
        if self.kind == "next tokens":
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat, wanted = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        counted = wanted != IGNORE
        return self.summed(flat[counted], wanted[counted], self.rows_of(labels)[counted], len(labels))

    def summed(self, logits: Tensor, wanted: Tensor, rows: Tensor, count: int) -> Tensor:
        """[count] fp64 from the logits [labels, classes] of labels that count, with the row each stands in."""
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(exact, wanted, reduction="none").double()
        return torch.zeros(count, dtype=torch.float64, device=losses.device).index_add(0, rows, losses) / self.count

    @staticmethod
    def rows_of(labels: Tensor) -> Tensor:
        """The row of every label, flat."""
        return torch.arange(len(labels), device=labels.device).repeat_interleave(labels[0].numel())


def recognise(logits: Tensor, labels: Tensor, loss: Tensor | None) -> RowLoss | None:
    """How `loss` comes from these logits and labels; None if it is no cross-entropy over them.

    Raises:
        ConfigError: the model gives no loss, or one that is not finite.
    """
    if loss is None:
        raise ConfigError("the model returns no loss for the validation rows: its forward must take `labels`.")
    if not bool(loss.isfinite().all()):
        raise ConfigError(
            f"the loss of the validation rows is {float(loss)}: no label of theirs counts, or the training has diverged."
        )
    if not isinstance(logits, Tensor) or labels.is_floating_point():
        return None
    found: list[RowLoss] = []
    if labels.dim() == 1 and logits.dim() == 2 and len(logits) == len(labels):
        found = [RowLoss("classes", int((labels != IGNORE).sum()))]
    elif labels.dim() == 2 and logits.shape[:-1] == labels.shape:
        found = [
            RowLoss("next tokens", int((labels[:, 1:] != IGNORE).sum())),
            RowLoss("tokens", int((labels != IGNORE).sum())),
        ]
    apart = {
        float((kind(logits, labels).sum().cpu() - loss.double().cpu()).abs()): kind for kind in found if kind.count
    }
    nearest = min(apart, default=None)
    return apart[nearest] if nearest is not None and nearest <= 1e-3 * abs(float(loss)) else None


@dataclass(eq=False)
class Network:
    """How to run `model`; `blocks` and `head` are empty where it is run in full."""

    model: nn.Module
    loss: RowLoss
    blocks: list[nn.Module] = field(default_factory=list)
    head: nn.Module | None = None

    def block_of(self, layer: nn.Module) -> int | None:
        """The number of the block that holds `layer`; None outside of all."""
        return next((n for n, block in enumerate(self.blocks) if any(m is layer for m in block.modules())), None)

    def losses(self, batch: Batch, replicas: int = 1, prefix: Sequence[Any] = ()) -> Tensor:
        """[replicas, rows] fp64 on the batch repeated so often.

        Args:
            prefix: what the first blocks gave on `batch`; they are not run.
        """
        labels = batch["labels"]
        many = {k: _repeat(v, replicas) for k, v in batch.items()}
        with ExitStack() as stack:
            stack.enter_context(_handing_on(self.blocks, prefix, replicas))
            if self.head is None:
                rows = self.loss(outermost(self.model)(**many).logits, many["labels"])
                return rows.view(replicas, len(labels))
            place = (labels[:, 1:] != IGNORE).nonzero()  # [labels that count, 2]: row, position
            stack.enter_context(_only_positions(self.head, labels.shape, place, replicas))
            del many["labels"]
            logits = outermost(self.model)(**many).logits
        row, position = place.T
        parts = torch.arange(replicas, device=row.device).repeat_interleave(len(row))
        found = self.loss.summed(
            logits.reshape(-1, logits.shape[-1]),
            labels[row, position + 1].repeat(replicas),
            parts * len(labels) + row.repeat(replicas),
            replicas * len(labels),
        )
        return found.view(replicas, len(labels))

    def prefix(self, batch: Batch) -> list[Any]:
        """What each block gives on `batch` as the gates are now."""
        found: list[Any] = []
        if self.blocks:
            with _watching(self.blocks[:-1], lambda _, __, given: found.append(given)):
                self.losses(batch)
        return found


def recognised(model: nn.Module, loss: RowLoss, layers: Sequence[WeftLayer], batch: Batch) -> Network:
    """The network with the blocks and the head that its form allows; one or two forward passes on `batch`."""
    network = Network(model, loss)
    found = [each for each in _lists(model) if _count(each, layers)]
    if found:
        most: nn.ModuleList = max(found, key=lambda each: _count(each, layers))
        blocks = list(most)
        network.blocks = blocks if _is_chain(network, blocks, batch) else []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if loss.kind == "next tokens" and not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        read = getattr(base, "get_output_embeddings", None)
        network.head = read() if callable(read) else None
    return network


def _lists(model: nn.Module) -> list[nn.ModuleList]:
    return [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]


def _count(blocks: nn.ModuleList, layers: Sequence[WeftLayer]) -> int:
    inside = {id(module) for module in blocks.modules()}
    return sum(id(layer) in inside for layer in layers)


def _is_chain(network: Network, blocks: list[nn.Module], batch: Batch) -> bool:
    """Whether each block runs once, in order, and takes the one tensor that the one before gave."""
    seen: list[tuple[nn.Module, Any, Any]] = []
    with _watching(blocks, lambda block, taken, given: seen.append((block, taken, given))):
        network.losses(batch)
    if [id(block) for block, _, _ in seen] != [id(block) for block in blocks]:
        return False
    given = [_hidden(out) for _, _, out in seen]
    taken = [first for _, first, _ in seen]
    return all(g is not None for g in given) and all(t is g for t, g in zip(taken[1:], given, strict=False))


def _hidden(given: Any) -> Tensor | None:
    """The one tensor that a block gives, alone or first in a tuple without others."""
    if isinstance(given, Tensor):
        return given
    if isinstance(given, tuple) and isinstance(given[0], Tensor) and not any(isinstance(t, Tensor) for t in given[1:]):
        return given[0]
    return None


@contextmanager
def _watching(blocks: Sequence[nn.Module], tell: Any) -> Iterator[None]:
    """Calls tell(block, first input, output) after each run of a block."""

    def after(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], given: Any) -> None:
        tell(block, args[0] if args else kwargs.get("hidden_states"), given)

    hooks = [block.register_forward_hook(after, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _handing_on(blocks: Sequence[nn.Module], prefix: Sequence[Any], replicas: int) -> Iterator[None]:
    """The first blocks give, without running, what the last of them gave, repeated: nobody but the next block reads it."""
    skipped = list(blocks[: len(prefix)])
    before = [block.__dict__.get("forward") for block in skipped]
    given = _given(prefix[-1], replicas) if prefix else None
    try:
        for block in skipped:
            object.__setattr__(block, "forward", partial(_hand, given))
        yield
    finally:
        for block, forward in zip(skipped, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                object.__setattr__(block, "forward", forward)


def _hand(given: Any, *_: Any, **__: Any) -> Any:
    return given


def _given(given: Any, replicas: int) -> Any:
    if isinstance(given, Tensor):
        return _repeat(given, replicas)
    return (_repeat(given[0], replicas), *copy.copy(given[1:]))


@contextmanager
def _only_positions(head: nn.Module, shape: torch.Size, place: Tensor, replicas: int) -> Iterator[None]:
    """The head sees [replicas, positions, width] instead of [replicas · rows, tokens, width]."""
    flat = place[:, 0] * shape[1] + place[:, 1]

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0].reshape(replicas, shape[0] * shape[1], -1)[:, flat], *args[1:])

    hook = head.register_forward_pre_hook(before)
    try:
        yield
    finally:
        hook.remove()


def _repeat(t: Tensor, times: int) -> Tensor:
    return t if times == 1 or t.dim() == 0 else t.repeat(times, *(1,) * (t.dim() - 1))
