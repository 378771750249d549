"""A choice saves exactly the tensors that it says it saves."""

from __future__ import annotations

from typing import Any

import pytest
from peft import get_peft_model

import weftlora
from families import FAMILIES
from weftlora.adapter.site import Site, build_site
from weftlora.host.attach import schedules
from weftlora.terms.axes import AXES

SIZE = (2, 6, 5)
STRUCTURES: list[Any] = [*(cls() for cls in AXES["structure"].values()), weftlora.Tied(train="tl5")]


def made(**axes: Any) -> Site:
    return build_site(axes.pop("structure", weftlora.Plain()), SIZE, scale=1.0, dropout=0.0, **axes)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_a_structure(structure: Any) -> None:
    names = set(made(structure=structure).structure.state_dict())
    assert names == structure.tensors() <= set(structure.saves)


@pytest.mark.parametrize("axis", ["boost", "start", "ranks", "layers"])
def test_what_the_other_axes_add_to_a_site(axis: str) -> None:
    plain = set(made().state_dict())
    for cls in AXES[axis].values():
        choice: Any = cls([1], gated=True) if cls.takes else cls()  # type: ignore[call-arg]
        added = {name.rpartition(".")[2] for name in set(made(**{axis: choice}).state_dict()) - plain}
        assert added == set(choice.saves), cls


@pytest.mark.parametrize("choice", [weftlora.Uniform(), weftlora.Reallocate()], ids=str)
def test_what_controllers_keep_on_the_first_site(choice: Any) -> None:
    model = get_peft_model(FAMILIES["llama"].build(), weftlora.WeftConfig(ranks=choice, boost=weftlora.Dash()))
    first = schedules(model)["default"].first
    assert first.counters == {"steps"} | set(choice.counts)
    assert not any(site.counters for site in model.modules() if isinstance(site, Site) and site is not first)
