"""In which type a base is held where nobody says it: by what its checkpoint is in, and what this CPU was measured to do."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from weftlora.runs import precision as module
from weftlora.runs.precision import bfloat16_gain, measured_gain, precision


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bfloat16_gain.cache_clear()
    yield
    bfloat16_gain.cache_clear()


@pytest.mark.parametrize(("gain", "dtype"), [(2.5, "bfloat16"), (1.0, "float32"), (0.3, "float32")])
def test_a_checkpoint_in_bfloat16_is_held_so_where_that_is_faster(
    gain: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "measured_gain", lambda: gain)
    for stored in (torch.bfloat16, "bfloat16"):
        found = precision(None, SimpleNamespace(dtype=stored))
        assert found.dtype == dtype
        assert bool(found.why) == (dtype == "bfloat16")
        assert not found.why or "2.5 times" in found.why


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, None])
def test_nothing_is_rounded_that_is_not_in_bfloat16_itself(
    stored: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measured_gain", lambda: pytest.fail("it was measured"))
    assert precision(None, SimpleNamespace(dtype=stored)).dtype == "float32"


def test_what_is_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_gain", lambda: pytest.fail("it was measured"))
    for asked in ("float32", "bfloat16", "auto"):
        assert precision(asked, SimpleNamespace(dtype=torch.bfloat16)).dtype == asked


def test_it_is_measured_once_for_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_gain", lambda: 1.75)
    assert bfloat16_gain() == 1.75
    bfloat16_gain.cache_clear()  # as another process begins
    monkeypatch.setattr(module, "measured_gain", lambda: pytest.fail("it was measured again"))
    assert bfloat16_gain() == 1.75
    [file] = (tmp_path / "weftlora" / "precision").iterdir()
    file.write_text('{"gain": "fast"}')
    bfloat16_gain.cache_clear()
    monkeypatch.setattr(module, "measured_gain", lambda: 0.5)
    assert bfloat16_gain() == 0.5, "what is damaged is measured again"
    file.write_text('{"gain": Infinity}')
    bfloat16_gain.cache_clear()
    assert bfloat16_gain() == 0.5, "nothing is infinitely fast"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(module, "measured_gain", lambda: 2.0)
    assert bfloat16_gain() == 2.0


def test_the_measurement_is_of_both_types() -> None:
    assert 0.001 < measured_gain() < 1000
