"""Spread, and the targets, on rounds made up so that the answer is known."""

import pytest

from weft.bench.cases import Case
from weft.bench.record import CaseResult, Shape, Spread, targets
from weft.errors import ConfigError


def measured(case: Case, *seconds: float, dtype: str = "fp32") -> CaseResult:
    one = Spread(1.0, 1.0, 1.0)
    return CaseResult(dtype, case, 0, one, one, 0, 1.0, None, None, list(seconds), list(seconds))


FLOOR = measured(Case("floor"), 1.0, 2.0, 4.0)


def test_median_and_quartiles():
    assert Spread.over([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.over([7.0]) == Spread(7.0, 7.0, 7.0)


@pytest.mark.parametrize(("behind", "met"), [(0.02, True), (-0.4, True), (0.04, False)])
@pytest.mark.parametrize("kind", ["plain", "tied"])
def test_behind_peft_is_counted_in_floors_of_the_same_round(kind: str, behind: float, met: bool):
    peft = measured(Case("peft", 16), 1.5, 3.0, 6.0)
    own = measured(Case(kind, 16), *(1.5 * f + behind * f for f in FLOOR.seconds))
    [target] = targets([FLOOR, peft, own])
    assert target.value.median == pytest.approx(behind)
    assert target.met is met


def test_hydra_is_held_against_plain_of_rank_16():
    plain, hydra = measured(Case("plain", 16), 1.0, 2.0, 4.0), measured(Case("hydra", 8), 1.1, 2.4, 5.2)
    [target] = [t for t in targets([FLOOR, plain, hydra]) if "hydra" in t.name]
    assert target.value.median == pytest.approx(1.2)
    assert not target.met


@pytest.mark.parametrize(("seconds", "met"), [(2.04, True), (2.1, False)])
def test_dash_is_held_against_plain_of_as_many_slots(seconds: float, met: bool):
    plain, dash = measured(Case("plain", 16), 1.0, 2.0, 4.0), measured(Case("dash", 8), 1.5, seconds, 4.0)
    [target] = [t for t in targets([FLOOR, plain, dash]) if "dash" in t.name]
    assert target.name == "dash r=8 p=0 fp32: over plain r=16"
    assert target.value.median == pytest.approx(seconds / 2)
    assert target.met is met


@pytest.mark.parametrize(
    "other", [Case("peft", 8), Case("peft", 16, 0.05), Case("peft", 16, 0.0, "bf16")], ids=["rank", "dropout", "dtype"]
)
def test_only_equal_rank_dropout_and_adapter_dtype_are_compared(other: Case):
    assert targets([FLOOR, measured(other, 1.0, 1.0, 1.0), measured(Case("plain", 16), 9.0, 9.0, 9.0)]) == []


def test_bases_of_another_dtype_are_not_compared():
    low = measured(Case("peft", 16), 1.0, 1.0, 1.0, dtype="bf16")
    assert targets([FLOOR, low, measured(Case("plain", 16), 9.0, 9.0, 9.0)]) == []


@pytest.mark.parametrize(("field", "value"), [("hidden", 100), ("layers", 0), ("batch", -1)])
def test_a_shape_that_is_no_model_is_refused(field: str, value: int):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Shape(**{field: value})
