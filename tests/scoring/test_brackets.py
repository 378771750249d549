"""Scores: the fast ways against a plain double loop, identities, traces, odd rows; estimates against exact scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from allocating import TOKENS, alora, bare, controller, random_factors, scorer, train
from dashing import sites
from peft import get_peft_model
from torch import Tensor, nn

import weftlora
from families import FAMILIES, adapter_config, randomise
from weftlora.schedule import rank_slots as surgery
from weftlora.schedule.rank_slots import agreement, scores
from weftlora.scoring import brackets
from weftlora.scoring.network import Network
from weftlora.scoring.scorer import undisturbed


def adapted(family: str, structure: str, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """Every slot contributes; some are dead."""
    ranks = weftlora.Reallocate(first=50, max_rounds=1, **fields)
    model = get_peft_model(FAMILIES[family].build(), adapter_config(structure, family, ranks=ranks)).to(dtype)
    randomise(model)
    for site in list(sites(model).values())[::3]:
        surgery.move(site, [1], [], [], 1)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in FAMILIES[family].batch().items()}
    weftlora.attach(model, validation=[batch])
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
    batch = scorer(model).drawn(draw)
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
    slots = controller(model).scoring.live()[::5]
    got = scorer(model).exact(slots, "0/1")
    torch.testing.assert_close(got.sum(2), by_definition(model, slots), rtol=0, atol=1e-9)
    blocks = len(scorer(model).way.blocks)
    assert blocks == (0 if family == "t5" else 2)  # an encoder-decoder hands on more than one tensor
    assert (scorer(model).way.head is not None) == (family in ("llama", "gpt2", "gpt_neox", "phi3"))


def test_in_fp32_within_one_hundred_thousandth() -> None:
    model = adapted("llama", "plain", torch.float32)
    slots = controller(model).scoring.live()[::3]
    torch.testing.assert_close(scorer(model).exact(slots, "0/1").sum(2), by_definition(model, slots), rtol=0, atol=1e-5)


def test_chunks_and_shares_of_rows_do_not_show() -> None:
    model = alora(rows=8).double()
    random_factors(model)
    slots, s = controller(model).scoring.live()[::4], scorer(model)
    passes: list[int] = []
    seen = model.get_base_model().model.embed_tokens.register_forward_pre_hook(lambda _, x: passes.append(len(x[0])))
    expected = s.exact(slots, "a")
    seen.remove()
    assert passes[0] == 4  # ways are tried on the rows of one pass: 1024 tokens in 32 replicas of rows of 7
    with undisturbed(model, s.sites):
        batch = s.drawn("a")
        for tokens in (1, 14, 7 * 9, 7 * 64, 10**6):
            got = brackets.exact_brackets(s._way(batch), s.layers, s.sites, slots, batch, chunk_tokens=tokens)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_what_drifts_with_the_shape_of_a_pass_is_not_in_a_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of 16 bits round differently for other shapes; here, each pass is off by its number of replicas."""
    model = alora(rows=6).double()
    random_factors(model)
    slots, s = controller(model).scoring.live()[::3], scorer(model)
    expected, real = s.exact(slots, "a"), Network.losses
    monkeypatch.setattr(Network, "losses", lambda way, *a: real(way, *a) + 0.1 * (a[1] if len(a) > 1 else 1))
    torch.testing.assert_close(s.exact(slots, "a"), expected, rtol=0, atol=1e-12)


def test_most_blocks_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Block l of L is run for slots of blocks up to l only: (L + 1)/2L of the work, with the control, and the two prefixes."""
    model = alora(rows=2, max_rounds=1)
    random_factors(model)
    s, slots = scorer(model), controller(model).scoring.live()
    s.exact(slots[:1], "a")
    runs, passes, ticks = [0, 0], [], []
    for n, block in enumerate(s.way.blocks):
        block.mlp.register_forward_hook(lambda _, __, out, n=n: runs.__setitem__(n, runs[n] + len(out) // 2))
        block.mlp.register_forward_hook(lambda *_: passes.append(1))
    s.watch(ticks.append)
    s.exact(slots, "a")
    assert (ticks[-1].done, ticks[-1].total) == (len(passes) - 2 * 2,) * 2  # blocks that were run, but for the prefixes
    here = len(slots) // 2  # slots of one block; each trajectory has a prefix pass, and a control per pass
    assert runs[0] == 2 * (1 + here + 1)
    assert 2 * (1 + 2 * here + 2) - 2 <= runs[1] <= 2 * (1 + 2 * here + 2)


def test_the_estimate_does_not_depend_on_the_size_of_a_chunk() -> None:
    model = alora(rows=8, score="taylor").double()
    random_factors(model)
    slots, s = controller(model).scoring.live(), scorer(model)
    expected = s.estimate(slots, "a")
    with undisturbed(model, s.sites):
        batch = s.drawn("a")
        for tokens in (1, 14, 7 * 3, 10**6):
            got = brackets.estimated_brackets(s._way(batch), s.sites, slots, batch, chunk_tokens=tokens)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mode", ["exact", "estimate"])
def test_autocast_around_the_loop_changes_no_score(mode: str) -> None:
    model = alora()
    random_factors(model)
    slots, s = controller(model).scoring.live(), scorer(model)
    expected = getattr(s, mode)(slots, "a")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(getattr(s, mode)(slots, "a"), expected)


def test_the_head_sees_only_positions_whose_label_counts() -> None:
    model, answer = bare(rows=4), torch.tensor([-100] * 5 + [8, 9])
    weftlora.attach(model, validation=[{"input_ids": ids, "labels": answer} for ids in TOKENS[:4]])
    random_factors(model)
    s, slots = scorer(model), controller(model).scoring.live()
    s.exact(slots[:1], "a")
    seen: list[torch.Size] = []
    s.way.head.register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    s.exact(slots, "a")
    assert {shape[1] for shape in seen} == {2 * 4}  # labels of a pass, of 4 · 7 positions
    assert max(shape[0] for shape in seen) > 2  # replicas


def test_a_model_of_unknown_form_is_scored_in_full_and_right(caplog: pytest.LogCaptureFixture) -> None:
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

    config = weftlora.AllocLoraConfig(r=2, first=9, max_rounds=1, target_modules=["0", "1", "head"])
    model = get_peft_model(Odd(), config).double()
    randomise(model)
    draw = torch.Generator().manual_seed(1)
    weftlora.attach(
        model,
        validation={"x": 0} and [{"x": torch.randn(4, 12, generator=draw).double(), "labels": torch.randn(4).double()}],
    )
    slots = controller(model).scoring.live()
    with caplog.at_level("INFO", logger="weftlora"):
        got = scorer(model).exact(slots, "0/1")
    assert scorer(model).way is None
    assert "is not a cross-entropy over rows: one pass per slot." in caplog.text
    torch.testing.assert_close(got.sum(2), by_definition(model, slots), rtol=0, atol=1e-12)
    with pytest.raises(weftlora.ConfigError, match="use score='exact'"):
        scorer(model).estimate(slots, "0/1")


# ---------------------------------------------------------------------- identities


def test_with_b_zero_every_bracket_is_exactly_zero() -> None:
    model = alora()
    slots = controller(model).scoring.live()
    assert torch.count_nonzero(controller(model).scoring.exact(slots, "a")) == 0
    assert scorer(model).exact(slots, "a").abs().max() < 1e-6  # measured all the same


def test_with_one_slot_last_in_is_first_in() -> None:
    model = alora(r=1, target_modules=["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]).double()
    random_factors(model)
    scorer(model).sites[1].mask[:] = 0  # the only other slot
    last_in, first_in = scorer(model).exact([(0, 0)], "a").sum(2)[0].tolist()
    batch = scorer(model).drawn("a")
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
    batch = s.drawn("0/1")
    with undisturbed(model, s.sites):
        slopes = [t.sum(0) for t in brackets.gate_gradients(s._way(batch), s.sites, batch, 1.0)]
    model.get_base_model().gradient_checkpointing_enable()
    model.train()
    with undisturbed(model, s.sites):
        again = [t.sum(0) for t in brackets.gate_gradients(s._way(batch), s.sites, batch, 1.0)]
    model.get_base_model().gradient_checkpointing_disable()
    model.eval()(**batch).loss.backward()
    for site, slope, other in zip(s.sites, slopes, again, strict=True):
        term = site.structure
        torch.testing.assert_close(slope, (term.B.grad * term.B).sum(0).detach(), rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(slope, (term.A.grad * term.A).sum(1).detach(), rtol=1e-5, atol=1e-10)
        assert torch.equal(slope, other)


def test_the_estimate_is_its_formula_row_by_row() -> None:
    """last-in −s + ½ N s², s = ⟨∇_B L_row, B⟩ of each row alone; first-in −⟨∇_B L_row, B⟩ at B = 0 without other slots."""
    model = alora(rows=3, score="taylor", lora_dropout=0.2).double()
    random_factors(model)
    s = scorer(model)
    slots = controller(model).scoring.live()[::9]
    got, batch = s.estimate(slots, "a"), s.drawn("a")
    labels = batch["input_ids"].numel() - len(batch["input_ids"])  # all but the first of each row
    its = list(sites(model).values())

    def share(row: int) -> Tensor:
        ids = batch["input_ids"][row : row + 1]
        logits = model.eval()(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum") / labels

    for row in range(3):
        model.zero_grad()
        share(row).backward()
        for n, (m, slot) in enumerate(slots):
            slope = float((its[m].structure.B.grad * its[m].structure.B)[:, slot].sum())
            assert got[n, 0, row].item() == pytest.approx(-slope + 0.5 * labels * slope**2, rel=1e-6, abs=1e-12)
    for site in its:
        site.mask = torch.zeros_like(site.mask)
    for n, (m, slot) in enumerate(slots):
        its[m].mask[slot], b = 1, its[m].structure.B
        kept = b.detach()[:, slot].clone()
        b.data[:, slot] = 0
        for row in range(3):
            model.zero_grad()
            share(row).backward()
            assert got[n, 1, row].item() == pytest.approx(-float(b.grad[:, slot] @ kept), rel=1e-6, abs=1e-12)
        b.data[:, slot], its[m].mask[slot] = kept, 0


def test_the_estimate_is_near_the_exact_score_and_its_shortlist_nearer() -> None:
    model = alora(rows=24)
    train(model, 3)
    random_factors(model, size=0.03)
    slots, s = controller(model).scoring.live(), scorer(model)
    truth = scores(s.exact(slots, "a"), "both")
    guess = scores(s.estimate(slots, "a"), "both")
    told = agreement(guess, truth, 7)
    assert told["spearman"] > 0.9
    assert told["overlap"] >= 5 / 7
    short = sorted(range(len(slots)), key=lambda n: guess[n])[:14]
    refined = [truth[n] if n in short else max(truth) + 1 for n in range(len(slots))]
    assert agreement(refined, truth, 7)["overlap"] >= told["overlap"]


# ---------------------------------------------------------------------- copies


def test_a_copy_scores_itself_and_shares_the_rows() -> None:
    model = alora()
    random_factors(model)
    slots = controller(model).scoring.live()[:4]
    before = scorer(model).exact(slots, "a")
    other = copy.deepcopy(model)
    assert scorer(other).model is other
    assert scorer(other).rows is scorer(model).rows
    random_factors(other, seed=11)
    assert not torch.allclose(scorer(other).exact(slots, "a"), before)
    assert torch.equal(scorer(model).exact(slots, "a"), before)
