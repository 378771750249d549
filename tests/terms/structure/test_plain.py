"""The tensors of a plain term."""

import torch

from weftlora.terms.structure.plain import Plain, PlainTerm


def test_a_plain_term_trains_the_given_a_and_a_zero_b():
    a = torch.randn(3, 5)
    term = PlainTerm(a, 4)
    assert {n: tuple(p.shape) for n, p in term.named_parameters()} == {"A": (3, 5), "B": (4, 3)}
    assert torch.equal(term.A, a)
    assert torch.count_nonzero(term.B) == 0
    f = term.factors(2.5)
    assert (f.A is term.A, f.B is term.B, f.scale, f.heads) == (True, True, 2.5, 1)
    assert (f.gate, f.v, f.router, f.extra) == (None, None, None, ())


def test_the_sides_of_an_adapter_are_read_off_its_tensors():
    a, b = torch.zeros(2, 5), torch.zeros(7, 2)
    assert Plain().sides({"A": a, "B": b}) == (5, 7)
    assert Plain().sides({"A": a}) == (5, None)
    assert Plain().sides({}) == (None, None)
