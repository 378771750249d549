"""HydraLoRA (arXiv 2404.19245): its equations as independent loops, and what follows from them.

y = W0 x + s Σ_i ω_i B_i A x,   ω = softmax(Wg x)        equations 2-4; s = α/r, one router per adapted module
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weftlora
from weftlora import kernel
from weftlora.adapted.routing import likeness
from weftlora.adapter.site import Site, build_site
from weftlora.errors import CombinationError, ConfigError, MergeError
from weftlora.kernel import Factors, Work, add_low_rank
from weftlora.kernel.dropout import dropped as dropout_of
from weftlora.terms.structure.hydra import Hydra, balance_loss

IN, OUT, R, N, S = 5, 4, 2, 3, 1.5


def site_of(heads: int = N, *, random: bool = True, dropout: float = 0.0, **fields: object) -> Site:
    torch.manual_seed(0)
    site = build_site(Hydra(heads=heads, **fields), (R, IN, OUT), scale=S, dropout=dropout).double()
    if random:
        for p in site.parameters():
            nn.init.normal_(p)
    return site


def heads_of(b: Tensor) -> Tensor:
    """B_i side by side in one matrix → [N, out, r]."""
    return b.unflatten(1, (-1, R)).transpose(0, 1)


def tokens(count: int = 7) -> Tensor:
    return torch.randn(count, IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def update(site: Site, x: Tensor) -> Tensor:
    return site(x, x.new_zeros(*x.shape[:-1], OUT))


def randomise(model: nn.Module, seed: int = 0) -> None:
    rng = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data = torch.randn(p.shape, generator=rng).to(p)


class Net(nn.Module):
    """Two linear modules; `checkpointing` recomputes the first in backward."""

    def __init__(self, checkpointing: bool | None = None):
        super().__init__()
        self.first, self.second = nn.Linear(IN, IN), nn.Linear(IN, OUT)
        self.reentrant = checkpointing

    def forward(self, x: Tensor) -> Tensor:
        def block(h: Tensor) -> Tensor:
            return torch.tanh(self.second(torch.tanh(self.first(h))))

        if self.reentrant is None:
            return block(x)
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)


def net(checkpointing: bool | None = None, **fields: object) -> PeftModel:
    torch.manual_seed(0)
    config = weftlora.HydraLoraConfig(r=R, heads=N, target_modules=["first", "second"], **fields)
    model = get_peft_model(Net(checkpointing), config).double()
    randomise(model)
    return model


# ---------------------------------------------------------------------- equations 2-4


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(2, 7), count=st.integers(1, 5), r=st.integers(1, 5))
def test_every_token_gets_its_own_mixture_of_the_heads(heads: int, count: int, r: int):
    torch.manual_seed(0)
    site = build_site(Hydra(heads=heads), (r, IN, OUT), scale=S, dropout=0.0).double()
    for p in site.parameters():
        nn.init.normal_(p)
    W0, x, term = torch.randn(OUT, IN).double(), tokens(count), site.structure
    y = site(x, x @ W0.T)
    for t in range(count):
        logits = [sum(term.router[i, j] * x[t, j] for j in range(IN)) for i in range(heads)]
        weights = [logit.exp() / sum(other.exp() for other in logits) for logit in logits]
        want = W0 @ x[t]
        for i in range(heads):
            want = want + S * weights[i] * (term.B[:, i * r : (i + 1) * r] @ (term.A @ x[t]))
        torch.testing.assert_close(y[t], want, rtol=1e-12, atol=1e-12)


def test_the_other_reading_of_equation_4_routes_on_the_projected_token():
    site, x = site_of(router_input="Ax"), tokens()
    assert site.structure.router.shape == (N, R)
    for t in range(len(x)):
        u = site.structure.A @ x[t]
        weights = torch.softmax(site.structure.router @ u, 0)
        mixed = sum(w * b for w, b in zip(weights, heads_of(site.structure.B), strict=True))
        torch.testing.assert_close(update(site, x)[t], S * mixed @ u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_backward_formulas_of_the_paper_hold(dropout: float):
    """Given g = ∂L/∂y and a mask m: dB, dA, dWg and dx written out, against autograd through our kernel."""
    site, x, W0 = site_of(dropout=dropout), tokens().requires_grad_(), torch.randn(OUT, IN).double()
    A, B, Wg = site.structure.A, site.structure.B, site.structure.router
    torch.manual_seed(8)
    m = dropout_of(torch.ones_like(x), dropout).detach() if dropout else torch.ones_like(x)
    torch.manual_seed(8)
    y = site.train()(x, x @ W0.T)
    g = torch.randn_like(y)
    dA, dB, dWg, dx = torch.autograd.grad(y, [A, B, Wg, x], g)
    with torch.no_grad():
        z = m * x
        u, w = z @ A.T, torch.softmax(x @ Wg.T, -1)
        v = (S * w[:, :, None] * u[:, None, :]).flatten(1)
        G = S * (g @ B).unflatten(1, (N, R))
        gw = (G * u[:, None, :]).sum(-1)
        gu = (w[:, :, None] * G).sum(1)
        gl = w * (gw - (w * gw).sum(1, keepdim=True))
        want = gu.T @ z, g.T @ v, gl.T @ x, g @ W0 + m * (gu @ A) + gl @ Wg
    for got, formula in zip((dA, dB, dWg, dx), want, strict=True):
        torch.testing.assert_close(got, formula, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- what follows from the equations


def test_a_router_that_weighs_all_alike_is_lora_with_the_mean_head():
    site, x = site_of(), tokens()
    for router in (torch.zeros(N, IN), torch.randn(1, IN).expand(N, IN)):
        site.structure.router.data = router.double().clone()
        mean = heads_of(site.structure.B).mean(0)
        torch.testing.assert_close(update(site, x), S * x @ (mean @ site.structure.A).T, rtol=1e-12, atol=1e-12)


def test_a_vector_added_to_every_row_of_the_router_changes_nothing():
    site, x = site_of(), tokens()
    before = update(site, x)
    site.structure.router.data += torch.randn(1, IN).double()
    torch.testing.assert_close(update(site, x), before, rtol=1e-12, atol=1e-12)


def test_equal_heads_make_the_router_irrelevant():
    site, x = site_of(), tokens()
    one = heads_of(site.structure.B)[0].detach()
    site.structure.B.data = one.repeat(1, N)
    update(site, x).square().sum().backward()
    torch.testing.assert_close(update(site, x), S * x @ (one @ site.structure.A).T, rtol=1e-12, atol=1e-12)
    assert site.structure.router.grad.abs().max() < 1e-12


def test_one_head_is_lora_bit_for_bit_and_its_router_never_moves():
    torch.manual_seed(0)
    A, B, x = (torch.randn(shape, dtype=torch.float64) for shape in ((R, IN), (OUT, R), (7, IN)))
    router = torch.randn(1, IN, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(7, OUT, dtype=torch.float64)
    routed = add_low_rank(y, x, Work(Factors(A, B, S, router=router)))
    assert torch.equal(routed, add_low_rank(y, x, Work(Factors(A, B, S))))
    assert torch.count_nonzero(torch.autograd.grad(routed.square().sum(), router)[0]) == 0


def test_per_token_the_update_has_rank_r_and_the_row_space_of_A():
    """With the router reading only half of x, the other half meets one fixed ΔW per token: look at that matrix."""
    torch.manual_seed(0)
    half, r = 6, 2
    site = build_site(Hydra(heads=4), (r, 2 * half, 8), scale=S, dropout=0.0).double()
    term = site.structure
    for p in site.parameters():
        nn.init.normal_(p)
    term.router.data[:, half:], term.A.data[:, :half] = 0, 0
    deltas = []
    for _ in range(3):
        x = torch.cat([torch.randn(1, half).expand(half, half), torch.eye(half)], 1).double()
        deltas.append(site(x, torch.zeros(half, 8, dtype=torch.float64)).T.detach())  # [out, in/2] of this token
    for delta in deltas:
        assert torch.linalg.matrix_rank(delta) == r
    assert (deltas[0] - deltas[1]).abs().max() > 1e-3  # another token, another ΔW
    rows = torch.cat([*deltas, term.A[:, half:]])
    assert torch.linalg.matrix_rank(rows) == r  # all of them within the row space of A
    assert (
        torch.linalg.matrix_rank(torch.cat(deltas, 1)) > r
    )  # their column spaces differ: more than one LoRA of rank r


# ---------------------------------------------------------------------- start and symmetry


def test_at_the_start_the_model_is_the_base_and_only_the_heads_get_a_gradient():
    site, x, W0 = site_of(random=False), tokens().requires_grad_(), torch.randn(OUT, IN).double()
    base = F.linear(x, W0)
    y = site(x, base)
    assert torch.equal(y, base)
    g = torch.randn_like(y)
    A, B, Wg = site.structure.A, site.structure.B, site.structure.router
    dA, dB, dWg, dx = torch.autograd.grad(y, [A, B, Wg, x], g)
    assert torch.count_nonzero(dA) == torch.count_nonzero(dWg) == 0
    assert torch.equal(dx, g @ W0)
    w, u = torch.softmax(x @ Wg.T, -1), x @ A.T
    for i, got in enumerate(heads_of(dB)):
        torch.testing.assert_close(got, S * g.T @ (w[:, i : i + 1] * u), rtol=1e-12, atol=1e-12)


def test_every_part_has_moved_after_three_steps():
    model = net()
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 6  # A, B and router of two modules
    for name, p in model.named_parameters():
        if ".B" in name:
            p.data.zero_()
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, [p for p in model.parameters() if p.requires_grad], steps=3)
    assert {n for n, p in model.named_parameters() if not torch.equal(p, start[n])} == set(names)


def train(model: nn.Module, parameters: list[nn.Parameter], steps: int, lr: float = 0.05) -> None:
    optimiser = torch.optim.SGD(parameters, lr=lr)
    x, target = tokens(16), tokens(16)[:, :OUT].cos()
    for _ in range(steps):
        optimiser.zero_grad()
        (model(x) - target).square().mean().backward()
        optimiser.step()


class Alone(nn.Module):
    """A site on a base of zeros."""

    def __init__(self, site: Site):
        super().__init__()
        self.site = site

    def forward(self, x: Tensor) -> Tensor:
        return update(self.site, x)


def trained_heads(site: Site, steps: int = 50) -> tuple[float, float]:
    """The largest difference between two heads, and between two rows of the router, after training."""
    train(Alone(site.train()), list(site.parameters()), steps, lr=0.5)
    b, router = heads_of(site.structure.B.detach()), site.structure.router.detach()
    assert b.abs().max() > 0.01  # it did learn something
    return (b - b[0]).abs().max().item(), (router - router[0]).abs().max().item()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_zero_router_with_a_shared_mask_keeps_all_heads_equal_for_ever(dropout: float):
    site = site_of(random=False, dropout=dropout)
    nn.init.zeros_(site.structure.router)
    heads, router = trained_heads(site)
    assert heads < 1e-14
    assert router < 1e-14


def test_the_kaiming_router_breaks_the_symmetry():
    assert min(trained_heads(site_of(random=False))) > 1e-3


def test_a_gain_scales_the_router_that_is_drawn_and_nothing_else():
    one, eight = site_of(random=False).structure, site_of(random=False, router_gain=8.0).structure
    torch.testing.assert_close(eight.router, 8 * one.router, rtol=1e-6, atol=0)
    assert torch.equal(eight.A, one.A)
    assert torch.count_nonzero(eight.B) == 0  # the model is the base at the start, whatever the gates


def test_heads_of_gates_that_start_sharp_learn_from_different_tokens():
    """Gates near 1/N give all heads nearly one gradient, which Adam's first steps make nearly one update."""
    alike = []
    for gain in (0.2, 1.0, 20.0):
        site = site_of(random=False, router_gain=gain)
        optimiser = torch.optim.Adam(site.parameters(), lr=0.01)
        x, target = tokens(32), torch.randn(32, OUT, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        for _ in range(5):
            optimiser.zero_grad()
            (update(site, x) - target).square().mean().backward()
            optimiser.step()
        alike.append(likeness(site))
    assert alike[0] > alike[1] > alike[2] + 0.2


def test_so_does_a_mask_per_head():
    site = site_of(random=False, dropout=0.3, per_head_dropout=True)
    nn.init.zeros_(site.structure.router)
    assert min(trained_heads(site)) > 1e-3


def test_a_start_that_cannot_learn_is_refused():
    with pytest.raises(ConfigError, match="all heads equal"):
        Hydra(router_init="zero")
    broken = Hydra(router_init="zero", per_head_dropout=True)
    with pytest.raises(ConfigError, match="all heads equal"):
        weftlora.WeftConfig(structure=broken)
    assert weftlora.WeftConfig(structure=broken, lora_dropout=0.1).structure == broken
    with pytest.raises(ConfigError, match="heads=1"):
        weftlora.HydraLoraConfig(heads=1)


# ---------------------------------------------------------------------- dropout


COUNT, P = 30_000, 0.4


def dropped(per_head: bool) -> tuple[Site, Tensor, Tensor]:
    """A site in training, one token, and its updates under many independent masks."""
    site = site_of(dropout=P, per_head_dropout=per_head).train()
    x = tokens(1)
    torch.manual_seed(5)
    with torch.no_grad():
        return site, x[0], update(site, x.expand(COUNT, IN))


@pytest.mark.parametrize("per_head", [False, True])
def test_the_mean_over_masks_is_the_update_in_evaluation(per_head: bool):
    site, x, updates = dropped(per_head)
    error = updates.std(0) / COUNT**0.5
    assert ((updates.mean(0) - update(site.eval(), x)).abs() < 5 * error).all()


@pytest.mark.parametrize("per_head", [False, True])
def test_the_noise_of_dropout_is_that_of_one_mask_or_of_one_per_head(per_head: bool):
    """Var = p/(1−p) s² Σ_j (C_j x_j)²: with one mask C = Σ ω_i B_i A; with a mask per head their variances add up."""
    site, x, updates = dropped(per_head)
    with torch.no_grad():
        w = torch.softmax(site.structure.router @ x, 0)
        effect = w[:, None, None] * (heads_of(site.structure.B) @ site.structure.A) * x  # [N, out, in]
        effect = effect if per_head else effect.sum(0, keepdim=True)
        variance = P / (1 - P) * S**2 * effect.square().sum((0, 2))
    torch.testing.assert_close(updates.var(0), variance, rtol=0.04, atol=0)


def test_a_shared_mask_keeps_rank_r_and_a_mask_per_head_does_not():
    """All heads read one projected token, so under any shared masks a token's updates span r dimensions."""
    assert torch.linalg.matrix_rank(dropped(False)[2][:50], rtol=1e-9) == R
    assert torch.linalg.matrix_rank(dropped(True)[2][:50], rtol=1e-9) == OUT  # of N·r = 6 possible ones


def test_equal_heads_average_the_noise_of_masks_of_their_own():
    variance = []
    for per_head in (False, True):
        site = site_of(heads=4, dropout=P, per_head_dropout=per_head).train()
        site.structure.router.data.zero_()
        site.structure.B.data = heads_of(site.structure.B.data)[0].repeat(1, 4)
        torch.manual_seed(5)
        variance.append(update(site, tokens(1).expand(COUNT, IN)).var(0).mean().item())
    assert variance[0] / variance[1] == pytest.approx(4, rel=0.06)


@pytest.mark.parametrize("router_input", ["x", "Ax"])
@pytest.mark.parametrize("per_head", [False, True])
def test_the_router_sees_the_undropped_token(per_head: bool, router_input: str):
    model = net(lora_dropout=0.5, per_head_dropout=per_head, router_input=router_input)
    x = tokens()
    weights = []
    for mode in (True, False):
        with weftlora.routing(model.train(mode)) as routing:
            model(x)
        weights.append(next(iter(routing.omega.values()))[0])
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- counts


@pytest.fixture(scope="module")
def shares() -> dict[str, tuple[int, float]]:
    """Trained parameters on q and v of LLaMA2-7B at r = 8, and their percentage of the base."""
    out = {}
    for name, config in {"lora": weftlora.PlainLoraConfig, "hydra": weftlora.HydraLoraConfig}.items():
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig())  # the class's defaults are LLaMA2-7B's sizes
        whole = sum(p.numel() for p in base.parameters())
        assert whole == 6_738_415_616
        model = get_peft_model(base, config(r=8, target_modules=["q_proj", "v_proj"]))
        trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
        routers = sum(size for n, size in trained.items() if "router" in n)
        total = sum(trained.values())
        out[name] = (total, 100 * total / whole)
        out[f"{name} without routers"] = (total - routers, 100 * (total - routers) / whole)
    return out


def test_the_parameter_counts_are_those_of_the_papers_tables(shares):
    assert shares["lora"][0] == 4_194_304
    assert shares["lora"][1] == pytest.approx(0.0622, abs=5e-5)
    assert shares["hydra without routers"][1] == pytest.approx(0.1245, abs=5e-5)  # the tables print 0.124
    assert shares["hydra"][1] == pytest.approx(0.1362, abs=5e-5)


@settings(max_examples=25, deadline=None)
@given(heads=st.integers(2, 6), r=st.integers(1, 5), fan_in=st.integers(1, 9), out=st.integers(1, 9))
def test_a_site_trains_r_times_in_plus_n_out_and_its_router(heads: int, r: int, fan_in: int, out: int):
    site = build_site(Hydra(heads=heads), (r, fan_in, out), scale=1.0, dropout=0.0)
    assert sum(p.numel() for p in site.parameters()) == r * (fan_in + heads * out) + heads * fan_in


# ---------------------------------------------------------------------- adapters side by side, merging


def test_two_adapters_add_up_each_with_its_own_router_and_rank():
    model, x = net(), tokens()
    model.add_adapter("other", weftlora.HydraLoraConfig(r=3, heads=2, lora_alpha=9, target_modules=["second"]))
    model.double()
    model.set_adapter("other")
    randomise(model, seed=4)
    layer = model.base_model.model.second
    hidden = tokens() * 0.5
    outputs = {}
    for active in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(active)
        outputs["+".join(active)] = layer(hidden)
    with model.disable_adapter():
        base = layer(hidden)
        assert torch.equal(base, layer.base_layer(hidden))
    both = base + (outputs["default"] - base) + (outputs["other"] - base)
    torch.testing.assert_close(outputs["default+other"], both, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(outputs["default"], outputs["other"])
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_a_merge_is_refused_with_its_reason_and_changes_nothing(merge: str):
    model, x = net(), tokens()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    y = model(x)
    with pytest.raises(MergeError, match="token"):
        getattr(model, merge)()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(model(x), y)


# ---------------------------------------------------------------------- the control without a gate


def test_uniform_gates_are_a_lora_whose_b_is_the_mean_of_the_heads() -> None:
    """The paper's ablation "w/o gate": ω_i = 1/N; nothing but A and the heads is trained, or saved."""
    site, x = site_of(router="uniform"), tokens()
    mean = heads_of(site.structure.B).mean(0)
    torch.testing.assert_close(update(site, x), S * x @ site.structure.A.T @ mean.T, rtol=1e-12, atol=1e-12)
    assert {name for name, _ in site.named_parameters()} == {"structure.A", "structure.B"}
    assert not any("router" in name for name in site.state_dict())


def test_uniform_gates_train_save_and_come_back(tmp_path) -> None:
    def base() -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))

    model = get_peft_model(base(), weftlora.HydraLoraConfig(r=2, router="uniform"))
    randomise(model)
    ids = torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    before = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, before)
    assert not torch.allclose(base().eval()(input_ids=ids).logits, before)


def test_uniform_gates_have_no_router_to_balance() -> None:
    with pytest.raises(ConfigError, match="no router to start or to balance"):
        Hydra(router="uniform", balance=0.1)


# ---------------------------------------------------------------------- some heads per token


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_token_uses_its_k_best_heads_with_the_softmax_over_these(k: int) -> None:
    """The released multimodal code dispatches each token to its best head, whose output it does not scale (`dense_moe=False`)."""
    site, x = site_of(router="topk", k=k, balance=0.05).eval(), tokens()
    term = site.structure
    for t in range(len(x)):
        logits = term.router @ x[t]
        best = sorted(range(N), key=lambda i: -float(logits[i].detach()))[:k]
        share = torch.softmax(logits[best], 0)
        want = sum(S * w * heads_of(term.B)[i] @ (term.A @ x[t]) for w, i in zip(share, best, strict=True))
        torch.testing.assert_close(update(site, x)[t], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("router_input", ["x", "Ax"])
@pytest.mark.parametrize("told", [False, True])
def test_the_node_of_some_heads_is_the_equation(told: bool, router_input: str) -> None:
    """Values and gradients, also where the whole softmax, which a listener is told, has a gradient of its own."""
    found = []
    for path in (add_low_rank, lambda y, x, work: y + kernel.reference(x, work)):
        site = site_of(router="topk", k=2, router_input=router_input)
        x = tokens().requires_grad_()
        omegas: list[Tensor] = []
        work = Work(site.factors(), on_mix=omegas.append if told else None)
        y = path(x.new_zeros(len(x), OUT), x, work)
        loss = y.square().sum() + sum((omega * torch.arange(N)).square().sum() for omega in omegas)
        found.append([y, *omegas, *torch.autograd.grad(loss, [x, *site.parameters()])])
        if told:
            torch.testing.assert_close(omegas[0].sum(-1), torch.ones(len(x), dtype=torch.float64))
            assert (omegas[0] > 0).all()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_all_heads_of_top_k_are_the_dense_router() -> None:
    dense, every = site_of(), site_of(router="topk", k=N)
    torch.testing.assert_close(update(every, tokens()), update(dense, tokens()), rtol=0, atol=0)


def test_a_hard_choice_leaves_the_router_to_the_balance_term() -> None:
    """With k = 1 the weight is 1 whatever the logits: the loss's gradient of the router is 0, that of the balance term is not."""
    site, x = site_of(router="topk", k=1, balance=0.05).train(), tokens()
    omegas: list[Tensor] = []
    site.recorder = omegas.append
    y = update(site, x)
    [g] = torch.autograd.grad(y.square().sum(), [site.structure.router], retain_graph=True)
    assert torch.equal(g, torch.zeros_like(g))
    [g] = torch.autograd.grad(balance_loss(omegas[0]), [site.structure.router])
    assert g.abs().max() > 1e-4
    with pytest.raises(ConfigError, match="the loss moves no router"):
        Hydra(router="topk", k=1)


def test_equal_logits_take_the_first_heads_and_the_unused_have_gradient_zero() -> None:
    site, x = site_of(router="topk", k=2), tokens()
    site.structure.router.data[:] = site.structure.router.data[0]
    update(site, x).square().sum().backward()
    by_head = heads_of(site.structure.B.grad)
    assert by_head[:2].abs().amin(dim=(1, 2)).min() > 0
    assert torch.equal(by_head[2], torch.zeros_like(by_head[2]))


def test_the_mean_gate_is_of_the_weights_used_and_a_fixed_one_uses_all_heads() -> None:
    model = net(router="topk", k=1, balance=0.01).eval()
    x = torch.randn(64, IN, dtype=torch.float64)
    with weftlora.routing(model) as record, torch.no_grad():
        model(x)
    for name, mean in record.mean_gate().items():
        [omega] = record.omega[name]
        share = torch.bincount(omega.argmax(-1), minlength=N).to(mean) / len(x)
        torch.testing.assert_close(mean, share)
    site = next(m for m in model.modules() if isinstance(m, Site))
    fixed = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mixed = torch.einsum("n,nor->or", fixed, heads_of(site.structure.B.detach()))
    site.structure.fix(fixed)
    torch.testing.assert_close(site(x, x.new_zeros(64, IN)), site.scale * x @ site.structure.A.T @ mixed.T)


@pytest.mark.parametrize(
    "fields", [{"router": "topk", "k": 2}, {"split": True}, {"router": "topk", "k": 1, "balance": 0.1}]
)
def test_its_variants_come_back_from_a_config(fields: dict[str, object]) -> None:
    config = weftlora.HydraLoraConfig(heads=3, **fields)
    again = weftlora.WeftConfig(**config.to_dict())
    assert again.structure == config.structure == Hydra(heads=3, **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"router": "topk"}, "give both or none"),
        ({"k": 2}, "give both or none"),
        ({"router": "topk", "k": 4}, "from 1 to 3"),
        ({"router": "topk", "k": 2, "router_init": "zero", "per_head_dropout": True}, "to the first heads"),
        ({"split": True, "router_input": "Ax"}, "share no A"),
        ({"split": "yes"}, "neither true nor false"),
    ],
)
def test_variants_that_mean_nothing_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Hydra(**fields)


# ---------------------------------------------------------------------- the control with an A per head


def test_lora_split_is_n_loras_with_an_a_of_their_own() -> None:
    """The ablation "w/o Hydra": N·r (in + out) trained numbers, as many as one LoRA of rank N·r, and the router."""
    site, x = site_of(split=True), tokens()
    term = site.structure
    assert sum(p.numel() for p in (term.A, term.B)) == N * R * (IN + OUT)
    each = [(term.A[n * R : (n + 1) * R], heads_of(term.B)[n]) for n in range(N)]
    for t in range(len(x)):
        omega = torch.softmax(term.router @ x[t], 0)
        want = sum(S * w * b @ (a @ x[t]) for w, (a, b) in zip(omega, each, strict=True))
        torch.testing.assert_close(update(site, x)[t], want, rtol=1e-12, atol=1e-12)
    whole = site_of(split=True, router="uniform")
    one = S / N * whole.structure.B @ whole.structure.A
    assert torch.linalg.matrix_rank(one) == min(N * R, IN, OUT)  # not r, as with one A
    torch.testing.assert_close(update(whole, x), x @ one.T, rtol=1e-12, atol=1e-12)


def test_lora_split_trains_saves_exports_and_has_no_slots_to_move(tmp_path) -> None:
    model = net(split=True)
    x = tokens()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path).double().eval()
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-6, atol=1e-6)
    with pytest.raises(CombinationError, match="Hydra with Reallocate: with split=True"):
        weftlora.AllocLoraConfig(structure=Hydra(split=True))
    weftlora.AllocLoraConfig(structure=Hydra())
