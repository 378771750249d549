"""`make demo` runs to its page; what it says of a method is what the losses of its job say."""

from __future__ import annotations

import dataclasses
import re
import sys

import demo
import pytest

from weftlora.compare.plan import make
from weftlora.compare.recipe import CompareRecipe
from weftlora.runs.recipe import BUILTIN


def recipes(job: demo.Job) -> list[str]:
    return [each if isinstance(each, str) else each["recipe"] for each in job.methods]


def test_every_recipe_has_a_job_and_plain_lora_is_in_each():
    assert {name for job in demo.JOBS for name in recipes(job)} == set(BUILTIN)
    assert all(recipes(job)[0] == "lora" for job in demo.JOBS)
    assert {name for job in demo.JOBS for name in recipes(job)[1:]} >= set(demo.OURS)


def test_the_demo_ends_with_a_table_a_page_and_a_report_per_job(
    tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    job = dataclasses.replace(demo.JOBS[0], methods=["lora", "tied_lora", "peft:lora"])
    monkeypatch.setattr(demo, "JOBS", (job,))
    page = tmp_path / "page.html"
    given = ["--out", str(tmp_path / "out"), "--seeds", "1", "--steps", "2", "--rows", "8", "--jobs", "0"]
    monkeypatch.setattr(sys, "argv", ["demo.py", *given, "--report", str(page)])
    monkeypatch.setattr(demo, "chosen_rates", lambda: {job.name: {"lora": 1e-2, "tied_lora": 5e-3}})
    demo.main()
    shown = capsys.readouterr().out
    for words in (job.have, "tied_lora", "one seed: no verdict", "The answer is"):
        assert words in shown
    assert "stock peft" not in shown  # its time is for seeds
    text = page.read_text(encoding="utf-8")
    assert "Each method at the job it is for" in text
    assert job.have in text
    (link,) = re.findall(r'<a href="(out/[^"]+)"', text)
    report = (tmp_path / link).read_text(encoding="utf-8")
    assert "lr: 0.01" in report or "lr=0.01" in report  # of --measure, and not a default
    page.write_text("mine", encoding="utf-8")
    with pytest.raises(demo.weftlora.RunError, match="is not a page of weftlora"):
        demo.main()


def losses(lora: list[float], **methods: list[float]) -> list[dict]:
    return [
        {"variant": name, "seed": seed, "test": loss, "trainable": 1234 if name == "lora" else 1200}
        for name, each in {"lora": lora, **methods}.items()
        for seed, loss in enumerate(each)
    ]


def test_a_line_says_what_the_paired_losses_say(monkeypatch: pytest.MonkeyPatch):
    job = dataclasses.replace(demo.JOBS[0], have="a need")
    monkeypatch.setattr(demo, "JOBS", (job,))
    lora = [0.5, 0.9, 0.7]
    runs = {job.name: losses(lora, good=[0.39, 0.8, 0.61], bad=[0.61, 1.0, 0.79], level=[0.4, 1.0, 0.7], short=[0.4])}
    good, bad, level, short = demo.table_rows(runs)
    assert good == ("a need", "good", "1,234", "0.700", "0.600", good[5], "better")
    assert re.fullmatch(r"−0\.100 \[−0\.1\d\d, −0\.0\d\d\]", good[5])
    assert bad[:4] == ("", "bad", "", "")  # what is the same is said once
    assert bad[6] == "worse"
    assert level[6] == "not distinguishable"
    assert short[3:] == ("0.500", "0.400", "−0.100", "one seed: no verdict")  # of the one seed that both have


def test_a_job_that_was_measured_before_has_its_runs_from_there():
    runs = demo.committed()
    known = [job for job in demo.JOBS if job.known]
    assert known
    for job in known:
        assert {run["r"] for run in runs[job.name]} == {job.r}
        assert set(job.variants) == set(recipes(job)) == {run["variant"] for run in runs[job.name]}
    assert all(line.gap.n == 5 for line in demo.lines(runs))
    assert {line.method for line in demo.lines(runs)} == {name for job in demo.JOBS for name in recipes(job)} - {
        "lora",
        "none",
    }


def test_a_folder_that_is_taken_is_a_sentence(tmp_path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "kinds").mkdir()
    (tmp_path / "kinds" / "mine.txt").write_text("mine", encoding="utf-8")
    given = ["demo.py", "--out", str(tmp_path), "--report", str(tmp_path / "page.html")]
    monkeypatch.setattr(sys, "argv", given)
    with pytest.raises(demo.weftlora.RunError, match=r"holds other files, such as mine\.txt"):
        demo.main()


def test_every_method_can_be_given_as_many_trainable_parameters_as_plain_lora():
    every = {name: method for job in demo.JOBS for name, method in zip(recipes(job), job.methods, strict=True)}
    job = dataclasses.replace(demo.JOBS[0], methods=list(every.values()))
    rates = {name: rate for of in demo.chosen_rates().values() for name, rate in of.items()}
    planned = make(CompareRecipe.read(demo.recipe(job, "nowhere", steps=100, rows=8, seeds=3, rates=rates)))
    gaps = {method.name: method.budget_gap for method in planned.methods if method.budget_gap is not None}
    assert gaps.keys() == every.keys() - {"none"}
    assert max(map(abs, gaps.values())) < 0.06
    for job in demo.JOBS:
        if not job.known:
            counts = {run["trainable"] for run in demo.committed()[job.name]}
            assert min(counts) > 0.94 * max(counts)
