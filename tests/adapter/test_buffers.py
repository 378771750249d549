"""A schedule does not wait for the device at every step, and still sees every change of what it remembers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dashing import adam, batch, dash, init, loss_of, parameters, steps, train
from torch.utils._python_dispatch import TorchDispatchMode

import weftlora
from weftlora.adapter.buffers import Remembered
from weftlora.host.attach import schedules

T = 2


class Reads(TorchDispatchMode):
    """Counts the operations that bring a number from a tensor into Python."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", [dash, init])
@pytest.mark.parametrize("taken", [0, T + 1])
def test_a_step_without_an_event_reads_no_tensor(taken: int, build: Any) -> None:
    model = build(after=T if taken else 100)
    optimizer = torch.optim.SGD(parameters(model), lr=1e-2)
    train(model, taken + 1, optimizer)
    loss_of(model, batch(0)).backward()
    with Reads() as reads:
        optimizer.step()
    assert steps(model) == taken + 2
    assert reads.count == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.add_(3),
        lambda t: t.copy_(torch.tensor(8)),
        lambda t: torch.nn.Module.load_state_dict(holder(t), {"t": torch.tensor(8)}),
    ],
    ids=["in place", "copied", "loaded"],
)
def test_a_change_by_anybody_is_seen(change: Any) -> None:
    tensor, known = torch.tensor(5), Remembered(int)
    assert known.read(tensor) == 5
    change(tensor)
    assert known.read(tensor) == 8
    assert known.read(torch.tensor(9)) == 9  # another tensor in its place


def holder(tensor: torch.Tensor) -> torch.nn.Module:
    module = torch.nn.Module()
    module.register_buffer("t", tensor)
    return module


def test_a_tensor_of_inference_mode_is_read_every_time() -> None:
    known = Remembered(int)
    with torch.inference_mode():
        tensor = torch.tensor(1)
        assert known.read(tensor) == 1
        tensor.add_(1)
    assert known.read(tensor) == 2


def test_a_copy_of_the_model_remembers_for_itself() -> None:
    model = dash(after=T)
    train(model, 1)
    other = copy.deepcopy(model)
    train(other, 3, adam(other))
    assert [s.steps for m in (model, other) for s in schedules(m).values()] == [1, 4]
    assert not weftlora.state_dict(model)["default"]["events"]
    assert len(weftlora.state_dict(other)["default"]["events"]) == 1
