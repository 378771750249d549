"""What a controller asks for scores: draws the rows, finds the fastest way that is right for this model, leaves no trace.

A way is right if it gives the reference's losses for the whole model and for the model without the slots of one module. That is
looked at once per run; the next slower way takes over where it is not so, and says so in the log.

No trace: modes, random state, gates, listeners and cache flags are put back, also after an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from weftlora.adapted.hooks import in_mode
from weftlora.adapted.layer import WeftLayer
from weftlora.adapter.shards import outermost
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError
from weftlora.progress import Progress, Tick, ignore
from weftlora.schedule import processes
from weftlora.schedule.rank_slots import ALL, TERMS, Share
from weftlora.scoring import brackets
from weftlora.scoring.brackets import SlotId
from weftlora.scoring.network import Network, RowLoss, recognise, recognised
from weftlora.scoring.rows import Batch, Rows
from weftlora.settings import IGNORE
from weftlora.terms.events import SlotScoring


@contextmanager
def undisturbed(model: nn.Module, sites: Sequence[Site]) -> Iterator[None]:
    """Evaluation mode without gradients, caches and listeners, for the length of the block.

    Gradients of parameters are not touched by what runs inside; whoever needs gates' gradients asks for them alone.
    """
    listeners = [(site, site.listeners) for site in sites]
    cached = [config for config in _configs(model) if getattr(config, "use_cache", None)]
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), ExitStack() as stack:
            for kind in {p.device.type for p in model.parameters()}:
                stack.enter_context(torch.autocast(kind, enabled=False))
            for config in cached:
                config.use_cache = False
            for site in sites:
                site.unheard()
            stack.enter_context(in_mode(model, training=False))
            yield
    finally:
        for site, before in listeners:
            site.listen_again(before)
        for config in cached:
            config.use_cache = True


def _configs(model: nn.Module) -> list[Any]:
    found = [getattr(module, "config", None) for module in model.modules()]
    return list({id(c): c for c in found if c is not None and not isinstance(c, dict)}.values())


logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Ablation:
    """Scores the rank slots of one adapter of `model` on validation rows; see `weftlora.schedule.rank_slots.Scorer`."""

    model: nn.Module
    layers: list[WeftLayer]
    adapter: str
    choice: SlotScoring
    rows: Rows
    way: Network | None = field(default=None, init=False)
    progress: Progress = field(default_factory=lambda: ignore, init=False)
    known: bool = field(default=False, init=False)
    """Whether `way` has been looked for; None then means the reference."""

    @property
    def held(self) -> list[Site]:
        """The sites as the layers hold them: those of experts in batches."""
        return [layer.site(self.adapter) for layer in self.layers]

    @property
    def sites(self) -> list[Site]:
        """The sites of one matrix each, in the order of the layers."""
        return [member.site for layer in self.layers for member in layer.members(self.adapter)]

    @property
    def layer_of(self) -> list[WeftLayer]:
        """The layer of each of `sites`."""
        return [layer for layer in self.layers for _ in layer.members(self.adapter)]

    def drawn(self, draw: str, *, other: bool = False) -> Batch:
        """The rows that `draw` seeds, or others, on the device of the model."""
        device = next(self.model.parameters()).device
        rows = self.rows.draw(self.choice.rows, draw, other=other)
        return {k: v.to(device) for k, v in rows.items()}

    def exact(self, slots: Sequence[SlotId], draw: str, *, other: bool = False, share: Share = ALL) -> Tensor:
        """[slots, 2, rows] fp64, of rows outside of the share 0. A loss without parts per row is the first share's alone."""
        batch, terms = self.drawn(draw, other=other), TERMS[self.choice.terms]
        with undisturbed(self.model, self.held):
            if not slots:
                return torch.zeros(0, 2, len(batch["labels"]) if self._way(batch) else 1, dtype=torch.float64)
            if way := self._way(batch):
                mine, tokens = share.of(batch), self.choice.chunk_tokens
                found = brackets.exact_brackets(
                    way, self.layer_of, self.sites, slots, mine, chunk_tokens=tokens, terms=terms, tell=self._tell
                )
                return share.among_all(found, batch)
            found = brackets.brackets_by_definition(self.sites, slots, lambda: self._whole_loss(batch))
            return found if share.number == 0 else torch.zeros_like(found)

    def watch(self, progress: Progress) -> None:
        """See `weftlora.schedule.rank_slots.Scorer`."""
        self.progress = progress

    def _tell(self, done: int, total: int) -> None:
        self.progress(Tick("scoring ranks", done, total))

    def check(self, *, estimated: bool) -> None:
        """See `weftlora.schedule.rank_slots.Scorer`. Nothing of it is kept: slots that have hardly moved prove no way right."""
        device = next(self.model.parameters()).device
        batch = {k: v.to(device) for k, v in self.rows.draw(self.choice.rows, "first step").items()}
        with undisturbed(self.model, self.held):
            way = self._way(batch)
        self.way, self.known = None, False
        if estimated and way is None:
            raise self._refusal()

    def estimate(self, slots: Sequence[SlotId], draw: str, *, share: Share = ALL) -> Tensor:
        """[slots, 2, rows] fp64, of rows outside of the share 0."""

        def measure(way: Network, sites: Sequence[Site], some: Sequence[SlotId], batch: Batch, **how: Any) -> Tensor:
            found = brackets.estimated_brackets(way, sites, some, share.of(batch), **how)
            return share.among_all(found, batch)

        return self._by_gradients(measure, slots, draw)

    def sensitivity(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """[slots] fp64: |w ∂L/∂w|, averaged over the slot's part of every parameter, summed over these."""
        return self._by_gradients(brackets.sensitivities, slots, draw)

    def gates(self, slots: Sequence[SlotId], draw: str) -> Tensor:
        """[slots] fp64: gates α' = 2 sigmoid(a') of the slots, trained on these rows from a' = 0."""
        return self._by_gradients(brackets.trained_gates, slots, draw)

    def _by_gradients(self, measure: Callable[..., Tensor], slots: Sequence[SlotId], draw: str) -> Tensor:
        """What `measure` of `scoring.brackets` gives on the rows of a draw. Raises ConfigError where the loss has no such way."""
        batch = self.drawn(draw)
        with undisturbed(self.model, self.held):
            if way := self._way(batch):
                return measure(way, self.sites, slots, batch, chunk_tokens=self.choice.chunk_tokens, tell=self._tell)
        raise self._refusal()

    def _refusal(self) -> ConfigError:
        return ConfigError(
            f"{self.choice.title}(score={self.choice.way!r}) needs a cross-entropy over logits with one part per row, which "
            f"{type(self.model).__name__} does not give: use score='exact'."
        )

    def _whole_loss(self, batch: Batch) -> Tensor:
        """[1] fp64: the model's own loss."""
        loss: Tensor = outermost(self.model)(**batch).loss
        return loss.double().reshape(1)

    def _way(self, batch: Batch) -> Network | None:
        """How to run this model on this batch; None is the reference."""
        if not self.known:
            self.way, self.known = self._find_way(batch), True
        if self.way is None:
            return None
        kind, labels = self.way.loss.kind, batch["labels"]
        count = int(((labels[:, 1:] if kind == "next tokens" else labels) != IGNORE).sum())
        if not count:
            raise ConfigError("no label of the validation rows drawn counts: give rows with answers, or more of them.")
        self.way.loss = RowLoss(kind, count)
        return self.way

    def _find_way(self, batch: Batch) -> Network | None:
        """Tried on a few rows with labels, whatever the size of the round's batch."""
        size = brackets.shares(batch, self.choice.chunk_tokens)[0]
        few = _most_labelled(batch, max(size, 2))
        given = outermost(self.model)(**few)
        loss = recognise(given.logits, few["labels"], given.loss)
        if loss is None:
            logger.info(
                "the loss of %s is not a cross-entropy over rows: one pass per slot.", type(self.model).__name__
            )
            return None
        fast = recognised(self.model, loss, self.layers, few)
        in_turn = {"prefix and head": fast, "head": replace(fast, blocks=[]), "replicas": Network(self.model, loss)}
        for name, way in in_turn.items():
            if self._agrees(way, few):
                logger.info("rank slots are scored with: %s (%d blocks)", name, len(way.blocks))
                return way
            logger.warning("%s: scoring with %s is not exact; a slower way.", type(self.model).__name__, name)
        return None

    def _agrees(self, way: Network, batch: Batch) -> bool:
        """Whether replicas come out as the model itself does, whole and with one module's slots off, in their places."""
        sites = self.sites
        layers = self.layer_of
        blocks = {id(layer): way.block_of(layer) or 0 for layer in self.layers}
        m = max(range(len(sites)), key=lambda n: (blocks[id(layers[n])], n))
        site = sites[m]
        whole = [way.loss(outermost(self.model)(**batch).logits, batch["labels"]).sum()]
        others = [(n, slot) for n, each in enumerate(sites) for slot in each.live() if n != m]
        with brackets.only(sites, others):
            without = way.loss(outermost(self.model)(**batch).logits, batch["labels"]).sum()
        expected = torch.stack([*whole, without, *whole])
        assert site.mask is not None
        keep = torch.ones(3, len(site.mask), device=site.mask.device)
        keep[1] = 0
        try:
            prefix = way.prefix(batch)[: blocks[id(layers[m])]]
            site.keep = keep
            got = way.losses(batch, 3, prefix).sum(1)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if processes.ends_a_wait(error):  # says nothing of the way
                raise
            logger.debug("%s", error)
            return False
        finally:
            site.keep = None
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(self._dtype, 3e-2)
        return torch.allclose(got, expected, rtol=tolerance, atol=tolerance)

    @property
    def _dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())


def _most_labelled(batch: Batch, count: int) -> Batch:
    """The `count` rows with the most labels that count, whether or not they are shifted by a token."""
    counted = (batch["labels"] != IGNORE).reshape(len(batch["labels"]), -1)
    found = counted.sum(1) + counted[:, 1:].sum(1)
    best = found.argsort(descending=True, stable=True)[:count].sort().values
    return {k: v[best.to(v.device)] for k, v in batch.items()}
