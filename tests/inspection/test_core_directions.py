"""`weftlora.directions` on adapters in memory: planted answers come back, and nothing in the model changes."""

import copy
import json
import random
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import weftlora
from families import FAMILIES, adapter_config, randomise
from weftlora import change_rates
from weftlora.adapted.layer import WeftLinear
from weftlora.adapted.updates import Update
from weftlora.errors import AdapterError, ConfigError, ModelError
from weftlora.inspection.core_directions import DirectionsReport, Question, SiteDirections, measure

Chosen = Callable[[int], Sequence[int]]  # number of a site's core directions → which ones to move, fastest first
TARGETS = {"llama": ["q_proj", "k_proj", "gate_proj", "down_proj"], "gpt2": ["c_attn", "c_fc", "c_proj"]}


def last_but(k: int) -> list[int]:
    """Four directions near the small end, not in their order."""
    return [k - 3, k - 2, k - 7, k - 5]


def dense_svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.linalg.svd(w.double(), full_matrices=False)


def moves(w: Tensor, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """B [out, r], A [r, in] with B A = Σ 0.9·0.8ʲ·σ_k u_k v_kᵀ over the chosen k: change rates 0.9, 0.72, …"""
    u, sigma, vt = dense_svd(w)
    k = list(chosen)
    amount = sigma[k] * 0.9 * 0.8 ** torch.arange(len(k), dtype=torch.float64)
    return u[:, k] * amount, vt[k]


def layers_of(model: nn.Module) -> dict[str, WeftLinear]:
    return {m.module_name: m for m in model.modules() if isinstance(m, WeftLinear)}


def plant(model: nn.Module, chosen: Chosen, adapter: str = "default") -> None:
    """Make the ΔW of every site of a Plain adapter move the chosen directions."""
    for layer in layers_of(model).values():
        w, site = layer.base_matrix(), layer.site(adapter)
        b, a = moves(w, chosen(min(w.shape)))
        with torch.no_grad():
            site.structure.A.copy_(a)
            site.structure.B.copy_(b / site.scale)


def adapted(family: str = "llama", **fields) -> nn.Module:
    return get_peft_model(
        FAMILIES[family].build(), weftlora.PlainLoraConfig(r=4, target_modules=TARGETS[family], **fields)
    )


def fine_tuned(folder: Path, family: str, chosen: Chosen) -> Path:
    """The whole base with the chosen directions of every target moved, in a folder."""
    base = FAMILIES[family].build()
    names = [n for n, _ in base.named_modules() if n.rpartition(".")[2] in TARGETS[family]]
    for name in names:
        weight = base.get_submodule(name).weight
        w = weight.T if family == "gpt2" else weight
        b, a = moves(w.detach(), chosen(min(w.shape)))
        with torch.no_grad():
            w.add_((b @ a).to(w))
    base.save_pretrained(folder)
    return folder


def sites_of(report: DirectionsReport, adapter: int = 0) -> dict[str, SiteDirections]:
    return {site.site: site for site in report.adapters[adapter].sites}


# ---------------------------------------------------------------------- the spectrum


@pytest.mark.parametrize("family", TARGETS)
def test_planted_directions_come_back_in_order_with_their_numbers(family: str):
    model = adapted(family)
    plant(model, last_but)
    report = weftlora.directions(model, directions=4)
    assert report.adapters[0].phase == "plain"
    assert sites_of(report).keys() == layers_of(model).keys()
    for name, site in sites_of(report).items():
        w = layers_of(model)[name].base_matrix()
        assert site.shape == tuple(w.shape)
        assert site.index == last_but(min(w.shape)), name
        torch.testing.assert_close(torch.tensor(site.rate), torch.tensor([0.9, 0.72, 0.576, 0.4608]), rtol=1e-4, atol=0)
        sigma = dense_svd(w)[1][site.index]
        torch.testing.assert_close(torch.tensor(site.sigma).double(), sigma, rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.tensor(site.moved).double(), sigma * torch.tensor(site.rate).double(), rtol=1e-4, atol=0
        )


@pytest.mark.parametrize("structure", ["plain", "tied_tl6", "tied_tl5_shape"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_full_spectrum_is_the_dense_one(family: str, structure: str):
    model = get_peft_model(FAMILIES[family].build(), adapter_config(structure, family))
    randomise(model)
    for name, site in sites_of(weftlora.directions(model, full=True)).items():
        layer = layers_of(model)[name]
        u, sigma, vt = dense_svd(layer.base_matrix())
        d = (u.T @ layer.site("default").delta_weight().double() @ vt.T).diagonal().abs()
        assert site.spectrum is not None
        torch.testing.assert_close(torch.tensor(site.spectrum.sigma).double(), sigma, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(torch.tensor(site.spectrum.rate).double(), d / sigma, rtol=1e-3, atol=1e-5)


def test_without_full_only_the_first_are_kept():
    model = adapted()
    plant(model, last_but)
    site = next(iter(sites_of(weftlora.directions(model, directions=2)).values()))
    assert (len(site.index), site.spectrum) == (2, None)


def test_an_adapter_that_has_not_moved_has_no_directions():
    report = weftlora.directions(adapted(), directions=4)
    assert all(site.index == [] and site.amplification.factor is None for site in report.adapters[0].sites)
    json.dumps(report.record(), allow_nan=False)


# ---------------------------------------------------------------------- recall and accuracy


@pytest.mark.parametrize("family", TARGETS)
def test_a_full_fine_tune_along_the_predicted_directions_gives_recall_1(family: str, tmp_path: Path):
    model = adapted(family)
    plant(model, last_but)
    report = weftlora.directions(model, against=fine_tuned(tmp_path, family, last_but), directions=4)
    for site in report.adapters[0].sites:
        assert site.hits is not None
        assert (site.hits["predicted"].recall, site.hits["predicted"].accuracy) == (1.0, 1.0), site.site


def partly(k: int) -> list[int]:
    """Eight directions: the second of `last_but` first, then another, then the first, then others of which one is its third."""
    return [k - 2, 0, k - 3, 1, 2, k - 7, 3, 4]


def test_recall_and_accuracy_are_counted_as_defined(tmp_path: Path):
    """s = 4: of the true top 2 (k−2 and 0) one is predicted; of the four predicted three are in the true top 8."""
    model = adapted()
    plant(model, last_but)
    report = weftlora.directions(model, against=fine_tuned(tmp_path, "llama", partly), directions=4)
    for site in report.adapters[0].sites:
        assert site.hits is not None
        assert (site.hits["predicted"].recall, site.hits["predicted"].accuracy) == (0.5, 0.75), site.site
        assert (site.hits["top"].recall, site.hits["top"].accuracy) == (0.5, 1.0)
        assert (site.hits["bottom"].recall, site.hits["bottom"].accuracy) == (0.5, 0.5)
        assert (site.hits["chance"].recall, site.hits["chance"].accuracy) == (4 / site.able, 8 / site.able)
    means = report.adapters[0].mean_hits()
    assert means is not None
    assert means["predicted"].accuracy == 0.75


def test_against_a_later_adapter_is_the_same_as_against_its_merged_model(tmp_path: Path):
    model = adapted()
    plant(model, last_but)
    model.add_adapter("later", weftlora.PlainLoraConfig(r=8, target_modules=TARGETS["llama"]))
    plant(model, partly, "later")
    by_adapter = weftlora.directions(model, "default", against="later", directions=4)
    by_model = weftlora.directions(model, "default", against=fine_tuned(tmp_path, "llama", partly), directions=4)
    assert [site.hits for site in by_adapter.adapters[0].sites] == [site.hits for site in by_model.adapters[0].sites]


def test_launched_directions_are_the_prediction():
    """Whatever the update has become since: a Dash adapter is held to what it launched."""
    model = launched(lambda k: [0, 1, 2, 3], gains=[0.0] * 4)
    plant(model, last_but)
    report = weftlora.directions(model, against="default", directions=4)
    assert report.adapters[0].phase == "launched"
    for site in report.adapters[0].sites:
        assert site.launched == [0, 1, 2, 3]
        assert site.index == last_but(site.able)
        assert site.hits is not None
        assert site.hits["predicted"].recall == 0.0


def random_case(seed: int) -> DirectionsReport:
    """A random site and a random truth: nothing can be predicted."""
    torch.manual_seed(seed)
    w, delta = torch.randn(24, 16), torch.randn(24, 16)
    update = Update(torch.randn(2, 16).double(), torch.randn(24, 2).double())
    question = Question(directions=4, seed=seed)
    return measure(
        {"q": lambda: (w, "in memory")},
        {"mine": {"q": update}},
        question,
        lambda n, w: change_rates.spectrum(w),
        lambda n: delta,
    )


def test_random_directions_hit_as_often_as_chance_says():
    rows = [random_case(seed).adapters[0].sites[0].hits for seed in range(150)]
    chance = rows[0]["chance"]
    assert (chance.recall, chance.accuracy) == (4 / 16, 8 / 16)
    for measured, expected in (
        ([row["random"].recall for row in rows], chance.recall),
        ([row["random"].accuracy for row in rows], chance.accuracy),
    ):
        assert abs(statistics.mean(measured) - expected) < 4 * statistics.stdev(measured) / len(rows) ** 0.5


def test_the_random_control_is_seeded():
    model = adapted()
    plant(model, last_but)
    hits = [
        weftlora.directions(model, against="default", directions=4, seed=seed).record()["adapters"]
        for seed in (0, 0, 1)
    ]
    kept = [[site["hits"]["random"] for site in row[0]["sites"]] for row in hits]
    assert kept[0] == kept[1] != kept[2]


# ---------------------------------------------------------------------- amplification


def launched(chosen: Chosen, gains: Sequence[float]) -> nn.Module:
    """A Dash adapter whose slots lie along the chosen directions, with these gains."""
    config = weftlora.LoraDashConfig(r=4, directions=len(gains), after=1, target_modules=TARGETS["llama"])
    model = get_peft_model(FAMILIES["llama"].build(), config)
    for layer in layers_of(model).values():
        w, term = layer.base_matrix(), layer.site("default").boost
        spectrum = change_rates.spectrum(w)
        term.launch(change_rates.take(spectrum, w, torch.zeros(min(w.shape)), list(chosen(min(w.shape)))))
        with torch.no_grad():
            term.gain.copy_(torch.tensor(gains))
    return model


def test_amplification_is_what_the_gains_add_on_the_launched_directions():
    gains = [0.5, -0.25, 0.125, 1.0]
    model = launched(last_but, gains)
    plant(model, last_but)
    report = weftlora.directions(model, directions=4)
    for site in report.adapters[0].sites:
        got = site.amplification
        lora = [site_sigma * 0.9 * 0.8**j for j, site_sigma in enumerate(sigma_of(model, site, last_but))]
        assert got.index == last_but(site.able)
        assert got.lora == pytest.approx(lora, rel=1e-4)
        assert got.dash == pytest.approx(gains)
        whole = sum(abs(a + b) for a, b in zip(lora, gains, strict=True))
        assert got.total_over_lora == pytest.approx(whole / sum(map(abs, lora)), rel=1e-4)


def sigma_of(model: nn.Module, site: SiteDirections, chosen: Chosen) -> list[float]:
    w = layers_of(model)[site.site].base_matrix()
    return dense_svd(w)[1][list(chosen(min(w.shape)))].tolist()


def test_the_change_rate_of_a_launched_adapter_includes_its_gains():
    model = launched(last_but, [0.5, 0.5, 0.5, 0.5])  # B is 0: only the gains move W
    for site in weftlora.directions(model, directions=4).adapters[0].sites:
        rates = [0.5 / sigma for sigma in sigma_of(model, site, last_but)]
        expected = sorted(zip(rates, last_but(site.able), strict=True), reverse=True)
        assert site.index == [k for _, k in expected]
        assert site.rate == pytest.approx([rate for rate, _ in expected], rel=1e-4)


@pytest.mark.parametrize("dash", [False, True])
def test_loras_own_factor_is_the_dense_one(dash: bool):
    model = launched(last_but, [0.5, -0.25, 0.125, 1.0]) if dash else adapted()
    randomise(model)
    for name, site in sites_of(weftlora.directions(model)).items():
        layer = layers_of(model)[name]
        w, delta = layer.base_matrix().double(), layer.site("default").delta_weight().double()
        u, _sigma, vt = dense_svd(delta)
        r = 8 if dash else 4
        seen = (u[:, :r].T @ w @ vt[:r].T).norm()
        assert site.amplification.norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert site.amplification.seen == pytest.approx(float(seen), rel=1e-4)
        assert site.amplification.factor == pytest.approx(float(delta.norm() / seen), rel=1e-4)


def switched(lora_alpha: float) -> nn.Module:
    """An adapter right after the switch of LoRA-Init, at every site along last_but."""
    config = weftlora.LoraInitConfig(after=1, r=4, lora_alpha=lora_alpha, target_modules=TARGETS["llama"])
    model = get_peft_model(FAMILIES["llama"].build(), config)
    plant(model, last_but)
    assert weftlora.directions(model).adapters[0].phase == "before the switch"
    model(**FAMILIES["llama"].batch()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
    return model


@pytest.mark.parametrize("lora_alpha", [8, 3])
def test_right_after_a_switch_nothing_is_moved(lora_alpha: float):
    """The frozen slots are part of ΔW: without them it would be all of W along the directions."""
    (adapter,) = weftlora.directions(switched(lora_alpha), directions=4).adapters
    assert adapter.phase == "switched"
    for site in adapter.sites:
        assert site.launched == site.predicted == last_but(site.able)
        assert site.index == site.rate == []
        assert site.amplification.lora == [0.0] * 4
        assert (site.amplification.norm, site.amplification.factor) == (0.0, None)


def test_what_a_switched_adapter_moves_is_measured_with_its_frozen_slots():
    model = switched(3)
    randomise(model, size=0.3)
    for name, site in sites_of(weftlora.directions(model, directions=4, full=True)).items():
        layer = layers_of(model)[name]
        u, sigma, vt = dense_svd(layer.base_matrix())
        delta = layer.site("default").delta_weight().double()
        d = (u.T @ delta @ vt.T).diagonal()
        assert site.spectrum is not None
        assert site.spectrum.rate == pytest.approx((d.abs() / (sigma + 1e-8 * sigma[0])).tolist(), rel=1e-3, abs=1e-5)
        assert site.amplification.lora == pytest.approx(d[last_but(site.able)].tolist(), rel=1e-3, abs=1e-5)
        assert site.amplification.norm == pytest.approx(float(delta.norm()), rel=1e-4)


def test_of_lora_tsd_the_gains_and_the_frozen_slots_are_both_in():
    model = get_peft_model(
        FAMILIES["llama"].build(), weftlora.LoraTsdConfig(after=1, r=4, directions=4, target_modules=TARGETS["llama"])
    )
    plant(model, last_but)
    model(**FAMILIES["llama"].batch()).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0).step()
    for layer in layers_of(model).values():
        layer.site("default").boost.gain.data = torch.tensor([0.5, -0.25, 0.125, 1.0])
    (adapter,) = weftlora.directions(model, directions=4).adapters
    assert adapter.phase == "launched"
    for site in adapter.sites:
        assert site.launched == last_but(site.able)
        assert site.amplification.dash == pytest.approx([0.5, -0.25, 0.125, 1.0])
        assert site.amplification.lora == pytest.approx([0.0] * 4, abs=1e-9)
        norm = layers_of(model)[site.site].site("default").delta_weight().norm()
        assert site.amplification.norm == pytest.approx(float(norm), rel=1e-4)


# ---------------------------------------------------------------------- overlap


def test_overlap_counts_which_rank_is_which(tmp_path: Path):
    model = adapted()
    plant(model, lambda k: [5, 1, 9, 3])
    model.add_adapter("other", weftlora.PlainLoraConfig(r=4, target_modules=TARGETS["llama"]))
    plant(model, lambda k: [1, 5, 0, 3], "other")
    report = weftlora.directions(model, ["default", "other"], directions=4)
    (overlap,) = report.overlaps
    n = len(report.adapters[0].sites)
    assert overlap.adapters == ("default", "other")
    assert overlap.grid == [[0, n, 0, 0], [n, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, n]]
    assert overlap.shared == 3.0
    assert overlap.chance == pytest.approx(statistics.mean(16 / site.able for site in report.adapters[0].sites))


def test_overlap_is_over_the_sites_that_both_have():
    model = adapted()
    plant(model, last_but)
    model.add_adapter("other", weftlora.PlainLoraConfig(r=4, target_modules=["q_proj"]))
    for name, layer in layers_of(model).items():
        if name.endswith("q_proj"):
            layer.weft_site["other"].load_state_dict(layer.weft_site["default"].state_dict())
    (overlap,) = weftlora.directions(model, ["default", "other"], directions=4).overlaps
    assert (overlap.sites, overlap.shared) == (2, 4.0)


# ---------------------------------------------------------------------- routed, stock, quantised


def test_a_routed_adapter_is_measured_at_its_mean_gate():
    family = FAMILIES["llama"]
    model = get_peft_model(family.build(), adapter_config("hydra", "llama"))
    randomise(model, size=0.3)
    with pytest.raises(AdapterError, match="inputs"):
        weftlora.directions(model)
    report = weftlora.directions(model, inputs=[family.batch()], full=True)
    with weftlora.routing(model) as routing, torch.no_grad():
        model(**family.batch())
    gates = routing.mean_gate()
    for name, site in sites_of(report).items():
        layer = layers_of(model)[name]
        f = layer.site("default").factors()
        b = torch.einsum("onr,n->or", f.B.unflatten(1, (3, -1)), gates[f"base_model.model.{name}"].to(f.B))
        u, sigma, vt = dense_svd(layer.base_matrix())
        d = (u.T @ (f.scale * b @ f.A).double() @ vt.T).diagonal().abs()
        assert site.spectrum is not None
        torch.testing.assert_close(torch.tensor(site.spectrum.rate).double(), d / sigma, rtol=1e-3, atol=1e-5)


def test_a_module_in_a_mode_of_its_own_keeps_it_while_gates_are_measured():
    family = FAMILIES["llama"]
    model = get_peft_model(family.build(), adapter_config("hydra", "llama")).train()
    resting = next(module for name, module in model.named_modules() if name.endswith("lm_head")).eval()
    weftlora.directions(model, inputs=[family.batch()])
    assert model.training
    assert not resting.training


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_stock_peft_lora_is_read_too(family: str, rslora: bool):
    config = LoraConfig(
        r=4, lora_alpha=12, use_rslora=rslora, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2"
    )
    model = get_peft_model(FAMILIES[family].build(), config)
    randomise(model)
    base = model.get_base_model()
    for name, site in sites_of(weftlora.directions(model, full=True)).items():
        layer = base.get_submodule(name)
        w, delta = layer.base_layer.weight.detach(), layer.get_delta_weight("default").detach().double()
        u, sigma, vt = dense_svd(w.T if family == "gpt2" else w)
        d = (u.T @ (delta.T if family == "gpt2" else delta) @ vt.T).diagonal().abs()
        assert site.spectrum is not None
        torch.testing.assert_close(torch.tensor(site.spectrum.rate).double(), d / sigma, rtol=1e-3, atol=1e-5)


def test_dora_is_refused():
    model = get_peft_model(FAMILIES["llama"].build(), LoraConfig(r=4, use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match="DoRA"):
        weftlora.directions(model)


def test_the_original_of_a_base_can_be_decomposed_instead(tmp_path: Path):
    FAMILIES["gpt2"].build().save_pretrained(tmp_path)
    model = adapted("gpt2")
    plant(model, last_but)
    whole = weftlora.directions(model, directions=4)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.base_layer.weight.mul_(3).round_(decimals=1)
    for name, site in sites_of(weftlora.directions(model, directions=4, original=tmp_path)).items():
        assert site.ranked_on == "original"
        assert site.index == sites_of(whole)[name].index


# ---------------------------------------------------------------------- nothing changes, and errors


def test_the_model_is_left_as_it_was():
    family = FAMILIES["llama"]
    model = get_peft_model(
        family.build(), weftlora.LoraDashConfig(r=2, directions=2, after=5, structure=weftlora.Hydra(heads=2))
    )
    model.train()
    before = copy.deepcopy(model.state_dict())
    wants = [p.requires_grad for p in model.parameters()]
    meters = [layer.site("default").gate_meter for layer in layers_of(model).values()]
    random_state = torch.get_rng_state()
    python_state = random.getstate()
    report = weftlora.directions(model, inputs=[family.batch()])
    assert report.adapters[0].phase == "before the launch"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert wants == [p.requires_grad for p in model.parameters()]
    assert all(module.training for module in model.modules())
    assert meters == [layer.site("default").gate_meter for layer in layers_of(model).values()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert python_state == random.getstate()


def test_the_record_is_plain_json_with_the_means(tmp_path: Path):
    model = adapted()
    plant(model, last_but)
    report = weftlora.directions(model, against="default", directions=4, full=True)
    record = json.loads(json.dumps(report.record(), allow_nan=False))
    row = record["adapters"][0]
    assert row["mean"]["hits"]["predicted"] == {"recall": 1.0, "accuracy": 1.0}
    assert row["mean"]["factor"] == pytest.approx(statistics.mean(s["amplification"]["factor"] for s in row["sites"]))
    assert len(row["sites"][0]["spectrum"]["sigma"]) == row["sites"][0]["able"]


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_a_number_of_directions_that_cannot_be(count):
    with pytest.raises(ConfigError, match="whole number"):
        weftlora.directions(adapted(), directions=count)


def test_directions_launched_on_another_weight_are_refused():
    model = launched(last_but, [0.5, -0.25, 0.125, 1.0])
    weftlora.directions(model)
    for layer in layers_of(model).values():
        torch.nn.init.normal_(layer.base_layer.weight, std=0.02)
    with pytest.raises(AdapterError, match="that are not those of this weight"):
        weftlora.directions(model)


def test_what_is_no_adapter_of_the_model_is_named():
    model = adapted()
    with pytest.raises(AdapterError, match="adapters default and no 'nope'"):
        weftlora.directions(model, "nope")
    with pytest.raises(AdapterError, match="no 'nope'"):
        weftlora.directions(model, against="nope")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge"):
        weftlora.directions(model)


def test_what_cannot_be_compared_with_is_named(tmp_path: Path):
    model = adapted()
    plant(model, last_but)
    model.add_adapter("narrow", weftlora.PlainLoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(AdapterError, match=r"narrow has no update at .*k_proj"):
        weftlora.directions(model, "default", against="narrow")
    FAMILIES["gpt2"].build().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="is a gpt2 and the base a llama"):
        weftlora.directions(model, against=tmp_path / "gpt2")
    FAMILIES["llama"].build(intermediate_size=64).save_pretrained(tmp_path / "wide")
    with pytest.raises(ModelError, match=r"gate_proj is \[64, 32\]"):
        weftlora.directions(model, against=tmp_path / "wide")
