"""What a search hands on: a file, a choice for any config, a stock LoRA, controls, and the second stage."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from dashing import sites
from peft import PeftModel, get_peft_model
from searching import adapted, make, mse, planted, rows_of, stack

import weft
from families import FAMILIES, STRUCTURES, adapter_config, logits, randomise
from weft.errors import ConfigError, RunError
from weft.glue.layer import WeftLinear
from weft.search import Candidate, Selection, compare
from weft.search.driver import LayerSearch
from weft.search.inner import Inner
from weft.terms.layers.search import weights

SMALL = {"outer_batches": 2, "val_size": 12, "steps": 3}


def searched(structure: dict | None = None, **fields) -> tuple[PeftModel, Selection]:
    base = stack(4)
    model = adapted(
        base, weft.Search(**{**SMALL, "select": "top_k", "top_k": 2, **fields}), moved=0.3, **(structure or {})
    )
    found = make(model, planted(stack(4), {1, 2}, 40))
    return model, found.run()


def test_a_selection_survives_its_file_and_is_small(tmp_path: Path):
    _, selection = searched()
    selection.save(tmp_path / "selection.json")
    again = Selection.load(tmp_path / "selection.json")
    assert again.layers == selection.layers
    assert again.candidates == selection.candidates
    assert again.record == selection.record
    assert json.loads((tmp_path / "selection.json").read_text())["layers"] == list(selection.blocks)
    assert (tmp_path / "selection.json").stat().st_size < 10_000


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 99}', '{"r": 8}'])
def test_a_file_that_is_no_selection_is_refused_in_a_sentence(content: str, tmp_path: Path):
    (tmp_path / "selection.json").write_text(content)
    with pytest.raises(ConfigError, match=r"selection\.json"):
        Selection.load(tmp_path / "selection.json")


DAMAGE = {
    "layers a number": ("layers", 3),
    "layers that nobody selected": ("layers", [0]),
    "no candidates": ("candidates", []),
    "candidates no list": ("candidates", {"0": {}}),
    "a candidate no object": ("candidates.0", [1, 2]),
    "a name that is none": ("candidates.1.name", 7),
    "alpha a string": ("candidates.0.alpha", "0.3"),
    "alpha no number": ("candidates.0.alpha", float("nan")),
    "alpha_hat missing": ("candidates.0.alpha_hat", ...),
    "selected a number": ("candidates.0.selected", 1),
    "a block below zero": ("candidates.0.block", -1),
    "a block that is half": ("candidates.0.block", 0.5),
    "modules a string": ("candidates.0.modules", "blocks.0.up"),
    "modules empty": ("candidates.0.modules", []),
    "distance null": ("candidates.2.distance", None),
    "a candidate with more": ("candidates.0.alhpa", 0.3),
    "granularity unknown": ("granularity", "layer"),
    "adapter a list": ("adapter", ["r", 8]),
    "r a string": ("adapter.r", "8"),
    "rank_pattern a list": ("adapter.rank_pattern", [1]),
    "a search with a wrong setting": ("search.inner_steps", "many"),
    "a search with another setting": ("search.inner_stpes", 2),
    "inner with a wrong setting": ("inner.lr", None),
    "record missing": ("record", ...),
    "seconds a string": ("seconds", "12 s"),
    "something that is not there": ("layer", [1]),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_malformed_value_is_named_with_its_file_and_key_when_the_file_is_read(damage: str, tmp_path: Path):
    _, selection = searched()
    path, (key, value) = tmp_path / "selection.json", DAMAGE[damage]
    selection.save(path)
    content = json.loads(path.read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    inside = content
    for part in parents:
        inside = inside[part]
    if value is ...:
        del inside[last]
    else:
        inside[last] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=str(last)) as raised:
        Selection.load(path)
    assert str(path) in str(raised.value)
    assert "search again, or name the blocks by hand" in str(raised.value)
    assert type(raised.value) is ConfigError
    assert len(str(raised.value)) < 400  # the value that is wrong, not the whole file


def test_a_selection_in_which_nothing_is_selected_is_refused(tmp_path: Path):
    """Or the empty list would reach peft, which takes it for all layers."""
    _, selection = searched()
    none = [dataclasses.replace(c, selected=False) for c in selection.candidates]
    path = tmp_path / "selection.json"
    content = {"format": 1, "layers": [], **dataclasses.asdict(selection), "candidates": [vars(c) for c in none]}
    path.write_text(json.dumps(content, default=str))
    with pytest.raises(ConfigError, match="none is selected"):
        Selection.load(path)


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_any_recipe_takes_the_selection_as_layers(structure: str):
    _, selection = searched()
    config = STRUCTURES[structure](r=2, target_modules=["up", "down"], layers=selection.layers)
    names = set(sites(get_peft_model(stack(4), config)))
    assert names == {m for c in selection.chosen for m in c.modules}
    assert len(names) == 4


@pytest.mark.parametrize(
    "fields",
    [
        {"boost": weft.Dash(directions=2, after=2)},
        {"start": weft.Directions(after=2)},
        {"boost": weft.Dash(directions=2, after=2), "structure": weft.Tied()},
    ],
    ids=["dash", "directions", "tied dash"],
)
def test_the_selection_goes_with_what_happens_over_time(fields: dict):
    """Events happen at the selected sites, the first of which is not the model's first module."""
    base = stack(4).float()
    model = get_peft_model(base, weft.WeftConfig(r=2, target_modules=["up", "down"], layers=[1, 3], **fields))
    optimizer = torch.optim.AdamW(weft.param_groups(model, lr=1e-2))
    x = torch.randn(16, 6)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = mse(model.train(), {"x": x, "y": x.cos()})
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(weft.state_dict(model)["default"]["events"]) == 1
    assert all(name.startswith(("blocks.1.", "blocks.3.")) for name in sites(model))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"boost": weft.Dash(directions=2, after=2)},
        {"start": weft.Directions(after=2)},
        {"ranks": weft.Reallocate(first=2, every=1, max_rounds=2, move=1, score="random")},
    ],
    ids=["dash", "directions", "reallocate"],
)
def test_a_gate_that_is_kept_from_a_search_goes_with_what_happens_over_time(fields: dict):
    """At 1 it changes nothing bit for bit; doubled, it doubles the whole update, extra slots and twins too."""
    found = []
    for gated in (False, True):
        torch.manual_seed(4)
        layers = weft.Only([1, 3], gated=gated)
        model = get_peft_model(stack(4), weft.WeftConfig(r=2, target_modules=["up", "down"], layers=layers, **fields))
        optimizer = torch.optim.AdamW(weft.param_groups(model.double(), lr=1e-2))
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(0)).double()
        for _ in range(5):
            mse(model.train(), {"x": x, "y": x.cos()}).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(model)
    one, other = (sites(model) for model in found)
    assert all(torch.equal(one[name].delta_weight(), other[name].delta_weight()) for name in one)
    assert weft.state_dict(found[1])["default"]["events"]
    for name, site in other.items():
        site.layer_gate.fill_(2.0)
        torch.testing.assert_close(site.delta_weight(), 2 * one[name].delta_weight(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "fields",
    [{"boost": weft.Dash()}, {"start": weft.Directions()}, {"ranks": weft.Reallocate()}],
    ids=["dash", "directions", "reallocate"],
)
def test_what_happens_over_time_waits_for_the_training_after_the_search(fields: dict):
    with pytest.raises(ConfigError, match="in the training after the search"):
        weft.WeftConfig(layers=weft.Search(), **fields)


def test_stock_peft_gets_the_same_modules_by_their_full_names():
    _, selection = searched()
    config = selection.peft_config()
    assert type(config).__name__ == "LoraConfig"
    assert (config.r, config.lora_alpha) == (2, 4)
    assert not config.layers_to_transform
    model = get_peft_model(stack(4), config)
    adapted_names = {
        n.split(".lora_A")[0].removeprefix("base_model.model.")
        for n, _ in model.named_modules()
        if n.endswith("lora_A")
    }
    assert adapted_names == {m for c in selection.chosen for m in c.modules}


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 3, "lora_alpha": 12},
        {"r": 4, "use_rslora": True},
        {"rank_pattern": {"up": 4}, "alpha_pattern": {"up": 2}},
        {"lora_dropout": 0.25},
    ],
    ids=str,
)
def test_stock_peft_gets_the_searched_ranks_scales_and_dropout(fields: dict, tmp_path: Path):
    """s as it was: with the same A and B its function is that of the searched adapter with gates of 1 and nothing elsewhere."""
    model, selection = searched(fields)
    selection.save(tmp_path / "selection.json")
    torch.manual_seed(0)
    stock = get_peft_model(stack(4), Selection.load(tmp_path / "selection.json").peft_config()).double().eval()
    held = {n.removeprefix("base_model.model."): m for n, m in stock.named_modules() if hasattr(m, "lora_A")}
    assert set(held) == {m for c in selection.chosen for m in c.modules}
    with torch.no_grad():
        for name, site in sites(model).items():
            site.layer_gate.fill_(float(name in held))
            if name in held:
                held[name].lora_A["default"].weight.copy_(site.structure.A)
                held[name].lora_B["default"].weight.copy_(site.structure.B)
    x = torch.randn(5, 6).double()
    torch.testing.assert_close(stock(x), model.eval()(x), rtol=1e-12, atol=1e-12)
    dropped = [m.p for m in stock.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert dropped == [0.25] * len(held) if "lora_dropout" in fields else not dropped


def test_an_empty_rule_never_reaches_peft_as_an_empty_list():
    """α all equal: above the mean there is nothing, and layers_to_transform=[] would adapt everything."""
    base = stack(3)
    model = adapted(base, weft.Search(**{**SMALL, "steps": 1}))
    found = make(model, planted(stack(3), {1}, 40))
    selection = found.selection()
    assert selection.blocks == (0,)
    assert [c.filled for c in selection.candidates] == [True, False, False]
    assert len(selection.peft_config().target_modules) == 2


def test_an_empty_rule_is_an_error_where_that_was_asked_for():
    model = adapted(stack(3), weft.Search(**SMALL, when_fewer="error"))
    with pytest.raises(RunError, match="selects 0 of 3 groups"):
        make(model, planted(stack(3), {1}, 40)).selection()


def test_single_modules_are_selected_by_name():
    _, selection = searched(granularity="module", top_k=3)
    assert len(selection.candidates) == 8
    assert set(selection.blocks) <= {f"blocks.{i}.{m}" for i in range(4) for m in ("up", "down")}
    config = weft.PlainLoraConfig(r=2, target_modules=["up", "down"], layers=selection.layers)
    assert set(sites(get_peft_model(stack(4), config))) == set(selection.blocks)


def test_controls_have_the_size_of_the_selection_and_are_seeded():
    _, selection = searched()
    found = selection.controls(draws=3, seed=1)
    assert list(found) == ["all", "random 1", "random 2", "random 3", "first", "last", "gradient norm"]
    assert found["all"].blocks == (0, 1, 2, 3)
    assert {len(only.blocks) for name, only in found.items() if name != "all"} == {2}
    assert (found["first"].blocks, found["last"].blocks) == ((0, 1), (2, 3))
    assert found == selection.controls(draws=3, seed=1)
    assert all(c.gradient_norm > 0 for c in selection.candidates)


def of_size(n: int, chosen: set[int]) -> Selection:
    """A selection of these groups out of n, made by hand."""
    groups = [Candidate(f"b.{i}", i, (f"b.{i}.up",), 0.0, 1.0, 0.0, i in chosen, False, False, i) for i in range(n)]
    return Selection(tuple(groups), "block", {}, {}, {})


@pytest.mark.parametrize(("n", "chosen"), [(4, {0}), (4, {1, 2}), (3, {0, 2}), (6, {5, 1, 3}), (8, set(range(7)))])
def test_random_controls_differ_from_the_selection_and_from_each_other_as_far_as_there_are_enough(n: int, chosen: set):
    selection = of_size(n, chosen)
    others = {c for c in combinations(range(n), len(chosen)) if set(c) != chosen}
    assert selection.others == len(others)
    for seed in range(20):
        for draws in (1, 3, 5):
            found = selection.controls(draws, seed)
            drawn = [only.blocks for name, only in found.items() if name.startswith("random")]
            assert len(drawn) == len(set(drawn)) == min(draws, len(others))
            assert set(drawn) <= others
            assert found == selection.controls(draws, seed)


def test_fewer_draws_are_the_first_of_more_and_every_other_selection_is_as_likely():
    selection = of_size(5, {0, 1})
    names = ["random 1", "random 2"]
    for seed in range(5):
        few, many = selection.controls(2, seed), selection.controls(6, seed)
        assert [few[name] for name in names] == [many[name] for name in names]
    seen = Counter(selection.controls(1, seed)["random 1"].blocks for seed in range(900))
    assert len(seen) == 9
    assert max(seen.values()) < 2 * min(seen.values())


def test_with_everything_selected_all_is_the_only_control_and_the_second_stage_is_plain_lora():
    model, selection = searched(top_k=4)
    assert list(selection.controls()) == ["all"]
    torch.manual_seed(5)
    again = weft.second_stage(model, selection, "restart")
    base = stack(4)
    torch.manual_seed(5)
    plain = get_peft_model(base, weft.WeftConfig(r=2, target_modules=["up", "down"]), autocast_adapter_dtype=False)
    a, b = sites(again), sites(plain)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n].factors().A, b[n].factors().A) for n in a)
    assert all(site.layer_gate is None for site in a.values())
    for m in (again, plain):
        optimizer = torch.optim.AdamW(weft.param_groups(m.double(), lr=1e-2))
        mse(m.train(), {"x": torch.ones(3, 6).double(), "y": torch.zeros(3, 6).double()}).backward()
        optimizer.step()
    assert all(torch.equal(a[n].structure.B, b[n].structure.B) for n in a)
    assert max(float(site.structure.B.detach().abs().max()) for site in a.values()) > 0


def test_restart_leaves_no_adapter_on_unselected_blocks():
    model, selection = searched()
    again = weft.second_stage(model, selection, "restart")
    assert set(sites(again)) == {m for c in selection.chosen for m in c.modules}
    assert all(float(site.structure.B.detach().abs().max()) == 0 for site in sites(again).values())
    assert again.peft_config["default"].layers == selection.layers
    trained = {n for n, p in again.named_parameters() if p.requires_grad}
    assert all(any(f".{m}." in n for c in selection.chosen for m in c.modules) for n in trained)
    mse(again, {"x": torch.randn(3, 6).double(), "y": torch.zeros(3, 6).double()}).backward()


FOLDED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "hydra": {"structure": weft.Hydra(heads=3)},
    "tied_tl6": {"structure": weft.Tied(train="tl6")},
    "tied_Bu": {"structure": weft.Tied(train="Bu")},
    "tied_AB": {"structure": weft.Tied(train="tl5")},
}


@pytest.mark.parametrize("structure", list(FOLDED))
def test_continue_folds_the_gates_and_keeps_the_function_of_the_selected_blocks(structure: str, tmp_path: Path):
    model, selection = searched(FOLDED[structure])
    x = torch.randn(5, 6).double()
    alpha_hat = {c.name: c.alpha_hat for c in selection.candidates}
    assert max(abs(v - 1) for v in alpha_hat.values()) > 1e-3
    with torch.no_grad():
        for name, site in sites(model).items():
            if not any(name in c.modules for c in selection.chosen):
                site.layer_gate.zero_()
        expected = model.eval()(x)
    for c in selection.chosen:
        for name in c.modules:
            assert float(sites(model)[name].layer_gate) == c.alpha_hat
    again = weft.second_stage(model, selection, "continue")
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), expected, rtol=1e-12, atol=1e-12)
    assert set(sites(again)) == {m for c in selection.chosen for m in c.modules}
    gated = structure == "tied_AB"
    assert {site.layer_gate is not None for site in sites(again).values()} == {gated}
    mse(again.train(), {"x": x, "y": x}).backward()
    again.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(stack(4), tmp_path, autocast_adapter_dtype=False).double().eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), again.eval()(x), rtol=1e-6, atol=1e-6)


def test_folding_merges_to_the_same_weights():
    model, selection = searched({"use_rslora": True})
    gated = {name: site.delta_weight() for name, site in sites(model).items()}
    folded = {
        name: site.delta_weight() for name, site in sites(weft.second_stage(model, selection, "continue")).items()
    }
    for name, delta in folded.items():
        torch.testing.assert_close(delta, gated[name], rtol=1e-12, atol=1e-12)


def test_search_layers_on_a_bare_base_hands_it_back_as_it_was():
    base = stack(3)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    config = weft.FlexoraConfig(r=2, target_modules=["up", "down"], outer_batches=2, val_size=12, steps=2)
    rows = [{k: v.float() for k, v in row.items()} for row in planted(stack(3), {1}, 40)]
    seen = []
    selection = weft.search_layers(
        base.float(), rows, config=config, loss=mse, lr=1e-2, batch_size=2, on_step=seen.append
    )
    assert isinstance(selection, Selection)
    assert [row["step"] for row in seen] == [1, 2]
    after = dict(base.named_parameters())
    assert after.keys() == before.keys()
    assert all(p.requires_grad for p in after.values())
    assert all(torch.equal(before[n].float(), p) for n, p in after.items())


def test_search_layers_reads_the_loss_of_a_transformers_model_in_token_weights():
    """One long and one short answer: the mean is over tokens, not over micro-batches."""
    model = get_peft_model(
        FAMILIES["llama"].build(),
        adapter_config("plain", "llama", layers=weft.Search(outer_batches=2, val_size=2, steps=1)),
    )
    randomise(model)
    draw = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": (ids := torch.randint(3, 64, (9,), generator=draw)), "labels": ids.clone()} for _ in range(12)
    ]
    for i, row in enumerate(rows):
        row["labels"][: i % 7] = -100
    search = LayerSearch(model, model.peft_config["default"].layers, Inner(), rows)
    held = [rows[search.splits.validation[j]] for j in search.cycles["validation"].take(2)]
    search.cycles["validation"].position = 0
    loss, _ = search.hypergradient()
    with torch.no_grad():
        out = logits(model, {"input_ids": torch.stack([r["input_ids"] for r in held])})
    labels = torch.stack([r["labels"] for r in held])[:, 1:]
    expected = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_the_load_balance_term_of_routers_is_part_of_the_inner_loss_and_not_of_the_validation_loss():
    config = adapter_config("hydra", "llama", layers=weft.Search(outer_batches=1, val_size=2, steps=1))
    config.structure = weft.Hydra(heads=3, balance=0.5)
    model = get_peft_model(FAMILIES["llama"].build(), config)
    randomise(model)
    ids = torch.randint(3, 64, (12, 7), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    search = LayerSearch(model, model.peft_config["default"].layers, Inner(batch_size=2), rows)
    for site in sites(model).values():
        site.awaits_search = False
    batch = search._batches("train", 1)
    with torch.no_grad():
        plain = float(model.eval()(**batch[0]).loss)
    assert search.passes.backward(batch, training=False).loss == pytest.approx(plain, rel=1e-6)
    assert search.passes.backward(batch, training=True).loss > plain + 0.1


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
def test_every_family_is_searched_by_its_blocks(family: str):
    blocks = {"llama": 2, "gpt2": 2, "bert": 2, "t5": 4}[family]
    fields = {"exclude_modules": ["classifier", "pooler.dense"]} if family == "bert" else {}
    settings = weft.Search(outer_batches=1, val_size=2, steps=2)
    config = weft.WeftConfig(r=2, target_modules="all-linear", layers=settings, **fields)
    model = get_peft_model(FAMILIES[family].build(), config)
    randomise(model)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        ids = torch.randint(3, 64, (6,), generator=draw)
        rows.append({"input_ids": ids, "labels": torch.tensor(i % 3) if family == "bert" else ids})
    selection = weft.search_layers(model, rows, batch_size=2, accumulation=1, lr=1e-2)
    assert [c.block for c in selection.candidates] == list(range(blocks))
    assert sum(c.alpha for c in selection.candidates) == pytest.approx(0, abs=0.05)
    assert any(c.alpha for c in selection.candidates)


def test_the_weights_of_a_selection_are_those_of_its_alpha():
    _, selection = searched()
    alpha = torch.tensor([c.alpha for c in selection.candidates], dtype=torch.float64)
    assert [c.alpha_hat for c in selection.candidates] == weights(alpha).tolist()
    assert selection.margin == min(abs(c.distance) for c in selection.candidates)


def test_selections_are_compared_only_on_the_same_groups():
    _, one = searched()
    other = dataclasses.replace(one, candidates=one.candidates[:3])
    assert compare([one, one]).jaccard == 1.0
    with pytest.raises(ConfigError, match="same groups"):
        compare([one, other])


def two_adapters() -> PeftModel:
    model = adapted(stack(3), weft.Search(**SMALL))
    model.add_adapter("other", weft.PlainLoraConfig(r=2, target_modules=["up", "down"]))
    return model.double()


@pytest.mark.parametrize("active", [["other"], ["default", "other"]])
def test_an_adapter_that_is_not_the_only_active_one_is_not_searched(active: list[str]):
    model = two_adapters()
    model.base_model.set_adapter(active)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="set_adapter"):
        weft.search_layers(model, planted(stack(3), {1}, 40), loss=mse)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_restart_does_not_drop_another_adapter_unasked():
    model = two_adapters()
    selection = weft.search_layers(model, planted(stack(3), {1}, 40), loss=mse, lr=1e-2)
    with pytest.raises(ConfigError, match="other"):
        weft.second_stage(model, selection)
    assert set(model.peft_config) == {"default", "other"}
    kept = weft.second_stage(model, selection, "continue")
    others = [p for name, p in kept.named_parameters() if ".other." in name]
    assert others
    assert not any(p.requires_grad for p in others)
    layers = [m for m in kept.modules() if isinstance(m, WeftLinear)]
    assert all(layer.active_adapters == ["default"] for layer in layers)


def test_a_model_without_a_search_is_refused():
    model = adapted(stack(3), weft.All())
    with pytest.raises(ConfigError, match="has no search"):
        weft.search_layers(model, rows_of(torch.randn(4, 6), torch.randn(4, 6)))
    with pytest.raises(ConfigError, match=r"layers=weft\.Search"):
        weft.search_layers(stack(3), [], config=weft.PlainLoraConfig())
