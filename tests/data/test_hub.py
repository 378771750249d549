"""Data sets of the hub, from a server on loopback that speaks its HTTP API; all in one process, which asks nobody else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub

TOKEN = "hf_" + "a1B2" * 8
SECTIONS = {
    "files": {"train": "weft/files"},
    "config": {"train": "weft/configs:maths"},
    "no config": {"train": "weft/configs"},
    "split": {"train": "weft/files", "split": "test", "validation_fraction": 0},
    "no split": {"train": "weft/files", "split": "unseen"},
    "other split": {"train": "weft/configs:words", "test": "weft/files"},
    "both": {"train": ["weft/files", "mine.jsonl"], "validation_fraction": 0},
    "streamed": {"train": "weft/files", "streaming": True, "limit": 3},
    "streamed without a limit": {"train": "weft/files", "streaming": True},
    "nothing": {"train": "weft/nothing"},
    "closed": {"train": "weft/closed"},
    "bad row": {"train": "weft/bad"},
    "once cut": {"train": "weft/once"},
    "cut": {"train": "weft/cut"},
    "again": {"train": "weft/files"},
}
ASK = """
import json, logging, sys, warnings
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
from transformers import PreTrainedTokenizerFast
from weftlora.data import DataConfig, load
tokenizer = PreTrainedTokenizerFast.from_pretrained("tokenizer")
for name, section in json.load(open("sections.json")).items():
    try:
        held = load(DataConfig.parse(section), tokenizer)
        found = {split: list(getattr(held, split)["prompt"]) for split in held.counts}
        found |= {"hashes": held.hashes, "columns": held.columns}
    except Exception as error:
        found = {"error": type(error).__name__, "says": str(error)}
    print(json.dumps([name, found]), flush=True)
from huggingface_hub import HfApi
HfApi().create_repo("weft/mine", repo_type="dataset")
HfApi().upload_folder(repo_id="weft/mine", repo_type="dataset", folder_path="upload")
"""


def rows(*numbers):
    return [{"prompt": f"{n}=", "completion": str(n)} for n in numbers]


def write(path, held):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in held))


@pytest.fixture(scope="module")
def asked(tmp_path_factory, letters):
    """What came of each section, the server, and everything that the process has written."""
    top = tmp_path_factory.mktemp("hub")
    repos = {f"weft/{name}": top / "repos" / name for name in ("files", "configs", "bad", "once", "cut")}
    write(repos["weft/files"] / "train-0.jsonl", rows(*range(20)))
    write(repos["weft/files"] / "train-1.jsonl", rows(*range(20, 30)))
    write(repos["weft/files"] / "test.jsonl", rows(100, 101))
    write(repos["weft/configs"] / "maths" / "train.jsonl", rows(*range(1, 11)))
    write(repos["weft/configs"] / "words" / "train.jsonl", [{"prompt": c, "completion": c} for c in "abcdefgh"])
    card = "".join(f"- config_name: {name}\n  data_files: {name}/train.jsonl\n" for name in ("maths", "words"))
    (repos["weft/configs"] / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    write(repos["weft/bad"] / "train.jsonl", [*rows(1, 2), {"prompt": "3=", "completion": None}])
    for name in ("once", "cut"):
        write(repos[f"weft/{name}"] / "train.jsonl", rows(*range(500)))
    write(top / "mine.jsonl", rows(7))
    (top / "sections.json").write_text(json.dumps(SECTIONS))
    write(top / "upload" / "rows.jsonl", rows(1))
    letters.save_pretrained(top / "tokenizer")
    with hub(repos) as server:
        server.closed["weft/closed"] = "another"
        server.cut = {"weft/once/train.jsonl": 1, "weft/cut/train.jsonl": 10**6}
        clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        clean |= {"HF_ENDPOINT": server.url, "HF_HOME": str(top / "home"), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        clean |= {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "XDG_CACHE_HOME": str(top / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", ASK], env=clean, cwd=top, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
        yield found, server, done.stdout + done.stderr


def prompts(*numbers):
    return [f"{n}=" for n in numbers]


def test_several_files_are_one_set_with_its_test_split(asked):
    found = asked[0]["files"]
    assert sorted(found["train"] + found["validation"], key=lambda p: int(p[:-1])) == prompts(*range(30))
    assert found["test"] == prompts(100, 101)
    assert list(found["hashes"]) == ["hub:weft/files train", "hub:weft/files test"]
    assert found["columns"] == ["weft/files train: format prompt_completion: prompt, completion"]
    assert asked[0]["again"] == found


def test_a_config_is_named_behind_a_colon(asked):
    found = asked[0]["config"]
    assert sorted(found["train"] + found["validation"], key=lambda p: int(p[:-1])) == prompts(*range(1, 11))
    assert asked[0]["no config"]["error"] == "ConfigError"
    assert "maths" in asked[0]["no config"]["says"]
    assert "write name:config" in asked[0]["no config"]["says"]


def test_a_split_can_be_chosen(asked):
    assert asked[0]["split"]["train"] == prompts(100, 101)
    assert "has the splits train, test but no unseen" in asked[0]["no split"]["says"]
    assert asked[0]["other split"]["test"] == prompts(100, 101)


def test_a_set_and_a_file_go_together(asked):
    assert asked[0]["both"]["train"] == prompts(*range(30), 7)


def test_a_stream_gives_its_first_rows(asked):
    found = asked[0]["streamed"]
    assert len(found["train"]) == 3
    assert "say how many with data.limit" in asked[0]["streamed without a limit"]["says"]


def test_what_goes_wrong_is_one_sentence(asked):
    says = {name: found.get("says", "") for name, found in asked[0].items()}
    assert "neither a file nor a data set of the hub called weft/nothing" in says["nothing"]
    assert "does not let you read the data set weft/closed (it answers 401)" in says["closed"]
    assert says["bad row"].startswith("weft/bad train, row 3: column 'completion' holds None")
    assert "the data set weft/cut could not be read from the hub" in says["cut"]
    assert all("\n" not in text for text in says.values())
    assert {found["error"] for found in asked[0].values() if "error" in found} <= {"DataError", "ConfigError"}


def test_a_connection_that_breaks_once_is_taken_up_again(asked):
    assert len(asked[0]["once cut"]["train"]) + len(asked[0]["once cut"]["validation"]) == 500


def test_the_token_goes_to_the_server_and_nowhere_else(asked):
    _, server, written = asked
    assert any(token == f"Bearer {TOKEN}" for _, _, token in server.asked)
    assert TOKEN not in written
    for path in Path(server.repos["weft/files"]).parents[1].rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


def test_rows_can_be_put_there(asked):
    assert asked[1].uploaded["weft/mine/rows.jsonl"] == b'{"prompt": "1=", "completion": "1"}\n'
