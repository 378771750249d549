"""`weftlora directions` from the shell's side: one adapter on the demo model, measured once per test."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.cli import main
from weftlora.data.demo import demo_model_path
from weftlora.inspection import directions as module


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two adapters of two sites each on the demo model."""
    top = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(demo_model_path())
        config = weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0, 1])
        model = get_peft_model(base, config)
        for key, p in model.named_parameters():
            if key.endswith("structure.B"):
                torch.nn.init.normal_(p, std=0.1)
        model.save_pretrained(top / name)
    return [str(top / name) for name in ("one", "two")]


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as leave:
        main(["directions", *arguments])
    return int(leave.value.code or 0)


def test_json_and_file_hold_the_librarys_record(
    adapters: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "directions.json"
    assert run("demo", *adapters, "--against", adapters[1], "--directions", "4", "--json", "--out", str(out)) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    own = weftlora.directions("demo", adapters, against=adapters[1], directions=4).record()
    for record in (printed, own):
        for adapter in record["adapters"]:
            for site in adapter["sites"]:
                del site["seconds"]
    assert printed == json.loads(json.dumps(own))
    assert printed["adapters"][1]["mean"]["hits"]["predicted"] == {"recall": 1.0, "accuracy": 1.0}


def test_the_tables_show_sites_controls_and_overlap(
    adapters: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "160")
    assert run("demo", *adapters, "--against", adapters[1], "-q") == 0
    shown = capsys.readouterr().out
    report = weftlora.directions("demo", adapters, against=adapters[1])
    site = report.adapters[0].sites[0]
    assert "0.self_attn.q_proj" in shown
    assert " ".join(map(str, site.index)) in shown
    for words in ("recall: true 4 in 8", "accuracy: 8 in true 16", "smallest σ", "at random, on average"):
        assert words in shown
    assert f"{report.overlaps[0].shared:.2f} of 8 shared per module over 2" in shown


def test_full_shows_every_direction(adapters: list[str], capsys: pytest.CaptureFixture[str]):
    assert run(adapters[0], "--full", "-q") == 0
    shown = capsys.readouterr().out
    assert shown.count("│ 127 ") >= 2


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["demo"], 1, "is not an adapter"),
        (["demo", "nowhere"], 1, "nowhere is not an adapter"),
        (["demo", "ADAPTER", "--out", "/nowhere/x.json"], 1, "/nowhere is not a folder; choose another file"),
        (["demo", "ADAPTER", "--directions", "0"], 2, "directions"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    adapters: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, sentence: str
):
    assert run(*(adapters[0] if word == "ADAPTER" else word for word in arguments)) == code
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("weftlora: ")
    assert sentence in shown


def test_progress_is_told_per_site(adapters: list[str]):
    ticks: list[tuple[int, int]] = []
    module.directions(adapters[0], progress=lambda tick: ticks.append((tick.done, tick.total)))
    assert ticks == [(1, 2), (2, 2)]
