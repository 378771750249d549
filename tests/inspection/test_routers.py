"""Routers with a known mix: what is counted, what padding does, how domains are told apart."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from looking import demo_batch, train_a_little
from peft import get_peft_model

import weftlora
from families import FAMILIES
from weftlora.adapted.layer import WeftLinear
from weftlora.adapted.routing import Seen, counted
from weftlora.errors import AdapterError, ConfigError
from weftlora.inspection.record import SiteUsage, Usage
from weftlora.inspection.routers import usage


def model(**fields: Any) -> torch.nn.Module:
    config = weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["q_proj"], **fields)
    return get_peft_model(FAMILIES["llama"].build(), config)


def batch(tokens: list[int], masked: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones(1, len(tokens), dtype=torch.long)
    mask[0, len(tokens) - masked :] = 0
    return {"input_ids": torch.tensor([tokens]), "attention_mask": mask}


def routers(adapted: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [m.site("default").structure.router for m in adapted.modules() if isinstance(m, WeftLinear)]


def test_figures_of_a_planted_mix():
    seen = Seen(4)
    seen.add(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]))
    seen.add(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0]]))
    found = usage(seen)
    assert found.tokens == 4
    assert found.mean == pytest.approx([0.1875, 0.1875, 0.3125, 0.3125])
    assert found.entropy == pytest.approx((0.5 + 0 + 1 + 0) / 4)  # ln 2 / ln 4 is a half
    assert found.balance == pytest.approx(-sum(p * math.log(p) for p in found.mean) / math.log(4))
    assert found.top1 == [0.5, 0.0, 0.25, 0.25]  # ties go to the lowest index


def test_a_router_that_divides_tokens_evenly_is_balanced_but_sharp():
    seen = Seen(2)
    seen.add(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert (seen.sharpness, seen.balance) == (0.0, pytest.approx(1.0))


def test_a_router_of_zeros_mixes_evenly():
    adapted = model()
    for router in routers(adapted):
        router.data.zero_()
    found = weftlora.inspect(adapted, inputs=[batch([5, 6, 7, 8])], spectra=0).routers
    for site in found.sites:
        assert site.whole.mean == pytest.approx([0.5, 0.5])
        assert (site.whole.tokens, site.whole.entropy) == (4, pytest.approx(1.0))
        assert site.whole.top1 == [1.0, 0.0]


def test_padding_is_notcounted():
    adapted = model()
    whole = weftlora.inspect(adapted, inputs=[batch([5, 6, 7])], spectra=0).routers
    padded = weftlora.inspect(adapted, inputs=[batch([5, 6, 7, 0, 0, 0], masked=3)], spectra=0).routers
    for one, other in zip(whole.sites, padded.sites, strict=True):
        assert one.whole.tokens == other.whole.tokens == 3
        assert one.whole.mean == pytest.approx(other.whole.mean, abs=1e-5)


def test_padding_is_not_counted_where_a_site_sees_flattened_tokens():
    omega = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.25, 0.75]])
    mask = torch.tensor([[1, 0], [0, 1]])
    assert counted(omega, [mask]).tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert counted(omega.view(2, 2, 2), [mask]).tolist() == [[1.0, 0.0], [0.25, 0.75]]
    assert len(counted(omega[:3], [mask])) == 3  # no place of these tokens in the mask is known


@pytest.mark.parametrize("more", [0, 2])
def test_padding_of_either_side_of_an_encoder_decoder_is_notcounted(more: int):
    adapted = get_peft_model(FAMILIES["t5"].build(), weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["q", "k"]))
    ids = torch.tensor([[5, 6, 7, 0, 0, 0]])
    labels = torch.tensor([[8, 9, -100, -100, -100, -100] + more * [-100]])
    inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
    found = weftlora.inspect(adapted, inputs=[inputs], spectra=0).routers
    assert {
        (site.site.split(".")[0], "EncDec" in site.site and site.site[-1] == "k", site.whole.tokens)
        for site in found.sites
    } == {("encoder", False, 3), ("decoder", False, 2), ("decoder", True, 3)}
    assert labels.shape[1] == 6 + more  # the batch given is as it was


def test_batches_may_come_from_an_iterator_and_hold_more_than_tensors():
    adapted = model()
    found = weftlora.inspect(adapted, inputs=({"use_cache": False, **batch([5, 6])} for _ in range(3)), spectra=0)
    assert (found.routers.rows, found.routers.sites[0].whole.tokens) == (3, 6)


@pytest.mark.parametrize("given", [{"": []}, [batch([5, 6])]])
def test_rows_for_an_adapter_without_routers_are_said_to_be_unused(given: Any):
    plain = get_peft_model(FAMILIES["llama"].build(), weftlora.PlainLoraConfig(r=2))
    assert any("no routers to run" in sentence for sentence in weftlora.inspect(plain, inputs=given).left_out)


def test_every_module_is_left_in_the_mode_it_was_in():
    adapted = model().train()
    adapted.base_model.model.model.layers[0].eval()
    before = [module.training for module in adapted.modules()]
    assert len(set(before)) == 2
    weftlora.inspect(adapted, inputs=[batch([5, 6])], spectra=0)
    assert [module.training for module in adapted.modules()] == before


def test_domains_with_heads_of_their_own_are_apart():
    adapted = model()
    embedding = adapted.get_input_embeddings().weight
    layer = next(m for m in adapted.modules() if isinstance(m, WeftLinear))
    norm = adapted.base_model.model.model.layers[0].input_layernorm
    router = layer.site("default").structure.router
    with torch.no_grad():  # head 1 is for token 5 and head 2 for token 6
        normed = norm(embedding[[5, 6]])
        router.copy_(30 * (normed - normed.mean(0)))
    domains = {"fives": [batch([5, 5, 5])], "sixes": [batch([6, 6, 6])]}
    found = weftlora.inspect(adapted, inputs=domains, spectra=0).routers
    first = found.sites[0]
    assert found.domains == ["fives", "sixes"]
    assert first.domains["fives"].top1 == [1.0, 0.0]
    assert first.domains["sixes"].top1 == [0.0, 1.0]
    assert first.apart("fives") == pytest.approx(0.5, abs=0.02)
    assert first.whole.balance == pytest.approx(1.0, abs=0.01)
    assert first.whole.tokens == 6


def test_apart_is_half_the_distance_of_mean_gates():
    def used(*mean: float) -> Usage:
        return Usage(1, list(mean), 0.0, 0.0, list(mean))

    site = SiteUsage("q", used(0.5, 0.5), {"one": used(0.9, 0.1), "same": used(0.5, 0.5)})
    assert (site.apart("one"), site.apart("same")) == (pytest.approx(0.4), 0.0)


def test_the_measured_gate_is_the_one_that_norms_are_taken_at():
    adapted = train_a_little(weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["q_proj"]), steps=2)
    inputs = [demo_batch(2)]
    found = weftlora.inspect(adapted, inputs=inputs, spectra=0)
    assert {site.norm_kind for site in found.sites} == {"mean gate"}
    for site, used in zip(found.sites, found.routers.sites, strict=True):
        term = next(m for m in adapted.modules() if getattr(m, "module_name", None) == site.site).site("default")
        heads = term.structure.B.unflatten(1, (2, -1))
        mixed = torch.einsum("onr,n->or", heads, torch.tensor(used.whole.mean)) @ term.structure.A * term.scale
        assert site.norm == pytest.approx(float(mixed.norm()), rel=1e-4)


def test_an_idle_adapter_has_no_routers_to_run():
    adapted = model()
    adapted.add_adapter("other", weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"]))
    adapted.set_adapter("other")
    with pytest.raises(AdapterError, match="make it the active adapter"):
        weftlora.inspect(adapted, "default", inputs=[batch([5, 6])])


def test_rows_that_are_named_need_none_of_the_runs_own_files(hydra_run: Path, tmp_path: Path):
    folder = shutil.copytree(hydra_run, tmp_path / "run")
    record = json.loads((folder / "run.json").read_text())
    record["recipe"]["data"] |= {"train": "gone.jsonl", "validation": "gone too.jsonl", "limit": 1}
    (folder / "run.json").write_text(json.dumps(record))
    rows = [{"prompt": f"ask {n}", "completion": " tell"} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert weftlora.inspect(folder, data=tmp_path / "rows.jsonl", spectra=0).routers.rows == 3
    without = weftlora.inspect(folder, spectra=0)
    assert without.routers is None
    assert any("gone.jsonl does not exist" in sentence for sentence in without.left_out)


@pytest.mark.filterwarnings("error:data.max_length")
def test_a_run_is_read_at_the_length_it_was_trained_at(hydra_run: Path):
    assert json.loads((hydra_run / "run.json").read_text())["data"]["max_length"] == 256  # of 512, by default
    assert weftlora.inspect(hydra_run, rows=1, spectra=0).routers is not None
    weftlora.evaluate(hydra_run, split="validation", limit=1)


def test_data_and_inputs_go_with_what_they_are_for():
    with pytest.raises(ConfigError, match="data does not go with a model in memory"):
        weftlora.inspect(model(), data="rows.jsonl")
    with pytest.raises(ConfigError, match="inputs does not go with a folder"):
        weftlora.inspect("somewhere", inputs=[batch([5])])


# ---------------------------------------------------------------------- what the heads give, by domain


def planted_heads() -> torch.nn.Module:
    """Heads that give something."""
    torch.manual_seed(0)
    adapted = model()
    for layer in (m for m in adapted.modules() if isinstance(m, WeftLinear)):
        term = layer.site("default").structure
        torch.nn.init.normal_(term.A, std=1.0)
        torch.nn.init.normal_(term.B)
    return adapted


def test_head_outputs_are_the_mean_of_what_each_head_gives_and_their_axes_those_of_a_plain_svd() -> None:
    adapted = planted_heads()
    domains = {"fives": [batch([5, 5, 5, 0], masked=1), batch([5, 6])], "eights": [batch([8, 8, 9]), batch([9, 8])]}
    seen: dict[str, list[torch.Tensor]] = {}
    layer = next(m for m in adapted.modules() if isinstance(m, WeftLinear))
    handle = layer.register_forward_pre_hook(lambda _, given: seen.setdefault("x", []).append(given[0].detach()))
    for given in (one for each in domains.values() for one in each):
        adapted.eval()(**given)
    handle.remove()
    x = torch.stack([t[0, : 3 if n in (0, 2) else 2].mean(0) for n, t in enumerate(seen["x"])]).double()
    term, scale = layer.site("default").structure, layer.site("default").scale
    heads = term.B.detach().double().unflatten(1, (2, 2))
    given = torch.stack([scale * x @ term.A.detach().double().T @ heads[:, n].T for n in range(2)], 1)
    apart = (given - given.mean((0, 1))).flatten(0, 1)
    sigma = torch.linalg.svdvals(apart)
    within = given - given.mean(0)
    between = sum(2 * part.mean(0).square().sum() for part in (within[:2], within[2:])) / within.square().sum()
    found = weftlora.inspect(adapted, inputs=domains, spectra=0).routers.outputs
    assert [each.site for each in found] == [m.module_name for m in adapted.modules() if isinstance(m, WeftLinear)]
    first = found[0]
    assert first.explained == pytest.approx((sigma[:2].square() / sigma.square().sum()).tolist(), rel=1e-4)
    assert first.between_heads == pytest.approx(float(1 - within.square().sum() / apart.square().sum()), rel=1e-4)
    assert first.between_domains == pytest.approx(float(between), rel=1e-4)
    assert first.chance == pytest.approx(1 / 3)
    assert [(p.domain, p.head) for p in first.points] == [
        (d, n) for d in ("fives", "fives", "eights", "eights") for n in (1, 2)
    ]
    distance = torch.cdist(torch.tensor([[p.x, p.y] for p in first.points]).double(), torch.zeros(1, 2).double())
    assert float(distance.square().sum()) == pytest.approx(float(sigma[:2].square().sum()), rel=1e-4)


def test_domains_that_read_alike_are_not_apart_and_heads_of_zeros_give_nothing() -> None:
    same = {"one": [batch([5, 6]), batch([7, 8])], "other": [batch([5, 6]), batch([7, 8])]}
    [first, *_] = weftlora.inspect(planted_heads(), inputs=same, spectra=0).routers.outputs
    assert first.between_domains == pytest.approx(0, abs=1e-12)
    assert weftlora.inspect(model(), inputs=same, spectra=0).routers.outputs == []
    [alone, *_] = weftlora.inspect(planted_heads(), inputs=[batch([5]), batch([6])], spectra=0).routers.outputs
    assert (alone.between_domains, alone.chance) == (None, None)
