"""Spread, and the targets, on rounds made up so that the answer is known."""

import dataclasses

import pytest

from weftlora.bench.cases import Case, Shape, table_cases
from weftlora.bench.record import CaseResult, Spread, Target, goals, targets
from weftlora.errors import ConfigError


def measured(case: Case, *seconds: float, dtype: str = "fp32") -> CaseResult:
    one = Spread(1.0, 1.0, 1.0)
    return CaseResult(dtype, case, 0, one, one, 0, 1.0, None, None, {}, list(seconds), list(seconds))


FLOOR = measured(Case("floor"), 1.0, 2.0, 4.0)


def test_median_and_quartiles():
    assert Spread.over([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.over([7.0]) == Spread(7.0, 7.0, 7.0)


def named(found: list[Target], name: str) -> Target:
    [target] = [t for t in found if t.name == name]
    return target


@pytest.mark.parametrize(("over", "verdict"), [(1.04, "aim"), (1.05, "aim"), (1.06, "must"), (1.08, "missed")])
def test_a_figure_is_the_median_of_ratios_of_the_same_round(over: float, verdict: str):
    own = measured(Case("lora", 16), *(over * f for f in FLOOR.seconds))
    target = named(targets([FLOOR, own]), "LoRA r=16")
    assert target.value.median == pytest.approx(over)
    assert (target.must, target.aim, target.verdict) == (1.07, 1.05, verdict)


@pytest.mark.parametrize(("seconds", "verdict"), [(1.99, "aim"), (2.03, "must"), (2.1, "missed")])
@pytest.mark.parametrize(
    ("case", "name"),
    [
        (Case("tied_lora", 16), "Tied-LoRA r=16"),
        (Case("alora", 12), "ALoRA r=12, room for 16"),
        (Case("flexora", 16), "Flexora-gated r=16"),
    ],
)
def test_what_has_the_slots_of_lora_is_held_against_lora(case: Case, name: str, seconds: float, verdict: str):
    plain, own = measured(Case("lora", 16), 1.0, 2.0, 4.0), measured(case, 0.5, seconds, 8.0)
    target = named(targets([FLOOR, plain, own]), f"{name} / LoRA r=16")
    assert target.value.median == pytest.approx(seconds / 2)
    assert target.verdict == verdict


def test_stock_peft_as_shipped_is_judged_and_the_fairer_row_stands_beside_it():
    floor, own = (measured(Case(kind, r), 1.0, 1.0, dtype="bf16") for kind, r in (("floor", 0), ("lora", 16)))
    shipped = measured(Case("peft:lora", 16), 1.25, 1.25, dtype="bf16")
    fair = measured(Case("peft:lora", 16, 0.0, "bf16"), 1.1, 1.1, dtype="bf16")
    found = targets([floor, own, shipped, fair])
    judged, beside = (named(found, f"LoRA r=16 / stock peft {what}") for what in ("as shipped", "with bf16 adapters"))
    assert (judged.value.median, judged.verdict) == (pytest.approx(0.8), "aim")
    assert (beside.value.median, beside.must, beside.verdict) == (pytest.approx(1 / 1.1), None, "")


def test_compiled_cases_are_held_against_the_compiled_floor_and_eager():
    cases = {Case("floor", compiled=True): 0.9, Case("lora", 16, compiled=True): 0.99, Case("lora", 16, 0.05): 1.2}
    rows = [measured(case, value, value, dtype="bf16") for case, value in cases.items()]
    rows.append(measured(Case("lora", 16, 0.05, compiled=True), 1.26, 1.26, dtype="bf16"))
    found = targets([measured(Case("floor"), 1.0, 1.0, dtype="bf16"), *rows])
    assert named(found, "compiled / compiled floor").value.median == pytest.approx(1.1)
    assert named(found, "compiled, p=0.05 / eager").verdict == "missed"


def test_saved_bytes_are_judged_by_the_worst_eager_weft_case():
    def saving(case: Case, ratio: float) -> CaseResult:
        return dataclasses.replace(measured(case, 1.0, 2.0, 4.0), saved_ratio=ratio)

    rows = [
        FLOOR,
        saving(Case("lora", 16), 0.97),
        saving(Case("hydralora", 8), 1.1),
        saving(Case("peft:lora", 16), 3.0),
    ]
    rows.append(saving(Case("lora", 16, compiled=True), 2.0))
    target = named(targets(rows), "saved activations, largest of all weftlora cases [range]")
    assert target.value == Spread(1.1, 0.97, 1.1)
    assert target.verdict == "must"


def test_bases_of_another_dtype_are_not_compared():
    low = measured(Case("floor"), 1.0, 1.0, 1.0, dtype="bf16")
    assert [t for t in targets([low, measured(Case("lora", 16), 9.0, 9.0, 9.0)]) if "saved" not in t.name] == []


def test_every_goal_is_of_a_case_that_the_table_measures():
    for goal in goals():
        assert {goal.case, goal.over} <= set(table_cases(goal.dtype)), goal.name


@pytest.mark.parametrize(("field", "value"), [("hidden", 100), ("layers", 0), ("batch", -1)])
def test_a_shape_that_is_no_model_is_refused(field: str, value: int):
    with pytest.raises(ConfigError, match=f"{field}={value}"):
        Shape(**{field: value})
