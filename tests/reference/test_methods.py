"""Every method, run for some steps as it is and as its paper's equations written out: forward, gradients, schedule, scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import methods
import pytest
import torch
from methods import P
from peft import get_peft_model
from programs import transformer_loss
from test_true_hypergradients import Branches, Transformer, branches
from torch import Tensor, nn
from torch.nn import functional as F

import weftlora
from weftlora.adapted.layer import WeftLinear
from weftlora.host.attach import schedules

R, S, STEPS, LR = 2, 1.5, 9, 0.02
LAUNCH = 4
NOTHING: frozenset[str] = frozenset()


def launched(weights: list[Tensor], count: int) -> Callable[[int, list[P]], frozenset[str]]:
    def after(step: int, params: list[P]) -> frozenset[str]:
        if step != LAUNCH:
            return NOTHING
        for w, p in zip(weights, params, strict=True):
            methods.launch(w, p, S, count)
        return frozenset({"gain"})

    return after


def both(weights: list[Tensor], count: int) -> Callable[[int, list[P]], frozenset[str]]:
    def after(step: int, params: list[P]) -> frozenset[str]:
        return launched(weights, count)(step, params) | switched(weights)(
            step, params
        )  # Dash ranks on the ΔW before the switch

    return after


def rested(weights: list[Tensor], count: int, keep: bool) -> Callable[[int, list[P]], frozenset[str]]:
    def after(step: int, params: list[P]) -> frozenset[str]:
        if step != LAUNCH:
            return NOTHING
        for w, p in zip(weights, params, strict=True):
            methods.launch_and_rest(w, p, S, count, keep)
        return frozenset({"gain"})

    return after


def switched(weights: list[Tensor]) -> Callable[[int, list[P]], frozenset[str]]:
    def after(step: int, params: list[P]) -> frozenset[str]:
        if step != LAUNCH:
            return NOTHING
        for w, p in zip(weights, params, strict=True):
            methods.switch(w, p, S)
        return frozenset({"A", "B"})

    return after


CASES: dict[str, tuple[Any, methods.Update, set[str], set[str]]] = {
    "lora": (weftlora.PlainLoraConfig, methods.lora, {"A", "B"}, set()),
    "hydralora": (lambda **f: weftlora.HydraLoraConfig(heads=3, **f), methods.hydra, {"A", "B", "router"}, set()),
    "hydralora, on A x": (
        lambda **f: weftlora.HydraLoraConfig(heads=3, router_input="Ax", **f),
        methods.hydra_ax,
        {"A", "B", "router"},
        set(),
    ),
    "hydralora, no gate": (
        lambda **f: weftlora.HydraLoraConfig(heads=3, router="uniform", **f),
        methods.uniform,
        {"A", "B"},
        set(),
    ),
    "tied_lora": (weftlora.TiedLoraConfig, methods.tied, {"A", "B", "u", "v"}, {"A", "B"}),
    "lora_dash": (
        lambda **f: weftlora.LoraDashConfig(directions=3, after=LAUNCH, **f),
        methods.dash,
        {"A", "B", "gain"},
        set(),
    ),
    "lora_dash, A and B frozen": (
        lambda **f: weftlora.LoraDashConfig(directions=3, after=LAUNCH, pair="freeze", **f),
        methods.resting,
        {"A", "B", "gain"},
        set(),
    ),
    "lora_dash, A and B dropped": (
        lambda **f: weftlora.LoraDashConfig(directions=3, after=LAUNCH, pair="drop", **f),
        methods.resting,
        {"A", "B", "gain"},
        set(),
    ),
    "hydralora, top 2": (
        lambda **f: weftlora.HydraLoraConfig(heads=3, router="topk", k=2, **f),
        methods.topk,
        {"A", "B", "router"},
        set(),
    ),
    "lora-split": (
        lambda **f: weftlora.HydraLoraConfig(heads=3, split=True, **f),
        methods.split,
        {"A", "B", "router"},
        set(),
    ),
    "lora_tsd": (
        lambda **f: weftlora.LoraTsdConfig(directions=2, after=LAUNCH, **f),
        methods.tsd,
        {"A", "B", "gain"},
        set(),
    ),
    "lora_init": (lambda **f: weftlora.LoraInitConfig(after=LAUNCH, **f), methods.init, {"A", "B"}, set()),
}


def tensors(sites: list[Any]) -> list[P]:
    """What every site trains, by its letter; what its group shares stands with each."""
    found: list[P] = []
    for site in sites:
        f = site.structure.factors(S)
        own = {name.rsplit(".", 1)[-1]: p.detach().clone() for name, p in site.named_parameters()}
        found.append({"A": f.A.detach().clone(), "B": f.B.detach().clone(), **own})
    return found


@pytest.mark.parametrize("method", list(CASES))
def test_a_run_is_the_papers_equations_step_by_step(method: str) -> None:
    make, update, trained, shared = CASES[method]
    torch.manual_seed(0)
    base = Branches().double()
    weights = [block["up"].weight.detach().clone() for block in base.layers]
    torch.manual_seed(1)
    config = make(r=R, lora_alpha=S * R, target_modules=["up"])
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double().train()
    sites = [m.site("default") for m in model.modules() if isinstance(m, WeftLinear)]
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for site in sites:
            for name, p in site.named_parameters():
                if not name.endswith("gain"):
                    p.add_(0.2 * torch.randn(p.shape, generator=draw, dtype=p.dtype))
    x, y = (torch.randn(24, n, generator=draw, dtype=torch.float64) for n in (5, 4))
    happens = {
        "lora_dash, A and B frozen": rested(weights, 3, keep=True),
        "lora_dash, A and B dropped": rested(weights, 3, keep=False),
        "lora_dash": launched(weights, 3),
        "lora_init": switched(weights),
        "lora_tsd": both(weights, 2),
    }
    after = happens.get(method, lambda *_: NOTHING)
    start = tensors(sites)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        loss = (model(x) - y).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    expected, end = methods.run(
        update, weights, start, frozenset(trained), frozenset(shared), S, x, y, STEPS, LR, after
    )
    assert losses == pytest.approx(expected, rel=1e-9)
    assert losses[-1] < losses[0]
    mine = tensors(sites)
    for p, q in zip(mine, end, strict=True):
        for name in (
            q.keys() & trained - {"gain"} if method not in ("lora_init", "lora_tsd") else ()
        ):  # a direction's sign is free: ΔW below
            torch.testing.assert_close(p[name], q[name], rtol=1e-7, atol=1e-9)
    probe = torch.eye(5, dtype=torch.float64)
    theirs = sum(update(probe, q, S) + probe @ w.T for q, w in zip(end, weights, strict=True))
    torch.testing.assert_close(model.eval()(probe).detach(), theirs, rtol=1e-8, atol=1e-9)


def test_a_search_walks_as_flexora_says_and_selects_what_is_above_the_mean() -> None:
    inner = {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1, "max_grad_norm": 0.0}
    problem = branches(inner=inner, inner_steps=1, hypergrad="direct", alpha_lr=0.05)
    search = problem.search
    theta = [p.detach().clone() for p in search.passes.params]
    path = methods.search(
        theta, search.alpha.detach().clone(), problem.train, problem.validation, 0.02, 0.1, 0.05, search.steps
    )
    for expected in path:
        search.step()
        torch.testing.assert_close(search.alpha.detach(), expected, rtol=1e-8, atol=1e-10)
    selected = [block for block, value in enumerate(path[-1].tolist()) if value > float(path[-1].mean())]
    assert list(search.run().blocks) == selected
    assert len(path) == 3


class Scored(nn.Module):
    """The two-block transformer with the answer that transformers' models give."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Transformer()
        self.config = None

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        x = self.net.model["embed_tokens"](input_ids)
        for block in self.net.model["layers"]:
            x = block(x)
        logits = self.net.lm_head(self.net.model["norm"](x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return type("Given", (), {"logits": logits, "loss": loss})()


def scored() -> tuple[Any, dict[str, int], Callable[[dict[str, Tensor], Tensor], Tensor]]:
    """A model about to score its slots, their numbers by module, and the loss of rows with gates, written out."""
    torch.manual_seed(0)
    base = Scored().double()
    state = {name.removeprefix("net."): v.detach().clone() for name, v in base.state_dict().items()}
    config = weftlora.AllocLoraConfig(
        r=R, lora_alpha=S * R, target_modules=r".*_proj", first=1, every=1, max_rounds=1, rows=6, move=4, score="exact"
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).double()
    draw = torch.Generator().manual_seed(6)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for layer in model.modules():
        if isinstance(layer, WeftLinear):
            f = layer.site("default").structure
            with torch.no_grad():
                f.B[:, :R] = 0.5 * torch.randn(f.B.shape[0], R, generator=draw, dtype=torch.float64)
            factors[layer.module_name.removeprefix("net.")] = (f.A.detach()[:R].clone(), f.B.detach()[:, :R].clone())

    def loss(gates: dict[str, Tensor], tokens: Tensor) -> Tensor:
        def adapted(x: Tensor, name: str) -> Tensor:
            a, b = factors[name]
            return x @ state[f"{name}.weight"].T + S * ((x @ a.T) * gates[name]) @ b.T

        return transformer_loss(state, 2, 1e-6, tokens, tokens, adapted, 2)

    return model, dict.fromkeys(factors, R), loss


def test_ab_lora_scores_are_equation_6_and_its_round_is_algorithm_1() -> None:
    model, ranks, loss = scored()
    tokens = torch.randint(0, 13, (6, 7), generator=torch.Generator().manual_seed(7))
    weftlora.attach(model, validation=[{"input_ids": row, "labels": row} for row in tokens])
    [schedule] = schedules(model).values()
    scoring = schedule.controllers[-1].scoring
    names = [member.name.removeprefix("net.") for member in schedule.members]
    slots = scoring.live()
    exact = methods.ablation_scores(lambda gates: loss(gates, tokens), ranks)
    found = scoring.scorer.exact(slots, "0/1").sum((1, 2)).tolist()
    for (m, slot), value in zip(slots, found, strict=True):
        assert value == pytest.approx(exact[names[m], slot], rel=1e-6, abs=1e-9)
    labels = 6 * 6
    estimate = methods.taylor_scores(
        lambda gates: torch.stack([loss(gates, row[None]) / len(tokens) for row in tokens]), ranks, labels
    )
    guess = scoring.scorer.estimate(slots, "0/1").sum((1, 2)).tolist()
    for (m, slot), value in zip(slots, guess, strict=True):
        assert value == pytest.approx(estimate[names[m], slot], rel=1e-5, abs=1e-8)

    gone, made = methods.round_of(exact, 4, lambda name: R)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-13))
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    [event] = schedule.events
    assert [(name.removeprefix("net."), slot) for name, slot, _ in event["pruned"]] == gone
    added = [name.removeprefix("net.") for name, _ in event["added"]]
    assert {name: added.count(name) for name in added} == {name: count for name, count in made.items() if count}
