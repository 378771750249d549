"""Rebuild committed results from what they were made of, and the pages that show them.

    python scripts/evidence.py --list                   what there is, and how each is made
    python scripts/evidence.py dash-runs --jobs 2       one of them: evidence/dash-runs.json, and the pages anew
    python scripts/evidence.py demo -- --tasks demo     what follows -- goes to the command that makes it
    python scripts/evidence.py --all --jobs 2           all that `make evidence` rebuilds (hours)
    python scripts/evidence.py --page                   only the pages, from evidence/: docs/evidence.md and docs/real-runs.md

Results of real models need WEFT_DATA (see README), the encoder also the extra `evidence`. Runs are kept in runs/; what lies there
is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys

import evidence_page
import real_runs

from claims import ROOT, SOURCES

FOLDER = ROOT / "evidence"
PAGE = ROOT / "docs" / "evidence.md"


def build(name: str, jobs: int, more: list[str]) -> None:
    """Run the command of a result in the project's folder; what `weftlora` prints as JSON becomes the result."""
    source = SOURCES[name]
    program, *rest = shlex.split(source.command)
    arguments = [*rest, *(["--jobs", str(jobs)] if source.takes_jobs else []), *more]
    start = {"weftlora": [sys.executable, "-m", "weftlora.cli"], "python": [sys.executable]}.get(program, [program])
    record = subprocess.PIPE if program == "weftlora" else None
    done = subprocess.run([*start, *arguments], cwd=ROOT, env=environment(), stdout=record, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} was not made: {source.command} failed.")
    if record is not None:
        keep_record(name, json.loads(done.stdout))


def keep_record(name: str, record: dict[str, object]) -> None:
    """Save what a comparison found, without the folders of this machine."""
    if not record["complete"]:
        sys.exit(f"the comparison {name} is not complete; give the same command again.")
    folder = ROOT / str(record["folder"])
    record["folder"] = str(folder.relative_to(ROOT)) if folder.is_relative_to(ROOT) else folder.name
    (FOLDER / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def environment() -> dict[str, str]:
    return os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def write_pages() -> None:
    """docs/evidence.md and docs/real-runs.md, from evidence/."""
    PAGE.write_text(evidence_page.page(FOLDER), encoding="utf-8")
    results = json.loads(real_runs.RESULTS.read_text(encoding="utf-8"))
    real_runs.DOCUMENT.write_text(real_runs.report(results), encoding="utf-8")


def listing() -> str:
    """A line per result."""
    lines = [f"{name:<16} {source.what}: {source.command}" for name, source in SOURCES.items()]
    left_out = [f"--all leaves out {name}: {source.alone}" for name, source in SOURCES.items() if source.alone]
    return "\n".join([*lines, *left_out])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("name", nargs="?", choices=SOURCES)
    options.add_argument("more", nargs="*", help="after --, for the command itself")
    options.add_argument("--all", action="store_true")
    options.add_argument("--page", action="store_true")
    options.add_argument("--list", action="store_true")
    options.add_argument("--jobs", type=int, default=1, help="runs at once, one thread each")
    args = options.parse_args()
    if args.list or not (args.name or args.all or args.page):
        print(listing())
        return
    names = [n for n, source in SOURCES.items() if not source.alone] if args.all else [args.name] if args.name else []
    for name in names:
        build(name, args.jobs, args.more)
    write_pages()


if __name__ == "__main__":
    main()
