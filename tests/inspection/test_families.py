"""Every family of base models: its blocks and modules are named, its folder alone says the same, its page can be made."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import weftlora
from families import FAMILIES, adapter_config, randomise
from weftlora.report.inspection.elements import movement
from weftlora.report.inspection.page import page


@pytest.mark.parametrize("structure", ["plain", "hydra", "tied_tl6_fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_inspected_with_and_without_its_base(family: str, structure: str, tmp_path: Path):
    row = FAMILIES[family]
    model = get_peft_model(row.build(), adapter_config(structure, family))
    randomise(model)
    model.save_pretrained(str(tmp_path))
    live, bare = weftlora.inspect(model, inputs=[row.batch()], spectra=1), weftlora.inspect(tmp_path, base=False)
    assert (live.routers is not None) == (structure == "hydra")
    assert live.parameters.saved_modules == bare.parameters.saved_modules
    assert bool(row.modules_to_save) == bool(live.parameters.saved_modules)
    if structure != "hydra":  # whose norm is taken at another gate without rows
        norms = {site.site: site.norm for site in live.sites}
        assert {s.site: s.norm for s in bare.sites} == pytest.approx(
            {s.site: norms[s.site] for s in bare.sites}, rel=1e-4
        )
    _, grid = movement(live)
    assert len(grid.flat) == len(live.sites)
    assert len(set(grid.blocks)) == len(grid.blocks)
    assert len(set(grid.modules)) == len(grid.modules)
    assert page(live)
    assert page(bare)


def test_combined_axes_are_read_from_the_folder_alone(tmp_path: Path):
    config = weftlora.WeftConfig(
        structure=weftlora.Hydra(heads=2, router_input="Ax"),
        boost=weftlora.Dash(directions=2, after=1),
        ranks=weftlora.Reallocate(score="random", first=1, every=1, max_rounds=1),
        r=3,
        target_modules=["q_proj", "v_proj"],
    )
    model = get_peft_model(FAMILIES["llama"].build(), config)
    weftlora.attach(model, total_steps=2)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2))
    for _ in range(2):
        model(**FAMILIES["llama"].batch()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(tmp_path))
    live, bare = weftlora.inspect(model, spectra=0), weftlora.inspect(tmp_path, base=False)
    assert bare.method == "Hydra(heads=2) + Dash(directions=2) + Reallocate"
    assert {s.site: (s.rank, s.max_rank, s.trained) for s in bare.sites} == {
        s.site: (s.rank, s.max_rank, s.trained) for s in live.sites
    }
    assert {s.site: s.norm for s in bare.sites} == pytest.approx({s.site: s.norm for s in live.sites}, rel=1e-5)
    assert {d.site: d.chosen for d in bare.directions} == {d.site: d.chosen for d in live.directions}
    assert live.history is not None
    assert bare.history is None
    assert page(live)
