"""What the node may not cost: nothing of size tokens × out beside the result, no loop over heads, few saved bytes."""

import itertools
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from weftlora.kernel import Factors, Slots, Work, add_low_rank, linears

TOKENS, IN, OUT, RANK, HEADS = 256, 24, 200, 4, 3

CASES = [
    pytest.param(router, extra, dropout, id=f"{router}-extra{extra}-p{dropout}")
    for router, extra, dropout in itertools.product((None, "x", "Ax"), (0, 1), (0.0, 0.1))
]


def make(router: str | None, extra: int, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> Factors:
    torch.manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape).to(dtype).requires_grad_()

    wide = RANK if router is None else heads * RANK
    return Factors(
        A=leaf(RANK, IN),
        B=leaf(OUT, wide),
        scale=2.0,
        gate=leaf(RANK),
        v=leaf(OUT) if router is None else None,
        router=None if router is None else leaf(heads, IN if router == "x" else RANK),
        router_input="Ax" if router == "Ax" else "x",
        extra=(Slots(leaf(2, IN), leaf(OUT, 2), leaf(2)),) * extra,
    )


def inputs(count: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x, y = torch.randn(2, count // 2, IN), torch.randn(2, count // 2, OUT)
    return y.to(dtype).requires_grad_(), x.to(dtype).requires_grad_()


class Cost(TorchDispatchMode):
    """GEMM calls, and every new storage with the bytes it takes."""

    def __init__(self, *known: Tensor):
        super().__init__()
        self.gemms = 0
        self.calls: Counter[str] = Counter()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.new: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        self.gemms += name in {"mm", "addmm", "addmm_", "bmm", "baddbmm"}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.new[t.untyped_storage().data_ptr()] = t  # kept alive, so that no address is used twice
        return out

    def large(self, size: int) -> list[int]:
        return [t.numel() for t in self.new.values() if t.numel() >= size]


def saved_bytes(x: Tensor, f: Factors, run) -> tuple[int, int]:
    """(bytes of the distinct storages saved for backward beside x and the factors, numel of the largest)."""
    given = [t for t in (f.A, f.B, f.gate, f.v, f.router, *(t for s in f.extra for t in s)) if t is not None]
    known = {t.untyped_storage().data_ptr() for t in (x, *given)}
    saved: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        if (key := t.untyped_storage().data_ptr()) not in known:
            saved[key] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = run()
    sizes = [t.untyped_storage().nbytes() for t in saved.values()]
    del result
    return sum(sizes), max((t.untyped_storage().nbytes() // t.element_size() for t in saved.values()), default=0)


@pytest.mark.parametrize(("router", "extra", "dropout"), CASES)
def test_nothing_as_large_as_tokens_by_out_exists_but_the_result(router: str | None, extra: int, dropout: float):
    f, (y, x) = make(router, extra), inputs()
    with Cost(y, x) as forward:
        result = add_low_rank(y, x, Work(f, dropout))
    assert forward.large(TOKENS * OUT) == [TOKENS * OUT]  # the result itself
    upstream = torch.randn_like(result)
    with Cost(y, x, upstream) as backward:
        torch.autograd.grad(result, [y, x, f.A], upstream)
    assert backward.large(TOKENS * OUT) == []  # y's gradient is the upstream gradient itself


@pytest.mark.parametrize(("router", "extra", "dropout"), CASES)
def test_with_the_linear_itself_the_update_is_added_in_place(router: str | None, extra: int, dropout: float):
    f, (_, x), weight = make(router, extra), inputs(), torch.randn(OUT, IN)
    with Cost(x, weight) as forward:
        [result] = linears(x, [(weight, None, Work(f, dropout))])
    assert forward.large(TOKENS * OUT) == [TOKENS * OUT]
    upstream = torch.randn_like(result)
    with Cost(x, weight, upstream) as backward:
        torch.autograd.grad(result, [x, f.A], upstream)
    assert len(backward.large(TOKENS * IN)) <= (1 if not dropout else 4)  # gx; with dropout x̂, the mask's lanes, gu Ã


@pytest.mark.parametrize(("router", "extra", "dropout"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_are_the_latent_values_one_bit_per_element_and_small_factors(
    router: str | None, extra: int, dropout: float, dtype: torch.dtype
):
    """Per token what one GEMM reads (16 columns at least), the router's share in one of its own where dropout stands between,
    and IN bits of mask; of the factors what was put together: Ã and B̃, the latter in fp32."""
    f, (y, x) = make(router, extra, dtype=dtype), inputs(dtype=dtype)
    per_token = dtype.itemsize * 16 * (2 if dropout and router else 1) + (IN / 8 if dropout else 0)
    rows = RANK + 2 * extra
    columns = (RANK * HEADS if router else RANK) + 2 * extra
    constant = 4 * (rows * IN + columns * OUT * 3 + OUT) + 64
    for weight in (None, torch.randn(OUT, IN, dtype=dtype)):
        run = (
            (lambda: add_low_rank(y, x, Work(f, dropout)))
            if weight is None
            else (lambda weight=weight: linears(x, [(weight, None, Work(f, dropout))]))
        )
        size, largest = saved_bytes(x, f, run)
        size -= 0 if weight is None else weight.nbytes
        assert size <= TOKENS * per_token + constant
        assert largest < TOKENS * OUT


def test_a_group_saves_its_input_once():
    f, (_, x) = make(None, 0), inputs()
    weights = [torch.randn(OUT, IN) for _ in range(3)]
    seen: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t.data_ptr()), t)[1], lambda t: t):
        linears(x, [(weight, None, Work(f)) for weight in weights])
    assert seen.count(x.data_ptr()) == 1


@pytest.mark.parametrize(("router", "extra", "dropout"), [c for c in CASES if c.values[0]])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_work_is_the_same_number_of_operations_at_any_number_of_heads(
    router: str, extra: int, dropout: float, per_head: bool
):
    counts = []
    for heads in (5, 7):  # both padded
        f, (y, x) = make(router, extra, heads), inputs()
        with Cost(y, x) as cost:
            add_low_rank(y, x, Work(f, dropout, per_head)).sum().backward()
        counts.append((cost.gemms, cost.calls))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("router", [None, "x", "Ax"])
def test_one_gemm_down_and_one_up_and_four_back(router: str | None, extra: int):
    f, (y, x) = make(router, extra), inputs()
    with Cost(y, x) as cost:
        result = add_low_rank(y, x, Work(f))
    through_mix = router == "Ax"  # [t, r] times [r, N]
    assert cost.gemms == 2 + through_mix
    with Cost(y, x) as back:
        result.backward(torch.ones_like(result))
    assert back.gemms == 4 + 2 * through_mix


def test_dropout_costs_a_routed_site_one_more_gemm():
    f, (y, x) = make("x", 1), inputs()
    with Cost(y, x) as cost:
        add_low_rank(y, x, Work(f, 0.1))
    assert cost.gemms == 3  # the router must see the undropped x


def test_members_of_one_input_share_the_gemm_down():
    f, (_, x) = make(None, 1), inputs()
    members = [(torch.randn(OUT, IN), None, Work(f)) for _ in range(3)]
    with Cost(x) as cost:
        linears(x, members)
    assert cost.gemms == 1 + 3 * 2  # down; the base and up of each


class Wide(TorchDispatchMode):
    """Of every GEMM, whether it reads one of these weights."""

    def __init__(self, *weights: Tensor):
        super().__init__()
        self.weights = {weight.data_ptr() for weight in weights}
        self.found: list[bool] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in {"mm", "addmm", "addmm_"}:
            self.found.append(any(isinstance(t, Tensor) and t.data_ptr() in self.weights for t in args))
        return func(*args, **(kwargs or {}))


def test_in_the_backward_what_is_narrow_is_read_before_the_gemms_with_w():
    f, (_, x) = make(None, 1), inputs()
    members = [(torch.randn(OUT, IN), None, Work(f)) for _ in range(2)]
    outputs = torch.stack(linears(x, members))
    with Wide(*(weight for weight, _, _ in members)) as order:
        outputs.backward(torch.randn_like(outputs))
    assert order.found == [*[False] * 5, True, True, False]  # gh and gB̃ of each, gÃ of both; g W; += gu Ã


@pytest.mark.parametrize(("router", "autocast"), [(None, False), ("x", True), ("Ax", False)])
def test_the_node_is_one_graph_for_any_number_of_tokens(router: str | None, autocast: bool):
    torch._dynamo.reset()
    f, graphs = make(router, 1), []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda y, x: add_low_rank(y, x, Work(f, 0.1)), backend=backend, fullgraph=True, dynamic=True
    )
    for count in (10, 14, 22):  # no number equal to another size, which dynamo would take for the same symbol
        y, x = inputs(count)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            assert compiled(y, x).shape == y.shape
    assert len(graphs) == 1
