"""LoRA-Dash (arXiv 2409.01035): its definitions written out once more, dense and in fp64, against what a launch chooses.

W = U diag(σ) Vᵀ;  δ_i = |u_iᵀ ΔW v_i| / (σ_i + ε);  after t updates the s directions of largest δ;
W + ΔW_AB + Σ Δσ_i ū_i v̄_iᵀ, with A, B and Δσ trained and Δσ = 0 at the launch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import weftlora
from families import FAMILIES, adapter_config
from weftlora.adapted.layer import WeftLinear
from weftlora.terms.structure.hydra import HydraTerm

sys.path.insert(0, str(Path(__file__).parents[1] / "schedule"))
from dashing import IN, OUT, adam, batch, dash, event, launched, loss_of, parameters, sites, steps, terms, train

T = 3


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Module name → W [out, in] in fp64, transposed from the layout of Conv1D."""
    found = {m.module_name: m for m in model.modules() if isinstance(m, WeftLinear)}
    return {
        n: (m.base_layer.weight.T if type(m.base_layer).__name__ == "Conv1D" else m.base_layer.weight).detach().double()
        for n, m in found.items()
    }


def defined(w: Tensor, delta: Tensor, count: int, eps: float = 1e-8) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Index, δ and the outer products ū v̄ᵀ of the `count` directions that the paper's definition names, and σ."""
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    rate = torch.stack([(u[:, i] @ delta @ vt[i]).abs() / (sigma[i] + eps * sigma[0]) for i in range(len(sigma))])
    order = rate.argsort(descending=True)[:count].tolist()
    return order, rate[order], torch.stack([torch.outer(u[:, i], vt[i]) for i in order]), sigma[order]


def check(model: PeftModel, deltas: dict[str, Tensor], count: int) -> None:
    """Every site's buffers hold what the definition names."""
    for name, site in sites(model).items():
        index, rate, pairs, sigma = defined(weights(model)[name], deltas[name], count)
        term = site.boost
        assert term.index.tolist() == index, name
        torch.testing.assert_close(term.rate.double(), rate, rtol=1e-4, atol=0)
        torch.testing.assert_close(term.sigma.double(), sigma, rtol=1e-4, atol=0)
        got = torch.einsum("os,si->soi", term.up.double(), term.down.double())
        torch.testing.assert_close(got, pairs, rtol=0, atol=1e-5)


def dense(site) -> Tensor:
    """c B A, with the u and v of tied sites, fp64."""
    part = site.structure.part if hasattr(site.structure, "part") else lambda n: getattr(site.structure, n, None)
    a, b, u, v = (part(n) for n in ("A", "B", "u", "v"))
    a = a.detach().double() if u is None else u.detach().double()[:, None] * a.detach().double()
    b = b.detach().double() if v is None else v.detach().double()[:, None] * b.detach().double()
    return site.scale * b @ a


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"r": 1},
        {"lora_alpha": 0.5},
        {"use_rslora": True, "r": 4},
        {"rank_pattern": {"second": 4}, "alpha_pattern": {"first": 1}},
        {"structure": weftlora.Tied(group="shape")},
        {"structure": weftlora.Tied(train="vera")},
        {"lora_dropout": 0.2},
    ],
    ids=["plain", "r1", "alpha", "rslora", "patterns", "tied", "vera", "dropout"],
)
def test_directions_are_the_definitions(fields: dict) -> None:
    model = dash(after=T, **fields).train()
    train(model, T)
    check(model, {name: dense(site) for name, site in sites(model).items()}, 3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_directions_of_transformers(family: str) -> None:
    """gpt2's Conv1D keeps W transposed."""
    config = adapter_config("plain", family, boost=weftlora.Dash(directions=4, after=2))
    model = get_peft_model(FAMILIES[family].build(), config)
    optimizer = adam(model)
    for _ in range(2):
        model(**FAMILIES[family].batch()).loss.backward()
        optimizer.step()
    check(model, {name: dense(site) for name, site in sites(model).items()}, 4)


def test_a_routed_site_is_ranked_at_the_mean_gate_of_step_t() -> None:
    """The gates of the forwards of step t, of both micro batches, by hand; those of other steps and of evaluation not."""
    model = dash(after=T, structure=weftlora.Hydra(heads=3)).train()
    optimizer, seen = adam(model), {}
    for step in range(T):
        for micro in range(2):
            with weftlora.routing(model) as routing:
                loss_of(model, batch(10 * step + micro)).backward()
            if step == T - 1:
                for name, calls in routing.omega.items():
                    seen.setdefault(name, []).extend(o.detach().flatten(0, -2).double() for o in calls)
        if step == T - 1:
            with torch.no_grad():  # an evaluation before the step: other tokens, other gates
                model.eval()(5 * batch(77))
                model.train()
        optimizer.step()
        optimizer.zero_grad()
        if step < T - 1:
            with torch.no_grad():
                model.eval()(5 * batch(78))
                model.train()
    deltas = {}
    for name, site in sites(model).items():
        term = site.structure
        assert isinstance(term, HydraTerm)
        omega = torch.cat(seen[f"base_model.model.{name}"]).mean(0)
        heads = term.B.detach().double().unflatten(1, (3, -1))  # [out, N, r]
        deltas[name] = site.scale * sum(omega[n] * heads[:, n] @ term.A.detach().double() for n in range(3))
    check(model, deltas, 3)


def test_a_shared_row_added_to_the_router_would_change_nothing_but_a_different_gate_would() -> None:
    """The mean gate matters: with uniform gates other directions, or other rates, come out."""
    model = dash(after=1, structure=weftlora.Hydra(heads=3)).train()
    for site in sites(model).values():
        site.structure.B.data.normal_()
        site.structure.router.data.mul_(20)
    train(model, 1, torch.optim.SGD(parameters(model), lr=1e-6))
    for name, site in sites(model).items():
        mean = site.structure.B.detach().double().unflatten(1, (3, -1)).mean(1)
        _, rate, _, _ = defined(weights(model)[name], site.scale * mean @ site.structure.A.detach().double(), 3)
        assert not torch.allclose(site.boost.rate.double(), rate, rtol=1e-3)


# ---------------------------------------------------------------------- the launch changes nothing, then everything


@pytest.mark.parametrize(
    "structure", [weftlora.Plain(), weftlora.Tied(group="shape"), weftlora.Hydra(heads=3)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_output_is_continuous_at_the_launch(structure, dtype: torch.dtype) -> None:
    model, plain = (dash(after=t, structure=structure).to(dtype) for t in (T, 99))
    x = batch(50).to(dtype)
    for m in (model, plain):
        train(m, T, adam(m))
    assert launched(model)
    assert not launched(plain)
    assert torch.equal(model(x), plain(x))


def test_gains_get_no_gradient_before_and_one_right_after() -> None:
    model = dash(after=T)
    optimizer = adam(model, weight_decay=0.1)
    for step in range(T + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        grads = [term.gain.grad for term in terms(model)]
        if step < T:
            assert all(torch.count_nonzero(g) == 0 for g in grads)
        else:
            assert all((g != 0).all() for g in grads)
        assert all(torch.count_nonzero(term.gain) == 0 for term in terms(model))
        optimizer.step()
    assert all((term.gain != 0).all() for term in terms(model))


def test_the_gains_start_with_fresh_moments() -> None:
    """Their first AdamW step is lr long. Moments fed with zeros would make later steps up to 5 times too long."""
    model = dash(after=T)
    optimizer = adam(model, weight_decay=0.0)
    train(model, T, optimizer)
    assert not any(value.any() for term in terms(model) for value in optimizer.state[term.gain].values())
    others = [p for p in parameters(model) if not any(p is t.gain for t in terms(model))]
    assert all(optimizer.state[p]["step"] == T for p in others)
    train(model, 1, optimizer, start=T)
    for term in terms(model):
        assert optimizer.state[term.gain]["step"] == 1
        torch.testing.assert_close(term.gain.detach().abs(), torch.full((3,), 1e-2), rtol=1e-3, atol=0)


def test_the_trajectory_after_the_launch_is_that_of_a_fresh_optimiser_for_the_gains() -> None:
    """Against a loop by hand: plain LoRA for T steps, then gains with an AdamW of their own."""
    model = dash(after=T).double()
    twin = dash(after=99).double()
    train(model, T, first := adam(model))
    train(twin, T, second := adam(twin))
    for mine, theirs in zip(terms(model), terms(twin), strict=True):
        theirs.up.copy_(mine.up)
        theirs.down.copy_(mine.down)
        second.state.pop(theirs.gain, None)
    gains = torch.optim.AdamW([t.gain for t in terms(twin)], lr=1e-2)
    second.param_groups[0]["params"] = [p for p in parameters(twin) if not any(p is t.gain for t in terms(twin))]
    for step in range(T, T + 5):
        train(model, 1, first, step)
        gains.zero_grad()
        second.zero_grad()
        loss_of(twin, batch(step)).backward()
        second.step()
        gains.step()
    for one, other in zip(parameters(model), parameters(twin), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_b_and_gains_are_all_trained_after_the_launch_and_directions_stay() -> None:
    model = dash(after=T)
    train(model, T, optimizer := adam(model))
    start = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, 3, optimizer, start=T)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
    assert {n.rpartition(".")[2] for n in moved} == {"A", "B", "gain", "steps"}
    assert len(moved) == 2 * 3 + 1


def test_dash_learns_what_its_slots_can_say_and_lora_of_that_rank_cannot() -> None:
    """The target moves four directions of W; rank 1 reaches one of them, Dash with four slots all."""
    torch.manual_seed(0)
    w = torch.randn(OUT, IN)
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    target = w + (u[:, :4] * torch.tensor([0.4, -0.8, 1.0, 0.6]) * sigma[:4]) @ vt[:4]
    x = torch.randn(256, IN)

    def final(after: int) -> float:
        class One(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(IN, OUT, bias=False)
                self.first.weight.data = w.clone()

            def forward(self, x: Tensor) -> Tensor:
                return self.first(x)

        model = dash(after=after, net=One, r=1, directions=5, target_modules=["first"])
        optimizer = torch.optim.AdamW(parameters(model), lr=2e-2)
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(x) - x @ target.T).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    assert final(after=20) < 1e-3
    assert final(after=10**6) > 0.1


# ---------------------------------------------------------------------- parameter counts of the paper


def test_s_gains_per_site_are_all_that_dash_adds() -> None:
    """LLaMA-7B: 32 layers, 5 modules, s = 8 are the paper's + 1.3k."""
    added = {n: p.numel() for n, p in dash(directions=3).named_parameters() if n.endswith(".gain")}
    assert list(added.values()) == [3, 3]
    config = LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=11008)
    with torch.device("meta"):
        base = LlamaForCausalLM(config)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    counts = []
    for boost in (None, weftlora.Dash()):
        model = get_peft_model(base, weftlora.WeftConfig(r=4, boost=boost, target_modules=targets))
        counts.append(model.get_nb_trainable_parameters()[0])
        base = model.unload()
    assert counts[1] - counts[0] == 1280


def test_what_the_launch_did_is_an_event_with_its_numbers() -> None:
    model = dash(after=T)
    train(model, T)
    what = event(model)
    assert (what["event"], what["step"], what["adapter"]) == ("dash_launch", T, "default")
    assert what["seconds"] > 0
    assert set(what["sites"]) == {"first", "second"}
    for name, site in sites(model).items():
        said = what["sites"][name]
        assert said["index"] == site.boost.index.tolist()
        assert said["sigma"] == pytest.approx(site.boost.sigma.tolist(), rel=1e-6)
        assert said["rate"] == pytest.approx(site.boost.rate.tolist(), rel=1e-6)
        assert said["seconds"] > 0
    assert steps(model) == T


# ---------------------------------------------------------------------- gains alone, after the launch


@pytest.mark.parametrize("structure", [weftlora.Plain(), weftlora.Hydra(heads=2), weftlora.Hydra(heads=2, split=True)])
@pytest.mark.parametrize("pair", ["freeze", "drop"])
def test_a_and_b_rest_after_the_launch_whatever_an_optimiser_would_do(pair: str, structure) -> None:
    """Asked of the authors (issue 8 of the released code): drop LoRA and train the gains alone. Decay and momentum move nothing."""
    model = dash(after=T, pair=pair, structure=structure)
    optimizer = adam(model, weight_decay=0.5)
    train(model, T, optimizer)
    assert launched(model)
    of_site = {
        n: (s.structure, {k: p.detach().clone() for k, p in s.structure.named_parameters()})
        for n, s in sites(model).items()
    }
    start = {n: deltas(s) for n, s in sites(model).items()} if not structure.routed else {}
    for step in range(T, T + 4):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, batch(step)).backward()
        optimizer.step()
    for name, (term, before) in of_site.items():
        assert all(torch.equal(p, before[k]) for k, p in term.named_parameters()), name
    assert all(term.gain.abs().min() > 0 for term in terms(model))
    for name, site in sites(model).items():
        if structure.routed:
            continue
        gains = site.boost.up @ torch.diag(site.boost.gain) @ site.boost.down
        kept = start[name] if pair == "freeze" else torch.zeros_like(gains)
        torch.testing.assert_close(site.delta_weight(), (kept + gains).float(), rtol=1e-5, atol=1e-6)
        assert site.phase == {"freeze": "launched, A and B frozen", "drop": "launched, A and B dropped"}[pair]
        assert site.live() == ([] if pair == "drop" else [0, 1])


def deltas(site) -> Tensor:
    return site.delta_weight().detach()


@pytest.mark.parametrize("pair", ["freeze", "drop"])
def test_resting_pairs_come_back_from_a_file_and_leave_as_stock_lora(pair: str, tmp_path) -> None:
    model = dash(after=T, pair=pair)
    train(model, T + 3)
    x = batch(99)
    model.eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    from dashing import Net

    again = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    torch.testing.assert_close(again.eval()(x), model(x))
    before = [s.structure.A.detach().clone() for s in sites(again).values()]
    train(again.train(), 2)
    assert all(torch.equal(s.structure.A, a) for s, a in zip(sites(again).values(), before, strict=True))
    weftlora.export_lora(model, tmp_path / "stock", inputs=None, verify=False)
    torch.manual_seed(0)
    stock = PeftModel.from_pretrained(Net(), tmp_path / "stock").eval()
    torch.testing.assert_close(stock(x), model(x), rtol=1e-5, atol=1e-6)


def test_a_pair_that_rests_does_not_go_with_what_needs_it() -> None:
    with pytest.raises(weftlora.CombinationError, match="pair='drop'"):
        weftlora.WeftConfig(boost=weftlora.Dash(pair="drop"), ranks=weftlora.Reallocate())
    with pytest.raises(weftlora.CombinationError, match="pair='freeze'"):
        weftlora.WeftConfig(boost=weftlora.Dash(pair="freeze"), start=weftlora.Directions())
    with pytest.raises(weftlora.ConfigError, match="pair"):
        weftlora.Dash(pair="keep")
    config = weftlora.LoraDashConfig(pair="drop")
    assert weftlora.WeftConfig(**config.to_dict()).boost == config.boost == weftlora.Dash(pair="drop")
