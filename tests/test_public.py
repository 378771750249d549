"""What users import: every public name resolves, and nothing is missing. What importing costs: tests/test_import_cost.py."""

import ast
import inspect
from pathlib import Path

import pytest

import weftlora
from weftlora.recipes import RECIPES
from weftlora.terms.axes import AXES


def test_all_is_sorted_and_complete():
    assert list(weftlora.__all__) == sorted(set(weftlora.__all__))
    defined = {
        name
        for name, value in vars(weftlora).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or inspect.isfunction(value))
        and (value.__module__ or "").startswith("weftlora")
    }
    assert defined - {"register"} <= set(weftlora.__all__)
    assert set(weftlora._LAZY) <= set(weftlora.__all__)


def test_type_checkers_see_every_name_where_it_is_loaded_from():
    """Beside the table of names stand the same imports for type checkers: one must not go without the other."""
    told = {}
    for node in ast.walk(ast.parse(Path(weftlora.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            told = {alias.name: one.module for one in node.body for alias in one.names}
    assert told == weftlora._LAZY


@pytest.mark.parametrize("name", weftlora.__all__)
def test_a_public_name_resolves_and_says_what_it_is(name: str):
    value = getattr(weftlora, name)
    assert inspect.getdoc(value), name
    assert name in dir(weftlora)


def test_every_choice_and_every_recipe_of_ours_is_public():
    for axis in AXES:
        for cls in AXES[axis].values():
            assert getattr(weftlora, cls.__name__) is cls
            assert cls.__name__ in weftlora.__all__
    for name, recipe in RECIPES.items():
        if not name.startswith("peft:"):
            assert getattr(weftlora, recipe.__name__) is recipe
            assert recipe.__name__ in weftlora.__all__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="shuttle"):
        _ = weftlora.shuttle


def test_registering_again_changes_nothing():
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    weftlora.register()
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    weftlora.register()
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("WEFT")] is weftlora.WeftConfig
