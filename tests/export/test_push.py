"""Onto a hub that listens on this machine: what goes there, what it says of this machine, and what is said when it does not go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "smoke"))
from test_first_hour import TOKEN, Hub, pulled

import weftlora
from weftlora.errors import AdapterError, ConfigError
from weftlora.runs.run import Run

COMMAND = [sys.executable, "-c", "from weftlora.cli import main; main()", "push"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    made = Hub()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture(scope="module")
def run(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    import tiny_bases as tiny

    folder = tmp_path_factory.mktemp("pushed")
    return weftlora.train(
        {
            "model": str(llama_folder),
            "data": {"train": str(tiny.write_rows(folder / "rows.jsonl", tiny.answers(20)))},
            "adapter": {"recipe": "lora", "r": 2},
            "train": {"steps": 2, "batch_size": 4},
            "out": str(folder / "run"),
        }
    )


def told(hub: Hub, home: Path, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, which knows the hub on this machine and no other."""
    environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home), **more,
    }  # fmt: skip
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_a_runs_adapter_goes_there_and_nothing_of_this_machine(hub: Hub, run: Run, tmp_path: Path) -> None:
    done = told(hub, tmp_path, run.folder, "somebody/mine", "--base-name", "somebody/base", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["repo"], record["private"]) == ("somebody/mine", True)
    assert set(hub.files["somebody/mine"]) == set(record["files"])
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(record["files"])
    for name, content in hub.files["somebody/mine"].items():
        assert str(Path(run.base["source"])).encode() not in content, name
        assert str(run.folder.parent).encode() not in content, name
    folder = pulled(hub, "mine", tmp_path)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/base"
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base["source"]), str(folder))
    assert hub.authorised
    assert TOKEN not in done.stdout + done.stderr
    assert "base_model_name_or_path" in (run.adapter_folder / "adapter_config.json").read_text()
    assert "somebody/base" not in (run.adapter_folder / "adapter_config.json").read_text()


def test_a_hub_that_refuses_is_one_sentence_without_a_token(hub: Hub, run: Run, tmp_path: Path) -> None:
    def refuse(self: Any) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.say({"error": f"who is {TOKEN}"}, 401)

    hub.RequestHandlerClass = type("Refuses", (hub.RequestHandlerClass,), {"do_POST": refuse})
    done = told(hub, tmp_path, run.folder, "somebody/mine", "--base-name", "somebody/base")
    assert (done.returncode, done.stdout) == (1, "")
    assert "was not pushed: it does not know your token: set HF_TOKEN" in done.stderr
    assert TOKEN not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    offline = told(hub, tmp_path, run.folder, "somebody/mine", "--base-name", "x/y", HF_HUB_OFFLINE="1")
    assert "the hub client is offline (HF_HUB_OFFLINE)" in offline.stderr


def test_what_cannot_be_pushed_is_said_before_anything_goes(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"by a folder of this machine .* --base-name owner/model"):
        weftlora.push(run.folder, "somebody/mine")
    with pytest.raises(ConfigError, match="'mine' is not a repository: write owner/name"):
        weftlora.push(run.folder, "mine")
    with pytest.raises(AdapterError, match="is not an adapter"):
        weftlora.push(tmp_path, "somebody/mine")
