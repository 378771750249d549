"""LoRA-TSD (arXiv 2409.01035, version 4 on): LoRA-Init and LoRA-Dash after one pre-launch, on one ranking of directions.

Read off the framework figure; see test_lora_init.py for what each of the two is.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import weftlora
from weftlora import change_rates

sys.path.insert(0, str(Path(__file__).parents[1] / "schedule"))
from dashing import adam, batch, dash, events, init, parameters, sites, terms, train
from switching import T, base_of, defined, pre_launch, weights


@pytest.mark.parametrize(("r", "s"), [(4, 2), (3, 3), (2, 4)])
def test_dashs_directions_are_the_first_of_inits_on_one_pre_launch(r: int, s: int, monkeypatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = change_rates.spectrum
    monkeypatch.setattr(change_rates, "spectrum", lambda w, *args: (calls.append(tuple(w.shape)), real(w, *args))[1])
    model, deltas = init(after=T, r=r, directions=s), pre_launch(r=r)
    train(model, T)
    assert len(calls) == 2  # one decomposition per site, not two
    assert [e["step"] for e in events(model).values()] == [T, T]
    for name, site in sites(model).items():
        start, dash_term = site.start, site.boost
        both_have = min(r, s)
        assert start.index[:both_have].tolist() == dash_term.index[:both_have].tolist()
        assert torch.equal(start.rate[:both_have], dash_term.rate[:both_have])
        longest = dash_term if s >= r else start
        index, _, _, up, down = defined(weights(model)[name], deltas[name], max(r, s))
        assert longest.index.tolist() == index
        pairs = torch.einsum("os,si->soi", dash_term.up.double(), dash_term.down.double())
        torch.testing.assert_close(pairs, torch.einsum("os,si->soi", up, down)[:s], rtol=0, atol=1e-5)
        assert torch.count_nonzero(dash_term.gain) == 0


@pytest.mark.parametrize("select", ["top", "bottom", "random"])
def test_controls_share_their_list_too(select: str) -> None:
    model = init(after=T, r=4, directions=2, select=select, seed=5)
    train(model, T)
    for name, site in sites(model).items():
        k = min(weights(model)[name].shape)
        assert site.start.index[:2].tolist() == site.boost.index.tolist()
        expected = {"top": [0, 1, 2, 3], "bottom": [k - 1, k - 2, k - 3, k - 4]}
        assert site.start.index.tolist() == expected.get(select, site.start.index.tolist())


def test_gains_a_and_b_are_all_trained_after_both() -> None:
    model = init(after=T, directions=3)
    train(model, T, optimizer := adam(model))
    start = {n: t.clone() for n, t in model.state_dict().items()}
    train(model, 3, optimizer, start=T)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, start[n])}
    assert {n.rpartition(".")[2] for n in moved} == {"A", "B", "gain", "steps"}
    assert len(moved) == 2 * 3 + 1
    assert all((term.gain != 0).all() for term in terms(model))


def test_dash_after_init_is_ranked_on_what_has_moved_since_the_switch() -> None:
    model = dash(after=T + 2, start=weftlora.Directions(after=T))
    train(model, T + 1, optimizer := adam(model))
    train(model, 1, optimizer, start=T + 1)
    assert {e["event"]: e["step"] for e in events(model).values()} == {"start_switch": T, "dash_launch": T + 2}
    for name, site in sites(model).items():
        s, t = site.structure, site.start
        delta = site.scale * (s.B.detach().double() @ s.A.detach().double() - t.up.double() @ t.down.double())
        index, _, rate, _, _ = defined(weights(model)[name], delta, 3)
        assert site.boost.index.tolist() == index
        torch.testing.assert_close(site.boost.rate.double(), rate, rtol=1e-4, atol=0)
        alone = site.scale * s.B.detach().double() @ s.A.detach().double()
        assert not torch.allclose(defined(weights(model)[name], alone, 3)[2], rate, rtol=1e-2)


def test_init_after_dash_returns_to_the_pretrained_function_and_keeps_dashs_directions() -> None:
    model, x = dash(after=T, start=weftlora.Directions(after=T + 3)), batch(50)
    expected = base_of(model, x)
    train(model, T + 2, optimizer := adam(model))
    assert all((term.gain != 0).all() for term in terms(model))
    kept = [term.up.clone() for term in terms(model)]
    whole = dash(after=T, start=weftlora.Directions(after=10**6))
    train(whole, T + 3)
    train(model, 1, optimizer, start=T + 2)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=2e-6)
    assert all(torch.equal(term.up, up) for term, up in zip(terms(model), kept, strict=True))
    assert not any(optimizer.state[p]["step"] for p in parameters(model))
    for name, site in sites(model).items():  # ranked on all of ΔW, gains included
        index, _, rate, _, _ = defined(weights(model)[name], sites(whole)[name].delta_weight().double(), 2)
        assert site.start.index.tolist() == index
        torch.testing.assert_close(site.start.rate.double(), rate, rtol=1e-3, atol=0)
