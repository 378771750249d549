"""An export that is stopped, at any point, leaves no folder that looks finished; the next one cleans up after it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from safetensors import safe_open

import weftlora
from weftlora.disk.ownership import EXPORTED
from weftlora.errors import AdapterError, RunError
from weftlora.export import folder, proof

Adapted = Callable[..., PeftModel]


def killed_at(event: int, work: Callable[[], object], top: Path) -> bool:
    """Run `work` in a copy of this process that kills itself at its n-th touch of a file below `top`; False if there are fewer."""
    child = os.fork()
    if child == 0:
        left = [event]

        def count(name: str, arguments: tuple[object, ...]) -> None:
            if name.startswith(("open", "os.", "shutil.")) and any(str(top) in str(a) for a in arguments):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        try:
            sys.addaudithook(count)
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def finished(top: Path) -> list[str]:
    """The folders that look like an export: neither their own name nor one above says that they are unfinished or replaced."""
    found = [path.parent for path in [*top.rglob("adapter_config.json"), *top.rglob("config.json")]]
    return sorted({p.name for p in found if not any(".weft-" in part for part in p.parts)})


def whole(out: Path) -> bool:
    with safe_open(out / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    return bool(keys) and {p.name for p in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_killed_anywhere_a_new_export_is_not_there(adapted: Adapted, tmp_path: Path) -> None:
    model, stages = adapted(weftlora.PlainLoraConfig(r=2)), 0
    for stages in range(200):
        top = tmp_path / str(stages)
        out = top / "lora"
        top.mkdir()
        if not killed_at(stages, lambda out=out: weftlora.export_lora(model, out, verify=False), top):
            break
        if finished(top):  # the kill came after the rename
            assert finished(top) == ["lora"]
            assert whole(out)
        else:
            assert not out.exists()
        weftlora.export_lora(model, out, verify=False, overwrite=out.exists())
        assert [p.name for p in top.iterdir()] == ["lora"]
        assert whole(out)
    assert stages > 10


def test_killed_anywhere_an_export_that_is_replaced_is_the_old_or_the_new_one(adapted: Adapted, tmp_path: Path) -> None:
    model, stages, seen = adapted(weftlora.PlainLoraConfig(r=2)), 0, set()
    for stages in range(200):
        top = tmp_path / str(stages)
        out = top / "lora"
        weftlora.export_lora(model, out, verify=False, uniform=True)
        (out / "README.md").write_text(f"the old one\n\n{EXPORTED}")
        if not killed_at(
            stages,
            lambda out=out: weftlora.export_lora(model, out, verify=False, overwrite=True, server_ranks=True),
            top,
        ):
            break
        assert finished(top) in ([], ["lora"])
        if out.exists():
            assert whole(out)
            seen.add((out / "README.md").read_text().startswith("the old one"))
        weftlora.export_lora(model, out, verify=False, overwrite=True)
        assert [p.name for p in top.iterdir()] == ["lora"]
    assert stages > 10
    assert seen == {True, False}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, AdapterError("no")])
def test_interrupted_while_it_is_proved_nothing_is_left(
    stop: Any, adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(jobs: Sequence[Mapping[str, Any]], scratch: Path) -> list[str | None]:
        assert list(scratch.parent.glob("*.safetensors"))
        raise stop

    monkeypatch.setattr(proof, "run_jobs", run)
    model = adapted(weftlora.PlainLoraConfig(r=2))
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else AdapterError):
        weftlora.export_lora(model, tmp_path / "lora")
    with pytest.raises(KeyboardInterrupt if stop is KeyboardInterrupt else AdapterError):
        weftlora.merge(model, tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_failing_replacement_leaves_the_earlier_export(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, out = adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora"
    weftlora.export_lora(model, out, verify=False)
    before = (out / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(proof, "run_jobs", lambda jobs, scratch: ["it cannot be read" for _ in jobs])
    with pytest.raises(AdapterError, match="it cannot be read"):
        weftlora.export_lora(model, out, uniform=True, overwrite=True)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["lora"]


def test_what_is_in_the_way_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    taken, file = tmp_path / "taken", tmp_path / "file"
    taken.mkdir()
    (taken / "thesis.tex").write_text("mine")
    file.write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        folder.check_out(file, None, True)
    with pytest.raises(RunError, match=r"is not empty: choose another folder .*, or replace"):
        folder.check_out(taken, None, False)
    with pytest.raises(RunError, match="is not an export of weftlora, so it is not replaced"):
        folder.check_out(taken, None, True)
    with pytest.raises(RunError, match="holds the adapter itself"):
        folder.check_out(tmp_path, tmp_path / "adapter", True)
    folder.check_out(tmp_path / "new" / "deep", None, False)
