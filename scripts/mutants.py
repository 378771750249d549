"""`make mutants`: small changes of the mathematics, drawn by a seed; a test must notice each of them.

    python scripts/mutants.py --map                  which tests run which lines of the code that is mutated (minutes; build/mutants)
    python scripts/mutants.py [--minutes 25]         one part: mutants not tried yet, until the time is over or all are tried
    python scripts/mutants.py --only NAME            one mutant again, with what the tests say
    python scripts/mutants.py --only NAME --by tests/kernel/test_node.py::test_... [...]        by these tests
    python scripts/mutants.py --map tests/search/test_driver.py [...]       the map again for these files alone, after a change

A mutant is one change of one expression or statement of kernel, terms, schedule, scoring or search: a comparison, an operator, a
constant, a condition, an argument or a call less. Which are tried is drawn by SEED from all of them: candidates are put in order by a
digest of seed and name, so that a change of one function draws no other mutants elsewhere. A name holds its function, and a result
counts as long as that function is the same. Each is tried by the fast tests that run its line, cheapest first, up to `BUDGET` seconds
of them; the first that fails ends it. In kernel, which has lines that run with the Triton kernels alone, the interpreter's tests of
the line come after them. What survives is killed by a new test, or has a line in tests/mutants_explained.json.

Why not mutmut (3.8 was tried): it has no draw by a seed, and it puts every function behind a wrapper, so that what weftlora reads of
its own functions (signatures of recipes, abstract and final methods, autograd nodes under torch.compile) is the wrapper's. Here the
changed module is compiled in place of the one on disk, in a process forked from one that has loaded torch, transformers and peft.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import itertools
import json
import linecache
import os
import resource
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "weftlora"
ROOMS = ("kernel", "terms", "schedule", "scoring", "search")
LEFT_OUT = {
    "terms/events.py": "protocols",
    "terms/scaffold.py": "writes a file for authors of terms",
    "terms/registry.py": "finds packages; no mathematics",
    "terms/trust.py": "asks for consent; no mathematics",
}
RESULTS = ROOT / "evidence" / "mutants.json"
EXPLAINED = ROOT / "tests" / "mutants_explained.json"
MAP = ROOT / "build" / "mutants"
SEED, DRAWN = 19, 330
BUDGET, FILES = 8.0, 6
"""Seconds of tests that a mutant is given, as they took under coverage, and of how many files; survivors get AGAIN times as much."""
AGAIN = 5
PATIENCE, WAITS = 5.0, 20
"""Times as many seconds of the processor as tests took: what takes more does not end, and is killed; and how many times as many of
the clock, for what waits for ever on a machine that has much else to do."""
TESTS = ("kernel", "terms", "schedule", "scoring", "search", "reference", "claims", "adapter", "test_change_rates.py")
FAST = "not grid and not slow and not sharded and not kills and not interpreter"
KERNELS = "kernel/triton/"
"""Where Triton's interpreter runs the code: the tests of that part of the check are the ones that count, in its environment."""
INTERPRETED = "tests/kernel/test_triton.py"


# ---------------------------------------------------------------------- what can be changed


@dataclass(frozen=True)
class Mutant:
    """One change: of which function (by qualified name, "" outside of any), at which place of the file, into what."""

    file: str
    function: str
    kind: str
    nth: int
    line: int
    before: str
    after: str
    digest: str
    """Of the function's text, or the statement's outside of functions: a result counts while it is the same."""
    start: int
    end: int

    @property
    def name(self) -> str:
        return f"{self.file}:{self.function}:{self.kind}:{self.nth}"

    @property
    def order(self) -> str:
        return hashlib.sha256(f"{SEED}/{self.name}/{self.before}/{self.after}".encode()).hexdigest()

    def applied(self, text: bytes) -> str:
        return (text[: self.start] + self.after.encode() + text[self.end :]).decode()


COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATE = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Pow: ast.Mult, ast.MatMult: ast.Add, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
TELLING = {"warn", "debug", "info", "warning", "suggest", "ConfigError", "MergeError", "WeftError", "cast"}
"""Calls whose arguments are words for people, or nothing at all: not changed."""


def changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What can be changed at this node: kind, and the node in its place."""

    def made(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARE:
        yield "comparison", made(ops=[COMPARE[type(node.ops[0])]()])
    elif isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in OPERATE:
        yield "operator", made(op=OPERATE[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield "and/or", made(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not)):
        yield "sign", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "constant", made(value=not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield "constant", made(value=node.value + 1)
    elif isinstance(node, (ast.If, ast.IfExp)):
        yield "condition", made(test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "call left out", ast.Pass()
    elif isinstance(node, ast.Call) and node.keywords and node.keywords[-1].arg is not None:
        yield "argument left out", made(keywords=node.keywords[:-1])
    elif isinstance(node, ast.Return) and node.value is not None and not isinstance(node.value, ast.Constant):
        yield "returns nothing", made(value=None)
    elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Slice) and isinstance(node.ctx, ast.Load):
        yield "whole of a slice", node.value


def mutants(path: Path) -> list[Mutant]:
    """All of a file, in its order."""
    text = path.read_bytes()
    starts = [0]
    for each in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(each))
    found: list[Mutant] = []
    counts: Counter[tuple[str, str]] = Counter()
    name = path.relative_to(SOURCE).as_posix()

    def digest(node: ast.AST) -> str:
        return hashlib.sha256(ast.dump(node).encode()).hexdigest()[:16]

    def place(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]

    def visit(node: ast.AST, function: str, whole: str) -> None:
        if isinstance(node, (ast.Raise, ast.Assert, ast.Import, ast.ImportFrom)):
            return
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in TELLING:
            return
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return
        if isinstance(node, ast.ClassDef) and any(getattr(b, "id", "") == "Protocol" for b in node.bases):
            return
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if getattr(node, "name", "") in ("__repr__", "extra_repr"):
                return
            function = f"{function}.{node.name}".lstrip(".")
            whole = digest(node) if isinstance(node, ast.FunctionDef) else ""
        at = whole or (digest(node) if isinstance(node, ast.stmt) and not isinstance(node, ast.ClassDef) else "")
        for kind, new in changes(node):
            if isinstance(node, ast.If):  # only the test is replaced
                inner = node.test
                span, before, after = place(inner), ast.unparse(inner), f"not ({ast.unparse(inner)})"
            else:
                span, before, after = place(node), ast.unparse(node), ast.unparse(new)
                if isinstance(node, ast.expr):
                    after = f"({after})"
            counts[function, kind] += 1
            found.append(
                Mutant(name, function, kind, counts[function, kind], node.lineno, before, after, at or "0", *span)  # type: ignore[attr-defined]
            )
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "type_comment", "op", "ops", "ctx", "type_params"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, function, at if not isinstance(node, (ast.Module, ast.ClassDef)) else whole)

    visit(ast.parse(text), "", "")
    return found


def compiles(one: Mutant) -> bool:
    """Whether it is Python, and another program than before."""
    text = (SOURCE / one.file).read_bytes()
    try:
        changed = ast.parse(one.applied(text))
    except (SyntaxError, UnicodeDecodeError):
        return False
    return ast.dump(changed) != ast.dump(ast.parse(text))


def drawn() -> list[Mutant]:
    """The mutants of the draw: of every file as its number of candidates has it, at least one."""
    files = [path for room in ROOMS for path in sorted((SOURCE / room).rglob("*.py"))]
    by_file = {path.relative_to(SOURCE).as_posix(): mutants(path) for path in files}
    by_file = {name: each for name, each in by_file.items() if each and name not in LEFT_OUT}
    total = sum(map(len, by_file.values()))
    chosen = []
    for each in by_file.values():
        share = max(1, round(DRAWN * len(each) / total))
        chosen += itertools.islice(filter(compiles, sorted(each, key=lambda one: one.order)), share)
    return sorted(chosen, key=lambda one: one.order)


# ---------------------------------------------------------------------- which tests run which lines


def measure(files: list[str]) -> None:
    """Run the fast tests once under coverage, with the test as context of every line; those of `files` alone where any are named."""
    MAP.mkdir(parents=True, exist_ok=True)
    settings = MAP / "coveragerc"
    packages = ", ".join(f"weftlora.{room}" for room in ROOMS)
    settings.write_text(
        f"[run]\nsource_pkgs = {packages}\ndynamic_context = test_function\ndata_file = {MAP / 'coverage'}\n"
    )
    fast = [name for name in files if name != INTERPRETED] if files else [f"tests/{name}" for name in TESTS]
    slow = [INTERPRETED] if not files or INTERPRETED in files else []
    coverage = ["-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-p", "no:cacheprovider"]
    for kernels, part, replaced in ((False, fast, files), (True, slow, slow)):
        if part:
            (MAP / "coverage").unlink(missing_ok=True)
            tests = ["-m", "interpreter" if kernels else FAST, *(str(ROOT / name) for name in part)]
            command = [sys.executable, *coverage, f"--junitxml={MAP / 'tests.xml'}", *tests]
            subprocess.run(command, cwd=ROOT, env=surroundings(kernels=kernels))
            keep(MAP / "coverage", MAP / "tests.xml", SOURCE, replaced)


def keep(data: Path, report: Path, source: Path, files: list[str]) -> None:
    """Beside what is known of other test files, if only some were run:
    {"seconds": {file of tests::test: seconds}, "lines": {file: {function: {line within it: [test, ...]}}}} as JSON."""
    from coverage import CoverageData

    recorded = CoverageData(str(data))
    recorded.read()
    seconds: Counter[str] = Counter()
    for case in ElementTree.parse(report).iter("testcase"):
        parts = case.attrib["classname"].split(".")
        while parts and not (ROOT / ("/".join(parts) + ".py")).is_file():
            parts.pop()
        test = f"{'/'.join(parts)}.py::{case.attrib['name'].partition('[')[0]}"
        seconds[test] += float(case.attrib["time"])
    known: dict[str, list[str]] = {}
    for test in seconds:
        known.setdefault(f"{Path(test.partition('::')[0]).stem}.{test.partition('::')[2]}", []).append(test)
    lines: dict[str, dict[str, dict[str, list[str]]]] = {}
    for path in (path for room in ROOMS for path in sorted((source / room).rglob("*.py"))):
        name = path.relative_to(source).as_posix()
        spans = functions(path)
        measured = next((f for f in recorded.measured_files() if f.endswith("weftlora/" + name)), None)
        if measured is None:
            continue
        for line, contexts in recorded.contexts_by_lineno(measured).items():
            function, first = next(((f, a) for f, a, b in spans if a <= line <= b), ("", 0))
            tests = sorted({t for c in contexts for t in known.get(".".join(c.split(".")[-2:]), [])})
            if tests:
                lines.setdefault(name, {}).setdefault(function, {})[str(line - first)] = tests
    if files and (MAP / "map.json").is_file():
        before = json.loads((MAP / "map.json").read_text())
        seconds |= {test: took for test, took in before["seconds"].items() if test.partition("::")[0] not in files}
        for name, functions_of in before["lines"].items():
            for function, by_line in functions_of.items():
                for line, tests in by_line.items():
                    there = lines.setdefault(name, {}).setdefault(function, {})
                    there[line] = sorted(
                        {*there.get(line, []), *(t for t in tests if t.partition("::")[0] not in files)}
                    )
    (MAP / "map.json").write_text(json.dumps({"seconds": dict(seconds), "lines": lines}))


def functions(path: Path) -> list[tuple[str, int, int]]:
    """(qualified name, first line, last line), innermost first."""
    found: list[tuple[str, int, int]] = []

    def visit(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = above
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                name = f"{above}.{child.name}".lstrip(".")
                if isinstance(child, ast.FunctionDef):
                    found.append((name, child.lineno, child.end_lineno or child.lineno))
            visit(child, name)

    visit(ast.parse(path.read_text()), "")
    return sorted(found, key=lambda each: each[2] - each[1])


def tests_of(one: Mutant, known: dict[str, Any], times: int) -> list[list[str]]:
    """The fast tests, and where its line runs with the Triton kernels on, those of the interpreter, in a process of their own."""
    if one.file.startswith(KERNELS):
        return [fast_tests(one, known, times, interpreted=True)]
    beside = fast_tests(one, known, times, interpreted=True) if one.file.startswith("kernel/") else []
    return [fast_tests(one, known, times), *([beside] if beside else [])]


def fast_tests(one: Mutant, known: dict[str, Any], times: int, *, interpreted: bool = False) -> list[str]:
    """Those that run its line, else its function, else its file; cheapest first, one per file before a second, up to the budget."""
    of_file = {
        function: {
            line: found for line, tests in by_line.items() if (found := [t for t in tests if counts(t) == interpreted])
        }
        for function, by_line in known["lines"].get(one.file, {}).items()
    }
    spans = {name: first for name, first, _ in functions(SOURCE / one.file)}
    of_function = of_file.get(one.function, {})
    exact = of_function.get(str(one.line - spans.get(one.function, 0)), [])
    near = {test for tests in of_function.values() for test in tests}
    anything = {test for each in of_file.values() for tests in each.values() for test in tests}
    room, stem = one.file.split("/")[0], Path(one.file).stem
    seconds: dict[str, float] = known["seconds"]

    def rank(test: str) -> tuple[int, float, str]:
        level = 0 if test in exact else 1 if test in near else 2
        named = 0 if stem.strip("_") in test or stem == "__init__" else 1
        return level * 4 + named * 2 + (f"tests/{room}" not in test), seconds[test], test

    pool = sorted(set(exact) or near or anything, key=rank)
    chosen, spent = [], 0.0
    turns: dict[str, list[str]] = {}
    for test in pool:
        turns.setdefault(test.partition("::")[0], []).append(test)
    nearest = list(turns.values())[: FILES * times]
    while any(nearest):
        for tests in nearest:
            if tests:
                test = tests.pop(0)
                if spent + seconds[test] <= BUDGET * times or not chosen:
                    chosen.append(test)
                    spent += seconds[test]
    return chosen


def counts(test: str) -> bool:
    """Whether a test is one of the interpreter's."""
    return test.partition("::")[0] == INTERPRETED


# ---------------------------------------------------------------------- one mutant


class Changed(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Loads one module from a text instead of its file."""

    def __init__(self, module: str, path: Path, text: str):
        self.module, self.path, self.text = module, path, text

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.module:
            return None
        package = [str(self.path.parent)] if self.path.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, self.path, loader=self, submodule_search_locations=package
        )

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: Any) -> bytes:
        return self.text.encode()

    def path_stats(self, path: Any) -> dict[str, Any]:
        raise OSError  # no cached bytecode


def run_tests(one: Mutant | None, tests: list[str], seconds: float, *, show: bool = False) -> str:
    """ "killed", "survived", or "killed by time", in a process of its own with `seconds` of the processor; None: the code as is."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        code = 70
        try:
            resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5))
            if not show:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            if one is not None:
                path = SOURCE / one.file
                parts = path.relative_to(SOURCE.parent).with_suffix("").parts
                module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                text = one.applied(path.read_bytes())
                sys.meta_path.insert(0, Changed(module, path, text))
                # Triton reads a kernel's text again, by way of linecache, which takes this for the file's as long as it has no time.
                linecache.cache[str(path)] = (len(text), None, text.splitlines(keepends=True), str(path))
            kernels = any(map(counts, tests))
            if kernels:
                os.environ.update(surroundings(kernels=True))
                sys.path.insert(0, str(interpreter()))
            import pytest

            chosen = "interpreter" if kernels else FAST
            options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", "-m", chosen, "--no-header"]
            code = int(pytest.main([*options, *(str(ROOT / test) for test in tests)]))
        finally:
            os._exit(code)
    limit = time.monotonic() + WAITS * seconds
    while time.monotonic() < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                return "killed by time"
            return "survived" if code == 0 else "killed" if code != 5 else "no tests"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed by time"


def warm() -> None:
    """Load what every test needs, once, before forking; nothing of weftlora."""
    os.environ.update(surroundings())
    os.chdir(ROOT)
    sys.path[:0] = [str(ROOT / "src")]
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import transformers
    from transformers import LlamaForCausalLM, Trainer  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    loaded = [name for name in sys.modules if name == "weftlora" or name.startswith("weftlora.")]
    if loaded:
        raise SystemExit(f"{loaded[0]} is loaded already: nothing of it could be changed")


def surroundings(*, kernels: bool = False) -> dict[str, str]:
    """The environment of tests; `kernels`: of those that Triton's interpreter runs."""
    ours = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    path = [str(ROOT / "src")]
    if kernels:
        ours["TRITON_INTERPRET"] = "1"
        path.append(str(interpreter()))
    return {**os.environ, **ours, "PYTHONPATH": os.pathsep.join(path)}


def interpreter() -> Path:
    """The folder with Triton, which `make interpreter` makes."""
    found = [path.parent for path in (ROOT / ".venv").glob("interpreter-*/.installed")]
    if not found:
        raise SystemExit("Triton is not there: run `make interpreter` first.")
    return found[0]


# ---------------------------------------------------------------------- a part


def part(minutes: float) -> None:
    """Try what is not tried yet, and write the results after every mutant."""
    known = json.loads((MAP / "map.json").read_text())
    chosen = drawn()
    results = kept(chosen)
    warm()
    end = time.monotonic() + 60 * minutes
    for one in sorted(chosen, key=lambda one: one.name in results):  # survivors, with the tests of today, at the end
        if one.name in results and results[one.name]["result"] != "survived":
            continue
        if one.name in results and results[one.name].get("tests") == [*itertools.chain(*tests_of(one, known, AGAIN))]:
            continue  # survived these tests before
        if time.monotonic() > end:
            break
        results[one.name] = tried(one, known)
        write(chosen, results)
        print(
            f"{len(results)}/{len(chosen)} {results[one.name]['result']:15} {one.name}  {one.before} → {one.after}",
            flush=True,
        )
    write(chosen, results)


def kept(chosen: list[Mutant]) -> dict[str, dict[str, Any]]:
    """What is known of these mutants."""
    before = json.loads(RESULTS.read_text())["mutants"] if RESULTS.is_file() else []
    told = {(each["name"], each["digest"], each["before"], each["after"]): each for each in before}
    return {one.name: told[key] for one in chosen if (key := (one.name, one.digest, one.before, one.after)) in told}


def by_name(one: Mutant, tests: list[str]) -> None:
    """Try one mutant by these tests, and keep it if they kill it."""
    began = time.monotonic()
    result = run_tests(one, tests, 600, show=True)
    print(result)
    chosen = drawn()
    if result == "killed" and one in chosen:
        write(chosen, kept(chosen) | {one.name: told(one, result, began) | {"by": tests}})


def told(one: Mutant, result: str, began: float) -> dict[str, Any]:
    """The record of a mutant."""
    said = {k: v for k, v in asdict(one).items() if k not in ("start", "end", "line")}
    return {"name": one.name, **said, "result": result, "seconds": round(time.monotonic() - began, 1)}


def tried(one: Mutant, known: dict[str, Any]) -> dict[str, Any]:
    began, result = time.monotonic(), "no tests"
    for times in (1, AGAIN):
        chosen = [tests for tests in tests_of(one, known, times) if tests]
        for tests in chosen:
            expected = sum(known["seconds"][test] for test in tests)
            result = run_tests(one, tests, 30 + PATIENCE * expected)
            if result.startswith("killed"):
                return told(one, result, began)
    return told(one, result, began) | ({"tests": [*itertools.chain(*chosen)]} if result == "survived" else {})


def write(chosen: list[Mutant], results: dict[str, dict[str, Any]]) -> None:
    """The results with a table by file; survivors with their explanation, where there is one."""
    explained = json.loads(EXPLAINED.read_text()) if EXPLAINED.is_file() else {}
    table: dict[str, dict[str, Any]] = {}
    for one in chosen:
        if (found := results.get(one.name)) is None:
            continue
        row = table.setdefault(one.file, {"tried": 0, "killed": 0, "explained": 0})
        row["tried"] += 1
        row["killed"] += found["result"].startswith("killed")
        if not found["result"].startswith("killed") and one.name in explained:
            found["explanation"] = explained[one.name]
            row["explained"] += 1
    for row in table.values():
        row["share"] = round(row["killed"] / row["tried"], 3)
    whole = {key: sum(row[key] for row in table.values()) for key in ("tried", "killed", "explained")}
    record = {
        "command": "make mutants",
        "seed": SEED,
        "drawn": len(chosen),
        **whole,
        "files": dict(sorted(table.items())),
        "left_out": LEFT_OUT,
        "mutants": [results[one.name] for one in chosen if one.name in results],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--map", nargs="*", metavar="FILE")
    parser.add_argument("--only")
    parser.add_argument("--by", nargs="+", metavar="TEST")
    given = parser.parse_args()
    if given.map is not None or not ((MAP / "map.json").is_file() or given.by):
        measure(given.map or [])
        if given.map is not None:
            return
    if given.only:
        one = next(
            one
            for room in ROOMS
            for p in sorted((SOURCE / room).rglob("*.py"))
            for one in mutants(p)
            if one.name == given.only
        )
        print(f"{one.file}:{one.line}  {one.before} → {one.after}")
        warm()
        if given.by:
            by_name(one, given.by)
        else:
            for tests in filter(None, tests_of(one, json.loads((MAP / "map.json").read_text()), 1)):
                print(run_tests(one, tests, 600, show=True))
        return
    part(given.minutes)


if __name__ == "__main__":
    main()
