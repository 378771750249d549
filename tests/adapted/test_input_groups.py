"""What a group of one input hands from one member to the next: never anything stale, and nothing that outlives its use."""

from __future__ import annotations

import functools
import threading

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weftlora
from families import FAMILIES, adapter_config, randomise, trainable
from weftlora.adapted.fusion import nodes
from weftlora.adapted.layer import WeftLinear
from weftlora.kernel import use_reference

QKV = ["q_proj", "k_proj", "v_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]


class Inputs(nn.Module):
    """q, k and v of one input; `narrow`: k and v read another one, with fewer features."""

    def __init__(self, narrow: bool = False):
        super().__init__()
        self.width = 24 if narrow else 64
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(n, 8) for n in (64, self.width, self.width))

    def forward(self, x: Tensor) -> Tensor:
        other = x if self.width == 64 else x[..., :24]
        return torch.cat([self.q_proj(x), self.k_proj(other), self.v_proj(other)], -1)


def adapted(base: nn.Module, **fields) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(base), weftlora.PlainLoraConfig(r=2, **{"target_modules": QKV, **fields}))
    randomise(model)
    return model.train()


def inside(model: PeftModel) -> nn.Module:
    return model.base_model.model[0]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 64, generator=torch.Generator().manual_seed(1))


def weights_change(model: PeftModel) -> None:
    with torch.no_grad():
        inside(model).k_proj.site("default").structure.B.add_(1.0)


def training_ends(model: PeftModel) -> None:
    model.eval()


def another_adapter(model: PeftModel) -> None:
    model.set_adapter("second")


@pytest.mark.parametrize("change", [weights_change, training_ends, another_adapter])
def test_a_result_from_before_a_change_is_not_taken(change, x: Tensor) -> None:
    model = adapted(Inputs(), lora_dropout=0.5)
    model.add_adapter("second", weftlora.PlainLoraConfig(r=2, target_modules=QKV))
    randomise(model)
    model.train(change is training_ends)
    inside(model).q_proj(x)  # k and v wait
    change(model)
    got = inside(model).k_proj(x)
    with use_reference():
        torch.testing.assert_close(got, inside(model).k_proj(x))


def test_a_result_from_outside_autocast_is_not_taken_inside(x: Tensor) -> None:
    model = adapted(Inputs())
    inside(model).q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert inside(model).k_proj(x).dtype == torch.bfloat16


def test_a_forward_that_broke_off_frees_its_graph() -> None:
    """A smaller batch is tried after the memory ran out: nothing of the larger one may be kept for members never called."""
    model = get_peft_model(FAMILIES["llama"].build(), adapter_config("plain", "llama"))
    last = [m for n, m in model.named_modules() if n.endswith("k_proj") and isinstance(m, WeftLinear)][-1]

    def stop(*_: object) -> None:
        assert last.group.waits
        raise RuntimeError("stop")

    last.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stop"):
        model(**FAMILIES["llama"].batch())
    assert not last.group.waits


def test_threads_never_get_each_others_results() -> None:
    model = adapted(Inputs()).eval()
    inputs = [torch.randn(3, 64) for _ in range(4)]
    with use_reference():
        want = [model(x).detach() for x in inputs]
    wrong: list[int] = []

    def run(i: int) -> None:
        for _ in range(50):
            got = model(inputs[i])
            if not torch.allclose(got, want[i], atol=1e-5):
                wrong.append(i)
            inside(model).q_proj.group.misses = 0  # or the group would give up, and nothing be tried

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_linears_of_different_widths_are_no_group(x: Tensor) -> None:
    model = adapted(Inputs(narrow=True))
    with use_reference():
        want = model(x)
    torch.testing.assert_close(model(x), want)
    assert set(nodes(model).values()) == {"linear", "group"}


def test_under_autocast_the_input_is_cast_once_for_all_members(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model, casts, cast = adapted(Inputs()), [], WeftLinear.cast_input
    monkeypatch.setattr(WeftLinear, "cast_input", lambda self, x: (casts.append(1), cast(self, x))[1])
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert len(casts) == 1


# ---------------------------------------------------------------------- one mask per input


def bits_of(model: PeftModel, x: Tensor, adapter: str = "default") -> Tensor:
    """The mask that q and k read x through in one forward."""
    found = []
    for layer in (inside(model).q_proj, inside(model).k_proj):
        layer(x)
        found.append(layer._mask(adapter, x, x))
    assert torch.equal(found[0], found[1])
    return found[0]


def test_the_same_input_has_another_mask_in_the_next_forward(x: Tensor) -> None:
    model = adapted(Inputs(), lora_dropout=0.5, dropout_mask="input")
    assert not torch.equal(bits_of(model, x), bits_of(model, x))


def test_every_adapter_has_a_mask_of_its_own_probability() -> None:
    model = adapted(Inputs(), lora_dropout=0.1, dropout_mask="input")
    model.add_adapter(
        "second", weftlora.PlainLoraConfig(r=2, lora_dropout=0.9, dropout_mask="input", target_modules=QKV)
    )
    model.base_model.set_adapter(["default", "second"])
    x = torch.ones(64, 64)
    for adapter, p in (("default", 0.1), ("second", 0.9)):
        share = sum(byte.bit_count() for byte in bits_of(model, x, adapter).tolist()) / x.numel()
        assert abs(share - p) < 0.03


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_draws_the_masks_of_its_forward(use_reentrant: bool) -> None:
    """BERT's q, k and v read what checkpointing hands in, the very same tensor in the forward and in the recomputation."""

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        torch.manual_seed(3)
        model(**FAMILIES["bert"].batch()).loss.backward()
        return {n: p.grad.clone() for n, p in trainable(model).items()}

    config = adapter_config("plain", "bert", lora_dropout=0.3, dropout_mask="input")
    model = get_peft_model(FAMILIES["bert"].build(), config)
    randomise(model)
    model.train()
    want = gradients()
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for name, g in gradients().items():
        torch.testing.assert_close(g, want[name], msg=name)


# ---------------------------------------------------------------------- gated MLPs that are called or changed in other ways


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(64, 12), nn.Linear(64, 12), nn.Linear(12, 8)
        self.act_fn = nn.SiLU()

    def forward(self, hidden):
        return self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))


def twice(forward):
    """A decorator whose source, as `inspect` finds it, is that of what it decorates."""

    @functools.wraps(forward)
    def doubled(self, x):
        return 2 * forward(self, x)

    return doubled


class Decorated(Gated):
    @twice
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Patched(Gated):
    forward = twice(Gated.forward)


def test_the_input_may_be_given_by_name(x: Tensor) -> None:
    model = adapted(Gated(), target_modules=MLP)
    torch.testing.assert_close(inside(model)(hidden=x), inside(model)(x))


@pytest.mark.parametrize("kind", [Decorated, Patched])
def test_a_decorated_forward_is_called(kind: type[Gated], x: Tensor) -> None:
    model = adapted(kind(), target_modules=MLP)
    assert "mlp" not in nodes(model).values()
    with use_reference():
        want = model(x)
    torch.testing.assert_close(model(x), want)


def test_a_forward_put_in_place_of_the_classs_later_is_called(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(Gated(), target_modules=MLP)
    before = model(x)
    assert set(nodes(model).values()) == {"mlp"}
    monkeypatch.setattr(Gated, "forward", twice(Gated.forward))
    torch.testing.assert_close(model(x), 2 * before)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_can_be_saved(x: Tensor, tmp_path) -> None:
    model = adapted(Inputs()).eval()
    torch.jit.save(torch.jit.trace(model, (x,)), tmp_path / "traced")
    torch.testing.assert_close(torch.jit.load(tmp_path / "traced")(x), model(x))
