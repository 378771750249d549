"""The choice Tied, who owns a shared tensor, and how it is handed over; the formulas are in claims/test_tied_lora.py."""

import copy
import itertools

import pytest
import torch
from torch import nn

from weftlora.errors import ConfigError
from weftlora.terms.structure import Place, Size
from weftlora.terms.structure.tied import PARTS, PRESETS, Tied, TiedTerm, start_value, trained_parts, zero_part

ALL_SETS = ["".join(c) for n in range(1, 5) for c in itertools.combinations("ABuv", n)]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"group": "shapes"}, "did you mean 'shape'"),
        ({"group": "layer"}, "module_type"),
        ({"init": "kaimin"}, "did you mean 'kaiming'"),
        ({"zero": "w"}, "zero='w'"),
        ({"train": "AB", "zero": "v"}, "dead start.*B then starts at zero"),
    ],
)
def test_a_value_that_cannot_work_is_refused(fields: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        Tied(**fields)


@pytest.mark.parametrize("letters", ALL_SETS)
def test_the_zero_factor_is_always_a_trained_one(letters: str):
    trained = trained_parts(letters)
    assert zero_part(trained) in trained
    assert Tied(train=letters).starts_at_zero == zero_part(trained)
    for zero in letters:
        assert Tied(train=letters, zero=zero).starts_at_zero == zero


@pytest.mark.parametrize("letters", ALL_SETS)
def test_a_collection_is_kept_as_letters_so_that_it_can_be_saved(letters: str):
    for given in (list(letters), set(letters), tuple(reversed(letters))):
        assert Tied(train=given) == Tied(train=letters)
        assert Tied(train=given).train == letters


def test_the_presets_are_the_rows_that_are_known():
    assert {name: "".join(sorted(parts)) for name, parts in PRESETS.items()} == {
        "tl5": "AB",
        "tl6": "ABuv",
        "vera": "uv",
    }


@pytest.mark.parametrize("letters", ALL_SETS)
def test_start_values_have_their_shapes_and_one_zero(letters: str):
    choice, size = Tied(train=letters), (2, 5, 4)
    values = {part: start_value(choice, part, size, torch.randn) for part in PARTS}
    shapes = {"A": (2, 5), "B": (4, 2), "u": (2,), "v": (4,)}
    assert [part for part, t in values.items() if t is not None and torch.count_nonzero(t) == 0] == [
        choice.starts_at_zero
    ]
    for part, value in values.items():
        assert (value is None) == (part in "uv" and part not in letters)
        assert value is None or tuple(value.shape) == shapes[part]


# ---------------------------------------------------------------------- ownership


def group(train: str = "tl6", count: int = 3) -> list[TiedTerm]:
    """`count` terms, the first of which owns A and B."""
    choice, size = Tied(train=train), (2, 5, 4)
    out: list[TiedTerm] = []
    for _ in range(count):
        owner = {"A": out[0], "B": out[0]} if out else {}
        values = {part: start_value(choice, part, size, torch.randn) for part in PARTS if part not in owner}
        out.append(TiedTerm(choice, {p: t for p, t in values.items() if t is not None}, owner))
    return out


def test_only_the_group_of_experts_gives_those_of_one_parameter_an_a_and_each_its_own_b():
    expert, module = (Place("mlp.experts.up", Size(2, 5, 4), None, e) for e in (True, False))
    alike = Tied().shared_keys(module)
    assert alike["A"] == alike["B"]
    assert set(Tied(group="experts").shared_keys(expert)) == {"A"}
    assert Tied(group="experts").shared_keys(module) == Tied().shared_keys(expert) == alike


def test_a_shared_tensor_is_looked_up_where_it_lives_at_every_use():
    first, *others = group()
    first.A = nn.Parameter(torch.randn(2, 5))  # as hosts do when they cast or move
    for term in others:
        assert term.part("A") is term.factors(1.0).A is first.A
        assert term.part("B") is first.B
        assert term.part("u") is not first.u


@pytest.mark.parametrize("train", ["tl6", "vera", "Bu", "A"])
def test_the_owner_hands_its_tensors_over_before_it_goes(train: str):
    first, second, third = group(train)
    tensors, trained = {part: first.part(part) for part in "AB"}, Tied(train=train).trained
    first.hand_over()
    for part, tensor in tensors.items():
        assert second.part(part) is third.part(part) is tensor
        assert (part in dict(second.named_parameters())) == (part in trained)
        assert (part in dict(second.named_buffers())) == (part not in trained)
        assert part not in third.state_dict()
    tensors["A"] = nn.Parameter(torch.randn(2, 5)) if "A" in trained else torch.randn(2, 5)
    second.A = tensors["A"]  # a cast or a move at the new owner reaches the others
    assert third.part("A") is second.A
    second.hand_over()
    for part, tensor in tensors.items():
        assert third.part(part) is tensor
        assert part in third.state_dict()
    third.hand_over()  # the last one has nobody to give it to
    assert third.part("A") is tensors["A"]


def test_a_follower_that_goes_is_forgotten():
    first, second, third = group()
    second.hand_over()
    first.hand_over()
    assert "A" in third.state_dict()
    assert third.part("A") is not None


def test_a_copy_of_the_whole_group_stays_tied_to_itself():
    terms = nn.ModuleList(group())
    other = copy.deepcopy(terms)
    assert other[1].part("A") is other[2].part("A") is other[0].A
    assert other[0].A is not terms[0].A
    assert sum("A" in key for key in other.state_dict()) == 1
