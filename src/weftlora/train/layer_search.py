"""The search of a run whose adapter has layers that are searched: after the run folder, before the trainer.

    prepare → run folder → search, saved as it goes → selection.json → second stage → Trainer

search/state.pt    what --resume continues from inside the search; whole or not there
search.jsonl       one line per step on α
selection.json     what was selected: any other recipe takes it as `layers`
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainingArguments, set_seed

from weftlora.adapter.spec import WeftConfig, decode_choice
from weftlora.disk.files import Output, sync, write_lines, write_text, writing
from weftlora.disk.ownership import temporary
from weftlora.errors import ConfigError
from weftlora.host.attach import attach
from weftlora.host.optimizer import freeze
from weftlora.progress import Progress, Tick, ignore
from weftlora.recipes import SEARCHING
from weftlora.runs.adapter import parameters
from weftlora.runs.recipe import Recipe, TrainConfig
from weftlora.runs.run import Run
from weftlora.search import Selection, Stability, compare
from weftlora.search.batches import Batch, model_loss
from weftlora.search.driver import LayerSearch
from weftlora.search.finetuning_stage import second_stage
from weftlora.search.hypergradient import Inner
from weftlora.settings import is_whole
from weftlora.terms.layers import Layers
from weftlora.terms.layers.search import Search
from weftlora.train import arguments
from weftlora.train.prepare import Prepared

COLUMNS = ["input_ids", "attention_mask", "labels"]
SAVES = 5
"""How often a search is saved where train.save_every does not say."""

log = logging.getLogger(__name__)


def searches(prepared: Prepared) -> bool:
    """Whether the recipe's adapter is to be searched before it is trained."""
    return isinstance(prepared.adapter, WeftConfig) and prepared.adapter.layers.search is not None


def make_search(
    prepared: Prepared,
    args: TrainingArguments | None = None,
    seed: int | None = None,
    rows: int | None = None,
    training: int | None = None,
) -> LayerSearch:
    """The search that a recipe describes: θ as the train section trains it, α on rows held out of the training rows.

    `seed` and `rows`, at most so many of the training rows, take the place of the recipe's; `training` are the steps of the training
    that it is the search of.

    Raises:
        ConfigError: fp16, which would need its gradients scaled, or a setting that cannot work.
        DataError: too few rows.
    """
    config, train = cast(WeftConfig, prepared.adapter), prepared.recipe.train
    if train.precision == "fp16":
        raise ConfigError(
            "train.precision=fp16 cannot search layers, whose gradients would underflow: use bf16 or fp32."
        )
    model = cast(PeftModel, prepared.model)
    if args is not None:
        model.to(args.device)
    if train.gradient_checkpointing:
        reentrant = train.gradient_checkpointing == "reentrant"
        base: Any = model.get_base_model()
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
    world = int(os.environ.get("WORLD_SIZE", "1"))
    inner = Inner(
        lr=arguments.rate(train),
        batch_size=train.batch_size,
        accumulation=train.accumulation * world,
        optimizer="sgd" if train.optimizer == "sgd" else "adamw",
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
    )
    search = config.layers.search
    assert search is not None
    return LayerSearch(
        model,
        search,
        inner,
        cast("Sequence[Any]", prepared.data.train.select_columns(COLUMNS)),
        collate=prepared.collator,
        loss=_loss(train),
        seed=train.seed if seed is None else seed,
        max_samples=rows,
        training=training,
    )


def _loss(train: TrainConfig) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        kind = next(model.parameters()).device.type
        with torch.autocast(kind, torch.bfloat16) if train.precision == "bf16" else nullcontext():
            return model_loss(model, batch)

    return loss


@dataclass
class Stage:
    """The search of one run: made before its folder counts as started, finished before its trainer is made."""

    prepared: Prepared
    run: Run
    search: LayerSearch
    main: bool

    @property
    def _state(self) -> Path:
        return self.run.folder / "search" / "state.pt"

    def finish(self, resume: bool, progress: Progress) -> tuple[Prepared, Run]:
        """Search, or go on searching, and put the second stage's model in place of the searched one."""
        if resume and self._state.is_file():
            self.search.load(self._state)
        every = self.prepared.recipe.train.save_every
        every = max(1, math.ceil(self.search.steps / SAVES)) if every is None else every
        while self.search.done < self.search.steps:
            row = self.search.step()
            if self.main:
                progress(Tick("search", self.search.done, self.search.steps, row["loss"]))
            last = self.search.done == self.search.steps
            if last or (every and self.search.done % every == 0):
                self._save()
        selection = self.search.selection()
        self._write(selection)
        return self._second(selection)

    def _save(self) -> None:
        partial = temporary(self._state)
        with writing(self._state):
            self._state.parent.mkdir(exist_ok=True)
            self.search.save(partial)  # all processes: each has a random state of its own
            if not self.main:
                return
            with partial.open("rb") as file:
                sync(file.fileno())
            partial.replace(self._state)
        write_lines(self.run.folder / "search.jsonl", self.search.history)

    def _write(self, selection: Selection) -> None:
        chosen = [c.name for c in selection.chosen]
        log.info("selected %d of %d groups: %s", len(chosen), len(selection.candidates), ", ".join(chosen))
        if selection.filled:
            log.warning("not over the threshold, and added for min_layers: %s", ", ".join(selection.filled))
        if self.main:
            write_text(self.run.folder / "selection.json", selection.text())
            self.run.event(
                "selection",
                layers=list(selection.blocks),
                margin=selection.margin,
                near_ties=selection.near_ties,
                cost_in_steps=selection.record["cost_in_steps"],
                seconds=round(selection.seconds, 3),
            )

    def _second(self, selection: Selection) -> tuple[Prepared, Run]:
        set_seed(
            self.prepared.recipe.train.seed
        )  # the start of the second stage does not depend on the search's length
        model = second_stage(cast(PeftModel, self.prepared.model), selection)
        config = model.peft_config["default"]
        if self.prepared.recipe.train.freeze_down:
            freeze(model)
        attach(model, total_steps=self.run.steps)
        described = {**self.run.adapter, "layers": config.to_dict()["layers"]}
        took = {"search_seconds": round(selection.seconds, 3), "search_in_steps": selection.record["cost_in_steps"]}
        run = dataclasses.replace(self.run, adapter=described, parameters=parameters(model), time=self.run.time | took)
        if self.main:
            run.save()
        return dataclasses.replace(self.prepared, model=model, adapter=config), run


def begin(prepared: Prepared, run: Run, args: TrainingArguments, main: bool) -> Stage | None:
    """The search of a run, ready to start; None where nothing is searched. Raises what `make_search` raises."""
    return (
        Stage(prepared, run, make_search(prepared, args, training=prepared.steps), main) if searches(prepared) else None
    )


@dataclass(frozen=True)
class Searched:
    """What `weftlora search` found: a selection per seed, the first one being the result, and how far they agree.

    `by_rows` are selections of the first seed from so many rows each; the result is compared with them. `steps` is the length
    of the recipe's training, beside which the cost of the search is to be seen.
    """

    selections: tuple[Selection, ...]
    seeds: tuple[int, ...]
    by_rows: dict[int, Selection]
    steps: int
    path: Path | None

    @property
    def stability(self) -> Stability | None:
        """Over seeds; None for one."""
        return compare(self.selections) if len(self.selections) > 1 else None

    @property
    def stability_by_rows(self) -> Stability | None:
        """Over sizes of the search set, the result's own included; None without any."""
        return compare([self.selections[0], *self.by_rows.values()]) if self.by_rows else None

    def record(self) -> dict[str, Any]:
        """Plain data, as `--json` shows it."""
        return {
            "layers": list(self.selections[0].blocks),
            "path": None if self.path is None else str(self.path),
            "seeds": list(self.seeds),
            "stability": None if self.stability is None else dataclasses.asdict(self.stability),
            "stability_by_rows": None if self.stability_by_rows is None else dataclasses.asdict(self.stability_by_rows),
            "training_steps": self.steps,
            "seconds": [selection.seconds for selection in self.selections],
            "controls": {name: list(only.blocks) for name, only in self.selections[0].controls().items()},
            "selections": [dataclasses.asdict(selection) for selection in self.selections],
            "by_rows": {str(rows): dataclasses.asdict(selection) for rows, selection in self.by_rows.items()},
        }


def search_recipe(
    source: Any,
    *overrides: str,
    seeds: int = 1,
    rows: Sequence[int] = (),
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress = ignore,
) -> Searched:
    """Search the layers of a recipe and train nothing else.

    Args:
        source: a recipe file, a built-in name, a mapping or a `Recipe`. An adapter without a search gets `weftlora.Search()`.
        seeds: how many searches, with seeds counted up from train.seed; they differ in adapter start, splits and order.
        rows: search again with the first seed on so many rows each, to see how far the size of the search set decides.
        out: file for the first selection; an earlier selection is replaced.
        overwrite: replace `out` even if it is something else.

    Raises:
        ConfigError, DataError, ModelError, TargetError: something in the recipe cannot work, or it names its layers already.
        RunError: `out` cannot be written, or is something else than a selection.
    """
    place = None if out is None else Output(Path(out), "a selection", ("layers", "candidates"), overwrite)
    if place is not None:
        place.check()
    recipe = Recipe.read(source, *overrides)
    for name, counts in (("seeds", [seeds]), ("rows", rows)):
        if not all(is_whole(n, 1) for n in counts):
            given = counts[0] if name == "seeds" else list(counts)
            raise ConfigError(f"{name}={given!r} searches nothing: use whole numbers from 1 up.")
    first, several = recipe.train.seed, seeds > 1 or bool(rows)
    sized = {n: _search_once(recipe, first, n, progress, several)[0] for n in dict.fromkeys(rows)}
    found = [_search_once(recipe, seed, None, progress, several) for seed in range(first, first + seeds)]
    if place is not None:
        place.write(found[0][0].text())
    return Searched(
        tuple(selection for selection, _ in found),
        tuple(range(first, first + seeds)),
        sized,
        found[0][1],
        None if place is None else place.path,
    )


def _search_once(
    recipe: Recipe, seed: int, rows: int | None, progress: Progress, several: bool
) -> tuple[Selection, int]:
    """The selection, and how many steps the recipe trains."""
    from weftlora.train.prepare import prepare

    train = recipe.train.model_copy(update={"seed": seed})
    again = recipe.model_copy(update={"train": train, "adapter": _with_search(recipe.adapter)})
    again._base_dir = recipe.base_dir
    prepared = prepare(again)
    if rows is not None and rows > (there := len(prepared.data.train)):
        raise ConfigError(f"rows={rows} are more than the {there} that there are to search on: give fewer.")
    search = make_search(
        prepared,
        arguments.arguments(prepared.recipe.train, Path(recipe.out), prepared.steps, False),
        rows=rows,
    )
    name = f"search, seed {seed}" if several else "search"
    name += f", {rows} rows" if rows else ""

    def tick(row: dict[str, Any]) -> None:
        progress(Tick(name, row["step"], search.steps, row["loss"]))

    return search.run(tick), prepared.steps


def _with_search(adapter: dict[str, Any]) -> dict[str, Any]:
    name = str(adapter.get("recipe"))
    if name == "none" or name.startswith("peft:"):
        raise ConfigError(
            f"adapter {name} has no layer gates to search with: use a recipe of weftlora, such as flexora."
        )
    given = adapter.get("layers")
    from_file = isinstance(given, str) and given.endswith(".json")
    chosen: Layers | None = None if from_file else decode_choice("layers", given)
    searched = name in SEARCHING or (chosen is not None and chosen.search is not None)
    if not searched and given is not None and chosen != WeftConfig().layers:
        raise ConfigError(f"adapter.layers={given!r} is a choice already, so there is nothing to search: drop it.")
    return adapter if searched else {**adapter, "layers": Search.kind}
