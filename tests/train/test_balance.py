"""A load-balance term reaches the loss of our trainer, once per micro-batch and shared out under accumulation."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer

import weftlora
from weftlora.progress import ignore
from weftlora.runs.recipe import Recipe
from weftlora.train.arguments import arguments
from weftlora.train.prepare import prepare
from weftlora.train.trainer import make_trainer

HYDRA = {"recipe": "hydralora", "heads": 3, "r": 2, "balance": 0.5}


def balanced_trainer(recipe, tmp_path: Path, **train):
    made = Recipe.read(recipe("llama", adapter=HYDRA, train=train))
    prepared = prepare(made)

    class Nowhere:
        folder = tmp_path
        extends = None

    args = arguments(made.train, tmp_path / "checkpoints", prepared.steps, False)
    trainer = make_trainer(prepared, Nowhere(), args, ignore, ())
    return trainer, prepared


@pytest.mark.parametrize(("items", "share"), [(None, 1.0), (20, 1 / 4)])
def test_the_term_is_added_to_the_loss(recipe, tmp_path, items, share):
    trainer, prepared = balanced_trainer(recipe, tmp_path)
    rows = prepared.data.train.select(range(4)).select_columns(["input_ids", "attention_mask", "labels"])
    batch = prepared.collator(list(rows))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 4
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    with weftlora.routing(trainer.model) as routing:
        plain = Trainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
    expected = plain + share * routing.balance_loss(batch["attention_mask"])
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert loss > plain + 0.4 * share  # N Σ f p̄ is near 1 at the start, its weight is 0.5


def test_evaluation_has_no_such_term(recipe, tmp_path):
    trainer, prepared = balanced_trainer(recipe, tmp_path)
    rows = prepared.data.train.select(range(4)).select_columns(["input_ids", "attention_mask", "labels"])
    batch = prepared.collator(list(rows))
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(
            trainer.compute_loss(trainer.model, dict(batch)), Trainer.compute_loss(trainer, trainer.model, dict(batch))
        )


def test_a_whole_run_trains_with_it(recipe):
    run = weftlora.train(recipe("llama", adapter=HYDRA, train={"accumulation": 2}))
    assert run.status == "complete"
