"""A config that exists is valid: what is refused, what the defaults are, and that the saved form says it all."""

import dataclasses
import json
import pickle
import re
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig

import weftlora
from weftlora.adapter.spec import FORMAT_VERSION, WeftConfig, decode_choice, encode_choice, read_config
from weftlora.errors import AdapterError, ConfigError
from weftlora.terms.axes import AXES

choices_of_structure = st.one_of(
    st.just(weftlora.Plain()),
    st.builds(
        weftlora.Hydra,
        heads=st.integers(2, 20),
        router_input=st.sampled_from(["x", "Ax"]),
        per_head_dropout=st.booleans(),
        balance=st.floats(0, 1),
    ),
    st.builds(
        weftlora.Tied,
        train=st.one_of(st.sampled_from(["tl5", "tl6", "vera", "Bu"]), st.sets(st.sampled_from("ABuv"), min_size=1)),
        group=st.sampled_from(["module_type", "shape", "fused_qkv"]),
        init=st.sampled_from(["kaiming", "normal"]),
    ),
)
names = st.one_of(st.none(), st.just("all-linear"), st.sets(st.text("abc._", min_size=1, max_size=5), min_size=1))
configs = st.builds(
    WeftConfig,
    structure=choices_of_structure,
    r=st.integers(1, 64),
    lora_alpha=st.one_of(st.none(), st.integers(1, 100), st.floats(0.01, 100)),
    lora_dropout=st.floats(0, 0.99),
    target_modules=names,
    exclude_modules=names,
    layers_to_transform=st.one_of(st.none(), st.integers(0, 40), st.lists(st.integers(0, 40), min_size=1)),
    rank_pattern=st.dictionaries(st.text(max_size=5).map(re.escape), st.integers(1, 9)),
    alpha_pattern=st.dictionaries(st.text(max_size=5).map(re.escape), st.floats(0.1, 9)),
    modules_to_save=st.one_of(st.none(), st.just(["classifier"])),
    use_rslora=st.booleans(),
)

# ---------------------------------------------------------------------- choices and their saved form


@settings(max_examples=60, deadline=None)
@given(choices_of_structure)
def test_a_choice_survives_being_written_as_json(choice):
    written = json.loads(json.dumps(encode_choice(choice)))
    assert decode_choice("structure", written) == choice
    assert written["kind"] == type(choice).__name__.lower()


@settings(max_examples=60, deadline=None)
@given(configs)
def test_a_config_survives_being_written_as_json(config: WeftConfig):
    again = WeftConfig(**json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "value",
    [
        "hydra",
        {"kind": "hydra"},
        {"kind": "Hydra", "heads": 3},
        {"hydra": None},
        {"hydra": {"heads": 3}},
        weftlora.Hydra(3),
    ],
)
def test_every_way_to_write_a_choice(value):
    assert decode_choice("structure", value) == weftlora.Hydra(heads=3)


def test_every_choice_of_every_axis_can_be_named():
    for axis in AXES:
        for name, cls in AXES[axis].items():
            made = cls([0, 2]) if name == "only" else cls()
            if name != "only":
                assert decode_choice(axis, name) == made
            assert decode_choice(axis, encode_choice(made)) == made


def test_only_is_a_bare_list_and_says_what_it_lacks_without_one():
    assert WeftConfig(layers=[2, 0]).layers == WeftConfig(layers={"only": {"blocks": [0, 2]}}).layers
    with pytest.raises(ConfigError, match="needs blocks"):
        WeftConfig(layers="only")


def test_none_is_a_choice_only_where_an_axis_may_be_empty():
    assert WeftConfig(boost="none").boost is None
    assert encode_choice(None) is None
    for axis in ("structure", "start", "ranks", "layers"):
        with pytest.raises(ConfigError, match=f"{axis} must not be None"):
            WeftConfig(**{axis: None})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("hidra", r"did you mean 'hydra'\?$"),
        ({"kind": "hydra", "hedas": 4}, "did you mean 'heads'"),
        ({"plain": {"heads": 4}}, "takes no fields"),
        ({"hydra": 3}, "by name"),
        ({"hydra": [3]}, "by name"),
        ({"heads": 3, "balance": 0.1}, "kind"),
        ({}, "choose from plain, hydra, tied"),
        (3, "choose from plain, hydra, tied"),
        (weftlora.Kaiming(), "choose from plain, hydra, tied"),
        ({"kind": "hydra", "heads": 1}, "heads=1"),
    ],
)
def test_a_choice_that_means_nothing_is_refused(value, says: str):
    with pytest.raises(ConfigError, match=says):
        WeftConfig(structure=value)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 0}, "r=0"),
        ({"r": -1}, "r=-1"),
        ({"r": True}, "r=True"),
        ({"r": 8.0}, "r=8.0"),
        ({"r": "8"}, "r='8'"),
        ({"lora_alpha": 0}, "lora_alpha=0"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
        ({"lora_alpha": "16"}, "lora_alpha='16'"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"lora_dropout": -0.1}, "lora_dropout=-0.1"),
        ({"lora_dropout": "5e-2"}, "lora_dropout='5e-2'"),  # how YAML reads 5e-2
        ({"lora_dropout": None}, "lora_dropout=None"),
        ({"target_modules": []}, "names no module"),
        ({"target_modules": 3}, "target_modules=3"),
        ({"target_modules": ["q_proj", 3]}, "not a list of names"),
        ({"exclude_modules": []}, "names no module"),
        ({"modules_to_save": "classifier"}, "not a list of names"),  # peft would read it letter by letter
        ({"layers_to_transform": []}, "every layer"),
        ({"layers_to_transform": ()}, "every layer"),
        ({"layers_to_transform": [0, "1"]}, "'1' is not a block number"),
        ({"layers_to_transform": -1}, "-1 is not a block number"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "regex"),
        ({"layers_pattern": "layers"}, "without layers_to_transform"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern"),
        ({"rank_pattern": {"((": 4}}, "not a regular expression"),
        ({"alpha_pattern": {"(": 4.0}}, "not a regular expression"),
        ({"target_modules": "*q"}, "not a regular expression"),
        ({"rank_pattern": [4]}, "not a table"),
        ({"alpha_pattern": {"q": -1}}, "alpha_pattern"),
        ({"use_rslora": "no"}, "use_rslora='no'"),
        ({"task_type": "CAUSAL_L"}, "CAUSAL_L"),
        ({"lora_alpa": 16}, "did you mean 'lora_alpha'"),
        ({"heads": 3}, "no key 'heads'"),
    ],
)
def test_a_value_that_cannot_work_is_refused_with_what_was_given(fields: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        WeftConfig(**fields)


def test_an_unknown_key_is_a_value_error_and_never_a_warning():
    """peft itself warns and drops it, so that the run silently uses another value than the one written down."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="lora_alpha"):
            PeftConfig.from_peft_type(peft_type="WEFT", lora_alpa=16)


@pytest.mark.parametrize("layers", [[0, 2], (0, 2), {0, 2}, range(0, 3, 2)])
def test_blocks_may_be_any_collection(layers):
    assert sorted(WeftConfig(layers_to_transform=layers, target_modules=["q"]).to_dict()["layers_to_transform"]) == [
        0,
        2,
    ]


def test_alpha_defaults_to_twice_the_rank_and_to_the_rank_for_tied():
    assert weftlora.PlainLoraConfig(r=5).lora_alpha == 10
    assert weftlora.HydraLoraConfig(r=5).lora_alpha == 10
    assert weftlora.TiedLoraConfig(r=5).lora_alpha == 5
    assert WeftConfig(structure="tied", r=5).scale(5, 5) == 1


def test_scale_is_alpha_over_r_or_over_its_root():
    assert WeftConfig().scale(4, 12) == 3
    assert WeftConfig(use_rslora=True).scale(4, 12) == 6


# ---------------------------------------------------------------------- format version


def test_a_newer_format_is_refused_by_its_version():
    given = {**WeftConfig().to_dict(), "format_version": FORMAT_VERSION + 1, "weft_version": "9.1", "shine": 3}
    with pytest.raises(AdapterError, match=r"weftlora 9\.1.*upgrade weftlora"):
        WeftConfig(**given)


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"weft_version": "9.1", "peft_version": "0.30.0", "shine": 3}, r"'shine': .* 9\.1 with peft 0\.30\.0; .*: upgrade weftlora"),
        ({"weft_version": "9.1", "structure": {"kind": "hydra", "rays": 3}}, r"no key 'rays': .* weftlora 9\.1 .*: upgrade weftlora"),
        ({"weft_version": "9.1", "structure": {"kind": "sunny"}}, r"sunny.* weftlora 9\.1 .*: upgrade weftlora"),
        ({"weft_version": "0.0.1", "peft_version": None, "shine": 3}, r"no key 'shine': .* weftlora 0\.0\.1; this is [^:]*\.$"),
        ({"weft_version": "of old", "shine": 3}, r"no key 'shine': .* weftlora of old with peft"),
        ({"weft_version": None, "shine": 3}, r"no key 'shine': .* does not say which weftlora wrote it"),
        ({"shine": 3}, r"no key 'shine': [^:]*\.$"),  # by this version: a key that nobody has
    ],
)  # fmt: skip
def test_a_saved_config_that_cannot_be_read_says_which_version_wrote_it(written, says, tmp_path):
    weftlora.PlainLoraConfig().save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | written))
    for read in (read_config, PeftConfig.from_pretrained):
        with pytest.raises(ConfigError, match=says):
            read(str(tmp_path))


def test_the_saved_config_names_its_type_format_and_version(tmp_path):
    weftlora.HydraLoraConfig(target_modules=["b", "a"]).save_pretrained(str(tmp_path))
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["peft_type"] == "WEFT"
    assert saved["format_version"] == FORMAT_VERSION
    assert saved["weft_version"] == weftlora.__version__
    assert saved["target_modules"] == ["a", "b"]
    assert "import weftlora" in (tmp_path / "README.md").read_text()


def test_peft_reads_the_saved_config_back(tmp_path):
    config = weftlora.TiedLoraConfig(r=3, train="Bu", group="fused_qkv", lora_dropout=0.1, target_modules=["q"])
    config.save_pretrained(str(tmp_path))
    assert PeftConfig.from_pretrained(str(tmp_path)) == read_config(tmp_path) == config


@pytest.mark.parametrize("tokens", [[], {}, [1.5], [-1], [True], "embed_tokens", {"embed_tokens": []}, {1: [2]}, 7])
def test_tokens_that_are_none_are_refused(tokens):
    with pytest.raises(ConfigError, match=r"trainable_token_indices=.*(names no tokens|not a list of names)"):
        WeftConfig(trainable_token_indices=tokens)
    assert WeftConfig(trainable_token_indices={"embed_tokens": [3]}).to_dict()["trainable_token_indices"]


def test_saving_twice_does_not_repeat_the_note(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")
    for _ in range(2):
        WeftConfig().save_pretrained(str(tmp_path))
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("**`import weftlora` before you load this adapter**")
    assert text.count("# Mine\n") == 1
    assert text.count("import weftlora") == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "no adapter_config.json"), ("{", "damaged"), ("[]", "damaged"), ('{"peft_type": "LORA"}', "LORA adapter")],
)
def test_a_folder_that_is_no_weft_adapter_is_refused(tmp_path, content: str | None, says: str):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(AdapterError, match=says):
        read_config(tmp_path)


def neutral_fields() -> dict[str, object]:
    """Everything stock LoRA's config has beside what weftlora's has, at its own default."""
    ours = {f.name for f in dataclasses.fields(WeftConfig)}
    return {
        name: value
        for name, value in vars(LoraConfig()).items()
        if name in LoraConfig.__dataclass_fields__ and name not in ours
    }


def test_a_config_of_stock_lora_needs_no_line_taken_out():
    neutral = neutral_fields()
    assert {"use_dora", "fan_in_fan_out", "loftq_config"} <= neutral.keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = weftlora.HydraLoraConfig(r=4, init_lora_weights=True, **neutral)
        assert config.to_dict() == weftlora.HydraLoraConfig(r=4).to_dict()
        assert weftlora.PlainLoraConfig(fan_in_fan_out=True) == weftlora.PlainLoraConfig()
    assert weftlora.PlainLoraConfig(init_lora_weights=False).to_dict()["init_lora_weights"] is False
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"use_dora": True}, "use_dora=True works in stock LoRA only"),
        ({"bias": "al"}, "did you mean 'all'?"),
        ({"layer_replication": [(0, 2)]}, "no layer of the base is doubled"),
        ({"init_lora_weights": "pissa"}, "start=weftlora.Directions()"),
        ({"patterns_at_start": {"rank_pattern": {}}}, "as it is written where rank slots have moved"),
        ({"patterns_at_start": {"rank_pattern": {"q": 0}, "alpha_pattern": {}}}, "rank_pattern['q']=0 is not a rank"),
        ({"rank_pattern": {"q": 0}}, "rank_pattern['q']=0 is not a rank"),
    ],
)
def test_what_only_stock_lora_can_is_refused_by_its_name(fields, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as error:
        weftlora.PlainLoraConfig(**fields)
    assert next(iter(fields)) in str(error.value)
