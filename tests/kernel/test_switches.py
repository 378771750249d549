"""Which ways through the kernel are open, where there is neither a GPU nor triton."""

import json
from pathlib import Path

import pytest
import torch

import weftlora
from weftlora.errors import ConfigError, MissingExtraError
from weftlora.kernel import current, switched, switches
from weftlora.kernel.philox import philox, words
from weftlora.kernel.switches import triton_runs

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
HALF = torch.bfloat16


def test_the_triton_kernels_are_off_where_nothing_was_measured(monkeypatch: pytest.MonkeyPatch):
    """No architecture is asked for, so that no GPU is: there is none here."""
    monkeypatch.setattr(switches, "MEASURED", ())
    monkeypatch.setattr(switches, "FOUND", True)
    with switched(triton=None):
        assert not triton_runs(GPU, HALF)


@pytest.mark.parametrize(("here", "on"), [("sm_90", True), ("sm_80", False)])
def test_they_are_on_on_the_architectures_that_were_measured(here: str, on: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switches, "MEASURED", ("sm_90",))
    monkeypatch.setattr(switches, "FOUND", True)
    monkeypatch.setattr(switches, "architecture", lambda index: here)
    with switched(triton=None):
        assert triton_runs(GPU, HALF) is on
        with switched(triton=False):
            assert not triton_runs(GPU, HALF)
        with switched(triton=True):
            assert triton_runs(GPU, HALF)
            assert not triton_runs(GPU, torch.float64)
            assert not triton_runs(torch.device("meta"), HALF)
            monkeypatch.setattr(switches, "FOUND", False)
            with pytest.raises(MissingExtraError, match="triton is not installed"):
                triton_runs(GPU, HALF)


def test_on_a_cpu_there_are_kernels_in_the_interpreter_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(switches, "FOUND", True)
    for interpreted in (False, True):
        monkeypatch.setattr(switches, "INTERPRETED", interpreted)
        with switched(triton=True):
            assert triton_runs(CPU, HALF) is interpreted
        with switched(triton=None):
            assert not triton_runs(CPU, HALF)


@pytest.mark.parametrize(("said", "means"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_what_the_environment_says(said: str | None, means: bool | None):
    assert switches._triton_asked(said) is means
    assert switches._dequantised_asked(said) is means


def test_what_it_cannot_say():
    with pytest.raises(ConfigError, match="WEFT_TRITON='yes' is neither 1 nor 0"):
        switches._triton_asked("yes")
    with pytest.raises(ConfigError, match="WEFT_DEQUANTISED='yes' is neither 1 nor 0"):
        switches._dequantised_asked("yes")


def test_switches_are_as_before_after_a_block_and_after_an_error():
    before = current()
    with switched(triton=True, groups=False):
        assert (current().triton, current().groups, current().mlp) == (True, False, before.mlp)
    with pytest.raises(RuntimeError), switched(triton=False):
        raise RuntimeError
    assert current() == before


def test_what_is_on_is_what_the_record_says():
    """The kernels are on by default where bench/gpu.json says so, and nowhere without it."""
    record = Path(weftlora.__file__).parents[2] / "bench" / "gpu.json"
    shipped = Path(weftlora.__file__).parent / "assets" / "gpu.json"
    assert shipped.exists() == record.exists()
    if record.exists():
        measured = json.loads(record.read_text())
        assert (measured["architecture"] in json.loads(shipped.read_text())["on"]) is measured["on"]
    assert (tuple(json.loads(shipped.read_text())["on"]) if shipped.exists() else ()) == switches.MEASURED


@pytest.mark.parametrize(
    ("counter", "key", "published"),
    [
        (0x0, 0x0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, 0xFFFFFFFF_FFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_philox_gives_the_published_numbers(counter: int, key: int, published: str):
    """With ten rounds, for which its authors give them; dropout takes seven."""
    every = torch.full((1,), counter, dtype=torch.int64)
    assert " ".join(f"{int(word):08x}" for word in philox((every,) * 4, key, 10)) == published


def test_the_words_of_a_mask_are_those_of_its_token_and_column():
    found = words(2**40 + 7, 3, 6)
    assert found.shape == (3, 6)
    for token, column in ((0, 0), (2, 5)):
        counter = tuple(torch.tensor(n) for n in (token, column // 4, 0, 0))
        assert int(found[token, column]) == int(philox(counter, 2**40 + 7, 7)[column % 4])
