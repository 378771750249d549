"""Small adapted models and training loops for the tests of schedules.

model = dash(after=3)                    # two linear modules, Dash slots on both
train(model, 5)                          # a bare loop: no call of weftlora in it
steps(model), launched(model)            # 5, True
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

import weftlora
from weftlora.adapted.layer import WeftLinear
from weftlora.adapter.site import Site
from weftlora.schedule.schedule import Schedule
from weftlora.terms.boost.dash import DashTerm
from weftlora.terms.start.directions import DirectionsTerm

IN, HIDDEN, OUT = 6, 8, 5


class Net(nn.Module):
    """Two linear modules; a wide one and a tall one. `twice` calls the first two times per forward."""

    def __init__(self, twice: bool = False):
        super().__init__()
        self.first, self.second = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, OUT)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.second(h + torch.tanh(self.first(-x)) if self.twice else h)


def dash(after: Any = 3, *, net: Callable[[], nn.Module] = Net, seed: int = 0, **fields: Any) -> PeftModel:
    """A seeded Net with r = 2 and three Dash slots per site."""
    torch.manual_seed(seed)
    given = {"r": 2, "directions": 3, "target_modules": ["first", "second"], **fields}
    return get_peft_model(net(), weftlora.LoraDashConfig(after=after, **given))


def init(after: Any = 3, *, net: Callable[[], nn.Module] = Net, seed: int = 0, **fields: Any) -> PeftModel:
    """A seeded Net with r = 2 that starts anew along directions; with `directions=3`, LoRA-TSD."""
    torch.manual_seed(seed)
    make = weftlora.LoraTsdConfig if "directions" in fields else weftlora.LoraInitConfig
    return get_peft_model(net(), make(after=after, **{"r": 2, "target_modules": ["first", "second"], **fields}))


def parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def adam(model: nn.Module, **fields: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters(model), lr=1e-2, **fields)


def batch(step: int, rows: int = 8) -> Tensor:
    """The inputs of one step, the same for everybody who takes that step."""
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    x = x.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    target = x[:, :OUT].cos()
    return (model(x) - target).square().mean()


def train(model: nn.Module, count: int, optimizer: torch.optim.Optimizer | None = None, start: int = 0) -> None:
    """`count` steps of a bare loop, from step `start` on."""
    optimizer = optimizer or adam(model)
    for step in range(start, start + count):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()


def sites(model: nn.Module, adapter: str = "default") -> dict[str, Site]:
    """Module name → site of `adapter`."""
    layers = [m for m in model.modules() if isinstance(m, WeftLinear) and adapter in m.weft_site]
    return {m.module_name: m.site(adapter) for m in layers}


def terms(model: nn.Module, adapter: str = "default") -> list[DashTerm]:
    return [site.boost for site in sites(model, adapter).values()]  # type: ignore[misc]


def schedule(model: nn.Module, adapter: str = "default") -> Schedule:
    return next(s.schedule for s in sites(model, adapter).values() if s.schedule is not None)  # type: ignore[return-value]


def steps(model: nn.Module, adapter: str = "default") -> int:
    return schedule(model, adapter).steps


def launched(model: nn.Module, adapter: str = "default") -> bool:
    """Whether all sites are launched; they must agree."""
    flags = {bool(term.launched) for term in terms(model, adapter)}
    assert len(flags) == 1
    return flags.pop()


def starts(model: nn.Module, adapter: str = "default") -> list[DirectionsTerm]:
    return [site.start for site in sites(model, adapter).values()]  # type: ignore[misc]


def switched(model: nn.Module, adapter: str = "default") -> bool:
    """Whether all sites are switched; they must agree."""
    flags = {bool(term.launched) for term in starts(model, adapter)}
    assert len(flags) == 1
    return flags.pop()


def events(model: nn.Module, adapter: str = "default") -> dict[str, dict[str, Any]]:
    """What happened to the adapter, by kind; each kind once."""
    found = {e["event"]: e for e in schedule(model, adapter).events}
    assert len(found) == len(schedule(model, adapter).events)
    return found


def event(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """The one event of the adapter: its launch."""
    [only] = schedule(model, adapter).events
    assert only["event"] == "dash_launch"
    return only


def launch_step(model: nn.Module, adapter: str = "default") -> int:
    return event(model, adapter)["step"]


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that the adapter holds, buffers too."""
    return {n: t.clone() for n, t in model.state_dict().items() if ".weft_site." in n}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal bit for bit, name by name."""
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n], other[n])] == []
