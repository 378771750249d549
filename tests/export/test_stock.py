"""The process of the proof: weftlora cannot be imported there, and what goes wrong in it is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
from peft import PeftModel

import weftlora
from weftlora.errors import AdapterError
from weftlora.export import proof, stock_process

Adapted = Callable[..., PeftModel]

AFTERWARDS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("stock", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.main(sys.argv[2])
import weftlora
"""


def test_importing_weft_is_blocked_and_not_only_left_undone(tmp_path: Path) -> None:
    (tmp_path / "jobs.json").write_text("[]")
    command = [sys.executable, "-I", "-c", AFTERWARDS, stock_process.__file__, str(tmp_path / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]"
    assert done.returncode
    assert "import of weftlora halted" in done.stderr


ELSEWHERE = """
import peft
from pathlib import Path
from weftlora.export import proof

script = Path("script.py")
script.write_text(
    "import importlib.util, json, runpy\\n"
    f"runpy.run_path({proof.stock_process.__file__!r}, run_name='__main__')\\n"
    "print(json.dumps([importlib.util.find_spec('peft').origin, importlib.util.find_spec('planted') and 'planted']))\\n"
)
proof.stock_process.__file__ = str(script.absolute())
print(*proof.run_jobs([], Path(".")))
"""


def test_what_proves_are_the_libraries_that_run_here_and_nothing_else_of_this_path(tmp_path: Path) -> None:
    """A peft that PYTHONPATH names is the one that the export is made for; what else lies about is not looked at."""
    row, around = tmp_path / "row", tmp_path / "around"
    row.mkdir(), around.mkdir()
    (row / "peft").symlink_to(Path(peft.__file__).parent)
    (around / "planted.py").write_text("")
    here = os.pathsep.join([str(around), str(row), *(entry for entry in sys.path if entry)])
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=os.environ | {"PYTHONPATH": here},
    )  # fmt: skip
    assert done.stdout.split() == [str(row / "peft" / "__init__.py"), "None"], done.stderr


def test_a_process_that_comes_to_nothing_is_one_sentence(
    adapted: Adapted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'no module named torch' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(proof.sys, "executable", str(broken))
    with pytest.raises(AdapterError, match=r"stock peft failed \(no module named torch\).*verify=False"):
        weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_the_base_is_called_what_it_is_called_for_everybody(adapted: Adapted, tmp_path: Path) -> None:
    weftlora.export_lora(adapted(weftlora.PlainLoraConfig(r=2)), tmp_path / "lora", base_name="org/model", verify=False)
    card = (tmp_path / "lora" / "README.md").read_text()
    assert '"base_model_name_or_path": "org/model"' in (tmp_path / "lora" / "adapter_config.json").read_text()
    assert "base_model: org/model" in card
    assert "from_pretrained('org/model')" in card
