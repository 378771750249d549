"""`weftlora report` and `weftlora.report`: from folders to a page on disk, or one sentence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import weftlora
from weftlora.cli import main
from weftlora.disk.files import read_json, write_json
from weftlora.report.comparison.page import Report


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return int(left.value.code or 0), said.out, said.err


@pytest.fixture(scope="module")
def runs(alora_run: Path, hydra_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs with scores on the test rows, planted."""
    top = tmp_path_factory.mktemp("plain")
    for source, loss in ((alora_run, 1.25), (hydra_run, 1.5)):
        shutil.copytree(source, top / source.name)
        scores = {"loss": loss, "exact_match": 0.25}
        write_json(top / source.name / "eval-test.json", {"scores": scores, "domains": {}})
    return sorted(top.iterdir())


def test_run_folders_become_a_page(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    code, out, _ = run(capsys, "report", *runs, "-o", tmp_path / "page.html", "--title", "Two & more")
    assert code == 0
    assert out.splitlines()[0].startswith("No verdict: with one seed")
    assert out.splitlines()[1] == f"written: {tmp_path / 'page.html'}"
    text = (tmp_path / "page.html").read_text()
    assert "<h1>Two &amp; more</h1>" in text
    assert "1.2500" in text
    assert "1.5000" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_the_call_gives_what_the_command_prints(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    report = weftlora.report(*runs, out=tmp_path / "a.html")
    assert isinstance(report, Report)
    _, out, _ = run(capsys, "report", *runs, "-o", tmp_path / "b.html", "--json")
    record = json.loads(out)
    assert record == json.loads(json.dumps(report.record() | {"path": str(tmp_path / "b.html")}))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_baseline_and_the_metric_can_be_chosen(runs: list[Path], tmp_path: Path):
    report = weftlora.report(*runs, out=tmp_path / "page.html", baseline="hydralora", metric="exact_match")
    assert (report.comparison.baseline, report.comparison.metric) == ("hydralora", "exact_match")
    assert "may be luck" in report.verdict
    assert "hydralora" in report.verdict


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "there is no folder 'nowhere'"),
        (["."], "is not a run folder"),
        (["ALORA", "-o", "no/such/folder.html"], "choose another file"),
        (["ALORA", "--baseline", "hydra"], "there is no method 'hydra'"),
        (["ALORA", "--metric", "exactmatch"], "did you mean 'exact_match'?"),
        (["ALORA", "ALORA"], "are the same run"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    arguments: list[str],
    sentence: str,
    runs: list[Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(tmp_path)
    given = [str(runs[0]) if argument == "ALORA" else argument for argument in arguments]
    code, out, err = run(capsys, "report", *given)
    assert (code, out) == (1, "")
    assert sentence in " ".join(err.split())
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_missing_is_said_on_the_terminal_too(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(runs[0], tmp_path / "bare")
    (tmp_path / "bare" / "eval-test.json").unlink()
    code, out, _ = run(capsys, "report", tmp_path / "bare", runs[1], "-o", tmp_path / "page.html")
    assert code == 0
    assert "Unfinished, 1 of 2 runs missing" in out.splitlines()[0]
    assert f"To finish: weftlora eval {tmp_path / 'bare'}." in out


def test_runs_that_were_not_measured_get_the_commands(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copies = [Path(shutil.copytree(run_, tmp_path / f"bare {n}")) for n, run_ in enumerate(runs[:2])]
    for copy in copies:
        (copy / "eval-test.json").unlink()
    code, out, _ = run(capsys, "report", *copies, "-o", tmp_path / "page.html")
    assert code == 0
    assert "Nothing was measured yet: give the 2 commands below." in out.splitlines()[0]
    assert all(f"weftlora eval '{copy}'" in out for copy in copies)


def test_runs_without_test_rows_are_reported_by_their_validation_rows(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    copies = [Path(shutil.copytree(run_, tmp_path / f"bare{n}")) for n, run_ in enumerate(runs[:2])]
    for copy in copies:
        (copy / "eval-test.json").rename(copy / "eval-validation.json")
    code, out, _ = run(capsys, "report", *copies, "-o", tmp_path / "page.html")
    assert code == 0
    assert "Unfinished" not in out
    assert "on the validation rows" in (tmp_path / "page.html").read_text(encoding="utf-8")
    (copies[0] / "eval-validation.json").unlink()
    code, out, _ = run(capsys, "report", *copies, "-o", tmp_path / "page.html")
    assert f"weftlora eval {copies[0]} --split validation" in out


def test_runs_of_other_rows_are_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(runs[0], tmp_path / "other")
    record = read_json(tmp_path / "other" / "run.json")
    record["data"]["hashes"] = {"train": "of something else"}
    write_json(tmp_path / "other" / "run.json", record)
    code, _, err = run(capsys, "report", runs[1], tmp_path / "other", "-o", tmp_path / "page.html")
    assert code == 1
    assert "they cannot be compared" in err
    assert not (tmp_path / "page.html").exists()


def test_without_the_extra_it_says_what_to_install(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "vl_convert", None)  # as if it were not installed
    code, _, err = run(capsys, "report", runs[0], "-o", tmp_path / "page.html")
    assert code == 1
    assert err.endswith('needs vl-convert-python, which is not installed: pip install "weftlora[report]"\n')


def test_a_page_that_cannot_be_written_leaves_the_old_one(runs: list[Path], tmp_path: Path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(weftlora.RunError, match="cannot write"):
        weftlora.report(runs[0], out=tmp_path / "page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_the_name_stays_the_function_when_the_package_is_imported(saved: Callable[[str], Path]):
    import weftlora.report.inspection.page

    assert callable(weftlora.report)
    assert weftlora.inspect(saved("lora"), base=False).sites
