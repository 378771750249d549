"""torch.compile: one graph without breaks, the same numbers, no recompile per layer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounter

import weftlora
from families import FAMILIES, STRUCTURES, Mixer, adapter_config, logits, randomise, trainable
from weftlora.adapted.layer import WeftLinear

every_structure = pytest.mark.parametrize("structure", STRUCTURES)


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def trained(structure: str, base: nn.Module | None = None, **fields) -> PeftModel:
    """A small model, few sites: what is tested is one graph, and tracing takes its time."""
    base = base or FAMILIES["plain"].build()
    targets = ["embed", "q_proj", "v_proj"]  # embed: the first block's input then needs a gradient as all others do
    model = get_peft_model(base, STRUCTURES[structure](r=4, target_modules=targets, **fields))
    randomise(model)
    return model.train()


def one_block(structure: str) -> nn.Module:
    """A base of one block, or of two where blocks share: what the others add is time to trace."""
    base = FAMILIES["plain"].build()
    if not structure.startswith("tied"):
        del base.layers[1:]
    return base


def loss_and_gradients(model: nn.Module, run: nn.Module, family: str = "plain") -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = run(**FAMILIES[family].batch()).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in trainable(model).items()}


@every_structure
def test_a_model_compiles_in_one_graph_to_the_same_loss_and_gradients(structure: str) -> None:
    model = trained(structure)
    loss, gradients = loss_and_gradients(model, model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled_loss, compiled_gradients = loss_and_gradients(model, compiled)
    assert torch.allclose(compiled_loss, loss, atol=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(compiled_gradients[name], gradient, atol=1e-6), name


def test_a_router_is_listened_to_in_a_compiled_graph_before_a_launch() -> None:
    """Dash on a router ranks at the mean gate of the step before, which a controller measures in the forward."""
    ranked = {}
    for compiled in (False, True):
        model = trained("hydra", one_block("hydra"), boost=weftlora.Dash(directions=2, after=1))
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        run(**FAMILIES["plain"].batch()).loss.backward()
        gate = next(m for m in model.modules() if isinstance(m, WeftLinear)).site("default").gate_meter
        mean = gate.mean(3)
        optimizer.step()
        [event] = weftlora.state_dict(model)["default"]["events"]
        ranked[compiled] = mean, {name: site["rate"] for name, site in event["sites"].items()}
    assert ranked[True][0].std() > 0
    assert torch.allclose(ranked[True][0], ranked[False][0], atol=1e-6)
    for name, rate in ranked[True][1].items():
        assert rate == pytest.approx(ranked[False][1][name], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6_fused"])
def test_a_transformers_model_compiles_in_one_graph(structure: str) -> None:
    blocks = 2 if structure.startswith("tied") else 1  # blocks that share nothing are traced alike
    base = FAMILIES["llama"].build(num_hidden_layers=blocks)
    model = get_peft_model(base, adapter_config(structure, "llama")).train()
    randomise(model)
    loss, gradients = loss_and_gradients(model, model, "llama")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled_loss, compiled_gradients = loss_and_gradients(model, compiled, "llama")
    assert torch.allclose(compiled_loss, loss, atol=1e-6)
    assert all(torch.allclose(compiled_gradients[n], g, atol=1e-6) for n, g in gradients.items())


@every_structure
def test_blocks_compiled_one_by_one_do_not_recompile_per_layer(structure: str) -> None:
    base = FAMILIES["plain"].build()
    base.layers.extend(Mixer(32) for _ in range(2))
    model = trained(structure, base)
    expected, _ = loss_and_gradients(model, model)
    counter = CompileCounter()
    for block in model.base_model.model.layers:
        block.compile(backend=counter, fullgraph=True)
    for _ in range(2):
        loss, _ = loss_and_gradients(model, model)
    assert torch.allclose(loss, expected, atol=1e-6)
    owners = 2 if structure.startswith("tied") else 1  # the block that owns the shared tensors, and the others
    assert counter.frame_count == owners


@pytest.mark.parametrize("structure", ["hydra", "tied_tl6"])
def test_another_length_makes_one_dynamic_graph_and_no_more(structure: str) -> None:
    model, counter = trained(structure, one_block(structure)), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for tokens in (3, 5, 7, 11, 13):
        compiled(torch.randn(2, tokens, 12))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("structure", ["hydra", "hydra_Ax", "tied_tl6"])
def test_dropout_and_autocast_compile_without_a_break(structure: str) -> None:
    model = trained(structure, one_block(structure), lora_dropout=0.2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compiled(**FAMILIES["plain"].batch()).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trainable(model).values())


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_backward_applies_the_masks_of_its_forward(backend: str) -> None:
    """The directional derivative is that of differences of the compiled function itself under one seed, in fp64."""
    torch.manual_seed(0)
    model = get_peft_model(
        Mixer(16).double(),
        weftlora.PlainLoraConfig(r=4, lora_dropout=0.3, target_modules=["q_proj", "k_proj", "v_proj"]),
        autocast_adapter_dtype=False,
    ).train()
    randomise(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def value(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(1)
        return compiled(x.requires_grad_()).sin().sum()

    x, v = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    [g] = torch.autograd.grad(value(x), x)
    with torch.no_grad():
        ahead, behind = (x + 1e-6 * v).detach(), (x - 1e-6 * v).detach()
    assert (g * v).sum().item() == pytest.approx(((value(ahead) - value(behind)) / 2e-6).item(), rel=1e-6)


@pytest.mark.slow
def test_switching_adapters_gives_the_new_ones_output() -> None:
    model, batch = trained("plain").eval(), FAMILIES["plain"].batch()
    model.add_adapter("second", weftlora.PlainLoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    compiled = torch.compile(model, backend="eager")
    first = logits(compiled, batch)
    model.set_adapter("second")
    assert torch.equal(logits(compiled, batch), logits(FAMILIES["plain"].build(), batch))
    model.set_adapter("default")
    assert torch.equal(logits(compiled, batch), first)


@pytest.mark.slow
def test_the_inductor_backend_gives_the_same_numbers() -> None:
    model = trained("hydra")
    loss, gradients = loss_and_gradients(model, model)
    compiled_loss, compiled_gradients = loss_and_gradients(model, torch.compile(model, fullgraph=True))
    assert torch.allclose(compiled_loss, loss, atol=1e-5)
    assert all(torch.allclose(compiled_gradients[n], g, atol=1e-5) for n, g in gradients.items())
