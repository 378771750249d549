"""The papers' equations, a few lines each, in fp64 and sharing no code with weftlora: what its methods are held to.

A method is its update of one linear module, ΔW or Δ(x); a run of it is a loop with AdamW written out, in which what a paper does after
t steps is done after t steps. Ranks, scales and letters are those of the papers; torch is used for arithmetic and gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

P = dict[str, Tensor]


def lora(x: Tensor, p: P, s: float) -> Tensor:
    """LoRA: s B A x."""
    return s * (x @ p["A"].T) @ p["B"].T


def hydra(x: Tensor, p: P, s: float) -> Tensor:
    """HydraLoRA, equations 3 and 4: Σ_i ω_i B_i A x, ω = softmax(W_g x); the heads side by side in B."""
    omega = torch.softmax(x @ p["router"].T, -1)
    r = len(p["A"])
    return sum(
        omega[:, i : i + 1] * (s * (x @ p["A"].T) @ p["B"][:, i * r : (i + 1) * r].T) for i in range(omega.shape[1])
    )


def hydra_ax(x: Tensor, p: P, s: float) -> Tensor:
    """The other reading of equation 4, whose gate sees the token that A has made small: ω = softmax(W_g A x), W_g of N × r."""
    seen = x @ p["A"].T
    omega = torch.softmax(seen @ p["router"].T, -1)
    r = len(p["A"])
    return sum(s * omega[:, i : i + 1] * seen @ p["B"][:, i * r : (i + 1) * r].T for i in range(omega.shape[1]))


def uniform(x: Tensor, p: P, s: float) -> Tensor:
    """HydraLoRA without its gate: every head has the weight 1/N."""
    r = len(p["A"])
    heads = p["B"].shape[1] // r
    return sum(s / heads * (x @ p["A"].T) @ p["B"][:, i * r : (i + 1) * r].T for i in range(heads))


def topk(x: Tensor, p: P, s: float, k: int = 2) -> Tensor:
    """HydraLoRA with k experts per token: softmax over the k largest logits, one token at a time."""
    r, rows = len(p["A"]), []
    for token in x:
        logits = p["router"] @ token
        order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:k]
        weights = logits[order].exp() / logits[order].exp().sum()
        rows.append(
            sum(w * s * p["B"][:, i * r : (i + 1) * r] @ (p["A"] @ token) for w, i in zip(weights, order, strict=True))
        )
    return torch.stack(rows)


def split(x: Tensor, p: P, s: float) -> Tensor:
    """LoRA-Split behind the same router: Σ_i ω_i s B_i A_i x, every LoRA with an A of its own."""
    omega = torch.softmax(x @ p["router"].T, -1)
    n = omega.shape[1]
    each = zip(p["A"].chunk(n), p["B"].chunk(n, 1), strict=True)
    return sum(omega[:, i : i + 1] * (s * (x @ a.T) @ b.T) for i, (a, b) in enumerate(each))


def tied(x: Tensor, p: P, s: float) -> Tensor:
    """Tied-LoRA: s v ⊙ (B (u ⊙ (A x))), A and B of all layers the same."""
    return s * p["v"] * ((p["u"] * (x @ p["A"].T)) @ p["B"].T)


def dash(x: Tensor, p: P, s: float) -> Tensor:
    """LoRA-Dash: s B A x + Σ_i g_i ū_i v̄_iᵀ x, once there are directions."""
    y = lora(x, p, s)
    return y if "U" not in p else y + ((x @ p["V"]) * p["gain"]) @ p["U"].T


def resting(x: Tensor, p: P, s: float) -> Tensor:
    """LoRA-Dash whose A and B rest from the launch on: as they were then, A₀ and B₀, or gone."""
    if "U" not in p:
        return lora(x, p, s)
    kept = s * (x @ p["A0"].T) @ p["B0"].T if "A0" in p else 0
    return kept + ((x @ p["V"]) * p["gain"]) @ p["U"].T


def init(x: Tensor, p: P, s: float) -> Tensor:
    """LoRA-Init: s (B A − B₀ A₀) x, once there are A₀ and B₀."""
    y = lora(x, p, s)
    return y if "A0" not in p else y - s * (x @ p["A0"].T) @ p["B0"].T


def tsd(x: Tensor, p: P, s: float) -> Tensor:
    """LoRA-TSD: s (B A − B₀ A₀) x + Σ_i g_i ū_i v̄_iᵀ x."""
    return init(x, p, s) + (((x @ p["V"]) * p["gain"]) @ p["U"].T if "U" in p else 0)


def directions(weight: Tensor, delta: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the core directions u_i v_iᵀ of W, the `count` of largest change rate |u_iᵀ ΔW v_i| / (σ_i + ε), ε = 1e-8 σ_max: U, σ, V."""
    u, sigma, vt = torch.linalg.svd(weight, full_matrices=False)
    rate = (u.T @ delta @ vt.T).diagonal().abs() / (sigma + 1e-8 * sigma[0])
    best = rate.argsort(descending=True)[:count]
    return u[:, best], sigma[best], vt[best].T


def launch(weight: Tensor, p: P, s: float, count: int) -> None:
    """Dash, after its pre-launch: the directions are fixed, their gains start from 0."""
    p["U"], _, p["V"] = directions(weight, s * p["B"] @ p["A"], count)


def launch_and_rest(weight: Tensor, p: P, s: float, count: int, keep: bool) -> None:
    """The same, and A and B are no longer trained; without `keep` they are left out."""
    launch(weight, p, s, count)
    a, b = p.pop("A"), p.pop("B")
    if keep:
        p["A0"], p["B0"] = a, b


def switch(weight: Tensor, p: P, s: float) -> None:
    """Init, after its pre-launch: B₀ = Ū diag(√(σ̄/s)), A₀ = diag(√(σ̄/s)) V̄ᵀ; A and B start from them."""
    u, sigma, v = directions(weight, s * p["B"] @ p["A"], len(p["A"]))
    root = (sigma / s).sqrt()
    p["A0"], p["B0"] = root[:, None] * v.T, u * root
    p["A"], p["B"] = p["A0"].clone(), p["B0"].clone()


@dataclass
class Adam:
    """AdamW of one tensor, with its own count of steps."""

    lr: float
    decay: float = 0.0
    t: int = 0
    m: Tensor = field(default_factory=lambda: torch.zeros(()))
    v: Tensor = field(default_factory=lambda: torch.zeros(()))

    def step(self, p: Tensor, g: Tensor) -> Tensor:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        step = (self.m / (1 - 0.9**self.t)) / ((self.v / (1 - 0.999**self.t)).sqrt() + 1e-8)
        return p - self.lr * self.decay * p - self.lr * step


Update = Callable[[Tensor, P, float], Tensor]


def run(
    update: Update,
    weights: list[Tensor],
    params: list[P],
    trained: frozenset[str],
    shared: frozenset[str],
    s: float,
    x: Tensor,
    y: Tensor,
    steps: int,
    lr: float,
    after: Callable[[int, list[P]], frozenset[str]] = lambda step, params: frozenset(),
) -> tuple[list[float], list[P]]:
    """Losses before every step, and the parameters at the end.

    The model is Σ_m (W_m x + Δ_m(x)), the loss the mean of squares. `shared` names of the first module are those of all.
    `after(step, params)` does what a method does then, and says which tensors start fresh.
    """
    states: dict[tuple[int, str], Adam] = {}
    losses = []
    for step in range(1, steps + 1):
        leaves = [
            {k: v.detach().clone().requires_grad_(k in trained and "0" not in k) for k, v in p.items()} for p in params
        ]
        for p in leaves[1:]:
            p.update({name: leaves[0][name] for name in shared})
        out = sum(x @ w.T + update(x, p, s) for w, p in zip(weights, leaves, strict=True))
        loss = (out - y).pow(2).mean()
        loss.backward()
        losses.append(float(loss.detach()))
        for m, p in enumerate(leaves):
            for name, value in p.items():
                if value.grad is not None and not (m and name in shared):
                    state = states.setdefault((m, name), Adam(lr))
                    params[m][name] = state.step(params[m][name], value.grad)
        for p in params[1:]:
            p.update({name: params[0][name] for name in shared})
        for fresh in after(step, params):
            for m in range(len(params)):
                states.pop((m, fresh), None)
    return losses, params


def ablation_scores(loss: Callable[[dict[str, Tensor]], Tensor], ranks: dict[str, int]) -> dict[tuple[str, int], float]:
    """AB-LoRA, equation 6 without S(M): −S(M∖r) + S(M_r) + L(∅)… as differences: [L(M∖i) − L(M)] + [L(∅) − L({i})].

    `loss(gates)` is the cross-entropy with these gates of every module's ranks.
    """
    on = {name: torch.ones(r, dtype=torch.float64) for name, r in ranks.items()}
    off = {name: torch.zeros(r, dtype=torch.float64) for name, r in ranks.items()}
    whole, base = float(loss(on)), float(loss(off))
    found = {}
    for name, r in ranks.items():
        for i in range(r):
            unit = torch.zeros(r, dtype=torch.float64)
            unit[i] = 1
            without = float(loss({**on, name: on[name] - unit}))
            alone = float(loss({**off, name: unit}))
            found[name, i] = (without - whole) + (base - alone)
    return found


def taylor_scores(
    row_losses: Callable[[dict[str, Tensor]], Tensor], ranks: dict[str, int], count: int
) -> dict[tuple[str, int], float]:
    """−∂L/∂α + ½ N Σ_rows (∂L_row/∂α)² at all gates 1, plus −∂L/∂α at all gates 0; `row_losses` sum to L, N labels count."""
    found = dict.fromkeys(((name, i) for name, r in ranks.items() for i in range(r)), 0.0)
    for value in (1.0, 0.0):
        gates = {n: torch.full((r,), value, dtype=torch.float64, requires_grad=True) for n, r in ranks.items()}
        for row in row_losses(gates):
            slopes = torch.autograd.grad(row, list(gates.values()), retain_graph=True)
            for (name, r), slope in zip(ranks.items(), slopes, strict=True):
                for i in range(r):
                    g = float(slope[i])
                    found[name, i] += -g + (0.5 * count * g * g if value else 0.0)
    return found


def round_of(scores: dict[tuple[str, int], float], n: int, fresh: Callable[[str], int]) -> tuple[list, dict[str, int]]:
    """One round of Algorithm 1: the n lowest go; over the modules that lost none n new ones, the remainder to the highest means."""
    gone = sorted(scores, key=lambda slot: scores[slot])[:n]
    lost = {name for name, _ in gone}
    names = dict.fromkeys(name for name, _ in scores)
    mean = {m: [v for (name, _), v in scores.items() if name == m] for m in names if m not in lost}
    order = sorted(mean, key=lambda m: -sum(mean[m]) / len(mean[m]))
    if not order:
        return gone, {}
    each, rest = divmod(n, len(order))
    return gone, {m: each + (place < rest) for place, m in enumerate(order) if each + (place < rest) <= fresh(m)}


def search(
    theta: list[Tensor],
    alpha: Tensor,
    train: Callable[[list[Tensor], Tensor], Tensor],
    validation: Callable[[list[Tensor], Tensor], Tensor],
    lr: float,
    decay: float,
    alpha_lr: float,
    steps: int,
) -> list[Tensor]:
    """Flexora: θ takes a step of AdamW on the training rows while α stands still, then α one of Adam on the validation rows while θ
    does; the blocks' updates are weighed by α̂ = N softmax(α). α after every step.
    """
    inner, outer, path = [Adam(lr, decay) for _ in theta], Adam(alpha_lr), []

    def weighed(values: Tensor) -> Tensor:
        return len(values) * values.exp() / values.exp().sum()

    for _ in range(steps):
        leaves = [p.detach().requires_grad_() for p in theta]
        slopes = torch.autograd.grad(train(leaves, weighed(alpha)), leaves)
        theta = [each.step(p.detach(), g) for each, p, g in zip(inner, theta, slopes, strict=True)]
        free = alpha.clone().requires_grad_()
        [slope] = torch.autograd.grad(validation(theta, weighed(free)), free)
        alpha = outer.step(alpha, slope)
        path.append(alpha)
    return path
