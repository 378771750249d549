"""The Triton kernels, run in Python by Triton's interpreter: against the equation in fp64, under masks that both are given.

`make interpreter` runs this file; in the other parts of the check there is no triton. Sums of products of bfloat16 are fp32 in the
interpreter, whose own are wrong; what the compiler makes of the kernels is looked at without a GPU, as machine code for one.
"""

import ast
import inspect
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from weftlora import kernel
from weftlora.kernel import (
    Factors,
    Grouping,
    Slots,
    Work,
    add_by_row,
    add_grouped,
    add_low_rank,
    gated_mlp,
    linears,
    reference,
    switched,
)
from weftlora.kernel.factors import mixture, mixture_backward, used
from weftlora.kernel.philox import threshold, words
from weftlora.kernel.triton import products

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set: make interpreter sets it"),
]
if INTERPRETED:
    from weftlora.kernel.triton import kernels, launches

SEED = 2**62 + 12345678901
LIMIT = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _on() -> Iterator[None]:
    with switched(triton=True):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def kept(tokens: int, width: int, p: float, seed: int = SEED) -> Tensor:
    """1 where an element is kept, from the definition."""
    return (words(seed, tokens, width) >= threshold(p)).double()


def close(got: Tensor, want: Tensor, limit: float = 2e-6) -> None:
    """Equal shapes, and a difference of at most `limit` in norm. Where one head is taken alone its router has no gradient."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got.double() - want.double()).norm() <= limit * want.double().norm() + 1e-6


# ---------------------------------------------------------------------- each product by itself


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize(
    ("tokens", "width", "slots"), [(1, 1, 1), (70, 33, 5), (33, 1000, 16), (700, 40, 3), (20, 36, 512), (65, 130, 65)]
)
def test_products_of_rank_slots_of_any_size(tokens: int, width: int, slots: int, p: float):
    """Down, up and both their derivatives; long sums are cut into parts (1000 of in, 700 tokens)."""
    x, rows, gu, up = normal(tokens, width), normal(slots, width), normal(tokens, slots), normal(width, slots)
    drop = launches.Drop(SEED, p) if p else None
    through = kept(tokens, width, p) if p else torch.ones(tokens, width)
    dropped = x.double() * through
    close(launches.read(x, rows, drop), dropped @ rows.double().T)
    close(launches.rows_backward(gu, x, torch.float32, drop), gu.double().T @ dropped)
    product = gu.double() @ up.double().T
    close(launches.write(x, gu, up, 1.7, drop), x.double() + 1.7 * product * through)
    gh, gup = launches.write_backward(x, gu, up, 1.7)
    close(gh, 1.7 * x.double() @ up.double())
    close(gup, 1.7 * x.double().T @ gu.double())
    for blocks in launches.FUSED:
        close(
            launches.linear(x, rows, rows[:, 0], gu, normal(slots, slots) * 0 + 1, 0.3, blocks),
            x.double() @ rows.double().T + rows[:, 0].double() + 0.3 * gu.double().sum(1, keepdim=True),
        )


def test_in_sixteen_bits_a_wide_output_has_wider_blocks():
    g, h, up = (normal(*shape).bfloat16() for shape in ((3, 300), (3, 5), (300, 5)))
    gh, gup = launches.write_backward(g, h, up, 0.5)
    close(gh.double(), 0.5 * g.double() @ up.double(), 1e-2)
    close(gup.double(), 0.5 * g.double().T @ h.double(), 1e-2)


@pytest.mark.parametrize("layout", ["transposed", "every second", "a part of wider rows"])
def test_nothing_has_to_be_contiguous(layout: str):
    def given(rows: int, columns: int) -> Tensor:
        if layout == "transposed":
            return normal(columns, rows).T
        return normal(rows, 2 * columns)[:, ::2] if layout == "every second" else normal(rows, columns + 3)[:, 2:-1]

    x, rows, h, up, weight = given(20, 40), given(5, 40), given(20, 5), given(30, 5), given(30, 40)
    g, base = given(20, 30), given(20, 30)
    before = base.clone()
    for drop in (None, launches.Drop(SEED, 0.4)):
        dense = [t.contiguous() for t in (x, rows, h, up, weight, g, base)]
        dx, drows, dh, dup, dweight, dg, dbase = dense
        assert torch.equal(launches.read(x, rows, drop), launches.read(dx, drows, drop))
        assert torch.equal(launches.write(base, h, up, 2.0, drop), launches.write(dbase, dh, dup, 2.0, drop))
        assert torch.equal(launches.rows_backward(h, x, x.dtype, drop), launches.rows_backward(dh, dx, x.dtype, drop))
        assert torch.equal(launches.masked_by_count(x, 3, 0.5), launches.masked_by_count(dx, 3, 0.5))
    assert torch.equal(launches.linear(x, weight, None, h, up, 2.0), launches.linear(dx, dweight, None, dh, dup, 2.0))
    for got, want in zip(
        launches.write_backward(g, h, up, 2.0), launches.write_backward(dg, dh, dup, 2.0), strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(base, before)  # `write` without `into` leaves its base alone


def test_write_adds_into_its_base_where_it_is_told_to():
    base, h, up = normal(20, 30), normal(20, 4), normal(30, 4)
    want = base + h @ up.T
    assert launches.write(base, h, up, 1.0, into=True) is base
    close(base, want)


def test_what_several_programs_compute_is_put_together():
    """A sum in four parts; nine blocks of tokens by two of out, in groups of eight, of which the last has one."""
    x, rows = normal(3, 512), normal(4, 512)
    close(launches.read(x, rows), x.double() @ rows.double().T)
    x, weight, h, up = normal(520, 4), normal(130, 4), normal(520, 2), normal(130, 2)
    close(
        launches.linear(x, weight, None, h, up, 0.5), x.double() @ weight.double().T + 0.5 * h.double() @ up.double().T
    )


def test_blocks_are_what_a_compiler_takes_and_shares_no_larger_than_they_must_be(monkeypatch: pytest.MonkeyPatch):
    """Powers of two; of an axis the least multiple of a block with which as many programs as are wanted have it all."""
    launched: list[int] = []
    monkeypatch.setattr(launches, "_launch", lambda *_, **how: launched.extend(how[b] for b in how if b[0] == "B"))
    for dtype in (torch.float32, torch.bfloat16):
        launches.write_backward(
            normal(4, 300, dtype=dtype), normal(4, 3, dtype=dtype), normal(300, 3, dtype=dtype), 1.0
        )
    assert launched == [64, 128, 16, 64, 256, 16]
    for tokens, out, fan_in, *_ in launches.FUSED.values():
        assert all(size >= 16 and size & (size - 1) == 0 for size in (tokens, out, fan_in))
    for length, programs, parts in ((1000, 1, 7), (1024, 1, 8), (1024, 100, 3), (100, 1, 1), (2050, 20, 14)):
        share = launches._share(length, programs, least=128, unit=64)
        assert share == 64 * math.ceil(length / parts / 64)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 40),
    rank=st.integers(1, 70),
    heads=st.integers(1, 9),
    extra=st.integers(0, 5),
    top=st.none() | st.integers(1, 9),
    told=st.booleans(),
    ties=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_mixture_of_heads_and_its_derivative(
    tokens: int, rank: int, heads: int, extra: int, top: int | None, told: bool, ties: bool, seed: int
):
    """`top` heads of largest ω, of equal ones those of the lowest index; the softmax's derivative with what listeners add."""
    torch.manual_seed(seed)
    u, logits = normal(tokens, rank + extra), normal(tokens, heads)
    omega = torch.softmax(logits.round() if ties else logits, -1)
    h = launches.mix(u, omega, rank, top)
    close(h, mixture(u.double(), used(omega.double(), top), rank))
    gh, gomega = normal(*h.shape), normal(tokens, heads) if told else None
    got = launches.mix_backward(gh, gomega, u, omega, rank, top)
    wide = [None if t is None else t.double() for t in (gh, gomega, u, omega)]
    want = mixture_backward(*wide, rank, top)
    scale = gh.norm() * u.norm()
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= 1e-6 * scale


# ---------------------------------------------------------------------- several adapters in one batch


@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("mixed", [[0, 2, 2, 1, 0], [3], [1] * 40, []])
def test_a_table_gives_every_token_the_factors_of_its_adapter(mixed: list[int], chunk: int):
    """Five adapters, of which some have no token; in any order, in one launch."""
    adapter = torch.tensor(mixed * 7, dtype=torch.int64)
    tokens, width, out, slots, adapters = len(adapter), 24, 40, 5, 5
    table = launches.table_of(adapter, adapters, chunk)
    x, g, h = normal(tokens, width), normal(tokens, out), normal(tokens, slots)
    rows, up = normal(adapters, slots, width), normal(adapters, out, slots)
    own = F.one_hot(adapter, adapters).double()
    for drop in (None, launches.Drop(SEED, 0.3)):
        dropped = x.double() * (1.0 if drop is None else kept(tokens, width, drop.p))
        close(launches.read(x, rows, drop, table), torch.einsum("ti,tri->tr", dropped, rows[adapter].double()))
        want = torch.einsum("te,tr,ti->eri", own, h.double(), dropped)
        close(launches.rows_backward(h, x, torch.float32, drop, table), want)
    product = torch.einsum("tr,tor->to", h.double(), up[adapter].double())
    close(launches.write(g, h, up, 1.3, table=table), g.double() + 1.3 * product)
    gh, gup = launches.write_backward(g, h, up, 1.3, table)
    close(gh, 1.3 * torch.einsum("to,tor->tr", g.double(), up[adapter].double()))
    close(gup, 1.3 * torch.einsum("te,to,tr->eor", own, g.double(), h.double()))


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("case", ["plain", "one A", "routed", "routed by A x"])
def test_experts_are_adapters_of_one_batch(case: str, p: float):
    """Each token with the factors of its expert, of which the last has no token: by a table in one launch for all."""
    torch.manual_seed(7)
    count, fan_in, out, r, heads = 4, 20, 12, 3, 2
    expert = torch.sort(torch.randint(0, count - 1, (29,))).values
    grouping = Grouping(torch.bincount(expert, minlength=count).cumsum(0).to(torch.int32), expert)
    routed = case.startswith("routed")
    a, b = (
        normal(r, fan_in) if case == "one A" else normal(count, r, fan_in),
        normal(count, out, r * (heads if routed else 1)),
    )
    router = normal(count, heads, r if case == "routed by A x" else fan_in) if routed else None
    router_input = "Ax" if case == "routed by A x" else "x"
    f = Factors(a, b, 2.0, normal(count, r), router=router, router_input=router_input)
    x, y = normal(29, fan_in), normal(29, out)
    leading = [t.requires_grad_() for t in (x, y, *leaves(f))]
    launched: list[object] = []
    found = []
    with pytest.MonkeyPatch.context() as patch:
        launch = launches._launch
        patch.setattr(launches, "_launch", lambda *a, **k: (launched.append(k.get("TABLE")), launch(*a, **k))[1])
        for plain in (False, True):
            with kernel.use_reference(plain):
                given = Work(f, p, mask=torch.tensor([SEED]) if p else None)
                result = add_grouped(y.clone(), x, given, grouping)
            found.append([result.detach(), *torch.autograd.grad(result.square().sum(), leading)])
    assert True in launched
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 2e-5)


NAMED = {
    "narrow": (3, None, 0, None),
    "wide, with slots beside": (20, None, 2, None),
    "routed": (4, "x", 1, None),
    "one head of three": (5, "Ax", 0, 1),
}
"""Adapters of one batch: rank, router, extra slots, heads per token."""


@pytest.mark.parametrize(
    ("rows", "dtype"),
    [
        ([1, 4, 3, 0, 2, 1], torch.float32),
        ([2, 4, 3], torch.bfloat16),
        ([4, 3], torch.float32),
        ([0, 0], torch.float32),
    ],
)
def test_rows_that_name_adapters_of_all_structures_are_in_one_launch(rows: list[int], dtype: torch.dtype):
    """Of other ranks and scales, with a row of none (4): outputs, ω and gradients are those of each row by itself in fp64."""
    torch.manual_seed(8)
    named = [
        factors((24, 18, r, 3), router, extra, True, top, torch.float32) for r, router, extra, top in NAMED.values()
    ]
    named = [replace(f, scale=0.5 + number) for number, f in enumerate(named)]
    x, y = (
        normal(len(rows), 5, 24, dtype=dtype).requires_grad_(),
        normal(len(rows), 5, 18, dtype=dtype).requires_grad_(),
    )
    g = normal(*y.shape, dtype=dtype)
    heard: list[Tensor] = []
    used_now = sorted({row for row in rows if row < 4})
    before, launched = y.detach().clone(), []
    with pytest.MonkeyPatch.context() as patch:
        launch = launches._launch
        patch.setattr(launches, "_launch", lambda *a, **k: (launched.append(k["TABLE"]), launch(*a, **k))[1])
        works = [Work(named[number], on_mix=heard.append) for number in used_now]
        of_row = tuple(used_now.index(row) if row < 4 else len(used_now) for row in rows)
        got = add_by_row(y, x, works, of_row)
    routed = any(named[number].router_input == "x" and named[number].router is not None for number in used_now)
    assert launched == [True] * (3 if routed else 2)
    assert torch.equal(y, before)
    exact = [wide(f) for f in named]
    xs, ys, told = x.detach().double().requires_grad_(), y.detach().double().requires_grad_(), {}
    want = torch.stack(
        [
            y_row
            if row == 4
            else y_row
            + reference(x_row, Work(exact[row], on_mix=lambda o, row=row: told.setdefault(row, []).append(o)))
            for x_row, y_row, row in zip(xs, ys, rows, strict=True)
        ]
    )
    limit = LIMIT[dtype]
    close(got, want, limit)
    for mine, theirs in zip(heard, [torch.stack(told[row]) for row in used_now if row in told], strict=True):
        close(mine, theirs, limit)
    leading = [
        (x, xs),
        (y, ys),
        *((a, b) for row in used_now for a, b in zip(leaves(named[row]), leaves(exact[row]), strict=True)),
    ]
    mine = torch.autograd.grad(got, [a for a, _ in leading], g)
    theirs = torch.autograd.grad(want, [b for _, b in leading], g.double())
    for a, b in zip(mine, theirs, strict=True):
        close(a, b, 2 * limit)


def test_a_model_whose_rows_name_adapters_computes_what_it_does_without_the_kernels(
    llama: torch.nn.Module, token_batch: dict[str, Tensor]
):
    from peft import get_peft_model

    from weftlora import HydraLoraConfig, PlainLoraConfig

    model = get_peft_model(llama, HydraLoraConfig(r=4, heads=3, target_modules=["q_proj", "down_proj"]))
    model.add_adapter("two", PlainLoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if ".weft_site." in name:
            torch.nn.init.normal_(p, std=0.3)
    model.eval()
    ids, rows = token_batch["input_ids"].repeat(2, 1), ["two", "default", "__base__", "two"]
    found, launched = [], []
    for on in (True, False):
        with switched(triton=on), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            launch = launches._launch
            patch.setattr(launches, "_launch", lambda *a, **k: (launched.append(k["TABLE"]), launch(*a, **k))[1])  # noqa: B023
            found.append(model(input_ids=ids, adapter_names=rows).logits)
            assert launched.count(True) == 2 * (3 + 3)  # down, router and up of q_proj and of down_proj, in two blocks
    close(*found, 2e-5)
    with torch.inference_mode():
        close(model(input_ids=ids, adapter_names=rows).logits, found[1], 2e-5)


# ---------------------------------------------------------------------- dropout


def test_a_mask_is_that_of_its_definition_in_every_kernel_and_any_block():
    """What is dropped does not depend on where a block begins: the kernels differ in their blocks, the mask does not."""
    tokens, width, p = 90, 300, 0.37
    want = kept(tokens, width, p)
    ones, drop = torch.ones(tokens, width), launches.Drop(SEED, p)
    assert torch.equal(launches.masked_by_count(ones, SEED, p).double(), want)
    assert torch.equal(launches.read(ones, torch.eye(width), drop).double(), want)
    assert torch.equal(launches.rows_backward(torch.eye(tokens), ones, torch.float32, drop).double(), want)
    ranks = normal(tokens, 3).abs() + 1
    added = launches.write(torch.zeros(tokens, width), ranks, torch.ones(width, 3), 1.0, drop)
    assert torch.equal((added != 0).double(), want)


@pytest.mark.parametrize("p", [0.5, 0.05, 0.001])
def test_the_share_of_dropped_elements_is_p_and_they_are_independent(p: float):
    """Over 260,000 elements to five standard errors: the share, of all and in each of the four words, and neighbours in both axes."""
    tokens, width = 512, 512
    drops = [1 - launches.masked_by_count(torch.ones(tokens, width), seed, p).double() for seed in (1, SEED)]
    sure = 5 / math.sqrt(tokens * width)
    deviation = math.sqrt(p * (1 - p))
    for dropped in drops:
        assert abs(dropped.mean() - p) < sure * deviation
        for word in range(4):
            assert abs(dropped[:, word::4].mean() - p) < 2 * sure * deviation
        centred = (dropped - p) / deviation
        for distance in (1, 2, 3, 4, 32, 128):
            assert abs((centred[:, distance:] * centred[:, :-distance]).mean()) < 1.2 * sure
            assert abs((centred[distance:] * centred[:-distance]).mean()) < 1.2 * sure
    assert abs(((drops[0] - p) * (drops[1] - p)).mean()) < sure * deviation**2


def test_a_mask_takes_its_seed_from_torchs_generator_and_keeps_eight_bytes():
    x = normal(6, 8)
    torch.manual_seed(3)
    first, second = kernel.draw(x, 0.3), kernel.draw(x, 0.3)
    torch.manual_seed(3)
    assert torch.equal(kernel.draw(x, 0.3), first)
    assert not torch.equal(first, second)
    assert (first.dtype, first.shape) == (torch.int64, (1,))


# ---------------------------------------------------------------------- the whole node


def factors(
    sizes: tuple[int, int, int, int], router: str | None, extra: int, gate: bool, top: int | None, dtype: torch.dtype
) -> Factors:
    fan_in, out, r, heads = sizes

    def leaf(*shape: int) -> Tensor:
        return (normal(*shape) / shape[-1] ** 0.5).to(dtype).requires_grad_()

    return Factors(
        leaf(r, fan_in),
        leaf(out, r * (heads if router else 1)),
        1.7,
        leaf(r) if gate else None,
        leaf(out) if gate else None,
        None if router is None else leaf(heads, fan_in if router == "x" else r),
        "Ax" if router == "Ax" else "x",
        tuple(Slots(leaf(2, fan_in), leaf(out, 2), leaf(2)) for _ in range(extra)),
        top=top,
    )


def leaves(f: Factors) -> list[Tensor]:
    return [t for t in (f.A, f.B, f.gate, f.v, f.router, *(t for s in f.extra for t in s[:3])) if t is not None]


def wide(f: Factors) -> Factors:
    """The same numbers in fp64, as leaves of their own."""

    def to(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().double().requires_grad_()

    extra = tuple(Slots(*(to(t) for t in s[:3])) for s in f.extra)
    return replace(f, A=to(f.A), B=to(f.B), gate=to(f.gate), v=to(f.v), router=to(f.router), extra=extra)


Linear = tuple[Tensor, Tensor | None, Work]


def node_and_equation(x: Tensor, members: list[Linear], g: list[Tensor], gomega: float = 0.0) -> Iterator[list[Tensor]]:
    """Outputs and gradients of x and all factors: of the node, then of the equation in fp64, under the same masks."""
    for exact in (False, True):
        given = x.detach().double() if exact else x.detach()
        given.requires_grad_()
        told: list[Tensor] = []
        works = [replace(work, factors=wide(work.factors)) if exact else work for *_, work in members]
        works = [replace(work, on_mix=told.append) for work in works] if gomega else works
        if exact:
            outputs = [
                F.linear(given, w.double(), None if b is None else b.double()) + reference(given, work)
                for (w, b, _), work in zip(members, works, strict=True)
            ]
        else:
            outputs = linears(given, [(w, b, work) for (w, b, _), work in zip(members, works, strict=True)])
        loss = sum((y.double() * up.double()).sum() for y, up in zip(outputs, g, strict=True))
        loss = loss + gomega * sum((omega.double() ** 2).sum() for omega in told)
        wanted = [given, *(t for work in works for t in leaves(work.factors))]
        yield [*(y.detach() for y in outputs), *torch.autograd.grad(loss, wanted)]


def assert_node(x: Tensor, members: list[Linear], gomega: float = 0.0) -> None:
    g = [normal(*x.shape[:-1], len(w)).to(x.dtype) for w, *_ in members]
    got, want = node_and_equation(x, members, g, gomega)
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs, LIMIT[x.dtype])


def work(f: Factors, p: float, seed: int) -> Work:
    return Work(f, p, mask=torch.tensor([seed]) if p else None)


def each_way(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Every product with several ways takes its number-th, or its last."""

    def taken(name: str, x: Tensor, shape: object, ways: dict[str, Callable[[], Tensor]]) -> Tensor:
        return list(ways.values())[min(number, len(ways) - 1)]()

    monkeypatch.setattr(products, "fastest", taken)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2),
    sizes=st.tuples(st.integers(1, 150), st.integers(1, 150), st.integers(1, 24), st.integers(2, 5)),
    router=st.sampled_from([None, "x", "Ax"]),
    top=st.none() | st.integers(1, 4),
    extra=st.integers(0, 2),
    gate=st.booleans(),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.05, 0.5]),
    contiguous=st.booleans(),
    way=st.integers(0, 4),
    seed=st.integers(0, 2**63 - 2),
)
def test_the_node_is_the_equation(
    shape: list[int],
    sizes: tuple[int, int, int, int],
    router: str | None,
    top: int | None,
    extra: int,
    gate: bool,
    bias: bool,
    p: float,
    contiguous: bool,
    way: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
):
    """Output and every gradient, over shapes, ranks, heads, gates, extra slots, layouts, dropout and each way of a product."""
    torch.manual_seed(seed % 1000)
    each_way(monkeypatch, way)
    fan_in, out, _, heads = sizes
    assume(top is None or (router is not None and top <= heads))
    x = normal(*shape, fan_in) if contiguous else normal(fan_in, *shape).movedim(0, -1)
    f = factors(sizes, router, extra, gate, top, torch.float32)
    if top is not None:  # rounding must not decide who is among the largest
        q = x.double() @ f.router.double().T if router == "x" else x.double() @ f.A.double().T @ f.router.double().T
        apart = torch.softmax(q, -1).sort(-1).values.diff(dim=-1)
        assume(apart.min() > 1e-4)
    member = (normal(out, fan_in), normal(out) if bias else None, work(f, p, seed))
    assert_node(x, [member], gomega=0.5 if router and seed % 2 else 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("router", [None, "x", "Ax"])
@pytest.mark.parametrize("masters", [torch.float32, None])
def test_sixteen_bits_stay_within_their_precision(dtype: torch.dtype, router: str | None, masters: torch.dtype | None):
    torch.manual_seed(4)
    f = factors((40, 36, 4, 3), router, 1, True, None, masters or dtype)
    member = (normal(36, 40, dtype=dtype) / 6, normal(36, dtype=dtype), work(f, 0.1, 9))
    assert_node(normal(3, 20, 40, dtype=dtype), [member])
    for t, g in zip(leaves(f), torch.autograd.grad(sum(t.sum() for t in leaves(f)), leaves(f)), strict=True):
        assert g.dtype == t.dtype


@pytest.mark.parametrize("masks", ["own", "one", "none"])
@pytest.mark.parametrize("router", [None, "x"])
def test_linears_that_read_one_input(masks: str, router: str | None):
    """q, k and v with masks of their own or one; the gradient of x has a share through each."""
    torch.manual_seed(5)
    x, shared = normal(2, 11, 28), torch.tensor([77])
    members = []
    for number, out in enumerate((30, 10, 12)):
        f = factors((28, out, 5, 3), router, number % 2, False, None, torch.float32)
        mask = {"own": torch.tensor([number]), "one": shared, "none": None}[masks]
        members.append((normal(out, 28), None, Work(f, 0.2 if mask is not None else 0.0, mask=mask)))
    assert_node(x, members, gomega=0.3 if router else 0.0)


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_gated_mlp_is_its_three_linears(p: float):
    torch.manual_seed(6)
    sizes = [(20, 33), (20, 33), (33, 20)]
    members = [
        (normal(out, n), None, work(factors((n, out, 4, 2), "x" if k else None, 0, False, None, torch.float32), p, k))
        for k, (n, out) in enumerate(sizes)
    ]
    x = normal(2, 9, 20).requires_grad_()
    wanted = [x, *(t for *_, w in members for t in leaves(w.factors))]
    g = normal(2, 9, 20)
    whole = gated_mlp(x, "silu", *members)
    e, a = (F.linear(x, w) + reference(x, of) for w, _, of in members[:2])
    hidden = F.silu(e) * a
    single = F.linear(hidden, members[2][0]) + reference(hidden, members[2][2])
    close(whole, single, 2e-5)
    for mine, theirs in zip(torch.autograd.grad(whole, wanted, g), torch.autograd.grad(single, wanted, g), strict=True):
        close(mine, theirs, 5e-5)


@pytest.mark.parametrize("y_type", [torch.float32, torch.bfloat16])
def test_an_update_goes_onto_the_output_of_another_module(y_type: torch.dtype):
    f = factors((20, 30, 4, 3), "x", 1, True, None, torch.float32)
    x, y = normal(7, 20), normal(7, 30, dtype=y_type)
    before = y.clone()
    got = add_low_rank(y, x, work(f, 0.3, 5))
    assert got.dtype == y_type
    assert torch.equal(y, before)
    close(got, y.double() + reference(x.double(), work(wide(f), 0.3, 5)), LIMIT[y_type])


def test_and_the_update_alone_has_its_gradients():
    """Where no W is the node's, x has those that come through the rows: of slots through a mask, of the router past it."""
    torch.manual_seed(8)
    f, x, y = factors((20, 30, 4, 3), "x", 1, True, 2, torch.float32), normal(7, 20), normal(7, 30)
    found = []
    for own, path in ((f, add_low_rank), (wide(f), lambda y, x, work: y + reference(x, work))):
        source = x.to(own.A.dtype).requires_grad_()
        result = path(y.to(source.dtype), source, work(own, 0.3, 5))
        found.append(torch.autograd.grad(result.square().sum(), [source, *leaves(own)]))
    for mine, theirs in zip(*found, strict=True):
        close(mine, theirs, 2e-5)


def test_a_mask_that_was_drawn_without_the_kernels_is_the_mask_of_their_products():
    """Such a mask no kernel can make a part of: x goes through it before one reads it, and so does the gradient of x."""
    x = normal(6, 20)
    with switched(triton=False):
        bits = kernel.draw(x, 0.4)
    for outs in ((12,), (12, 9)):
        each = [factors((20, out, 3, 2), None, 0, False, None, torch.float32) for out in outs]
        assert_node(x, [(normal(len(f.B), 20), None, Work(f, 0.4, mask=bits)) for f in each])
    grouping = Grouping(torch.tensor([3, 6], dtype=torch.int32), torch.tensor([0, 0, 0, 1, 1, 1]))
    experts = Factors(normal(2, 3, 20).requires_grad_(), normal(2, 12, 3).requires_grad_(), 2.0)
    leading = [x.requires_grad_(), *leaves(experts)]
    for mask in (bits, torch.tensor([SEED])):
        found = []
        for plain in (False, True):
            with kernel.use_reference(plain):
                result = add_grouped(torch.zeros(6, 12), x, Work(experts, 0.4, mask=mask), grouping)
            found.append([result.detach(), *torch.autograd.grad(result.square().sum(), leading)])
        for mine, theirs in zip(*found, strict=True):
            close(mine, theirs, 2e-5)


@pytest.mark.parametrize("router", [None, "x", "Ax"])
def test_the_derivatives_are_those_of_finite_differences(router: str | None):
    """In fp64, which the kernels leave to torch's products, under a mask that a kernel would make."""
    f = factors((4, 3, 2, 3), router, 1, True, None, torch.float64)
    weight, names = normal(3, 4, dtype=torch.float64), ["A", "B", "gate", "v", *(["router"] if router else [])]

    def function(x: Tensor, *values: Tensor) -> Tensor:
        whole = replace(f, **dict(zip(names, values, strict=True)))
        return linears(x, [(weight, None, work(whole, 0.4, 11))])[0]

    x = normal(3, 4, dtype=torch.float64).requires_grad_()
    values = [getattr(f, name) for name in names]
    assert torch.autograd.gradcheck(function, (x, *values), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(function(x, *values), F.linear(x, weight) + reference(x, work(f, 0.4, 11)))


# ---------------------------------------------------------------------- what training does to it


def step(run: Callable[[Tensor], Tensor], f: Factors, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(2)
    x = normal(4, 6, 20, dtype=dtype).requires_grad_()
    torch.manual_seed(3)
    y = run(x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *leaves(f)])]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_under_checkpointing_the_masks_are_the_same(reentrant: bool):
    f, weight = factors((20, 30, 4, 3), "x", 0, False, None, torch.float32), normal(30, 20)

    def run(x: Tensor) -> Tensor:
        return linears(x, [(weight, None, Work(f, 0.3))])[0]

    def backward(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(2)
        x = normal(4, 6, 20).requires_grad_()
        torch.manual_seed(3)
        y = call(x)
        for t in (x, *leaves(f)):
            t.grad = None
        y.square().sum().backward()
        return [y.detach(), *(t.grad.clone() for t in (x, *leaves(f)))]

    plain = backward(run)
    again = backward(lambda x: checkpoint(run, x, use_reentrant=reentrant))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(again, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_weights_are_cast_and_masters_have_fp32_gradients(dtype: torch.dtype):
    f, weight = factors((20, 30, 4, 3), "x", 0, True, None, torch.float32), normal(30, 20)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return linears(x, [(weight, None, Work(f, mask=None))])[0]

    got = step(run, f, dtype)
    exact = wide(f)
    want = step(lambda x: F.linear(x.double(), weight.double()) + reference(x.double(), Work(exact)), exact, dtype)
    assert got[0].dtype == dtype
    assert {t.dtype for t in got[2:]} == {torch.float32}
    for mine, theirs in zip(got, want, strict=True):
        close(mine, theirs, 4e-2)


def test_a_second_derivative_is_refused():
    f, weight = factors((20, 30, 4, 3), None, 0, False, None, torch.float32), normal(30, 20)
    x = normal(5, 20).requires_grad_()
    [g] = torch.autograd.grad(linears(x, [(weight, None, Work(f))])[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_a_backward_has_the_products_of_its_forward_whatever_was_switched_between():
    f, weight = factors((20, 30, 4, 3), "Ax", 0, False, None, torch.float32), normal(30, 20)

    def run(x: Tensor) -> Tensor:
        return linears(x, [(weight, None, Work(f, 0.3))])[0]

    want = step(run, f)
    torch.manual_seed(2)
    x = normal(4, 6, 20).requires_grad_()
    torch.manual_seed(3)
    y = run(x)
    with switched(triton=False):
        got = torch.autograd.grad(y.square().sum(), [x, *leaves(f)])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, want[1:], strict=True))


@pytest.mark.parametrize("router", [None, "x"])
def test_compiled_the_products_are_opaque_and_the_numbers_the_same(router: str | None):
    """The whole node is one graph, in which every product stands as an op of torch.library."""
    f, weight = factors((20, 30, 4, 3), router, 1, True, None, torch.float32), normal(30, 20)
    seen: list[str] = []

    def run(x: Tensor) -> Tensor:
        return linears(x, [(weight, None, Work(f, 0.3))])[0]

    def note(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    backend = aot_autograd(fw_compiler=lambda g, a: (note(g, a), make_boxed_func(g.forward))[1])
    compiled = step(torch.compile(run, fullgraph=True, backend=backend), f)
    for mine, theirs in zip(compiled, step(run, f), strict=True):
        close(mine, theirs, 1e-6)
    for op in (
        "read",
        "linear",
        "write_backward",
        "rows_backward",
        "write",
        *(["mix", "mix_backward"] if router else []),
    ):
        assert f"weftlora.triton_{op}.default" in seen


def test_the_fake_implementations_are_those_of_the_ops():
    x, rows, h, up = normal(6, 8), normal(3, 8), normal(6, 3), normal(10, 3)
    mask, omega, base = torch.tensor([5]), torch.softmax(normal(6, 2), -1), normal(6, 10)
    calls = {
        "read": (x, rows, mask, 0.3),
        "linear": (x, normal(10, 8), normal(10), h, up, 1.5),
        "write": (base, h, up, 1.5, mask, 0.3),
        "mix": (h, omega, 2, 1),
        "mix_backward": (normal(6, 5), None, h, omega, 2, None),
        "write_backward": (base, h, up, 1.5),
        "rows_backward": (h, x, torch.bfloat16, None, 0.0),
    }
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(torch.ops.weftlora, f"triton_{name}").default, arguments)


def test_adapted_models_of_every_structure_take_the_same_step(llama: torch.nn.Module, token_batch: dict[str, Tensor]):
    from peft import get_peft_model

    from weftlora import HydraLoraConfig, PlainLoraConfig, TiedLoraConfig

    for config in (HydraLoraConfig(r=4, heads=3), PlainLoraConfig(r=4), TiedLoraConfig(r=4)):
        config.target_modules = ["q_proj", "k_proj", "v_proj", "down_proj", "gate_proj", "up_proj"]
        model = get_peft_model(llama, config)
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.add_(0.1 * torch.randn_like(p))
        launched: list[str] = []
        steps = []
        for on in (True, False):
            with switched(triton=on), pytest.MonkeyPatch.context() as patch:
                launch = launches._launch
                patch.setattr(launches, "_launch", lambda *a, **k: (launched.append(on), launch(*a, **k))[1])  # noqa: B023
                loss = model(**token_batch).loss
                steps.append([loss.detach(), *torch.autograd.grad(loss, trained)])
        assert set(launched) == {True}
        for mine, theirs in zip(*steps, strict=True):
            close(mine, theirs, 2e-5)
        llama = model.unload()


WORLD = """
import os, sys, traceback, warnings

import torch
import worlds
from weftlora.kernel.triton import launches

folder, launched, launch = sys.argv[1], [], launches._launch
launches._launch = lambda *a, **k: (launched.append(1), launch(*a, **k))[1]
torch.set_num_threads(1)
warnings.simplefilter("ignore")
worlds.END = 2
worlds.METHODS["hydralora"] = lambda: worlds.weftlora.HydraLoraConfig(r=2, heads=2, balance=0.01, target_modules=["q_proj", "up_proj"])

def be(rank):
    for engine in ("ddp", "fsdp2"):
        before = len(launched)
        worlds.be(rank, 2, f"{folder}/{engine}", engine, ["hydralora"], ["fp32"])
        assert len(launched) > before, engine

children = worlds.forked(2, be, lambda rank, error: traceback.print_exception(error))
torch.save(worlds.alone(["hydralora"], ["fp32"]), f"{folder}/alone.pt")
assert launched
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_two_processes_end_as_one_does(tmp_path: Path):
    """Two steps of HydraLoRA, replicated by DDP and sharded by FSDP2, each process with the kernels; worlds.py has the training."""
    for engine in ("ddp", "fsdp2"):
        (tmp_path / engine).mkdir()
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(tests), str(tests / "sharding")])
    env = {**os.environ, "WEFT_TRITON": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", WORLD, str(tmp_path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one = torch.load(tmp_path / "alone.pt", weights_only=True)["hydralora", "fp32"]["tensors"]
    for engine in ("ddp", "fsdp2"):
        first, second = (torch.load(tmp_path / engine / f"{rank}.pt", weights_only=True) for rank in (0, 1))
        for key, value in one.items():
            mine = first["hydralora", "fp32"]["tensors"][key]
            assert torch.equal(mine, second["hydralora", "fp32"]["tensors"][key]), (engine, key)
            assert (mine - value).abs().max() <= 1e-5, (engine, key)


# ---------------------------------------------------------------------- what only a GPU would show


def test_every_product_has_the_precision_that_is_asked_for_and_no_load_leaves_a_value_open():
    """The compiler's own precision is tf32, and what a mask leaves out is anything; in the interpreter they are exact, and 0."""
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(kernels))) if isinstance(node, ast.Call)]
    named = {
        name: [{k.arg: ast.unparse(k.value) for k in call.keywords} for call in calls if ast.unparse(call.func) == name]
        for name in ("tl.dot", "tl.load")
    }
    assert [given.get("input_precision") for given in named["tl.dot"]] == ["PRECISION"] * len(named["tl.dot"])
    assert all("other" in given for given in named["tl.load"] if "mask" in given)
    assert all(named.values())


def test_of_several_ways_the_fastest_is_measured_once_for_a_shape_and_the_first_taken_where_none_can_be(
    monkeypatch: pytest.MonkeyPatch,
):
    clock, taken = [0.0], []

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = math.nan if enable_timing else None

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    def way(name: str, takes: float) -> Callable[[], Tensor]:
        return lambda: (taken.append(name), clock.__setitem__(0, clock[0] + takes), torch.tensor(takes))[-1]

    ways = {"first": way("first", 3.0), "fast": way("fast", 1.0), "last": way("last", 2.0)}
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float32, shape=(5, 7))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(products, "ways_taken", {})
    for deterministic, capturing in ((True, False), (False, True)):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda on=deterministic: on)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda on=capturing: on)
        assert float(products.fastest("read", x, (7,), ways)) == 3.0
        assert (taken.pop(), taken, products.ways_taken) == ("first", [], {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert float(products.fastest("read", x, (7,), ways)) == 1.0
    assert [taken.count(name) for name in ways] == [7, 8, 7]
    assert float(products.fastest("read", x, (7,), ways)) == 1.0
    assert len(taken) == 23
    assert float(products.fastest("read", torch.zeros(5, 7), (7,), ways)) == 2.0


# ---------------------------------------------------------------------- the seam, and the compiler

NOTHING = """
import sys, torch
from weftlora.kernel import Factors, Work, linears
x = torch.randn(4, 8, requires_grad=True)
work = Work(Factors(torch.randn(2, 8), torch.randn(6, 2)), 0.1)
linears(x, [(torch.randn(6, 8), None, work)])[0].sum().backward()
print(sorted(name for name in sys.modules if name.split(".")[0] == "triton"))
"""


@pytest.mark.parametrize("asked", [None, "0", "1"])
def test_without_a_gpu_nothing_of_triton_is_imported(asked: str | None):
    """Whatever WEFT_TRITON says: without the interpreter there is no kernel for a CPU."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "WEFT_TRITON")}
    env |= {} if asked is None else {"WEFT_TRITON": asked}
    done = subprocess.run([sys.executable, "-c", NOTHING], env=env, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def gpu_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).parents[2] / "scripts" / "gpu.py"
    env = {**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment}
    return subprocess.run([sys.executable, str(script), *arguments], env=env, capture_output=True, text=True)


def test_every_kernel_compiles_for_a_gpu_that_is_not_there():
    """To machine code for compute capability 9.0, in bfloat16 with fp32 masters, its products on tensor cores."""
    done = gpu_script("--compile", "90")
    assert done.returncode == 0, done.stderr
    on_tensor_cores = {}
    for line in done.stdout.splitlines():
        name, count = line.split()
        on_tensor_cores[name] = int(count) > 0
    no_products = ("masked_kernel", "mix_kernel", "mix_backward_kernel")
    with_products = ("read_kernel", "write_kernel", "linear_kernel", "write_backward_kernel", "rows_backward_kernel")
    assert on_tensor_cores == dict.fromkeys(no_products, False) | dict.fromkeys(with_products, True)


def test_the_script_of_make_gpu_runs_without_one(tmp_path: Path):
    """Correctness and DDP at a tiny size; the record has no time, and a GPU's record is not written."""
    out = tmp_path / "gpu.json"
    done = gpu_script("--device", "cpu", "--parts", "correctness", "ddp", "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(out.read_text())
    assert record["architecture"] is None
    assert [part["right"] for part in record["parts"].values()] == [True, True]
    assert len(record["parts"]["correctness"]["cases"]) == 12
    refused = gpu_script("--device", "cpu", "--out", "bench/gpu.json", TRITON_INTERPRET="1")
    assert refused.returncode == 2
    assert "measured on a GPU" in refused.stderr
