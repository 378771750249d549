"""What users import: every public name resolves, nothing is missing, and importing weftlora stays light."""

import inspect
import json
import subprocess
import sys

import pytest

import weftlora
from weftlora.recipes import RECIPES
from weftlora.terms.axes import AXES

IMPORTS = """
import json, sys
import peft
before = set(sys.modules)
import weftlora
print(json.dumps(sorted(m for m in set(sys.modules) - before if m.split(".")[0] != "weftlora")))
print(json.dumps(sorted(m for m in sys.modules if m.split(".")[0] == "weftlora")))
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[list[str], list[str]]:
    """Modules that `import weftlora` loads beyond what `import peft` loads: those of others, and weftlora's own."""
    out = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    others, own = map(json.loads, out.stdout.strip().splitlines()[-2:])
    return others, own


def test_importing_weft_loads_no_more_of_transformers_or_trl_than_peft_does(loaded):
    others, _ = loaded
    assert [m for m in others if m.split(".")[0] in {"transformers", "trl", "datasets", "sklearn", "typer"}] == []


def test_importing_weft_does_not_load_the_training_stack(loaded):
    _, own = loaded
    assert {"weftlora.kernel", "weftlora.site", "weftlora.glue.tuner"} <= set(own)
    assert not [m for m in own if m.split(".")[1:2] and m.split(".")[1] in {"train", "data", "export", "bench", "cli"}]


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


@pytest.mark.parametrize("name", [n for n in weftlora.__all__ if n not in weftlora._LAZY])
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

    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)
    weftlora.register()
    assert (dict(PEFT_TYPE_TO_CONFIG_MAPPING), list(PeftType)) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("WEFT")] is weftlora.WeftConfig
