from pathlib import Path

import pytest

from weftlora.data import DataConfig, resolve_path
from weftlora.errors import ConfigError, DataError


def test_a_bare_string_is_the_training_data():
    assert DataConfig.parse("rows.jsonl") == DataConfig.parse({"train": "rows.jsonl"})
    assert DataConfig.parse({}).train == "demo"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"seperator": "|"}, "data has no key 'seperator': did you mean 'separator'?"),
        ({"fields": {"promt": "q"}}, "data.fields has no key 'promt': did you mean 'prompt'?"),
        ({"max_length": 2}, "max_length=2"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0"),
        ({"format": "chta"}, "format='chta'"),
        ({"prompt_template": "no column"}, "names no column"),
        ({"prompt_template": "{a.b}"}, "only plain column names"),
        ({"prompt_template": "{}"}, "only plain column names"),
        ({"prompt_template": "{a:>99999999}"}, "has a format after {a}"),
        ({"prompt_template": "{a!r}"}, "has a format after {a}"),
        ({"prompt_template": "{a"}, "write {column} for a column and {{ }} for literal braces"),
        ({"prompt_template": "{a}", "format": "chat"}, "does not go with format: chat"),
        ({"separator": ""}, "separator=''"),
        ({"limit": 0}, "limit=0"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(given, says):
    with pytest.raises(ConfigError) as error:
        DataConfig.parse(given)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_paths_start_at_the_recipe_and_expand(tmp_path, monkeypatch):
    monkeypatch.setenv("WEFT_TEST_FOLDER", str(tmp_path / "else"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert resolve_path("rows.jsonl", tmp_path) == tmp_path / "rows.jsonl"
    assert resolve_path("../rows.jsonl", tmp_path / "recipes") == tmp_path / "rows.jsonl"
    assert resolve_path("${WEFT_TEST_FOLDER}/rows.jsonl", "/nowhere") == tmp_path / "else" / "rows.jsonl"
    assert resolve_path("~/rows.jsonl", "/nowhere") == tmp_path / "home" / "rows.jsonl"
    assert resolve_path("rows.jsonl") == Path.cwd() / "rows.jsonl"


def test_a_missing_environment_variable_is_named(monkeypatch):
    monkeypatch.delenv("WEFT_TEST_FOLDER", raising=False)
    with pytest.raises(DataError, match="WEFT_TEST_FOLDER, which is not set"):
        resolve_path("${WEFT_TEST_FOLDER}/rows.jsonl")
