"""The choice Hydra and the tensors its term owns; what they compute is in claims/test_hydralora.py."""

import dataclasses

import pytest
import torch
from torch import nn

from weftlora.errors import ConfigError
from weftlora.kernel.factors import used
from weftlora.terms.structure.hydra import Hydra, HydraTerm


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"heads": 1}, "one head is plain LoRA"),
        ({"heads": 0}, "heads=0"),
        ({"heads": True}, "heads=True"),
        ({"heads": 3.0}, r"heads=3\.0"),
        ({"heads": "3"}, "heads='3'"),
        ({"router_input": "A x"}, "did you mean 'Ax'"),
        ({"router_init": "zeros"}, "did you mean 'zero'"),
        ({"router_gain": 0}, "router_gain=0"),
        ({"router_gain": True}, "router_gain=True"),
        ({"router_gain": 2, "router": "uniform"}, "router that is drawn"),
        ({"router_gain": 2, "router_init": "zero", "per_head_dropout": True}, "router that is drawn"),
        ({"balance": -0.1}, r"balance=-0\.1"),
        ({"balance": float("nan")}, "balance=nan"),
        ({"balance": float("inf")}, "balance=inf"),
        ({"balance": "1e-2"}, "balance='1e-2'"),  # how YAML reads 1e-2
        ({"balance": None}, "balance=None"),
        ({"per_head_dropout": "false"}, "per_head_dropout='false'"),
    ],
)
def test_a_value_that_cannot_work_is_refused(fields: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        Hydra(**fields)


def test_the_defaults_are_three_heads_on_the_raw_input_without_a_balance_term():
    assert Hydra() == Hydra(heads=3, router_input="x", per_head_dropout=False, balance=0.0, router_init="kaiming")


def test_a_choice_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Hydra().heads = 1


def test_the_term_trains_one_a_all_heads_side_by_side_and_the_router():
    a, router = torch.randn(2, 5), torch.randn(3, 5)
    term = HydraTerm(Hydra(heads=3), a, 4, router)
    assert {n: tuple(p.shape) for n, p in term.named_parameters()} == {"A": (2, 5), "B": (4, 6), "router": (3, 5)}
    assert not list(term.buffers())
    assert torch.count_nonzero(term.B) == 0
    nn.init.normal_(term.B)
    f = term.factors(1.5)
    assert (f.A is term.A, f.B is term.B, f.router is term.router) == (True, True, True)
    assert (f.scale, f.heads, f.gate, f.v, f.extra) == (1.5, 3, None, None, ())


def test_top_k_picks_per_token_whatever_the_leading_axes_are():
    omega = torch.tensor([[[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]], [[0.2, 0.6, 0.2], [0.4, 0.4, 0.2]]])
    expected = [[[1, 0, 0], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]]
    assert used(omega, 1).tolist() == expected
    torch.testing.assert_close(used(omega, 2)[0, 0], torch.tensor([0.625, 0.375, 0.0]))
