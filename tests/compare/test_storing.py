"""A comparison in storage that no machine mounts: what is put there whole is brought back, and nothing else counts."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from weftlora.compare import fetch, load, work
from weftlora.compare.leases import Claims, Files
from weftlora.compare.storing import Store, newest_step
from weftlora.disk.files import write_json
from weftlora.disk.lock import holding
from weftlora.errors import ConfigError, RunError
from weftlora.report import report
from weftlora.train.checkpoint import mark

RUN = "runs/lora/s0"


@pytest.fixture(params=["folder", "memory", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return f"{request.getfixturevalue('server')}/{tmp_path.name}"
    return str(tmp_path / "store") if request.param == "folder" else f"memory://{tmp_path.name}"


def begun(top: Path, step: int) -> Path:
    """A run in a comparison's folder that has come to a checkpoint."""
    run = top / RUN
    folder = run / "checkpoints" / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "optimizer.pt").write_bytes(os.urandom(3000))
    write_json(folder / "trainer_state.json", {"global_step": step})
    mark(folder, step)
    write_json(run / "run.json", {"step": step})
    (run / "metrics.jsonl").write_text('{"step": 1}\n' * step, encoding="utf-8")
    return run


def ended(top: Path, loss: float = 1.0) -> Path:
    run = top / RUN
    (run / "adapter").mkdir(parents=True, exist_ok=True)
    (run / "adapter" / "adapter_model.safetensors").write_bytes(os.urandom(5000))
    write_json(run / "run.json", {"ended": True})
    write_json(run / "eval-test.json", {"loss": loss})
    return run


def content(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_a_run_that_was_stopped_goes_on_elsewhere_from_its_newest_checkpoint(place: str, tmp_path: Path):
    run = begun(tmp_path / "one", 2)
    assert Store(place).put_run(RUN, 0, tmp_path / "one", "begun")
    begun(tmp_path / "one", 4)
    (run / "notes.txt").write_text("the user's", encoding="utf-8")
    assert Store(place).put_run(RUN, 0, tmp_path / "one", "begun")
    begun(tmp_path / "other", 2)
    Store(place).go_on(RUN, tmp_path / "other")
    assert newest_step(tmp_path / "other" / RUN) == 4
    known = {name: text for name, text in content(run).items() if name != "notes.txt" and "checkpoint-2" not in name}
    assert content(tmp_path / "other" / RUN) == known
    begun(tmp_path / "other", 6)
    before = content(tmp_path / "other" / RUN)
    Store(place).go_on(RUN, tmp_path / "other")  # it is further than the store
    assert content(tmp_path / "other" / RUN) == before
    assert Store(place).bring([RUN], tmp_path / "third") == set()


def test_of_a_run_that_ended_results_are_brought_first_and_its_checkpoints_are_gone(place: str, tmp_path: Path):
    begun(tmp_path / "one", 2)
    store = Store(place)
    assert store.put_run(RUN, 1, tmp_path / "one", "begun")
    run = ended(tmp_path / "one")
    assert store.put_run(RUN, 1, tmp_path / "one", "ended")
    assert store.takes.names() == ["runs+lora+s0.1.ended.json"]
    assert Store(place).bring([RUN], tmp_path / "other") == {RUN}
    small = {"run.json", "eval-test.json", "metrics.jsonl"}
    assert content(tmp_path / "other" / RUN).keys() == small
    Store(place).bring([RUN], tmp_path / "other", whole=True)
    whole = content(tmp_path / "other" / RUN)
    assert whole.keys() == {*small, "adapter/adapter_model.safetensors"}
    assert all(content(run)[name] == text for name, text in whole.items())
    with pytest.raises(OSError, match="checkpoint-2"):
        store.top.download("runs/lora/s0/1.2/checkpoints/checkpoint-2/optimizer.pt", (tmp_path / "x").open("wb"))


def test_a_worker_that_dies_while_it_puts_a_checkpoint_leaves_the_one_before(place: str, tmp_path: Path):
    run = begun(tmp_path / "one", 2)
    store = Store(place)
    assert store.put_run(RUN, 0, tmp_path / "one", "begun")
    two = content(run)
    begun(tmp_path / "one", 4)
    left = iter([True] * 5)  # all five files, and then no take
    assert not store.put_run(RUN, 0, tmp_path / "one", "begun", lambda: next(left, False))
    Store(place).go_on(RUN, tmp_path / "other")
    assert content(tmp_path / "other" / RUN) == two
    assert store.put_run(RUN, 0, tmp_path / "one", "begun")
    with pytest.raises(OSError, match="checkpoint-2"):  # nobody can go on from it any more
        store.top.download("runs/lora/s0/0.2/checkpoints/checkpoint-2/optimizer.pt", (tmp_path / "x").open("wb"))


def test_what_has_no_take_is_not_there_and_the_later_claim_counts(place: str, tmp_path: Path):
    store = Store(place)
    ended(tmp_path / "late", loss=1.0)
    assert not store.put_run(RUN, 0, tmp_path / "late", "ended", lambda: False)  # its lease was lost
    ended(tmp_path / "next", loss=2.0)
    assert store.put_run(RUN, 1, tmp_path / "next", "ended")
    assert store.put_run(RUN, 0, tmp_path / "late", "ended")  # it did not know, and is back
    Store(place).bring([RUN], tmp_path / "other", whole=True)
    assert content(tmp_path / "other" / RUN) == content(tmp_path / "next" / RUN)


def test_a_file_that_is_not_what_its_take_says_is_named_and_nothing_of_it_is_kept(place: str, tmp_path: Path):
    ended(tmp_path / "one")
    store = Store(place)
    store.put_run(RUN, 0, tmp_path / "one", "ended")
    store.top.write(f"{RUN}/0/eval-test.json", '{"loss": 0.0}')
    with pytest.raises(RunError, match=r"s0/0/eval-test\.json is not what takes/runs\+lora\+s0\.0\.ended\.json says"):
        Store(place).bring([RUN], tmp_path / "other")
    assert not content(tmp_path / "other" / RUN)
    manifest = {"format": 1, "step": -1, "files": {"../../../out.json": {"bytes": 2, "sha256": ""}}}
    store.takes.write("runs+lora+s0.0.ended.json", json.dumps(manifest))
    with pytest.raises(RunError, match="which is not in it"):
        Store(place).bring([RUN], tmp_path / "other", whole=True)
    store.takes.write("runs+lora+s0.0.ended.json", "{")
    with pytest.raises(RunError, match="is damaged"):
        Store(place).bring([RUN], tmp_path / "other")


def test_a_claim_in_an_object_store_is_made_once(place: str):
    first, second = (Claims(Files(f"{place}/leases"), name) for name in ("one", "other"))
    assert first.claim(["a"]) is not None
    assert second.claim(["a"]) is None


def test_what_cannot_be_reached_or_is_no_comparison_is_one_sentence(server: str, tmp_path: Path):
    with pytest.raises(RunError, match=r"there is no comparison at s3://bucket/nothing: it has no compare\.json"):
        fetch("s3://bucket/nothing", tmp_path / "out")
    store = Store("s3://no-such-bucket/x")
    with pytest.raises(OSError, match="bucket does not exist"):
        store.takes.write("a", "b")
    import s3fs

    assert not s3fs.S3FileSystem(skip_instance_cache=True).exists("no-such-bucket")


def test_storage_that_takes_nothing_is_one_sentence_and_the_folder_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuses(*_: object) -> bool:
        raise PermissionError(30, "Read-only file system")

    file = tmp_path / "compare.yaml"
    file.write_text("methods: [lora]\nmodel: demo\ndata: demo\nout: out\n", encoding="utf-8")
    monkeypatch.setattr(Files, "create", refuses)
    with pytest.raises(RunError, match="memory://read-only cannot be reached: Read-only file system; give the same"):
        work(file, f"out={tmp_path / 'out'}", store="memory://read-only")
    assert [*(tmp_path / "out").iterdir()] == []
    with holding(tmp_path / "out", "weftlora compare --worker"), pytest.raises(RunError, match="choose another folder"):
        work(file, f"out={tmp_path / 'out'}", store="memory://read-only")


def test_misuse_is_one_sentence(tmp_path: Path):
    with pytest.raises(RunError, match="there is no comparison at memory://empty-store"):
        load("memory://empty-store")
    with pytest.raises(RunError, match="--fetch --out FOLDER"):
        report("s3://bucket/prefix")
    (tmp_path / "compare.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match="to which --store memory://x cannot be added"):
        work(tmp_path, store="memory://x")
