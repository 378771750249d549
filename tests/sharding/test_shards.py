"""How parts and wholes belong together; what is refused before anything is sharded."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import weftlora
from weftlora.adapter import shards
from weftlora.adapter.site import build_site
from weftlora.errors import ConfigError, RunError
from weftlora.runs.recipe import Recipe
from weftlora.terms.structure import Structure
from weftlora.train.resuming import with_as_many_rows
from weftlora.train.sharded import check_wrapper

SIZE = (3, 5, 7)  # r, in, out: all of them different


@pytest.mark.parametrize(
    "structure", [weftlora.Plain(), weftlora.Hydra(heads=2), weftlora.Tied()], ids=lambda one: type(one).__name__
)
def test_every_tensor_of_a_term_says_what_its_axes_run_over(structure: Structure) -> None:
    boost, start = weftlora.Dash(directions=4), None
    if not isinstance(structure, (weftlora.Tied, weftlora.Hydra)):
        start = weftlora.Directions()
    site = build_site(structure, SIZE, scale=1.0, dropout=0.0, boost=boost, start=start)
    length = {"in": {5}, "out": {7}, "slots": {3, 4, 6}, "heads": {2}}
    for term in (site.structure, site.boost, site.start):
        if term is None:
            continue
        tensors = dict([*term.named_parameters(), *term.named_buffers()])
        assert tensors.keys() <= term.axes.keys()
        for name, value in tensors.items():
            assert value.dim() == len(term.axes[name]), name
            assert all(n in length[axis] for n, axis in zip(value.shape, term.axes[name], strict=True)), name


def test_what_is_not_split_is_itself() -> None:
    p = nn.Parameter(torch.arange(6.0).view(2, 3))
    assert not shards.is_shard(p)
    assert shards.full(p).data_ptr() == p.data_ptr()
    with shards.edited(p) as value:
        value[1] = 0
    assert p[1].tolist() == [0, 0, 0]
    linear = nn.Linear(2, 2)
    with shards.whole(linear) as stands_for:
        assert not stands_for


def test_a_part_is_given_by_who_asks_or_by_the_first_that_has_it() -> None:
    halves: list[shards.Place] = [((2, 3), (0, 0)), ((2, 3), (2, 0)), ((2, 3), (0, 0)), ((0, 3), (4, 0))]
    assert shards._givers(halves, 0) == {halves[0]: 0, halves[1]: 1}
    assert shards._givers(halves, 2) == {halves[0]: 2, halves[1]: 1}
    assert shards._givers(halves, 3) == {halves[0]: 0, halves[1]: 1}


def test_parts_of_a_flat_split_make_the_whole() -> None:
    whole: Tensor = torch.arange(10.0).view(2, 5)
    first, second = (shards._Flat((2, 5), (10,), place, None) for place in (((7,), (0,)), ((3,), (7,))))
    assert torch.cat([first.part(whole), second.part(whole)]).tolist() == whole.flatten().tolist()
    assert not len(shards._Flat((2, 5), (10,), ((0,), (0,)), None).part(whole))


@pytest.mark.parametrize(
    ("version", "original", "refused"), [(1, False, True), (1, True, False), (2, False, False), (2, True, False)]
)
def test_a_wrapper_that_makes_one_parameter_of_frozen_and_trained_ones_is_refused(
    version: int, original: bool, refused: bool
) -> None:
    plugin = SimpleNamespace(fsdp_version=version, use_orig_params=original)
    if not refused:
        check_wrapper(plugin)
        return
    with pytest.raises(ConfigError, match="fsdp_use_orig_params: true"):
        check_wrapper(plugin)


def test_a_wrapper_that_sends_parameters_alone_and_deepspeeds_are_refused() -> None:
    plugin = SimpleNamespace(fsdp_version=2, cpu_ram_efficient_loading=True)
    with pytest.raises(ConfigError, match="fsdp_cpu_ram_efficient_loading: false"):
        check_wrapper(plugin)
    with pytest.raises(ConfigError, match=r"accelerate-fsdp2\.yaml"):
        check_wrapper(None, SimpleNamespace(zero_stage=2))


@pytest.mark.parametrize(("accumulation", "begun", "now", "expected"), [(2, 2, 4, 1), (1, 4, 2, 2), (3, 1, 3, 1)])
def test_as_many_rows_make_a_step_of_another_number_of_processes(
    accumulation: int, begun: int, now: int, expected: int
) -> None:
    recipe = Recipe.read("lora", f"train.accumulation={accumulation}", "out=x")
    before = SimpleNamespace(processes=begun, folder="runs/x")
    assert with_as_many_rows(recipe, before, now).train.accumulation == expected  # type: ignore[arg-type]


def test_processes_that_cannot_share_a_step_are_refused() -> None:
    recipe = Recipe.read("lora", "out=x")
    with pytest.raises(RunError, match="a number of processes that divides 2"):
        with_as_many_rows(recipe, SimpleNamespace(processes=2, folder="runs/x"), 3)  # type: ignore[arg-type]
