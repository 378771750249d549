"""The load-balance term that HydraLoRA itself does without, N Σ f_n p̄_n, and how `weftlora.routing` collects it."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import weftlora
from weftlora.errors import ConfigError
from weftlora.terms.structure.hydra import balance_loss

IN, OUT, N, WEIGHT = 5, 4, 3, 0.25


class Net(nn.Module):
    """Two linear modules, recomputed in backward unless `reentrant` is None."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.first, self.second = nn.Linear(IN, IN), nn.Linear(IN, OUT)
        self.reentrant = reentrant

    def block(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)


def net(reentrant: bool | None = None, balance: float = WEIGHT, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    config = weftlora.HydraLoraConfig(r=2, heads=N, balance=balance, target_modules=["first", "second"], **fields)
    model = get_peft_model(Net(reentrant), config).double()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return model.train()


def tokens() -> Tensor:
    return torch.randn(2, 6, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


def by_hand(model: PeftModel, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """WEIGHT × the mean over the two modules of N Σ_n f_n p̄_n over the tokens that count."""
    layers, terms = model.base_model.model, []
    for layer, given in ((layers.first, x), (layers.second, torch.tanh(layers.first(x)))):
        w = torch.softmax(given @ layer.site("default").structure.router.T, -1).flatten(0, 1)
        w = w if mask is None else w[mask.flatten() == 1]
        f = torch.bincount(w.argmax(-1), minlength=N).double() / len(w)
        terms.append(N * sum(f[n] * w[:, n].mean() for n in range(N)))
    return WEIGHT * sum(terms) / 2


# ---------------------------------------------------------------------- the term


def test_it_is_one_when_uniform_and_n_when_one_head_takes_all():
    assert balance_loss(torch.full((8, N), 1 / N)).item() == pytest.approx(1)
    assert balance_loss(torch.eye(N)[[1] * 8]).item() == pytest.approx(N)
    assert balance_loss(torch.eye(N)[[0, 1, 2] * 4]).item() == pytest.approx(1)


def test_its_gradient_runs_through_the_mean_weight_only():
    w = torch.softmax(torch.randn(8, N), -1).requires_grad_()
    (slope,) = torch.autograd.grad(balance_loss(w), w)
    share = torch.bincount(w.argmax(-1), minlength=N) / 8
    torch.testing.assert_close(slope, (N * share / 8).expand(8, N))


def test_ties_go_to_the_lowest_head():
    w = torch.tensor([[0.4, 0.4, 0.2]] * 4, requires_grad=True)
    (slope,) = torch.autograd.grad(balance_loss(w), w)
    assert torch.equal(slope != 0, torch.tensor([[True, False, False]] * 4))


def test_descending_it_spreads_the_tokens():
    torch.manual_seed(0)
    router = torch.eye(N, IN, requires_grad=True)
    x = torch.randn(64, IN) + torch.eye(N, IN)[0]  # the first head takes most tokens
    start = balance_loss(torch.softmax(x @ router.T, -1)).item()
    for _ in range(50):
        loss = balance_loss(torch.softmax(x @ router.T, -1))
        router.data -= 0.5 * torch.autograd.grad(loss, router)[0]
    assert start > 1.2
    assert loss.item() < 1.05


# ---------------------------------------------------------------------- weftlora.routing


@pytest.mark.parametrize("padding", [False, True])
def test_routing_gives_the_mean_over_modules_without_padding(padding: bool):
    model, x = net(), tokens()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]) if padding else None
    with weftlora.routing(model) as routing:
        model(x)
    with weftlora.routing(model):  # `by_hand` runs the first layer
        want, other = by_hand(model, x, mask), by_hand(model, x, None if padding else torch.eye(2, 6))
    torch.testing.assert_close(routing.balance_loss(mask), want, rtol=1e-12, atol=1e-12)
    assert (want - other).abs() > 1e-4  # the mask matters


def test_routing_reports_the_mean_weight_of_every_site():
    model, x = net(), tokens()
    with weftlora.routing(model) as routing:
        model(x)
    gates = routing.mean_gate()
    assert [name.rpartition(".")[2] for name in gates] == ["first", "second"]
    w = torch.softmax(x @ model.base_model.model.first.site("default").structure.router.T, -1)
    torch.testing.assert_close(next(iter(gates.values())), w.mean((0, 1)), rtol=1e-12, atol=1e-12)


def test_the_weight_scales_the_term_and_zero_leaves_it_out(monkeypatch: pytest.MonkeyPatch):
    x = tokens()
    losses = []
    for balance in (0.1, 0.2):
        with weftlora.routing(model := net(balance=balance)) as routing:
            model(x)
        losses.append(routing.balance_loss().item())
    assert losses[1] == pytest.approx(2 * losses[0])
    with weftlora.routing(model := net(balance=0.0)) as routing:
        model(x)
    for processes in (1, 2):
        monkeypatch.setattr("weftlora.adapted.routing.world", lambda processes=processes: processes)
        with pytest.raises(ConfigError, match="balance > 0"):
            routing.balance_loss()


def test_nothing_is_recorded_after_the_block_or_by_the_other_mode():
    model, x = net(balance=0.0), tokens()
    with weftlora.routing(model) as routing:
        model(x)
    count = {name: len(calls) for name, calls in routing.omega.items()}
    model(x)
    assert {name: len(calls) for name, calls in routing.omega.items()} == count == dict.fromkeys(count, 1)


# ---------------------------------------------------------------------- a training loop cannot forget it


def test_training_without_the_block_is_refused_and_says_what_to_do():
    model = net()
    with pytest.raises(ConfigError, match=r"weftlora\.routing"):
        model(tokens())


def test_evaluation_needs_no_block():
    model, x = net(), tokens()
    with torch.no_grad():
        model(x)
    model.eval()(x)


def test_a_disabled_adapter_needs_no_block():
    model = net()
    with model.disable_adapter():
        model(tokens())


# ---------------------------------------------------------------------- gradient checkpointing


def step(model: PeftModel, x: Tensor, inside: bool) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Gradients of task loss + balance term, and how often each site was recorded."""
    torch.manual_seed(3)
    with weftlora.routing(model) as routing:
        loss = model(x).square().mean()
        if inside:
            (loss + routing.balance_loss()).backward()
    if not inside:
        (loss + routing.balance_loss()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return gradients, {name: len(calls) for name, calls in routing.omega.items()}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_recomputation_gives_the_same_gradients_and_counts_nothing_twice(inside: bool, dropout: float):
    want, once = step(net(lora_dropout=dropout), tokens(), inside)
    got, recorded = step(net(reentrant=False, lora_dropout=dropout), tokens(), inside)
    assert recorded == once == dict.fromkeys(once, 1)
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-12, atol=1e-12)


def test_the_term_reaches_the_routers():
    plain, _ = step(net(), tokens(), inside=False)
    without = net()
    with weftlora.routing(without):
        without(tokens()).square().mean().backward()
    router = next(n for n in plain if "first" in n and "router" in n)
    assert not torch.allclose(plain[router], dict(without.named_parameters())[router].grad)


def test_reentrant_checkpointing_hides_the_routers_and_says_so():
    model, x = net(reentrant=True), tokens()
    with weftlora.routing(model) as routing:
        model(x)
    with pytest.raises(ConfigError, match="use_reentrant"):
        routing.balance_loss()


def test_without_a_balance_term_both_kinds_of_checkpointing_give_the_same_gradients():
    gradients = []
    for reentrant in (None, False, True):
        model = net(reentrant, balance=0.0, lora_dropout=0.4)
        torch.manual_seed(3)
        model(tokens()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-12)


def test_blocks_nest_and_padding_alone_is_no_term():
    torch.manual_seed(0)
    model = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(4, 4)), weftlora.HydraLoraConfig(r=2, balance=1.0, target_modules=["0"])
    )
    x = torch.randn(2, 3, 4)
    with weftlora.routing(model) as outer:
        with weftlora.routing(model) as inner:
            model(x)
        model(x)
    [(_, seen)], [(_, seen_inside)] = outer.omega.items(), inner.omega.items()
    assert (len(seen), len(seen_inside)) == (2, 1)
    assert inner.balance_loss(torch.zeros(2, 3)) == 0
