"""What an optimiser is told of an adapter: every tensor's role, LoRA+, a frozen A, and the warning for groups made by name."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft import optimizers as peft_optimizers
from torch import nn
from transformers import Trainer, TrainingArguments

import weftlora
from families import FAMILIES, adapter_config
from weftlora.adapted.layer import WeftLinear
from weftlora.errors import ConfigError
from weftlora.kernel import Role
from weftlora.recipes import RECIPES

sys.path.insert(0, str(Path(__file__).parents[1] / "schedule"))
from dashing import dash, launched, parameters, train

LLAMA = FAMILIES["llama"]
OURS = [name for name in RECIPES if not name.startswith("peft:")]


def adapted(name: str = "lora", **fields: Any) -> PeftModel:
    """A tiny Llama with a recipe's adapter."""
    return get_peft_model(LLAMA.build(), RECIPES[name](r=2, **fields))


def sites(model: nn.Module):
    return [layer.site("default") for layer in model.modules() if isinstance(layer, WeftLinear)]


def role_of(model: nn.Module) -> dict[int, Role]:
    return {id(p): role for site in sites(model) for _, p, role in site.roles()}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(**LLAMA.batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def warned(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> list[str]:
    """What weftlora says about the optimiser in its first steps."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            step(model, optimizer)
    return [str(w.message) for w in caught if "is trained by an optimiser that" in str(w.message)]


# ---------------------------------------------------------------------- roles


@pytest.mark.parametrize("name", OURS)
def test_every_trained_tensor_of_an_adapter_has_a_role(name: str) -> None:
    model = adapted(name)
    told = {id(p) for site in sites(model) for p in site.parameters()}
    assert set(role_of(model)) == told


def test_what_the_roles_are() -> None:
    seen: dict[str, set[Role]] = {}
    for config in (
        weftlora.HydraLoraConfig(r=2, heads=2),
        weftlora.TiedLoraConfig(r=2),
        weftlora.LoraTsdConfig(r=2),
    ):
        for site in sites(get_peft_model(LLAMA.build(), config)):
            for name, _, role in site.roles():
                seen.setdefault(name, set()).add(role)
    gain: set[Role] = {"gain"}
    assert seen == {"A": {"down"}, "B": {"up"}, "router": {"router"}, "u": gain, "v": gain, "gain": gain}


# ---------------------------------------------------------------------- LoRA+


@pytest.mark.parametrize("name", OURS)
def test_lora_plus_gives_b_its_own_rate_and_nothing_else(name: str) -> None:
    model = adapted(name)
    roles = role_of(model)
    groups = weftlora.param_groups(model, lr=1e-3, weight_decay=0.1, lora_plus_ratio=16)
    for group in groups:
        assert group["params"]
        for parameter in group["params"]:
            role = roles[id(parameter)]
            assert group["lr"] == pytest.approx(16e-3 if role == "up" else 1e-3)
            assert group["weight_decay"] == (0.1 if role in ("up", "down") else 0.0)
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("ratio", [None, 1])
def test_without_a_ratio_the_groups_are_those_of_before(ratio) -> None:
    model = adapted("lora_dash")
    groups = weftlora.param_groups(model, lr=1e-3, weight_decay=0.1, lora_plus_ratio=ratio)
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [(1e-3, 0.1, 28), (1e-3, 0.0, 14)]
    factors = [p for n, p in model.named_parameters() if n.endswith((".A", ".B"))]
    assert all(
        p is q for p, q in zip(groups[0]["params"], factors, strict=True)
    )  # in the order that optimisers save them


def test_lora_plus_on_a_shared_b_multiplies_the_multiplier_and_leaves_heads_alone() -> None:
    row = FAMILIES["bert"]
    model = get_peft_model(row.build(), adapter_config("tied_tl6", "bert"))
    groups = weftlora.param_groups(model, lr=1e-3, tied_lr_multiplier=3, lora_plus_ratio=4)
    rate = {id(p): g["lr"] for g in groups for p in g["params"]}
    found = {name.rpartition(".")[2]: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found == pytest.approx({"A": 3e-3, "B": 12e-3, "u": 1e-3, "v": 1e-3, "weight": 1e-3, "bias": 1e-3})


def test_lora_plus_moves_b_sixteen_times_as_far() -> None:
    """The first step of Adam moves every number by its rate."""
    model = adapted("lora")
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-4, lora_plus_ratio=16))
    before = {id(p): p.detach().clone() for p in model.parameters()}
    step(model, optimizer)
    moved = {
        role: max(
            float((p - before[id(p)]).abs().max()) for site in sites(model) for _, p, r in site.roles() if r == role
        )
        for role in ("down", "up")
    }
    assert moved["up"] == pytest.approx(16e-4, rel=0.01)
    assert moved["down"] < 1e-4 * 1.01


@pytest.mark.parametrize("ratio", [0, -1, float("inf"), float("nan"), True, "16"])
def test_a_ratio_that_is_none_is_refused(ratio) -> None:
    with pytest.raises(ConfigError, match=r"lora_plus_ratio=.* is not a ratio of rates"):
        weftlora.param_groups(adapted(), lr=1e-3, lora_plus_ratio=ratio)


@pytest.mark.parametrize("field", ["lr", "weight_decay", "router_lr", "vector_lr", "gain_lr", "tied_lr_multiplier"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-3, "1e-3", True])
def test_a_rate_that_is_no_number_is_refused_before_anything_is_frozen(field: str, value: Any) -> None:
    model = adapted()
    with pytest.raises(ConfigError, match=f"{field}=.* does not work in an optimiser"):
        weftlora.param_groups(model, **{"lr": 1e-3, field: value}, freeze_down=True)
    assert all(p.requires_grad for n, p in model.named_parameters() if "weft_" in n)


def test_stock_lora_is_told_that_the_roles_are_of_weftloras_adapters() -> None:
    from peft import LoraConfig

    stock = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    for fields in ({"lora_plus_ratio": 16}, {"freeze_down": True}):
        with pytest.raises(ConfigError, match="of weftlora's adapters"):
            weftlora.param_groups(stock, lr=1e-3, **fields)


def test_a_ratio_without_any_b_is_refused() -> None:
    model = adapted("tied_lora", train="vera")
    with pytest.raises(ConfigError, match="is for the B of weftlora's adapters, and none is trained"):
        weftlora.param_groups(model, lr=1e-3, lora_plus_ratio=16)


# ---------------------------------------------------------------------- a frozen A


@pytest.mark.parametrize("name", [n for n in OURS if n != "flexora"])
def test_a_frozen_a_stays_and_the_rest_learns_through_every_event(name: str) -> None:
    """Launches, switches and moves of slots happen as with a trained A; only they change a frozen one."""
    times = {"lora_dash": {"after": 2}, "lora_init": {"after": 2}, "lora_tsd": {"after": 2}}.get(name, {})
    if name == "alora":
        times = {"first": 2, "every": 2, "max_rounds": 1, "score": "taylor", "rows": 2}
    if name == "hydralora":
        times = {"heads": 2}
    model = adapted(name, **times)
    if name == "alora":
        weftlora.attach(model, validation=[{k: v[i] for k, v in LLAMA.batch().items()} for i in (0, 1)])
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2, freeze_down=True))
    roles = role_of(model)
    downs = [p for p in model.parameters() if roles.get(id(p)) == "down"]
    assert downs
    assert not any(p.requires_grad for p in downs)
    assert not {id(p) for p in downs} & {id(p) for g in optimizer.param_groups for p in g["params"]}
    before = [p.detach().clone() for p in downs]
    loss = float(model(**LLAMA.batch()).loss)
    for done in range(6):
        if done == 1:
            assert all(torch.equal(p, was) for p, was in zip(downs, before, strict=True))
        step(model, optimizer)
    assert float(model(**LLAMA.batch()).loss) < loss
    events = weftlora.state_dict(model).get("default", {}).get("events", [])
    happened = bool(times) and name != "hydralora"
    assert bool(events) == happened
    assert all(p.grad is None for p in downs)
    kept = all(torch.equal(p, was) for p, was in zip(downs, before, strict=True))
    assert kept == (name in ("lora", "hydralora", "tied_lora", "lora_dash"))


def test_dash_launches_on_a_frozen_a_as_reference_and_node_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> PeftModel:
        torch.manual_seed(3)
        model = dash(after=2)
        train(model, 4, torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2, freeze_down=True)))
        assert launched(model)
        return model

    fast = trained()
    monkeypatch.setenv("WEFT_REFERENCE", "1")
    slow = trained()
    for p, q in zip(parameters(fast), parameters(slow), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_a_shared_a_is_frozen_for_its_whole_group() -> None:
    model = adapted("tied_lora")
    weftlora.param_groups(model, lr=1e-3, freeze_down=True)
    trained = {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"B", "u", "v"}


@pytest.mark.parametrize("fields", [{"train": "A"}, {"train": "ABu", "zero": "A"}])
def test_freezing_an_a_that_is_zero_is_refused_and_freezes_nothing(fields: dict) -> None:
    model = get_peft_model(LLAMA.build(), weftlora.WeftConfig(structure=weftlora.Tied(**fields), r=2))
    with pytest.raises(ConfigError, match="starts at zero, so the update would stay zero"):
        weftlora.param_groups(model, lr=1e-3, freeze_down=True)
    assert any(n.endswith(".A") and p.requires_grad for n, p in model.named_parameters())


def test_freezing_what_is_frozen_or_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze_down freezes the A of weftlora's adapters, and none is trained"):
        weftlora.param_groups(adapted("tied_lora", train="vera"), lr=1e-3, freeze_down=True)
    with pytest.raises(ConfigError, match="freeze_down='yes' is neither true nor false"):
        weftlora.param_groups(adapted(), lr=1e-3, freeze_down="yes")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- peft's own helpers


def lora_plus(model: PeftModel, **fields: Any) -> torch.optim.Optimizer:
    return peft_optimizers.create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, **fields
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("lora_dash", "gives its up factors (B) the rate 0.001 and its gains (u, v, those of Dash) 0.016"),
        ("tied_lora", "gives its up factors (B) the rate 0.001 and its gains (u, v, those of Dash) 0.016"),
        ("lora", "has an empty group of rate 0.016 and trains all of the adapter at 0.001 or less"),
        ("hydralora", "has an empty group of rate 0.016 and trains all of the adapter at 0.001 or less"),
    ],
)
def test_pefts_lora_plus_is_called_out_once_at_its_first_step(name: str, says: str) -> None:
    model = adapted(name)
    [message] = warned(model, lora_plus(model))
    assert says in message
    assert "weftlora.param_groups" in message


@pytest.mark.skipif(not hasattr(peft_optimizers, "create_lorafa_optimizer"), reason="this peft has no LoRA-FA")
def test_pefts_lora_fa_is_called_out() -> None:
    model = adapted("lora")
    optimizer = peft_optimizers.create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-3)
    [message] = warned(model, optimizer)
    assert "looks for the names lora_A and lora_B" in message


@pytest.mark.skipif(not hasattr(peft_optimizers, "create_riemannian_optimizer"), reason="this peft has no Riemannian")
def test_pefts_riemannian_optimizer_refuses_by_itself() -> None:
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):
        peft_optimizers.create_riemannian_optimizer(adapted("lora"), torch.optim.AdamW, lr=1e-3)


def test_a_copy_of_the_model_is_looked_after_by_itself() -> None:
    model = adapted("lora_dash")
    twin = copy.deepcopy(model)
    assert len(warned(twin, lora_plus(twin))) == 1
    assert not warned(model, torch.optim.AdamW(weftlora.param_groups(model, lr=1e-3)))


def test_gains_that_alone_are_decayed_are_called_out() -> None:
    model = adapted("lora_dash")
    gains = [p for n, p in model.named_parameters() if n.endswith(".gain")]
    rest = [p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(".gain")]
    optimizer = torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": gains, "weight_decay": 0.1}])
    [message] = warned(model, optimizer)
    assert "decays its gains (u, v, those of Dash) by 0.1 and its up factors (B) by 0" in message


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("fields", [{}, {"lora_plus_ratio": 16}, {"gain_lr": 0.5, "vector_lr": 1e-5, "router_lr": 0}])
def test_groups_that_weftlora_made_are_never_called_out(name: str, fields: dict) -> None:
    if name == "flexora":
        pytest.skip("its adapter is trained after a search")
    model = adapted(name, **({"max_rounds": 0} if name == "alora" else {}))
    groups = weftlora.param_groups(model, lr=1e-3, weight_decay=0.1, **fields)
    optimizer = torch.optim.AdamW(groups)
    assert not warned(model, optimizer)
    resumed = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-3, weight_decay=0.1, **fields))
    resumed.load_state_dict(optimizer.state_dict())
    torch.optim.lr_scheduler.LambdaLR(resumed, lambda n: 0.1 * n)  # a warm-up: the first rate is 0 everywhere
    assert not warned(model, resumed)


@pytest.mark.parametrize("name", ["lora", "lora_dash", "tied_lora", "hydralora"])
def test_plain_optimizers_and_trainers_own_groups_are_not_called_out(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    assert not warned(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3))
    row = [{k: v[0] for k, v in LLAMA.batch().items()}] * 4
    args = TrainingArguments(
        str(tmp_path), max_steps=2, weight_decay=0.1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )  # fmt: skip
    trainer = Trainer(model=adapted(name), args=args, train_dataset=row)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert not [w for w in caught if "is trained by an optimiser that" in str(w.message)]
    vectors = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    if vectors:  # decay and no decay by the number of axes, as some trainers have it
        rest = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
        groups = [{"params": rest, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        assert not warned(model, torch.optim.AdamW(groups, lr=1e-3))


def test_other_peoples_optimizers_are_left_alone() -> None:
    adapted("lora_dash")
    stock = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert not warned(stock, lora_plus(stock))


COMPILED = """
import torch
from torch._dynamo.utils import counters

def steps(model):
    torch._dynamo.reset()
    counters.clear()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        step()
    print(sum(counters["graph_break"].values()), counters["frames"]["total"])

steps(torch.nn.Sequential(torch.nn.Linear(8, 8)))
import weftlora
from peft import get_peft_model
steps(get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), weftlora.PlainLoraConfig(r=2, target_modules=["0"])))
"""


def test_looking_at_optimizers_breaks_no_graph_of_a_compiled_step() -> None:
    """In a process of its own: the hook of schedules, which breaks graphs on purpose, is there once any test has one."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True, capture_output=True, text=True)
    stock, ours = ran.stdout.splitlines()
    assert stock == ours
    assert int(stock.split()[1]) > 0  # it is compiled at all


def test_the_signature_says_what_the_documents_say() -> None:
    fields = inspect.signature(weftlora.param_groups).parameters
    assert (fields["lora_plus_ratio"].default, fields["freeze_down"].default) == (None, False)
