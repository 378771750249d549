"""Two processes over gloo: the same directions on both, weights equal to one process with the same global batch."""

from __future__ import annotations

import pytest
import torch
from pairing import both_of
from two_processes import CASES, DTYPES, made, train

pytestmark = pytest.mark.sharded


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return both_of("two_processes.py", tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_both_hold_the_same_bytes(name: str, kind: str, both: list) -> None:
    one, other = (result[name, kind][0] for result in both)
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_each_decomposes_its_share(name: str, kind: str, both: list) -> None:
    assert [len(result[name, kind][1]) for result in both] == [2, 1]


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_weights_are_those_of_one_process_with_the_same_global_batch(name: str, kind: str, both: list) -> None:
    dtype, tolerance = DTYPES[kind]
    adapted = made(CASES[name], dtype)
    expected = train(adapted, adapted, 0, 1)
    got = both[0][name, kind][0]
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        if value.is_floating_point():
            sign = _sign(got, expected, key)
            torch.testing.assert_close(got[key] * sign, value, rtol=0, atol=tolerance, msg=key)
        else:
            assert torch.equal(got[key], value), key


def _sign(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    """Directions are pairs: the same sign on ū and v̄ is the same direction, in A and B that started along them too."""
    owner, _, part = key.rpartition(".")
    if part in ("A", "B") and f"{owner.removesuffix('structure')}start.down" in got:
        owner, part = f"{owner.removesuffix('structure')}start", {"A": "down", "B": "up"}[part]
    if part not in ("up", "down"):
        return torch.ones(())
    sign = (got[f"{owner}.down"] * expected[f"{owner}.down"]).sum(1).sign()
    return sign if part == "up" else sign[:, None]


def test_both_say_the_same_of_the_launch(both: list) -> None:
    for name in CASES:
        said = [
            [{n: {**s, "seconds": 0} for n, s in sites.items()} for sites in result[name, "fp32"][2]] for result in both
        ]
        assert said[0] == said[1]
        assert len(said[0]) == (2 if name == "tsd" else 1)


def test_a_site_that_did_not_move_is_empty_on_both(both: list) -> None:
    for result in both:
        gap = result["odd"]["gap"]
        assert gap["base_model.model.second.weft_site.default.boost.index"].tolist() == [-1] * 3
        assert (gap["base_model.model.first.weft_site.default.boost.index"] >= 0).all()


def test_a_failure_on_one_process_ends_both(both: list) -> None:
    assert "failed on process 1: second has values that are not finite" in both[0]["odd"]["error"]
    assert "second has values that are not finite" in both[1]["odd"]["error"]


def test_two_adapters_that_launch_in_one_step_do_not_mix(both: list) -> None:
    one, other = (result["odd"]["two"] for result in both)
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert launched_in(one, "default")
    assert launched_in(one, "other")


def launched_in(state: dict[str, torch.Tensor], adapter: str) -> bool:
    return all(bool(t) for n, t in state.items() if f".{adapter}.boost.launched" in n)
