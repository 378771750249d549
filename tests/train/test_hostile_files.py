"""Files and values that nobody would write on purpose: one sentence each, at once, and nothing written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny
import torch
from safetensors.torch import load_file, save_file

import weftlora
from weftlora.compare.recipe import CompareRecipe
from weftlora.data.read import read_saved
from weftlora.errors import ConfigError, DataError, ModelError, RunError, WeftError
from weftlora.runs.recipe import Recipe, read_yaml
from weftlora.runs.run import Run

Make = Callable[..., dict[str, Any]]

BOMB = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9))]
)
CHAIN = "\n".join(["a0: &a0 [x]", *(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 2000))])
SICK = {
    "nested": "[" * 300 + "]" * 300,
    "nested mappings": "".join(f"{' ' * n}a:\n" for n in range(300)),
    "very nested": "[" * 100_000,
    "nested in flow": "{a: " * 300 + "1" + "}" * 300,
    "no int": "!!int x",
    "no date": "a: 2024-99-99",
    "no timestamp": "!!timestamp x",
    "no float": "!!float x",
    "no bytes": "!!binary é",
    "a huge number": "a: " + "9" * 5000,
    "a huge hexadecimal's key": "? " + "9" * 5000 + "\n: 1",
    "a hexadecimal number that cannot be shown": "a: 0x" + "f" * 5000,
    "a number of sixties": "a: 1" + ":1" * 5000,
    "aliases": BOMB,
    "a chain of aliases": CHAIN,
    "an alias in itself": "&a [*a]",
    "an alias in its mapping": "&a {b: *a}",
    "an unknown alias": "*nothing",
    "an object": "!!python/object/apply:os.system [true]",
    "no merge": "<<: 3\na: 1",
    "a list as key": "? [a]\n: 1",
    "twice": "a: 1\na: 2",
    "a NUL": "a: \0",
    "a lone surrogate": "a: \udcff",
    "too long": "a: " + "x" * 2_000_000,
    "a set": "!!set {a, {b}}",
    "omap": "!!omap [x]",
    "a bool": "!!bool x",
}


@pytest.mark.parametrize("sick", SICK)
def test_a_sick_yaml_is_one_short_sentence_at_once(sick: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="here") as said:
        read_yaml(SICK[sick], "here")
    assert time.process_time() - began < 5
    assert len(str(said.value)) <= 2000
    assert "Traceback" not in str(said.value)


def test_ordinary_yaml_is_read() -> None:
    text = """
    base: &base {lr: 1e-3, steps: 4}
    train: {<<: *base, steps: 5}
    more:
      <<: [*base, {warmup: 2}]
      seed: 3
    same: *base
    """
    found = read_yaml(text, "here")
    assert found["train"] == {"lr": 0.001, "steps": 5}
    assert found["more"] == {"lr": 0.001, "steps": 4, "warmup": 2, "seed": 3}
    assert found["same"] == found["base"]
    assert read_yaml("", "here") is None
    assert read_yaml("3", "here") == 3


LONG = "x" * 300
VALUES = [
    "train.seed=4294967296",
    f"train.seed={10**30}",
    f"train.num_threads={10**12}",
    f"train.batch_size={10**18}",
    f"train.accumulation={10**18}",
    f"train.steps={10**20}",
    f"train.eval_every={10**20}",
    f"train.keep={10**20}",
    f"out=runs/{LONG}",
    "out=~nosuchuser/run",
    'out="a\\0b"',
    f"model={LONG}",
    "model=~nosuchuser/model",
    'model="a\\0b"',
    f"data.train={LONG}.jsonl",
    "data.train=~nosuchuser/rows.jsonl",
    'data.train="a\\0b"',
    f"data.max_length={10**20}",
    f"data.seed={2**32}",
]


@pytest.mark.parametrize("override", VALUES)
def test_a_value_beyond_all_bounds_is_refused(recipe: Make, tmp_path: Path, override: str) -> None:
    made = recipe()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises((ConfigError, DataError, ModelError)):
        weftlora.train(made, override)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("source", [LONG, f"{LONG}.yaml", "a\0b", "~nosuchuser/x.yaml"])
def test_a_recipe_of_an_impossible_name(source: str) -> None:
    with pytest.raises(ConfigError):
        Recipe.read(source)


@pytest.mark.parametrize("value", [10**12, [0] * 2, list(range(2000)), [2**32], "x", True, -1])
def test_seeds_beyond_all_bounds(recipe: Make, value: Any) -> None:
    with pytest.raises(ConfigError, match="seeds"):
        CompareRecipe.read({"data": recipe()["data"], "methods": ["lora"], "out": "x", "seeds": value})


# ---------------------------------------------------------------------- run.json


DEEP = '{"recipe": ' + '{"a": ' * 100_000 + "1" + "}" * 100_001
WRONG: list[dict[str, Any]] = [
    {"format": "x", "status": 3},
    {"format": 99},
    *(
        {key: value}
        for key in ("recipe", "base", "data", "adapter", "parameters", "metrics")
        for value in ([], "x", 3, None)
    ),
    *({"recipe": {key: 3}} for key in ("model", "data", "adapter", "train")),
    {"status": []},
    {"steps": "x"},
    {"seed": None},
    {"data": {"hashes": []}},
    {"data": {"labels": 3}},
    {"base": {"shapes": 3}},
    {"metrics": {"train_loss": "x"}},
    {"figures": {"peak_bytes": [3]}},
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("run")
    tiny.llama(top / "base")
    tiny.write_rows(top / "rows.jsonl", tiny.answers(48))
    recipe = {"model": str(top / "base"), "data": {"train": str(top / "rows.jsonl")}, "adapter": "lora"}
    return weftlora.train(recipe | {"train": {"steps": 2, "num_threads": 1}, "out": str(top / "run")}).folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize("change", WRONG, ids=lambda change: json.dumps(change)[:40])
def test_a_record_with_wrong_values_is_damaged(run: Path, change: dict[str, Any]) -> None:
    file = run / "run.json"
    content = json.loads(file.read_text())
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"damaged|newer weftlora"):
        Run.load(run)


@pytest.mark.parametrize("text", [DEEP, "[]", "", "{", "\0", '{"format": 1}', "[" * 100_000])
def test_a_record_that_is_none(run: Path, text: str) -> None:
    (run / "run.json").write_text(text)
    with pytest.raises(RunError):
        Run.load(run)


def test_rows_of_metrics_without_a_step_are_none(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"loss": 1}\n{"step": "x", "loss": 1}\n[]\n3\n{"step": null}\n' + "[" * 100_000 + "\n")
    assert all(isinstance(row["step"], int) for row in Run.load(run).history())
    weftlora.report(run, out=run / "page.html")


# ---------------------------------------------------------------------- adapters and bases


def edit(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_values_that_are_no_numbers_is_refused(run: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(iter(tensors))].view(-1)[0] = value

    edit(run, spoil)
    for use in (weftlora.generate, lambda folder, prompt: weftlora.evaluate(folder, split="validation")):
        with pytest.raises(WeftError, match="holds values that are not numbers"):
            use(run, "a ->")


def test_an_adapter_with_tensors_without_a_dimension(run: Path) -> None:
    def flatten(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            tensors[key] = torch.tensor(1.0)

    edit(run, flatten)
    with pytest.raises(WeftError):
        weftlora.inspect(run / "adapter", base=False)


def test_a_missing_weights_file_is_named(recipe: Make, tmp_path: Path) -> None:
    base = tiny.llama(tmp_path / "base")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors").rename(base / "model-00001-of-00002.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model-00002-of-00002\.safetensors"):
        weftlora.train(recipe() | {"model": str(base)})
    index["weight_map"]["b"] = "../../other.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="is not beside it"):
        weftlora.train(recipe() | {"model": str(base)})
    (base / "model.safetensors.index.json").write_text("[" * 100_000)
    with pytest.raises(ModelError, match="is damaged"):
        weftlora.train(recipe() | {"model": str(base)})


# ---------------------------------------------------------------------- saved datasets


def saved(folder: Path) -> Path:
    import datasets

    rows = datasets.Dataset.from_list([{"prompt": "a ->", "completion": "b"}])
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(str(folder))
    return folder


RECORDS = [
    "null",
    "[]",
    "{}",
    "3",
    "",
    "{",
    '{"features": null}',
    '{"features": 3}',
    '{"features": {"a": null}}',
    "[" * 100_000,
]


@pytest.mark.parametrize("name", ["train/dataset_info.json", "train/state.json", "dataset_dict.json"])
def test_a_saved_dataset_with_a_sick_record_is_read_or_refused(tmp_path: Path, name: str) -> None:
    folder, said = saved(tmp_path / "saved"), []
    for text in RECORDS:
        (folder / name).write_text(text)
        try:
            assert len(read_saved(folder).rows) == 1
        except DataError as error:
            said.append(str(error))
    assert len(said) >= 6
    assert all(str(folder) in sentence for sentence in said)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("dataset_dict.json", {"splits": ["train", "../elsewhere"]}),
        ("dataset_dict.json", {"splits": ["/etc"]}),
        ("train/state.json", {"_data_files": [{"filename": "../../elsewhere/data.arrow"}]}),
        ("train/state.json", {"_data_files": [{"filename": 3}]}),
    ],
)
def test_a_saved_dataset_reads_nothing_outside_its_folder(tmp_path: Path, name: str, record: dict[str, Any]) -> None:
    folder = saved(tmp_path / "saved")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | record))
    with pytest.raises(DataError, match="is not in its folder"):
        read_saved(folder)


def test_a_run_whose_record_lacks_something_names_it(tmp_path: Path) -> None:
    words = dict.fromkeys(("base_dir", "task", "device"), "x")
    sections = {name: {} for name in ("versions", "base", "adapter", "parameters", "recipe", "data")}
    record = {**words, **dict.fromkeys(("seed", "steps", "threads"), 1), **sections, "status": "complete"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = Run.load(tmp_path)
    with pytest.raises(RunError, match=r"run\.json is damaged: it has no recipe\.model\.path\."):
        run.whole()
    with pytest.raises(RunError, match=r"run\.json is damaged: it has no "):
        weftlora.compare.load([tmp_path])


def test_rows_of_metrics_that_are_none_are_left_out(tmp_path: Path) -> None:
    words = dict.fromkeys(("base_dir", "task", "device"), "x")
    sections = {name: {} for name in ("versions", "base", "adapter", "parameters", "recipe", "data")}
    (tmp_path / "run.json").write_text(
        json.dumps({**words, **dict.fromkeys(("seed", "steps", "threads"), 1), **sections, "status": "complete"})
    )
    rows = [
        {"step": 1, "loss": 2.0},
        {"loss": 2.0},
        {"step": True},
        {"step": "2"},
        {"step": -1},
        {"step": 2, "loss": "x"},
        {"step": 3, "validation_loss": None},
        {"step": 4, "loss": float("nan")},
        {"step": 1.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row["step"] for row in Run.load(tmp_path).history()] == [1, 4]
