"""The table of combinations that do not work."""

import pytest

import weftlora
from weftlora.adapter import compat
from weftlora.errors import CombinationError, ConfigError
from weftlora.terms.axes import AXES, MERGE
from weftlora.terms.choice import Choice

CLASSES = {cls.__name__: cls for kinds in AXES.values() for cls in kinds.values()}
PAIRS = [pair for pair in compat.REFUSED if MERGE not in pair]


def choice(name: str) -> Choice:
    """An instance of a choice, as it is by default."""
    return CLASSES[name]()


@pytest.mark.parametrize("pair", PAIRS)
def test_every_row_is_refused_in_either_order_with_its_reason(pair: tuple[str, str]):
    one, other = map(choice, pair)
    for given in ((one, other), (other, one), (choice("All"), one, None, other)):
        with pytest.raises(CombinationError) as error:
            compat.check(*given)
        assert compat.REFUSED[pair] in str(error.value)
        assert pair[0] in str(error.value)
        assert pair[1] in str(error.value)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_half_of_a_row_is_fine_on_its_own(pair: tuple[str, str]):
    for name in pair:
        compat.check(choice(name), None, choice("All"))


def test_the_table_is_what_the_choices_say():
    said = {(cls.__name__, other): why for cls in CLASSES.values() for other, why in cls.refuses.items()}
    assert said == {pair: compat.REFUSED[pair] for pair in PAIRS}
    assert all(name in CLASSES for pair in said for name in pair)


def test_a_row_says_why_in_one_clause():
    for reason in compat.REFUSED.values():
        assert len(reason.split()) >= 5
        assert not reason.endswith(".")


def test_all_choices_that_exist_today_go_together():
    for kind in AXES["structure"].values():
        weftlora.WeftConfig(structure=kind())


def test_a_config_asks_the_table(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(compat.REFUSED, ("Hydra", "Uniform"), "a row for the length of this test")
    with pytest.raises(CombinationError, match="for the length of this test"):
        weftlora.WeftConfig(structure="hydra")
    weftlora.WeftConfig(structure="plain")


def test_a_combination_error_is_a_config_error():
    assert issubclass(CombinationError, ConfigError)
