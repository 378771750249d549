from __future__ import annotations

from pathlib import Path

import pytest

from weftlora.errors import ConfigError, RunError
from weftlora.runs.recipe import Recipe, asked, read_yaml

WHOLE = {"model": "demo", "data": "rows.jsonl", "adapter": "lora", "train": {"steps": 10}, "out": "runs/a"}


@pytest.mark.parametrize(
    ("change", "wrong", "near"),
    [
        ({"modle": "demo"}, "modle", "model"),
        ({"train": {"lr_rate": 1}}, "lr_rate", "lr"),
        ({"train": {"batchsize": 4}}, "batchsize", "batch_size"),
        ({"model": {"path": "demo", "dytpe": "auto"}}, "dytpe", "dtype"),
        ({"data": {"train": "a.jsonl", "max_lenght": 5}}, "max_lenght", "max_length"),
    ],
)
def test_an_unknown_key_names_the_nearest(change: dict[str, object], wrong: str, near: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe.read(WHOLE | change)
    assert repr(wrong) in str(raised.value)
    assert f"did you mean {near!r}?" in str(raised.value) or near in str(raised.value)


@pytest.mark.parametrize("value", [0, -16, float("inf"), "fast", True])
def test_a_ratio_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"train\.lora_plus_ratio=.* is not valid"):
        Recipe.read(WHOLE | {"train": {"lora_plus_ratio": value}})
    with pytest.raises(ConfigError, match=r"train\.freeze_down=.* is not valid"):
        Recipe.read(WHOLE | {"train": {"freeze_down": "A"}})


def test_a_ratio_may_be_whole() -> None:
    assert Recipe.read(WHOLE, "train.lora_plus_ratio=16").train.lora_plus_ratio == 16


def test_overrides_are_yaml_and_spell_out_shorthand() -> None:
    recipe = Recipe.read(
        WHOLE, "train.lr=1e-3", "model.dtype=bfloat16", "adapter.r=4", "data.limit=7", "adapter.targets=[a, b]"
    )
    assert recipe.train.lr == 1e-3
    assert recipe.train.steps == 10
    assert (recipe.model.path, recipe.model.dtype) == ("demo", "bfloat16")
    assert recipe.adapter == {"recipe": "lora", "r": 4, "targets": ["a", "b"]}
    assert (recipe.data.train, recipe.data.limit) == ("rows.jsonl", 7)
    assert WHOLE["train"] == {"steps": 10}, "overrides must not change what was given"


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "5E4", "-2e+1", ".5e1"])
def test_exponents_are_numbers(text: str) -> None:
    assert read_yaml(text, "here") == float(text)


@pytest.mark.parametrize("override", ["train.lr", "=3", "model.path.deeper=3", "train.lr=[1"])
def test_a_bad_override_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match=r"override|section|YAML"):
        Recipe.read(WHOLE | {"model": {"path": "demo"}}, override)


@pytest.mark.parametrize("missing", ["data", "adapter", "out"])
def test_a_missing_section_says_what_to_write(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"no '{missing}': name"):
        Recipe.read({key: value for key, value in WHOLE.items() if key != missing})


def test_steps_and_epochs_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="keep one"):
        Recipe.read(WHOLE, "train.epochs=2")


@pytest.mark.parametrize("override", ["train.steps=0", "train.lr=-1", "train.batch_size=two", "train.precision=fp8"])
def test_a_value_that_cannot_work_names_the_field(override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        Recipe.read(WHOLE, override)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.train={a.jsonl: .nan}", "data: train=nan is not valid: it should be"),
        ("train.samples=-1", "train.samples=-1 is not valid: it should be greater than or equal to 0"),
        ("data.fields.prompt=3", "fields.prompt=3 is not valid: it should be a valid string"),
    ],
)
def test_a_value_of_several_kinds_is_named_by_its_key_alone(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe.read(WHOLE | {"data": {"train": "rows.jsonl"}}, override)
    assert says in str(raised.value)


def test_remote_code_is_never_trusted() -> None:
    with pytest.raises(ConfigError, match="trust_remote_code"):
        Recipe.read(WHOLE, "model.trust_remote_code=true")


def test_a_file_gives_its_folder_as_the_start_of_paths(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: demo\ndata: rows.jsonl\nadapter: lora\nout: runs/a\n")
    recipe = Recipe.read(file)
    assert recipe.base_dir == tmp_path
    assert Recipe.read(recipe, "train.seed=3").base_dir == tmp_path


def test_broken_yaml_is_named_by_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: demo\ntrain: {steps: 3\nout: x\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml line 3"):
        Recipe.read(file)


def test_a_built_in_name_is_a_recipe_and_a_misspelt_one_names_it() -> None:
    assert Recipe.read("hydralora").adapter["recipe"] == "hydralora"
    with pytest.raises(ConfigError, match="did you mean 'hydralora'"):
        Recipe.read("hydra_lora")
    with pytest.raises(ConfigError, match="no recipe file"):
        Recipe.read("missing.yaml")


def test_a_dump_reads_back_the_same() -> None:
    recipe = Recipe.read(WHOLE, "train.args.adam_beta2=0.98")
    assert Recipe.read(recipe.model_dump(mode="json")).model_dump() == recipe.model_dump()


def test_resume_takes_a_folder_for_a_run_unless_a_recipe_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("lora", "other"):
        Path(name).mkdir()
    for given, folder in (("other", "other"), ("lora", "runs/lora")):
        with pytest.raises(RunError, match=f"^{folder} is not a run folder: it has no run.json"):
            asked(given, resume=True)


def test_the_demos_settings_are_the_demos_alone() -> None:
    """A built-in name on a model or rows of one's own is the method with the defaults of every recipe."""
    demo = Recipe.read("lora")
    assert (demo.data.max_length, demo.train.steps, demo.train.batch_size, demo.train.lr) == (64, 150, 32, 5e-3)
    assert demo.adapter == {"recipe": "lora", "r": 16}
    for given in (["model=mine", "data.train=mine.jsonl"], ["model.path=mine"], ["data=mine.jsonl"]):
        own = Recipe.read("lora", *given)
        assert (own.data.max_length, own.train.steps, own.train.epochs) == (512, None, None)
        assert (own.train.batch_size, own.train.lr, own.adapter) == (16, None, {"recipe": "lora"})
    assert Recipe.read("lora_init", "model=mine").adapter == {"recipe": "lora_init"}


@pytest.mark.parametrize("given", [["train.epochs=1"], ["train.epochs=2", "model=mine"]])
def test_epochs_are_not_refused_for_steps_that_nobody_set(given: list[str]) -> None:
    recipe = Recipe.read("hydralora", *given)
    assert recipe.train.steps is None
    assert recipe.train.epochs == float(given[0][-1])


def test_what_is_said_wins_over_the_demo() -> None:
    recipe = Recipe.read("lora", "train.lr=1e-4", "data.max_length=32", "adapter.r=2", "train.steps=7")
    assert (recipe.train.lr, recipe.data.max_length, recipe.adapter["r"], recipe.train.steps) == (1e-4, 32, 2, 7)
    assert Recipe.read("lora", "adapter=hydralora").adapter == {"recipe": "hydralora"}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learning_rate=1e-4", "the recipe has no key 'learning_rate': weftlora calls it train.lr."),
        ("train.learning_rate=1e-4", "train has no key 'learning_rate': weftlora calls it lr."),
        ("train.per_device_train_batch_size=4", "weftlora calls it batch_size."),
        ("num_train_epochs=3", "weftlora calls it train.epochs."),
        ("rank=8", "weftlora calls it adapter.r."),
        ("data.cutoff_len=8", "weftlora calls it max_length."),
        ("model.qlora=true", "asked for by model.load_in_4bit=true, model.load_in_8bit=true or model.quantization"),
        ("train.load_in_4bit=true", "asked for by model.load_in_4bit=true"),
    ],
)
def test_the_names_of_other_trainers_get_a_hint_and_no_list(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        Recipe.read(WHOLE, override)
    assert says in str(raised.value)
    assert "use one of" not in str(raised.value)


def test_a_rank_in_the_adapter_section_gets_the_hint_too() -> None:
    from weftlora.recipes import check_fields

    with pytest.raises(ConfigError, match=r"adapter lora has no key 'rank': weftlora calls it r\."):
        check_fields({"recipe": "lora", "rank": 8})


def test_every_hint_names_a_key_that_there_is() -> None:
    from weftlora.errors import ELSEWHERE
    from weftlora.recipes import CONFIG_KEYS
    from weftlora.runs.recipe import DataConfig, ModelConfig, TrainConfig

    sections = {"train": TrainConfig.model_fields, "data": DataConfig.model_fields, "model": ModelConfig.model_fields}
    for key in set(ELSEWHERE.values()):
        section, _, own = key.rpartition(".")
        own = "from_adapter" if key == "train.from" else own
        assert own in {**sections, "adapter": CONFIG_KEYS, "": {"out"}}[section], key


@pytest.mark.parametrize("text", ['a: "\\UFFFFFFFF"', "%YAML 1." + "9" * 5000 + "\n---\na: 1"])
def test_yaml_with_numbers_that_are_none_is_one_sentence(text: str) -> None:
    with pytest.raises(ConfigError, match="x is not valid YAML"):
        read_yaml(text, "x")


def test_a_folder_that_no_path_can_be_is_refused() -> None:
    content = {"model": "demo", "data": "demo", "adapter": "lora", "out": "o"}
    with pytest.raises(ConfigError, match="no folder for its relative paths"):
        Recipe._made(content, (), Path("a\0b"), {})
