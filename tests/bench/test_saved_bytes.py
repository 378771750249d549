"""Saved bytes against a count by hand."""

import weakref

import torch
from torch.nn import functional as F

from weftlora.bench.rounds import saved_bytes
from weftlora.kernel import Factors, Work, add_low_rank

TOKENS, IN, OUT, RANK = 10, 6, 7, 3


def test_a_plain_site_saves_its_input_and_the_latent():
    a, b = torch.randn(RANK, IN, requires_grad=True), torch.randn(OUT, RANK, requires_grad=True)
    x, y = torch.randn(TOKENS, IN, requires_grad=True), torch.randn(TOKENS, OUT)
    counted = saved_bytes(lambda: add_low_rank(y, x, Work(Factors(a, b, 2.0))), [a, b])
    assert counted == 4 * TOKENS * (IN + 16)  # the latent has the 16 columns that GEMMs are fast in


def test_weights_are_left_out():
    w, x = torch.randn(OUT, IN), torch.randn(TOKENS, IN, requires_grad=True)
    assert saved_bytes(lambda: F.linear(x, w), [w]) == 0
    assert saved_bytes(lambda: F.linear(x, w), []) == 4 * OUT * IN


def test_a_storage_counts_once_and_in_full():
    x = torch.randn(TOKENS, IN, requires_grad=True)

    def both_views() -> torch.Tensor:
        hidden = x.exp()  # saves its own result
        return hidden[0].sin() + hidden[1].sin()  # each saves a row of the same storage

    assert saved_bytes(both_views, []) == 4 * TOKENS * IN


def test_bf16_elements_count_two_bytes():
    x = torch.randn(TOKENS, IN, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda: x.exp(), []) == 2 * TOKENS * IN


class Token:
    """Lives as long as the node of the graph that it is hung on."""


def test_the_graph_is_freed():
    x, tokens = torch.randn(TOKENS, IN, requires_grad=True), []

    def watched() -> torch.Tensor:
        hidden = x.exp()
        token = hidden.grad_fn.metadata["token"] = Token()
        tokens.append(weakref.ref(token))
        return hidden.sin()

    saved_bytes(watched, [])
    assert tokens[0]() is None
