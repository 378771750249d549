"""`weftlora bench launch`: both ways choose the same directions, and its record says how it was measured."""

import json

import pytest
import torch

from weftlora import change_rates
from weftlora.bench import LaunchBench, launch
from weftlora.bench.dash_launch import Matrix, published_launch
from weftlora.bench.record import Spread
from weftlora.cli import main
from weftlora.errors import ConfigError


@pytest.fixture(scope="module")
def quick() -> LaunchBench:
    return launch(quick=True)


def test_both_ways_choose_the_same_directions(quick: LaunchBench):
    assert [row.agreed for row in quick.results] == [1.0] * 3
    assert [row.sites for row in quick.results] == [1, 1, 7]


def test_the_published_way_is_the_equation():
    """Planted: ΔW moves directions 3, 0 and 5 by 0.5, 0.4 and 0.3 of their σ."""
    w = torch.randn(12, 8)
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    k = [3, 0, 5]
    b, a = u[:, k] * sigma[k] * torch.tensor([0.5, 0.4, 0.3]), vt[k]
    assert published_launch(w, a, b / 2, 2.0, 3) == k
    spectrum = change_rates.spectrum(w)
    rate = change_rates.change_rate(spectrum, change_rates.moved(spectrum, w, a, b))
    assert change_rates.pick(spectrum, w, rate, 3).index.tolist() == k


def test_a_ratio_is_of_the_same_round(quick: LaunchBench):
    for row in quick.results:
        assert row.rounds == len(row.published) == 2
        assert row.ratio == Spread.over([a / b for a, b in zip(row.seconds, row.published, strict=True)])
        assert min(row.seconds + row.published) > 0


def test_the_record_has_the_command_and_medians(quick: LaunchBench):
    record = json.loads(json.dumps(quick.record()))
    assert record["command"].startswith(
        "weftlora bench launch --shape 48x32@2 --shape 32x48@2 --layers 1 --hidden 64 --rounds 2"
    )
    row = record["results"][0]
    assert row["median_seconds"] == sum(row["seconds"]) / 2
    assert {"weftlora", "torch", "cpu"} <= record["versions"].keys()


def test_settings_that_cannot_work(monkeypatch: pytest.MonkeyPatch):
    assert Matrix.parse("4096x1024@2") == Matrix(4096, 1024, 2)
    assert str(Matrix.parse("8x9")) == "8x9"
    for text in ("4096", "4096x", "ax8", "8x0", "8x8@0", "8x8@x"):
        with pytest.raises(ConfigError, match="OUTxIN"):
            launch([text])
    for setting in (
        {"clock": "sun"},
        {"rounds": 0},
        {"threads": 0},
        {"threads": 10**5},
        {"seed": -1},
        {"r": 0},
        {"directions": 0},
    ):
        with pytest.raises(ConfigError):
            launch(quick=True, **setting)
    monkeypatch.setenv("WEFT_CACHE", "somewhere")
    with pytest.raises(ConfigError, match="unset it"):
        launch(quick=True)


def test_measuring_leaves_torch_as_it_was():
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    launch(quick=True, layers=0)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_the_command_writes_its_record(tmp_path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "160")
    out = tmp_path / "launch.json"
    with pytest.raises(SystemExit) as leave:
        main(["bench", "launch", "--quick", "--layers", "0", "--quiet", "--out", str(out)])
    assert not leave.value.code
    assert [row["what"] for row in json.loads(out.read_text())["results"]] == ["48x32", "32x48"]
    shown = capsys.readouterr().out
    assert "48x32" in shown
    assert "100.0%" in shown
