"""The table of combinations that do not work."""

import pytest

import weftlora
from weftlora import compat
from weftlora.errors import CombinationError, ConfigError
from weftlora.terms.axes import AXES


def choice(name: str) -> object:
    """An instance of a class called `name`, whether or not its axis exists yet."""
    return type(name, (), {})()


@pytest.mark.parametrize("pair", list(compat.REFUSED))
def test_every_row_is_refused_in_either_order_with_its_reason(pair: tuple[str, str]):
    one, other = map(choice, pair)
    for given in ((one, other), (other, one), (choice("All"), one, None, other)):
        with pytest.raises(CombinationError) as error:
            compat.check(*given)
        assert compat.REFUSED[pair] in str(error.value)
        assert pair[0] in str(error.value)
        assert pair[1] in str(error.value)


@pytest.mark.parametrize("pair", list(compat.REFUSED))
def test_one_half_of_a_row_is_fine_on_its_own(pair: tuple[str, str]):
    for name in pair:
        compat.check(choice(name), None, choice("All"))


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
