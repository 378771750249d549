"""Nodes over several linears under unmodified models: the same numbers with and without, and out of the way when asked."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GemmaConfig, GemmaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

import weftlora
from families import FAMILIES, SIZE, SPECIAL, STRUCTURES, adapter_config, logits, randomise, trainable
from weftlora.adapted.fusion import activation_of, is_gated_mlp, nodes
from weftlora.adapted.input_groups import MISSES
from weftlora.adapted.layer import WeftLinear
from weftlora.kernel import switched, use_reference

MLP = ["gate_proj", "up_proj", "down_proj"]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_structure = pytest.mark.parametrize("structure", STRUCTURES)


def adapted(structure: str = "plain", family: str = "llama", base: nn.Module | None = None, **fields) -> PeftModel:
    model = get_peft_model(base or FAMILIES[family].build(), adapter_config(structure, family, **fields))
    randomise(model)
    return model.train()


def step(model: nn.Module, family: str = "llama", seed: int = 3) -> dict[str, Tensor]:
    """The loss and all gradients of one step."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**FAMILIES[family].batch()).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in trainable(model).items()}}


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], limit: float = 1e-5) -> None:
    for name, want in other.items():
        assert (one[name] - want).norm() <= limit * want.norm() + 1e-9, name


def layer_of(model: nn.Module, end: str) -> WeftLinear:
    return next(m for n, m in model.named_modules() if n.endswith(end) and isinstance(m, WeftLinear))


@every_family
@every_structure
def test_a_step_is_the_same_with_and_without(structure: str, family: str) -> None:
    """Loss and gradients, with dropout: spanning nodes draw the masks that their linears would draw one by one."""
    model = adapted(structure, family, lora_dropout=0.2)
    together = step(model, family)
    with switched(groups=False, mlp=False):
        assert_close(together, step(model, family))
    with use_reference():
        assert_close(together, step(model, family))


@pytest.mark.parametrize(
    ("family", "kinds"),
    [
        ("llama", {"q_proj": "group", "v_proj": "group", "o_proj": "linear", "gate_proj": "mlp", "down_proj": "mlp"}),
        ("bert", {"query": "group", "value": "group", "intermediate.dense": "linear"}),
        (
            "t5",
            {"SelfAttention.q": "group", "EncDecAttention.q": "linear", "EncDecAttention.v": "group", "wo": "linear"},
        ),
        ("gpt2", {"c_attn": "module: Conv1D is not a plain Linear"}),
        ("gpt_neox", {"query_key_value": "linear"}),
        ("plain", {"q_proj": "group", "mlp": "linear"}),
    ],
)
def test_which_node_computes_what(family: str, kinds: dict[str, str]) -> None:
    found = nodes(adapted("plain", family))
    for end, kind in kinds.items():
        assert {node for name, node in found.items() if name.endswith(end)} == {kind}, end


@pytest.mark.parametrize(
    ("build", "config"),
    [(GemmaForCausalLM, GemmaConfig), (MistralForCausalLM, MistralConfig), (Qwen2ForCausalLM, Qwen2Config)],
)
def test_gated_mlps_of_other_families_are_known_by_their_forward(build, config) -> None:
    torch.manual_seed(0)
    base = build(config(**SIZE, **SPECIAL, num_key_value_heads=2, head_dim=8))
    model = adapted(base=base)
    assert {node for name, node in nodes(model).items() if ".mlp." in name} == {"mlp"}
    together = step(model)
    with switched(groups=False, mlp=False):
        assert_close(together, step(model))


class Gated(nn.Module):
    """A gated MLP whose forward the tests below change."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Scaled(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 0.5


class Named(Gated):
    def forward(self, hidden: Tensor) -> Tensor:
        # a comment
        y = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return y  # noqa: RET504


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class Earlier(Gated):
    def forward(self, x):
        x = x + 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize(
    ("kind", "known"), [(Gated, True), (Named, True), (Scaled, False), (Swapped, False), (Earlier, False)]
)
def test_an_mlp_is_spanned_only_if_its_forward_is_that_and_nothing_else(kind: type[Gated], known: bool) -> None:
    torch.manual_seed(0)
    mlp = nn.Sequential(kind())
    x = torch.randn(3, 8)
    assert is_gated_mlp(mlp[0]) is known
    model = get_peft_model(mlp, weftlora.PlainLoraConfig(r=2, target_modules=MLP))
    randomise(model)
    with use_reference():
        want = model(x)
    torch.testing.assert_close(model(x), want)


def test_an_activation_that_is_not_known_is_left_to_the_module() -> None:
    assert activation_of(nn.Tanh()) is None
    base = Gated()
    base.act_fn = nn.Tanh()
    model = get_peft_model(nn.Sequential(base), weftlora.PlainLoraConfig(r=2, target_modules=MLP))
    assert set(nodes(model).values()) == {"group", "linear"}


# ---------------------------------------------------------------------- what a group keeps, and when it gives up


def groups_of(model: nn.Module) -> list:
    return list(
        {id(m.group): m.group for m in model.modules() if isinstance(m, WeftLinear) and m.group is not None}.values()
    )


def test_nothing_waits_after_a_forward_and_the_input_is_not_kept() -> None:
    model = adapted()
    step(model)
    assert groups_of(model)
    assert all(not group.waits and group.misses == 0 for group in groups_of(model))


class Crossed(nn.Module):
    """k reads another tensor than q and v."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x + 1) + self.v_proj(x)


def test_a_model_that_reads_another_input_gets_its_own_numbers_and_the_group_gives_up() -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(Crossed()), weftlora.PlainLoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    )
    randomise(model)
    x = torch.randn(5, 8)
    with use_reference():
        want = model(x)
    for _ in range(MISSES + 2):
        torch.testing.assert_close(model(x), want)
    assert groups_of(model)[0].misses == MISSES
    assert set(nodes(model).values()) == {"linear"}


def test_an_input_changed_in_place_between_two_members_is_another_input() -> None:
    model = adapted().eval()
    q, k = layer_of(model, "q_proj"), layer_of(model, "k_proj")
    x = torch.randn(1, 3, 32)
    with torch.no_grad():
        q(x)
        x.add_(1)
        got = k(x)
        with use_reference():
            assert torch.allclose(got, k(x), atol=1e-6)


def test_a_forward_that_broke_off_leaves_nothing_that_the_next_one_could_take() -> None:
    model = adapted()
    want = step(model)
    with pytest.raises(RuntimeError, match="stop"):
        fail_at(model, "k_proj")
    assert_close(step(model), want, 0)


def fail_at(model: nn.Module, end: str) -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("stop")

    hook = layer_of(model, end).register_forward_pre_hook(stop)
    try:
        model(**FAMILIES["llama"].batch())
    finally:
        hook.remove()


def test_a_model_can_be_copied_in_the_middle_of_a_forward() -> None:
    model = adapted().eval()
    x = torch.randn(1, 3, 32)
    layer_of(model, "q_proj")(x)  # k and v wait
    twin = copy.deepcopy(model)
    assert all(not group.waits for group in groups_of(twin))
    assert {id(m) for group in groups_of(twin) for m in group.members}.isdisjoint({id(m) for m in model.modules()})
    assert torch.equal(logits(twin, FAMILIES["llama"].batch()), logits(model, FAMILIES["llama"].batch()))


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_structure
def test_checkpointed_steps_are_the_same(structure: str, use_reentrant: bool) -> None:
    model = adapted(structure, lora_dropout=0.2)
    want = step(model)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_close(step(model), want)


class Writing(nn.Module):
    """A model that writes into what its linears give."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, bias=bias) for _ in range(3))
        self.mlp = Gated()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q *= 2
        k.add_(q)
        v[..., 0] = 0
        h = self.mlp(k * v)
        h += x
        return h


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8)])
def test_a_model_may_write_into_what_the_nodes_give(bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(Writing(bias)), weftlora.PlainLoraConfig(r=2, target_modules=[*MLP, "q_proj", "k_proj", "v_proj"])
    )
    randomise(model)
    x = torch.randn(shape)
    for switches in ({}, {"groups": False, "mlp": False}):
        with switched(**switches):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
        got = [y.detach(), *(p.grad.clone() for p in trainable(model).values())]
        with use_reference():
            model.zero_grad()
            want = model(x)
            want.square().sum().backward()
        for mine, theirs in zip(got, [want, *(p.grad for p in trainable(model).values())], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_copies_that_data_parallel_makes_compute_by_themselves() -> None:
    """replicate copies a module's __dict__: neither group nor MLP may lead back to the original's weights."""
    model = adapted().eval()
    mlp = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp"))
    copied = mlp._replicate_for_data_parallel()
    x, seen = torch.randn(1, 3, 32), []
    for name in MLP:
        twin = getattr(mlp, name)._replicate_for_data_parallel()
        twin.register_forward_hook(lambda *_, name=name: seen.append(name))
        copied._modules[name] = twin
    got = copied(x)
    assert seen == MLP  # its own members computed it
    torch.testing.assert_close(got, mlp(x))
    q = layer_of(model, "q_proj")
    twin = q._replicate_for_data_parallel()
    torch.testing.assert_close(twin(x), q(x))


def test_a_model_with_spanned_mlps_is_copied_pickled_and_given_its_classes_back() -> None:
    import pickle

    base = FAMILIES["llama"].build()
    kind = type(base.model.layers[0].mlp)
    model = adapted(base=base).eval()
    assert isinstance(base.model.layers[0].mlp, kind)
    assert type(base.model.layers[0].mlp).__name__ == kind.__name__
    want = logits(model, FAMILIES["llama"].batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, FAMILIES["llama"].batch()), want)
        assert "mlp" in nodes(twin).values()
    assert type(model.unload().model.layers[0].mlp) is kind


# ---------------------------------------------------------------------- out of the way when asked


@pytest.mark.parametrize("end", ["up_proj", "act_fn", "q_proj", "down_proj.base_layer", "k_proj.weft_site.default"])
def test_hooks_inside_see_what_they_always_see(end: str) -> None:
    model, seen = adapted(), []
    want = step(model)
    module = next(m for n, m in model.named_modules() if n.endswith(end))
    hook = module.register_forward_hook(lambda _, given, out: seen.append((given[0].shape, out.shape)))
    assert_close(step(model), want)
    assert len(seen) == 1
    hook.remove()
    step(model)
    assert len(seen) == 1


def test_a_hook_on_every_module_sees_every_module() -> None:
    model, seen = adapted(), []
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        step(model)
    finally:
        hook.remove()
    layers = {m for m in model.modules() if isinstance(m, WeftLinear)}
    assert layers <= set(seen)
    assert {m.act_fn for n, m in model.named_modules() if n.endswith(".mlp")} <= set(seen)


def test_a_trained_base_is_left_to_autograd() -> None:
    model = adapted()
    weight = layer_of(model, "up_proj").base_layer.weight
    weight.requires_grad_(True)
    assert nodes(model)["base_model.model.model.layers.0.mlp.up_proj"] == "module: the base is trained too"
    assert nodes(model)["base_model.model.model.layers.0.mlp.gate_proj"] == "linear"
    step(model)
    assert weight.grad.norm() > 0


def test_two_active_adapters_add_up() -> None:
    model = adapted().eval()
    model.add_adapter("second", adapter_config("hydra", "llama"))
    randomise(model)
    model.base_model.set_adapter(["default", "second"])
    batch = FAMILIES["llama"].batch()
    both = logits(model, batch)
    with use_reference():
        torch.testing.assert_close(both, logits(model, batch), rtol=1e-5, atol=1e-5)
    assert set(nodes(model).values()) == {"linear"}


def test_disabled_merged_and_unloaded_models_are_the_base_or_the_sum() -> None:
    base, batch = FAMILIES["llama"].build(), FAMILIES["llama"].batch()
    plain = logits(base, batch)
    model = adapted(base=base).eval()
    live = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), plain)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), live, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), live)
    assert torch.equal(logits(model.unload(), batch), plain)


def test_one_mask_per_input_is_what_the_members_of_a_group_share() -> None:
    model = adapted(lora_dropout=0.5, dropout_mask="input")
    x = torch.randn(1, 4, 32)
    ones = torch.ones(1, 4, 32)
    q, k, o = (layer_of(model, end) for end in ("q_proj", "k_proj", "o_proj"))
    for layer in (q, k, o):  # the update of a one reads the mask
        site = layer.site("default")
        site.structure.A.data = torch.eye(32)[: site.structure.A.shape[0]]
        site.structure.B.data = torch.eye(*site.structure.B.shape)
        layer.base_layer.weight.data.zero_()
    a, b, c = q(ones), k(ones), o(ones)
    r = q.site("default").structure.A.shape[0]
    assert torch.equal(a[..., :r], b[..., :r])
    assert not torch.equal(a[..., :r], c[..., :r])
    assert not torch.equal(q(x.sign().abs())[..., :r], a[..., :r])


def test_one_mask_per_input_is_the_same_on_every_path() -> None:
    model = adapted("hydra", lora_dropout=0.3, dropout_mask="input")
    together = step(model)
    with switched(groups=False, mlp=False):
        assert_close(together, step(model))
    with use_reference():
        assert_close(together, step(model))


def test_an_unknown_dropout_mask_is_refused() -> None:
    with pytest.raises(weftlora.ConfigError, match="dropout_mask='inputs'"):
        weftlora.PlainLoraConfig(dropout_mask="inputs")


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6"])
def test_a_model_trained_for_fifty_steps_has_the_loss_curve_of_the_equation(structure: str) -> None:
    """Groups, gated MLPs and dropout masks included, within 1e-4 at every step."""
    curves = []
    for reference in (False, True):
        model = adapted(structure, lora_dropout=0.1)
        optimizer = torch.optim.AdamW(trainable(model).values(), lr=2e-3)
        torch.manual_seed(5)
        losses = []
        with use_reference(reference):
            for _ in range(50):
                optimizer.zero_grad()
                loss = model(**FAMILIES["llama"].batch()).loss
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-1] < curves[0][0]
    assert ((curves[0] - curves[1]).abs() <= 1e-4 * curves[1]).all()
