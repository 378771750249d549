"""Two processes over gloo: the same α on both, and that of one process with the same global batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pairing import both_of
from searching import adapted, make, mse, planted, stack
from two_searches import CASES, identity, searched

import weftlora
from weftlora.terms.layers.search import weights

pytestmark = pytest.mark.sharded

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return both_of(str(HERE / "two_searches.py"), tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("name", CASES)
def test_both_processes_hold_the_same_bytes_though_they_started_apart(name: str, both: list):
    one, other = (result[name] for result in both)
    assert one[0] == other[0]
    assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    assert one[2] == other[2]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_select_as_one_with_the_same_global_batches(name: str, both: list):
    """Three micro-batches on two processes: the shares are unequal, the mean is still over all tokens."""
    alone, two = searched(name, seed=1), both[0][name]
    tolerance = 1e-6 if name == "unrolled_fd" else 1e-9
    torch.testing.assert_close(torch.tensor(two[0]), torch.tensor(alone[0]), rtol=0, atol=tolerance)
    for a, b in zip(two[1], alone[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert two[2] == alone[2]


def test_the_identity_on_two_processes_is_an_explicit_leaf_on_one(both: list):
    search = identity(seed=1)
    batches = search._batches("validation", 3)
    alpha = search.alpha.detach().clone().requires_grad_()
    search.model.eval()
    with search.gates.graphed(list(weights(alpha))):
        [expected] = torch.autograd.grad(torch.stack([mse(search.model, b) for b in batches]).mean(), alpha)
    for found in both:
        torch.testing.assert_close(found["identity"], expected, rtol=1e-5, atol=1e-9)
        assert abs(float(found["identity"].sum())) < 1e-9 * float(found["identity"].abs().sum())


def test_each_process_passes_its_share_of_the_micro_batches_only(both: list):
    """All of them on each would have the same mean, and cost twice as much."""
    assert [found["passed"] for found in both] == [2, 1]


def test_the_main_process_decides_even_where_another_has_other_numbers(both: list):
    assert both[0]["decided"] == both[1]["decided"] == [0, 2]


def test_a_search_with_dropout_resumes_exactly_each_process_with_its_own_random_state(both: list):
    for found in both:
        assert found["dropout"]["resumed"] == found["dropout"]["whole"]
    assert both[0]["dropout"] == both[1]["dropout"]


def test_a_process_that_fails_stops_the_others(both: list):
    assert both[1]["failing"]["error"] == "ValueError: no loss here"
    assert "a pass of the search failed on process 1: no loss here" in both[0]["failing"]["error"]


def test_a_search_resumed_by_another_number_of_processes_says_what_is_not_exact(tmp_path: Path):
    model = adapted(stack(3), weftlora.Search(outer_batches=2, val_size=12, steps=2))
    search = make(model, planted(stack(3), {1}, 40))
    state = search.state_dict()
    state["random"] *= 2
    with pytest.warns(UserWarning, match="saved by 2 processes and continues in 1"):
        search.load_state_dict(state)
