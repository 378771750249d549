"""Scores: the fast ways against a plain double loop, identities, traces, odd rows; estimates against exact scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from allocating import HELD_OUT, TOKENS, alora, bare, controller, random_factors, scorer, train
from dashing import sites
from peft import get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

import weft
from families import FAMILIES, adapter_config, randomise
from weft.glue.ablation import estimate, exact
from weft.glue.ablation.quiet import undisturbed
from weft.glue.ablation.rows import rows_of
from weft.schedule import slots as surgery
from weft.schedule.agreement import agreement, kendall, margin, scores, spearman


def adapted(family: str, structure: str, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """Every slot contributes; some are dead."""
    ranks = weft.Reallocate(first=50, max_rounds=1, **fields)
    model = get_peft_model(FAMILIES[family].build(), adapter_config(structure, family, ranks=ranks)).to(dtype)
    randomise(model)
    for site in list(sites(model).values())[::3]:
        surgery.move(site, [1], [], [], 1)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in FAMILIES[family].batch().items()}
    weft.attach(model, validation=[batch])
    return model


def loss_of(out: Any, labels: Tensor, model: nn.Module) -> float:
    """Mean cross-entropy, without the cast to fp32 of transformers; other losses as the model has them."""
    logits = out.logits
    if labels.is_floating_point():
        return out.loss.item()
    if labels.dim() == 2 and not model.get_base_model().config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)).item()


def by_definition(model: nn.Module, slots: list[tuple[int, int]], draw: str = "0/1") -> Tensor:
    """Equation 6 once more, with masks alone: [slots, 2]."""
    found, its = [], list(sites(model).values())
    batch = scorer(model)._batch(draw)
    masks = [site.mask.clone() for site in its]

    def loss(on: list[Tensor]) -> float:
        for site, mask in zip(its, on, strict=True):
            site.mask = mask
        return loss_of(model(**batch), batch["labels"], model)

    was = model.training
    model.eval()
    with torch.no_grad():
        whole, base = loss(masks), loss([m * 0 for m in masks])
        for m, slot in slots:
            without, alone = [t.clone() for t in masks], [t * 0 for t in masks]
            without[m][slot], alone[m][slot] = 0, 1
            found.append([loss(without) - whole, base - loss(alone)])
    for site, mask in zip(its, masks, strict=True):
        site.mask = mask
    model.train(was)
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("structure", ["plain", "hydra", "hydra_Ax"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_fast_way_is_the_definition(family: str, structure: str) -> None:
    model = adapted(family, structure)
    slots = controller(model)._live()[::5]
    got = scorer(model).exact(slots, "0/1")
    torch.testing.assert_close(got.sum(2), by_definition(model, slots), rtol=0, atol=1e-9)
    blocks = len(scorer(model).way.blocks)
    assert blocks == (0 if family == "t5" else 2)  # an encoder-decoder hands on more than one tensor
    assert (scorer(model).way.head is not None) == (family in ("llama", "gpt2", "gpt_neox", "phi3"))


def test_in_fp32_within_one_hundred_thousandth() -> None:
    model = adapted("llama", "plain", torch.float32)
    slots = controller(model)._live()[::3]
    torch.testing.assert_close(scorer(model).exact(slots, "0/1").sum(2), by_definition(model, slots), rtol=0, atol=1e-5)


def test_chunks_and_shares_of_rows_do_not_show() -> None:
    model = alora(rows=8).double()
    random_factors(model)
    slots, s = controller(model)._live(), scorer(model)
    expected = s.exact(slots, "a")
    with undisturbed(model, s.sites):
        batch = s._batch("a")
        for tokens in (1, 14, 7 * 9, 7 * 64, 10**6):
            got = exact.brackets(s._way(batch), s.layers, s.sites, slots, batch, chunk_tokens=tokens)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_most_blocks_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block l of L is run for slots of blocks up to l only: (L + 1)/2L of the work, with the control, and the two prefixes."""
    model = alora(rows=2, max_rounds=1)
    random_factors(model)
    s, slots = scorer(model), controller(model)._live()
    s.exact(slots[:1], "a")
    runs = [0, 0]
    for n, block in enumerate(s.way.blocks):
        block.mlp.register_forward_hook(lambda _, __, out, n=n: runs.__setitem__(n, runs[n] + len(out) // 2))
    s.exact(slots, "a")
    here = len(slots) // 2  # slots of one block; each trajectory has a prefix pass, and a control per pass
    assert runs[0] == 2 * (1 + here + 1)
    assert 2 * (1 + 2 * here + 2) - 2 <= runs[1] <= 2 * (1 + 2 * here + 2)


def test_a_model_of_unknown_form_is_scored_in_full_and_right() -> None:
    class Odd(nn.Module):
        """Its second block also reads the input of the first; the loss is its own."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(12, 12), nn.Linear(12, 12)])
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            h = torch.tanh(self.layers[0](x))
            h = torch.tanh(self.layers[1](h + x))
            logits = self.head(h)
            return type("Out", (), {"logits": logits, "loss": nn.functional.mse_loss(logits[:, 0], labels)})()

    config = weft.AllocLoraConfig(r=2, first=9, max_rounds=1, target_modules=["0", "1", "head"])
    model = get_peft_model(Odd(), config).double()
    randomise(model)
    draw = torch.Generator().manual_seed(1)
    weft.attach(
        model,
        validation={"x": 0} and [{"x": torch.randn(4, 12, generator=draw).double(), "labels": torch.randn(4).double()}],
    )
    slots = controller(model)._live()
    got = scorer(model).exact(slots, "0/1")
    assert scorer(model).way is None
    torch.testing.assert_close(got.sum(2), by_definition(model, slots), rtol=0, atol=1e-12)
    with pytest.raises(weft.ConfigError, match="use score='exact'"):
        scorer(model).estimate(slots, "0/1")


# ---------------------------------------------------------------------- identities


def test_with_b_zero_every_bracket_is_exactly_zero() -> None:
    model = alora()
    slots = controller(model)._live()
    assert torch.count_nonzero(controller(model)._exact(slots, "a")) == 0
    assert scorer(model).exact(slots, "a").abs().max() < 1e-6  # measured all the same


def test_with_one_slot_last_in_is_first_in() -> None:
    model = alora(r=1, target_modules=["layers.0.mlp.up_proj"]).double()
    random_factors(model)
    last_in, first_in = scorer(model).exact([(0, 0)], "a").sum(2)[0].tolist()
    batch = scorer(model)._batch("a")
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        base = loss_of(model(**batch), batch["labels"], model)
    whole = loss_of(model(**batch), batch["labels"], model)
    assert last_in == pytest.approx(base - whole, abs=1e-12)
    assert first_in == pytest.approx(base - whole, abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_gradient_of_a_gate_is_that_of_b_and_that_of_a(family: str) -> None:
    """∂L/∂α_i = ⟨∇_B[:,i] L, B[:,i]⟩ = ⟨∇_A[i,:] L, A[i,:]⟩, and with gradient checkpointing too."""
    model = adapted(family, "plain", score="taylor")
    s = scorer(model)
    batch = s._batch("0/1")
    with undisturbed(model, s.sites):
        slopes = [t.sum(0) for t in estimate.gate_gradients(s._way(batch), s.sites, batch, 1.0)]
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    with undisturbed(model, s.sites):
        again = [t.sum(0) for t in estimate.gate_gradients(s._way(batch), s.sites, batch, 1.0)]
    model.get_base_model().gradient_checkpointing_disable()
    model.eval()(**batch).loss.backward()
    for site, slope, other in zip(s.sites, slopes, again, strict=True):
        term = site.structure
        torch.testing.assert_close(slope, (term.B.grad * term.B).sum(0).detach(), rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(slope, (term.A.grad * term.A).sum(1).detach(), rtol=1e-5, atol=1e-10)
        assert torch.equal(slope, other)


def test_the_estimate_is_near_the_exact_score_and_its_shortlist_nearer() -> None:
    model = alora(rows=24)
    train(model, 3)
    random_factors(model, size=0.03)
    slots, s = controller(model)._live(), scorer(model)
    truth = scores(s.exact(slots, "a"), "both")
    guess = scores(s.estimate(slots, "a"), "both")
    told = agreement(guess, truth, 7)
    assert told["spearman"] > 0.9
    assert told["overlap"] >= 5 / 7
    short = sorted(range(len(slots)), key=lambda n: guess[n])[:14]
    refined = [truth[n] if n in short else max(truth) + 1 for n in range(len(slots))]
    assert agreement(refined, truth, 7)["overlap"] >= told["overlap"]


# ---------------------------------------------------------------------- no trace


def everything(model: nn.Module) -> dict[str, Any]:
    its = sites(model)
    return {
        "state": {n: t.clone() for n, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires": {n: p.requires_grad for n, p in model.named_parameters()},
        "modes": [m.training for m in model.modules()],
        "rng": torch.get_rng_state(),
        "keep": [site.keep for site in its.values()],
        "masks": [id(site.mask) for site in its.values()],
        "listeners": [(site.recorder, site.gate_meter) for site in its.values()],
        "cache": model.config.use_cache,
        "forwards": [n for n, m in model.named_modules() if "forward" in m.__dict__],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("mode", ["exact", "taylor", "shortlist"])
def test_scoring_leaves_no_trace(mode: str, interrupted: bool) -> None:
    model = alora(score=mode, structure=weft.Hydra(heads=2), lora_dropout=0.3)
    random_factors(model)
    model(input_ids=TOKENS[:2], labels=TOKENS[:2]).loss.backward()
    next(iter(model.modules())).training = True
    list(sites(model).values())[2].train(False)
    next(iter(sites(model).values())).gate_meter = meter = lambda _: pytest.fail("a meter heard the scoring")
    before, calls = everything(model), 0
    if interrupted:

        def boom(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls > 7:
                raise KeyboardInterrupt

        hook = list(sites(model).values())[-1].register_forward_hook(boom)
        before["hooks"] = everything(model)["hooks"]
        with pytest.raises(KeyboardInterrupt):
            controller(model)._measure(1)
        assert same(everything(model), before)
        hook.remove()
    else:
        controller(model)._measure(1)
        assert same(everything(model), before)
    assert next(iter(sites(model).values())).gate_meter is meter


# ---------------------------------------------------------------------- rows


def test_rows_come_in_any_form_and_are_drawn_by_the_seed_alone() -> None:
    rows = [{"input_ids": t.tolist(), "labels": t.tolist()} for t in TOKENS[:10]]
    forms = [
        rows,
        tuple(rows),
        DataLoader([{k: torch.tensor(v) for k, v in row.items()} for row in rows], batch_size=3),
        [{k: torch.tensor([row[k] for row in rows[n : n + 4]]) for k in rows[0]} for n in (0, 4, 8)],
        iter(rows),
    ]
    drawn = [rows_of(form).draw(4, "7/1") for form in forms]
    for one in drawn[1:]:
        assert torch.equal(one["input_ids"], drawn[0]["input_ids"])
    assert not torch.equal(rows_of(rows).draw(4, "7/2")["input_ids"], drawn[0]["input_ids"])


def test_fewer_rows_than_asked_are_all_drawn() -> None:
    assert rows_of(HELD_OUT[:3]).draw(32, "x")["input_ids"].shape == (3, 7)


def test_rows_of_unequal_length_are_padded_and_masked() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    drawn = rows_of(rows).draw(2, "x")
    assert drawn["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert drawn["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert drawn["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([], "has no rows"),
        (3, "is nothing to draw rows from"),
        ({"input_ids": [1]}, "is nothing to draw rows from"),
        ([[1, 2]], "not a dict"),
    ],
)
def test_what_is_no_rows_is_refused(given: Any, match: str) -> None:
    with pytest.raises(weft.WeftError, match=match):
        weft.attach(bare(), validation=given)


def test_labels_that_are_all_ignored_are_an_error_not_a_nan() -> None:
    for labels in ([-100] * 7, [5] + [-100] * 6):  # the second counts nowhere: there is nothing before the first token
        model = bare(first=1)
        weft.attach(model, validation=[{"input_ids": TOKENS[0].tolist(), "labels": labels}] * 3)
        with pytest.raises(weft.WeftError, match="label"):
            train(model, 1)


def test_rows_for_an_adapter_that_scores_nothing_are_refused() -> None:
    model = get_peft_model(FAMILIES["llama"].build(), weft.LoraDashConfig(after=3))
    with pytest.raises(weft.ConfigError, match="no adapter has Reallocate"):
        weft.attach(model, validation=HELD_OUT)


def test_a_copy_scores_itself_and_shares_the_rows() -> None:
    model = alora()
    random_factors(model)
    slots = controller(model)._live()[:4]
    before = scorer(model).exact(slots, "a")
    other = copy.deepcopy(model)
    assert scorer(other).model is other
    assert scorer(other).rows is scorer(model).rows
    random_factors(other, seed=11)
    assert not torch.allclose(scorer(other).exact(slots, "a"), before)
    assert torch.equal(scorer(model).exact(slots, "a"), before)


# ---------------------------------------------------------------------- agreement


def test_rank_correlation_with_ties() -> None:
    assert spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 1, 2, 3], [1, 1, 3, 2]) == pytest.approx(7 / 9)  # ranks 0.5, 0.5, 2, 3
    assert kendall([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert kendall([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert kendall([1, 1, 2, 3], [1, 1, 3, 2]) == pytest.approx(3 / 5)  # four pairs agree, one does not, one is tied
    assert kendall([1, 2, 3], [1, 1, 2]) == pytest.approx(2 / 6**0.5)  # two agree, one is tied on one side
    assert agreement([1.0, 1.0], [1.0, 2.0], 1)["spearman"] is None
    assert agreement([1.0, 1.0], [1.0, 2.0], 1)["kendall"] is None


def test_overlap_and_regret() -> None:
    told = agreement([0.0, 1.0, 2.0, 3.0], [-4.0, 5.0, -2.0, 6.0], 2)  # chosen 0, 1; truly lowest 0, 2
    assert told["overlap"] == 0.5
    assert told["regret"] == pytest.approx((1 - -6) / 6)


def test_the_margin_and_its_noise() -> None:
    rows = torch.tensor([[1.0, 1.0], [2.0, 4.0], [9.0, 9.0]], dtype=torch.float64)
    brackets = torch.stack([rows, torch.zeros_like(rows)], 1)
    gap, noise = margin(brackets, "both", 1)  # by row 1 and 3: sum 4, standard deviation √2 by row
    assert gap == 4
    assert noise == pytest.approx(2**0.5 * 2**0.5)
    assert margin(brackets, "both", 3) is None
