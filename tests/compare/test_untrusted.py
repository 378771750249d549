"""A comparison's folder that somebody else has made: nothing is read, written or deleted outside it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from comparing import recipe

import weftlora
from weftlora.compare import compare, load
from weftlora.compare.plan import Plan
from weftlora.compare.workers import carry_out
from weftlora.errors import RunError


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    top = tmp_path_factory.mktemp("comparison")
    made = recipe(top, methods=["lora", "peft:lora"], seeds=1)
    compare(made, jobs=0)
    return made


@pytest.fixture
def copied(done: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    import shutil

    out = tmp_path / "place" / "comparison"
    shutil.copytree(done["out"], out)
    return done | {"out": str(out)}, out


def victim(tmp_path: Path) -> Path:
    """A run of the user's, outside the comparison, with all that a run has."""
    folder = tmp_path / "victim" / "s0"
    folder.mkdir(parents=True)
    for name in ("run.json", "thesis.tex", "metrics.jsonl"):
        (folder / name).write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ways(made: dict[str, Any], out: Path) -> dict[str, Callable[[], object]]:
    """All that reads a comparison's folder."""
    return {
        "compare": lambda: compare(made, jobs=0),
        "overwrite": lambda: compare(made, jobs=0, overwrite=True),
        "load": lambda: load([out]),
        "report": lambda: weftlora.report(out, out=out.parent / "page.html"),
    }


@pytest.mark.parametrize("way", ["compare", "overwrite", "load", "report"])
@pytest.mark.parametrize("slug", ["../../../victim", "..", "", "/tmp/victim", "a/b", ".", "a\0b", 3, None, "x" * 300])
def test_a_slug_that_leads_out_is_refused(
    copied: tuple[dict[str, Any], Path], tmp_path: Path, slug: Any, way: str
) -> None:
    made, out = copied
    untouched = victim(tmp_path)
    plan = json.loads((out / "compare.json").read_text())
    plan["slugs"]["lora"] = slug
    (out / "compare.json").write_text(json.dumps(plan))
    before = contents(tmp_path)
    with pytest.raises(RunError, match=r"is not a folder inside|is damaged"):
        ways(made, out)[way]()
    assert contents(tmp_path) == before
    assert untouched.is_dir()


@pytest.mark.parametrize("way", ["compare", "overwrite", "load", "report"])
@pytest.mark.parametrize("link", ["runs", "runs/lora", "runs/lora/s0"])
def test_a_link_that_leads_out_is_refused(
    copied: tuple[dict[str, Any], Path], tmp_path: Path, link: str, way: str
) -> None:
    made, out = copied
    outside = tmp_path / "victim"
    (out / link).rename(outside)
    (out / link).symlink_to(outside)
    before = contents(outside)
    with pytest.raises(RunError, match=r"leads out of .* through a link"):
        ways(made, out)[way]()
    assert contents(outside) == before


def test_a_run_whose_folder_became_a_link_meanwhile_is_not_carried_out(
    copied: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    _, out = copied
    plan = Plan.load(out)
    job = plan.reported(plan.of("lora"), 1e-3)[0]
    (out / job.folder).rename(tmp_path / "victim")
    (out / job.folder).symlink_to(tmp_path / "victim")
    before = contents(tmp_path / "victim")
    with pytest.raises(RunError, match="through a link"):
        carry_out(job, out, lambda tick: None)
    assert contents(tmp_path / "victim") == before


@pytest.mark.parametrize(
    ("key", "value"), [("seeds", ["../x"]), ("seeds", 3), ("rates", ["a/../../b"]), ("methods", {}), ("slugs", [])]
)
def test_a_damaged_plan_is_one_sentence(copied: tuple[dict[str, Any], Path], key: str, value: Any) -> None:
    _, out = copied
    plan = json.loads((out / "compare.json").read_text()) | {key: value}
    (out / "compare.json").write_text(json.dumps(plan))
    with pytest.raises(RunError, match=r"compare\.json is damaged|is not in it"):
        load([out])


def test_overwrite_takes_the_comparisons_files_only(copied: tuple[dict[str, Any], Path]) -> None:
    made, out = copied
    mine = [
        "rows.jsonl",
        "runs/notes.md",
        "runs/lora/keep/run.json",
        "runs/mine/s0/run.json",
    ]
    for name in mine:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    compare(made, jobs=0, overwrite=True)
    assert [name for name in mine if (out / name).read_text() != "mine"] == []
    assert os.path.exists(out / "runs" / "lora" / "s0" / "eval-test.json")


def test_overwrite_deletes_nothing_where_something_of_the_users_lies_in_a_run(
    copied: tuple[dict[str, Any], Path],
) -> None:
    made, out = copied
    (out / "runs" / "lora" / "s0" / "thesis.tex").write_text("mine")
    before = contents(out)
    with pytest.raises(RunError, match=r"thesis\.tex was not written by this comparison"):
        compare(made, jobs=0, overwrite=True)
    assert contents(out) == before
