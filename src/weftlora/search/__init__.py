"""Flexora: which blocks are worth an adapter, searched by hypergradient.

    selection = weftlora.search_layers(model, train, validation)         model: base, or adapted with layers=weftlora.Search(...)
    model = get_peft_model(base, weftlora.HydraLoraConfig(layers=selection.layers))

`batches` runs forwards and backwards that leave nothing behind, `groups` are the sites that α weighs, `hypergradient` differentiates
inner steps, `driver` is the loop, `selection` is what it selects as a file, `agreement` says how far selections agree,
`finetuning_stage` comes after it. What gates, gradient and selection are, the choice of layers says
(`weftlora.terms.layers.SearchedLayers`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

from peft import PeftModel, get_peft_model
from torch import nn

from weftlora.adapter.shards import is_sharded
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import ConfigError
from weftlora.search.agreement import Stability, stability
from weftlora.search.batches import Collate, Loss, Rows
from weftlora.search.driver import LayerSearch
from weftlora.search.finetuning_stage import second_stage, unload
from weftlora.search.hypergradient import Inner
from weftlora.search.selection import Candidate, Selection, compare
from weftlora.settings import check_seed
from weftlora.terms.layers import SearchedLayers

__all__ = [
    "Candidate",
    "LayerSearch",
    "Selection",
    "Stability",
    "compare",
    "search_layers",
    "second_stage",
    "stability",
]


def search_layers(
    model: nn.Module,
    train: Rows,
    validation: Rows | None = None,
    *,
    config: WeftConfig | None = None,
    adapter: str = "default",
    collate: Collate | None = None,
    loss: Loss | None = None,
    lr: float = 1e-4,
    batch_size: int = 1,
    accumulation: int = 8,
    optimizer: Literal["adamw", "sgd"] = "adamw",
    schedule: Literal["cosine", "constant"] = "cosine",
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    on_step: Callable[[dict[str, Any]], None] | None = None,
) -> Selection:
    """Search which blocks of `model` to adapt. Where torch.distributed runs, every process calls it with the same rows.

    Args:
        model: a base model, which is adapted for the search and handed back as it was; or a model adapted with
            layers=weftlora.Search(...), which keeps its searched adapter for `weftlora.second_stage`. Not wrapped in DDP.
        train: rows, such as a datasets.Dataset or a list of dicts; θ is trained on them.
        validation: other rows, for α; None holds out `val_size` of the training rows. The two are disjoint in content.
        config: the adapter to search with on a bare base; None is `weftlora.FlexoraConfig()`.
        adapter: the adapter's name.
        collate: a list of rows → the keyword arguments of a forward; None stacks rows of equal shapes.
        loss: (model, batch) → mean loss; None takes the `.loss` that the model returns.
        lr, batch_size, accumulation, optimizer, schedule, weight_decay, max_grad_norm: of the inner steps, see
            `weftlora.search.hypergradient.Inner`. Validation micro-batches have at most `batch_size` rows too.
        seed: of the splits and the order of rows (of dropout and the adapter's start: torch's own).
        on_step: called after every step on α with "step", "loss", "validation_loss", "alpha", "skipped" and more.

    Raises:
        ConfigError: the model has no search, another adapter of it is active, or a setting cannot work.
        DataError: too few rows, or validation rows that are training rows.
        TargetError: the model has fewer than two blocks with targeted modules.
        RunError: no validation loss was ever a number, or too few blocks are selected and `when_fewer` is "error".
    """
    inner = Inner(lr, batch_size, accumulation, optimizer, schedule, weight_decay, max_grad_norm)
    check_seed(seed, "search_layers: seed")
    before = [(p, p.requires_grad) for p in model.parameters()]
    adapted, search, own = _searchable(model, config, adapter)
    try:
        job = LayerSearch(
            adapted,
            search,
            inner,
            train,
            validation,
            adapter=adapter,
            collate=collate,
            loss=loss,
            seed=seed,
        )
        return job.run(on_step)
    finally:
        if own:
            unload(adapted)
            for p, trained in before:  # peft freezes a base and leaves it so
                p.requires_grad_(trained)


def _searchable(model: nn.Module, config: WeftConfig | None, adapter: str) -> tuple[PeftModel, SearchedLayers, bool]:
    """The adapted model to search, how, and whether it was adapted here."""
    if not isinstance(model, PeftModel):
        if is_sharded(model):
            raise ConfigError(
                "the base is split among processes already, and an adapter put on it now would not be: adapt it with "
                "layers=weftlora.Search() first, then shard it, then search."
            )
        if config is None:
            from weftlora.recipes.flexora import FlexoraConfig

            config = FlexoraConfig()
        if (search := config.layers.search) is None:
            raise ConfigError(
                f"a config with layers={config.layers.title} has no search: give it layers=weftlora.Search()."
            )
        return cast(PeftModel, get_peft_model(model, config, adapter_name=adapter)), search, True
    if config is not None:
        raise ConfigError("the model has an adapter and a config was given too: search one of the two.")
    given = model.peft_config.get(adapter)
    if not isinstance(given, WeftConfig) or (search := given.layers.search) is None:
        raise ConfigError(
            f"adapter {adapter!r} of the model has no search: create its config with layers=weftlora.Search()."
        )
    return model, search, False
