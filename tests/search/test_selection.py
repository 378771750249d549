"""What a search hands on: a choice for any config, a stock LoRA, and what it was found by."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from dashing import sites
from peft import get_peft_model
from searching import SMALL, adapted, make, mse, planted, rows_of, searched, stack, two_adapters

import weftlora
from families import FAMILIES, adapter_config, logits, randomise
from weftlora.errors import ConfigError, RunError
from weftlora.search import Selection, compare
from weftlora.search.driver import LayerSearch
from weftlora.search.hypergradient import Inner
from weftlora.terms.layers.search import weights


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
    model = adapted(base, weftlora.Search(**{**SMALL, "steps": 1}))
    found = make(model, planted(stack(3), {1}, 40))
    selection = found.selection()
    assert selection.blocks == (0,)
    assert [c.filled for c in selection.candidates] == [True, False, False]
    assert len(selection.peft_config().target_modules) == 2


def test_an_empty_rule_is_an_error_where_that_was_asked_for():
    model = adapted(stack(3), weftlora.Search(**SMALL, when_fewer="error"))
    with pytest.raises(RunError, match="selects 0 of 3 groups"):
        make(model, planted(stack(3), {1}, 40)).selection()


def test_single_modules_are_selected_by_name():
    _, selection = searched(granularity="module", top_k=3)
    assert len(selection.candidates) == 8
    assert set(selection.blocks) <= {f"blocks.{i}.{m}" for i in range(4) for m in ("up", "down")}
    config = weftlora.PlainLoraConfig(r=2, target_modules=["up", "down"], layers=selection.layers)
    assert set(sites(get_peft_model(stack(4), config))) == set(selection.blocks)


def test_search_layers_on_a_bare_base_hands_it_back_as_it_was():
    base = stack(3)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    config = weftlora.FlexoraConfig(r=2, target_modules=["up", "down"], outer_batches=2, val_size=12, steps=2)
    rows = [{k: v.float() for k, v in row.items()} for row in planted(stack(3), {1}, 40)]
    seen = []
    selection = weftlora.search_layers(
        base.float(), rows, config=config, loss=mse, lr=1e-2, batch_size=2, seed=3, on_step=seen.append
    )
    assert isinstance(selection, Selection)
    assert selection.record["seed"] == 3
    assert [row["step"] for row in seen] == [1, 2]
    after = dict(base.named_parameters())
    assert after.keys() == before.keys()
    assert all(p.requires_grad for p in after.values())
    assert all(torch.equal(before[n].float(), p) for n, p in after.items())


def test_search_layers_reads_the_loss_of_a_transformers_model_in_token_weights():
    """One long and one short answer: the mean is over tokens, not over micro-batches."""
    model = get_peft_model(
        FAMILIES["llama"].build(),
        adapter_config("plain", "llama", layers=weftlora.Search(outer_batches=2, val_size=2, steps=1)),
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
    config = adapter_config("hydra", "llama", layers=weftlora.Search(outer_batches=1, val_size=2, steps=1))
    config.structure = weftlora.Hydra(heads=3, balance=0.5)
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
    settings = weftlora.Search(outer_batches=1, val_size=2, steps=2)
    config = weftlora.WeftConfig(r=2, target_modules="all-linear", layers=settings, **fields)
    model = get_peft_model(FAMILIES[family].build(), config)
    randomise(model)
    draw = torch.Generator().manual_seed(0)
    rows = []
    for i in range(8):
        ids = torch.randint(3, 64, (6,), generator=draw)
        rows.append({"input_ids": ids, "labels": torch.tensor(i % 3) if family == "bert" else ids})
    selection = weftlora.search_layers(model, rows, batch_size=2, accumulation=1, lr=1e-2)
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


@pytest.mark.parametrize("active", [["other"], ["default", "other"]])
def test_an_adapter_that_is_not_the_only_active_one_is_not_searched(active: list[str]):
    model = two_adapters()
    model.base_model.set_adapter(active)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ConfigError, match="set_adapter"):
        weftlora.search_layers(model, planted(stack(3), {1}, 40), loss=mse)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_without_a_search_is_refused():
    model = adapted(stack(3), weftlora.All())
    with pytest.raises(ConfigError, match="has no search"):
        weftlora.search_layers(model, rows_of(torch.randn(4, 6), torch.randn(4, 6)))
    with pytest.raises(ConfigError, match=r"layers=weftlora\.Search"):
        weftlora.search_layers(stack(3), [], config=weftlora.PlainLoraConfig())


def test_agreement_is_held_against_the_chance_of_as_many_groups_and_seconds_do_not_make_a_selection_another():
    _, one = searched()
    found = compare([one, one])
    assert len(found.frequency) == len(one.candidates) == 4
    assert 0 < found.chance < 1
    assert dataclasses.replace(one, seconds=one.seconds + 5) == one
