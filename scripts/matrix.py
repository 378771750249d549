"""weftlora beside what its users run: builds the rows of matrix.toml and runs tests/smoke in each.

    python scripts/matrix.py                 every row
    python scripts/matrix.py oldest axolotl  these
    python scripts/matrix.py --ci            those marked `ci`, in a folder of results that is thrown away
    python scripts/matrix.py --resolve NAME  what the host's own pins resolve to today, beside the row

A row shares this environment and its torch; what it has in other versions is put, without dependencies, into a folder in front of
the path, kept under .venv/matrix by its content. A row marked `own`, or of a host that wants another Python, gets an environment of
its own, which is removed again: its versions come there with what they ask for, torch as the index has it, a CUDA build, which runs
on the CPU. With --ci, and where this machine has no such Python, a row of another Python runs on this one and says so. Results go to
evidence/matrix.json, and with the rows' versions into the package, where `weftlora doctor` reads them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "matrix.toml"
RESULTS = ROOT / "evidence" / "matrix.json"
CONSTRAINTS = ROOT / "constraints.txt"
SHIPPED = ROOT / "src" / "weftlora" / "assets" / "matrix.json"
BESIDE = (
    *("pytest", "typer", "rich", "pydantic", "packaging", "psutil", "pyyaml"),
    *("scipy", "scikit-learn", "sacrebleu", "rouge-score"),
)
"""What rows with an environment of their own need beside their versions: the tools of the suite, and what the commands import."""
MINORS = range(11, 20)
"""Minor versions of Python 3 that a row may be given."""
BOUND = 120
"""CPU seconds that the suite may take in a row; a record of a row that takes more is a failure. `make check` sees wall time itself."""
LIMIT = 1200
"""Seconds after which a row is given up: many times the bound, since other work may run beside it."""


def main() -> int:
    """Exit 1 where a row has failed, or where one that was asked for by name or by --ci could not be run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="rows; all without")
    parser.add_argument("--ci", action="store_true", help="the rows of `make check`; writes no results")
    parser.add_argument("--shared", action="store_true", help="only rows that share this environment")
    parser.add_argument("--resolve", metavar="NAME", help="print what a row's pins resolve to")
    args = parser.parse_args()
    rows = {row["name"]: row for row in tomllib.loads(ROWS.read_text(encoding="utf-8"))["row"]}
    if unknown := [name for name in [*args.names, *([args.resolve] if args.resolve else [])] if name not in rows]:
        parser.error(f"matrix.toml has no row {unknown[0]!r}: use one of {', '.join(rows)}")
    if args.resolve:
        return resolve(rows[args.resolve])
    wanted = [row for row in rows.values() if (row["name"] in args.names if args.names else True)]
    wanted = [row for row in wanted if not (args.ci and not row.get("ci")) and not (args.shared and row.get("own"))]
    with ThreadPoolExecutor(2 if args.ci else 1) as pool:  # side by side, which no measurement of CPU seconds may be
        results = [
            *pool.map(lambda row: run(row, own_python=not (args.ci or args.shared), bounded=not args.ci), wanted)
        ]
    if not args.ci:
        write(rows, results)
    for result in results:
        print(f"{result['name']:<14} {result['status']:<8} {said(result)}")
    bad = {"failed", "not run"} if args.ci or args.names else {"failed"}
    return int(any(result["status"] in bad for result in results))


def said(result: dict[str, Any]) -> str:
    """One line about a row."""
    if result["status"] == "not run":
        return result["reason"]
    counts = f"{result['passed']} passed, {result['failed']} failed, {result['skipped']} skipped"
    return f"{counts}, {result['cpu_seconds']} CPU s" + "".join(f"\n    {line}" for line in result["failures"])


# ---------------------------------------------------------------------- a row


def run(row: dict[str, Any], own_python: bool = True, bounded: bool = True) -> dict[str, Any]:
    """Build a row, run the suite in it, and say what came of it.

    Args:
        row: of matrix.toml.
        bounded: hold the suite to `BOUND`.
        own_python: give a row whose host wants another Python than this one an environment of that Python.
    """
    here = platform.python_version()
    apart = row.get("own") or (own_python and not fits(row, here) and interpreter(row))
    if reason := row.get("reason") or cannot(row, bool(apart)):
        return {"name": row["name"], "status": "not run", "reason": reason}
    print(f"--- {row['name']}: {row['host']}", flush=True)
    if not apart and not fits(row, here):
        print(f"    its host wants Python {row['python']}; here it runs on {here}", flush=True)
    folder = None
    try:
        python, path, folder = own(row) if apart else shared(row)
        return suite(row, python, path, bounded)
    except subprocess.CalledProcessError as error:
        return {"name": row["name"], "status": "not run", "reason": f"could not be built: {error}"}
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def cannot(row: dict[str, Any], apart: bool) -> str | None:
    """Why a row cannot be run on this machine."""
    if apart:
        return None if interpreter(row) else f"no Python {row['python']} on this machine"
    here = version("torch").partition("+")[0]
    return None if here == row["versions"]["torch"] else f"this environment has torch {here}"


def fits(row: dict[str, Any], python: str) -> bool:
    """Whether a version of Python is one that the row's host takes."""
    return SpecifierSet(row["python"]).contains(python)


def interpreter(row: dict[str, Any]) -> str | None:
    """A Python that the row's host takes: this one where it does, else the least minor version that this machine has."""
    if fits(row, platform.python_version()):
        return sys.executable
    for minor in MINORS:
        installed = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        for candidate in filter(None, (shutil.which(f"python3.{minor}"), *map(str, installed))):
            said = subprocess.run([candidate, "-V"], capture_output=True, text=True)
            if said.returncode == 0 and fits(row, said.stdout.split()[-1]):
                return candidate
    return None


def shared(row: dict[str, Any]) -> tuple[str, list[str], None]:
    """This Python, and a folder in front of the path with what the row has in other versions."""
    differing = [
        f"{name}=={wanted}"
        for name, wanted in sorted(row["versions"].items())
        if name != "torch" and installed(name) != wanted
    ]
    if not differing:
        return sys.executable, [], None
    kept = Path(sys.prefix).resolve() / "matrix"
    content = hashlib.sha256(" ".join([sys.version, *differing]).encode()).hexdigest()[:12]
    folder = kept / f"{row['name']}-{content}"
    if not folder.is_dir():
        kept.mkdir(exist_ok=True)
        for old in kept.glob(f"{row['name']}-*"):
            shutil.rmtree(old)
        making = Path(tempfile.mkdtemp(dir=kept, prefix="making-"))
        pip(sys.executable, "--ignore-requires-python", "--no-deps", "--target", str(making), *differing)
        making.rename(folder)
    return sys.executable, [str(folder)], None


def own(row: dict[str, Any]) -> tuple[str, list[str], Path]:
    """An environment of the row's own, in a folder to be removed: its versions, what torch itself asks for, and the tools."""
    folder = Path(tempfile.mkdtemp(prefix="weft-matrix-"))
    subprocess.run([interpreter(row) or sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    versions = [f"{name}=={wanted}" for name, wanted in row["versions"].items()]
    pins = dict(line.lower().split("==") for line in CONSTRAINTS.read_text(encoding="utf-8").split() if "==" in line)
    tools = [f"{name}=={pins[name]}" if name in pins else name for name in BESIDE if name not in row["versions"]]
    # Requires-Python counts here: without, the newest release is taken even where it has no wheel for this Python, and is built.
    pip(python, "--no-cache-dir", "--prefer-binary", *versions, *tools)
    return python, [], folder


def installed(name: str) -> str | None:
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def pip(python: str, *arguments: str) -> None:
    subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)


def source_digest(*folders: str) -> str:
    """Of the Python files of these folders of the project, by name and content: results are of one source where it is equal."""
    whole = hashlib.sha256()
    for folder in folders:
        for file in sorted((ROOT / folder).rglob("*.py")):
            whole.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return whole.hexdigest()[:12]


def suite(row: dict[str, Any], python: str, path: list[str], bounded: bool = True) -> dict[str, Any]:
    """tests/smoke in a row; its versions are checked by the suite itself.

    Args:
        bounded: more CPU seconds than `BOUND` are a failure; not where rows run side by side, whose seconds are counted together.
    """
    given = {"name": row["name"], "versions": row["versions"], "without": row.get("without", [])}
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*path, str(ROOT / "src")]),
        "WEFT_MATRIX_ROW": json.dumps(given),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory() as folder:
        out, settings = Path(folder) / "junit.xml", Path(folder) / "pytest.ini"
        settings.write_text("[pytest]\n", encoding="utf-8")  # the project's own asks for plugins that a row may lack
        command = [
            python,
            "-m",
            "pytest",
            "--tb=line",
            "--durations=8",
            "-c",
            str(settings),
            f"--rootdir={ROOT / 'tests' / 'smoke'}",
            "--import-mode=importlib",
            f"--confcutdir={ROOT / 'tests' / 'smoke'}",
            "-p",
            "no:cacheprovider",
            f"--junitxml={out}",
            *(str(ROOT / "tests" / "smoke" / name) for name in row.get("tests", [""])),
        ]
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        try:
            done = subprocess.run(
                command, env=env, cwd=folder, timeout=LIMIT, check=False, capture_output=True, text=True
            )
            print(done.stdout + done.stderr, flush=True)  # whole: another row may run beside this one
        except subprocess.TimeoutExpired:
            return {
                "name": row["name"],
                "status": "failed",
                "failures": [f"not done after {LIMIT} s"],
                "passed": 0,
                "failed": 0,
                "skipped": 0,
                "seconds": LIMIT,
                "cpu_seconds": LIMIT,
            }
        seconds, after = time.monotonic() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        cases = [*ElementTree.parse(out).getroot().iter("testcase")] if out.is_file() else []
    bad = [c for c in cases if c.find("failure") is not None or c.find("error") is not None]
    skipped = {c.get("name", ""): skip.get("message", "") for c in cases if (skip := c.find("skipped")) is not None}
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    slow = [f"{used:.0f} CPU seconds, of which a row may take {BOUND}"] if bounded and used > BOUND else []
    return {
        "name": row["name"],
        "status": "passed" if cases and not bad and not slow else "failed",
        "passed": len(cases) - len(bad) - len(skipped),
        "failed": len(bad),
        "skipped": len(skipped),
        "failures": [*(str(c.get("name")) for c in bad), *slow] or ([] if cases else ["the suite did not start"]),
        "left_out": sorted({said for reason in skipped.values() if (said := reason_of(reason))}),
        "seconds": round(seconds),
        "cpu_seconds": round(used),
        "source": source_digest("src/weftlora", "tests/smoke"),
        **json.loads(subprocess.run([python, "-c", FOUND], capture_output=True, text=True, check=True).stdout),
    }


FOUND = """
import json, platform, re
from importlib.metadata import distributions, version
import torch
cuda = {d.name: d.version for d in distributions() if re.match("nvidia-|cuda-|triton", d.name)}
build = {"python": platform.python_version(), "torch_build": torch.__version__}
print(json.dumps(build | ({"cuda_packages": dict(sorted(cuda.items()))} if torch.version.cuda else {})))
"""
"""What a row was run with beside its versions: its Python, which build of torch, and what a CUDA build brought."""


def reason_of(skip: str) -> str | None:
    """Why a test was left out, without folders of this machine; None for a test that has nothing to do in a row."""
    return None if skip.startswith("got empty parameter set") else re.sub(r" \(/[^)]*\)", "", skip)


# ---------------------------------------------------------------------- what is kept


def write(rows: dict[str, dict[str, Any]], results: list[dict[str, Any]]) -> None:
    """Put the results among those that are there, and all of them into the package."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {"rows": []}
    before = {result["name"]: result for result in kept["rows"]}
    ran = {
        result["name"]: result for result in results if result["status"] != "not run" or result["name"] not in before
    }
    found = [
        {"name": name, "status": "not run", "reason": row["reason"]}
        if "reason" in row
        else ran.get(name) or before.get(name) or {"name": name, "status": "not run", "reason": "not tried yet"}
        for name, row in rows.items()
    ]
    for result in found:
        if result["name"] in ran:
            result["versions"] = rows[result["name"]]["versions"]
        elif result.get("versions", {}) not in (
            {},
            rows[result["name"]]["versions"],
        ):  # of other versions than the row has now
            found[found.index(result)] = {"name": result["name"], "status": "not run", "reason": "not tried yet"}
    record = {"command": "make matrix", "machine": f"{platform.machine()}, {os.cpu_count()} cores", "rows": found}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    SHIPPED.write_text(json.dumps({"rows": shipped(rows, found)}, indent=1) + "\n", encoding="utf-8")


def shipped(rows: dict[str, dict[str, Any]], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows as the package has them: who, which versions, what came out."""
    status = {result["name"]: result["status"] for result in found}
    return [
        {
            "name": name,
            "host": row["host"],
            "python": row["python"],
            "status": status.get(name, "not run"),
            "versions": row["versions"],
            "without": row.get("without", []),
        }
        for name, row in rows.items()
    ]


def resolve(row: dict[str, Any]) -> int:
    """What the pins of a row's host resolve to today, for the packages that the row names."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        asked = ("--ignore-requires-python", "--dry-run", "--ignore-installed", f"--report={out}")
        requirements = row["pins"]
        if len(requirements) == 1:  # a host: its own requirements of the packages of the row, without the rest of it
            pip(sys.executable, *asked, "--no-deps", *requirements)
            metadata = json.loads(out.read_text())["install"][0]["metadata"]
            names = {name.replace("_", "-") for name in row["versions"]}
            requirements = [
                line
                for line in metadata.get("requires_dist", [])
                if "extra ==" not in line and re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") in names
            ]
        pip(sys.executable, *asked, f"torch=={row['versions']['torch']}", *requirements)
        found = {
            item["metadata"]["name"].lower().replace("-", "_"): item["metadata"]["version"].partition("+")[0]
            for item in json.loads(out.read_text())["install"]
        }
    for name, wanted in row["versions"].items():
        print(f"{name:<16} {wanted:<12} {found.get(name, 'none')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
