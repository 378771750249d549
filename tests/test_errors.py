"""One tree of errors, and tails that point at the nearest valid name."""

import ast
import inspect
from pathlib import Path

import pytest

import weftlora
from weftlora import errors
from weftlora.errors import ConfigError, WeftError, suggest, unknown_key

SOURCE = Path(weftlora.__file__).parent


def test_every_error_is_a_weft_error_and_public():
    found = [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, BaseException) and cls.__name__[0] != "_"
    ]
    assert len(found) > 5
    for cls in found:
        assert issubclass(cls, WeftError)
        assert cls.__name__ in weftlora.__all__
        assert getattr(weftlora, cls.__name__) is cls
        assert cls.__doc__


def test_a_bad_value_is_also_a_value_error_for_those_who_catch_that():
    for name in ("ConfigError", "TargetError", "MergeError", "AdapterError", "DataError", "ModelError"):
        assert issubclass(getattr(weftlora, name), ValueError)
    assert issubclass(weftlora.RunError, RuntimeError)


def test_no_other_file_defines_an_error():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and path.name != "errors.py":
                bases = [ast.unparse(base) for base in node.bases]
                assert not [b for b in bases if b.endswith(("Error", "Exception"))], f"{path}: {node.name}"


@pytest.mark.parametrize(
    ("name", "valid", "tail"),
    [
        ("lora_alpa", ["r", "lora_alpha", "lora_dropout"], "did you mean 'lora_alpha'?"),
        ("hidra", ["plain", "hydra", "tied"], "did you mean 'hydra'?"),
        ("zzz", ["b", "a"], "use one of a, b."),
        ("r", {"rank": 1, "run": 2}, "use one of rank, run."),
    ],
)
def test_suggest_names_the_nearest_or_all(name: str, valid, tail: str):
    assert suggest(name, valid) == tail


def test_unknown_key_says_where_what_and_which():
    error = unknown_key("hedas", ["heads", "balance"], "Hydra")
    assert isinstance(error, ConfigError)
    assert str(error) == "Hydra has no key 'hedas': did you mean 'heads'?"
