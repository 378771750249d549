"""Heads followed over training: what is recorded at a measurement is what the routers did, and the run stays the same run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny_bases as tiny
import torch

import weftlora
from weftlora.adapted.routing import Seen, information, likeness, routing
from weftlora.runs.load import load_run

HYDRA = {"recipe": "hydralora", "heads": 3, "r": 2}


def test_information_is_what_the_domain_tells_of_the_head():
    one, two = Seen(2), Seen(2)
    one.add(torch.tensor([[1.0, 0.0]] * 3))
    two.add(torch.tensor([[0.0, 1.0]]))
    of_the_domain = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert information([one, two]) == pytest.approx(of_the_domain)  # the head says the domain, whatever share it has
    assert information([one, one]) == 0.0


def test_a_run_records_its_routers_at_every_measurement_and_stays_the_same_run(recipe, tmp_path):
    rows = [row | {"domain": "abc"[n % 3]} for n, row in enumerate(tiny.answers())][:48]
    data = {"train": str(tiny.write_rows(tmp_path / "rows.jsonl", rows)), "validation_fraction": 0.25}
    made = recipe("llama", adapter=HYDRA, train={"eval_every": 2, "batch_size": 5}, data=data)
    plain = weftlora.train({**made, "out": str(tmp_path / "plain")})
    run = weftlora.train(made, "train.follow_heads=true")
    assert run.metrics["validation_loss"] == plain.metrics["validation_loss"]
    lines = map(json.loads, (Path(run.folder) / "events.jsonl").read_text().splitlines())
    found = [line for line in lines if line["event"] == "heads"]
    assert [line["step"] for line in found] == [2, 4]
    assert (
        not (Path(plain.folder) / "events.jsonl").exists()
        or "heads" not in (Path(plain.folder) / "events.jsonl").read_text()
    )

    trained = load_run(run)
    from weftlora.data import load as load_data
    from weftlora.runs.recipe import Recipe

    told = Recipe.read(made)
    held = load_data(told.data, trained.base.tokenizer, base_dir=tmp_path, task="causal").validation
    entropies, cosines = [], []
    with routing(trained.model) as record, torch.no_grad():
        for row in held:  # one by one, without padding
            trained.model.eval()(input_ids=torch.tensor([row["input_ids"]]))
    for name, calls in record.omega.items():
        omega = torch.cat([each.flatten(0, -2) for each in calls]).double()
        entropies.append(float(-(omega * omega.log()).sum(-1).mean()) / math.log(3))
        cosines.append(likeness(record.sites[name]))
    last = found[-1]
    assert last["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=2e-4)
    assert last["cosine"] == pytest.approx(sum(cosines) / len(cosines), abs=2e-4)
    assert last["domains"].keys() == {"a", "b", "c"}
    assert 0 <= last["information"] <= last["balance"] - last["entropy"] + 1e-4


def test_an_adapter_without_routers_has_nothing_to_follow(recipe, tmp_path):
    run = weftlora.train(recipe("llama", adapter="lora", train={"follow_heads": True, "steps": 1}))
    events = Path(run.folder) / "events.jsonl"
    assert not events.exists() or '"heads"' not in events.read_text()
