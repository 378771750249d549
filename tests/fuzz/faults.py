"""Faults that were fixed, each put back by a small change of the source: what the fuzzer finds again.

A fault names a function and replaces text of its source, as a patch would; `test_fuzz.py` holds that the text is still there. Run by
`python scripts/fuzz.py --faults`, in a process that knows no other faults.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Change:
    """One text of the source of a function, or of a method, for another: `module:function` or `module:Class.method`."""

    where: str
    old: str
    new: str


@dataclass(frozen=True)
class PutBack:
    """A fault: what it is, who should find it, and the changes that put it back."""

    name: str
    target: str
    changes: tuple[Change, ...]


def located(where: str) -> tuple[Any, Any, str]:
    """(module, what holds the function, its name)."""
    module_name, _, path = where.partition(":")
    module = importlib.import_module(module_name)
    *outer, name = path.split(".")
    holder: Any = module
    for part in outer:
        holder = getattr(holder, part)
    return module, holder, name


def source_of(change: Change) -> str:
    """The source that a change is made in."""
    _, holder, name = located(change.where)
    found = inspect.getattr_static(holder, name)
    function = getattr(found, "__func__", found)
    return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))


def put_back(fault: PutBack) -> None:
    """Make the changes in this process: in the module, and wherever else the function was imported by name."""
    by_function: dict[str, list[Change]] = {}
    for change in fault.changes:
        by_function.setdefault(change.where, []).append(change)
    for where, changes in by_function.items():
        module, holder, name = located(where)
        source = source_of(changes[0])
        for change in changes:
            if change.old not in source:
                raise LookupError(f"{where} has no {change.old!r}")
            source = source.replace(change.old, change.new)
        made: dict[str, Any] = {}
        exec(compile("from __future__ import annotations\n" + source, f"<{fault.name}>", "exec"), vars(module), made)
        before = inspect.getattr_static(holder, name)
        if holder is not module:
            setattr(holder, name, made[name])
            continue
        for other in [other for key, other in sys.modules.items() if key.partition(".")[0] == "weftlora"]:
            if vars(other).get(name) is before:
                setattr(other, name, made[name])
            _in_tables(other, before, made[name])


def _in_tables(module: Any, before: Any, after: Any) -> None:
    """Where a table of a module, or of a class of it, has the function; and what is kept of its earlier calls is forgotten."""
    places = [
        module,
        *(value for value in vars(module).values() if isinstance(value, type) and value.__module__ == module.__name__),
    ]
    for value in [value for place in places for value in vars(place).values()]:
        if isinstance(value, dict):
            value.update({key: after for key, kept in value.items() if kept is before})
        if callable(clear := getattr(value, "cache_clear", None)):
            clear()


def _fault(name: str, target: str, *changes: tuple[str, str, str]) -> PutBack:
    return PutBack(name, target, tuple(Change(*change) for change in changes))


_RECIPE, _RUN, _FILES, _CHECKPOINT = (
    f"weftlora.{name}" for name in ("runs.recipe", "runs.run", "disk.files", "train.checkpoint")
)
_JSON = ("weftlora.foreign_text:from_json", "except RecursionError:", "except ZeroDivisionError:")
_TYPES = ("weftlora.records:_misfit", "    origin, inner", "    return None\n    origin, inner")
_KINDS = ("weftlora.records:check_kinds", "for key, kind in kinds.items():", "for key, kind in ():")

FAULTS = [
    _fault(
        "YAML alias bombs", "recipes",
        (f"{_RECIPE}:read_yaml", "if size > MOST or depth > 2 * DEEPEST:", "if False:"),
    ),
    _fault("YAML nested 300 deep", "recipes", (f"{_RECIPE}:_check_depth", "if depth > DEEPEST:", "if False:")),
    _fault(
        "YAML of a type that is not what it says (!!int x, 2024-99-99, 5,000 digits)", "recipes",
        (f"{_RECIPE}:_Yaml.construct_object", "(ValueError, TypeError, ArithmeticError, LookupError, AttributeError)", "ZeroDivisionError"),
        (f"{_RECIPE}:_Yaml.construct_object", "super()", "super(_Yaml, self)"),
    ),
    _fault(
        "YAML merges (<<) refused", "recipes",
        (f"{_RECIPE}:_mapping", 'name = "<<" if key.tag == _MERGE else str(loader.construct_object(key, deep=True))',
         "name = str(loader.construct_object(key, deep=True))\n"
         "        if key.tag == _MERGE: raise yaml.constructor.ConstructorError(None, None, 'no', key.start_mark)"),
    ),
    _fault("an override below a key that is no section", "overrides", (f"{_RECIPE}:apply", "elif section is not None and not isinstance(section, dict):", "elif False:")),
    _fault("a recipe's name that is no text", "overrides", ("weftlora.recipes:check_fields", "not isinstance(name, str) or ", "")),
    _fault(
        "paths of 300 characters, with a NUL, of no user", "recipes",
        ("weftlora.data.paths:resolve_path", "Path(checked_path(_VARIABLE.sub(value, written)))", "Path(_VARIABLE.sub(value, written))"),
    ),
    _fault("JSON nested so deep that its reader falls over: run.json", "run.json", _JSON),
    _fault("JSON nested so deep: selections", "selections", _JSON),
    _fault("JSON nested so deep: the index of a base's weights", "weights of a base", _JSON),
    _fault("run.json with wrong inner types", "run.json", _TYPES, _KINDS),
    _fault('run.json with "format": "x"', "run.json", ("weftlora.records:Record.fields_in", "is_number(written) and ", "")),
    _fault("run.json that lacks what every run has", "run.json", (f"{_RUN}:Run.whole", "check_kinds(", "(lambda *a, **k: None)(")),
    _fault("metrics rows without step, or with a loss that is a text", "metrics", (f"{_RUN}:Run.history", "if is_row(row)", "")),
    _fault("damaged checkpoints are gone on from", "checkpoints", (f"{_CHECKPOINT}:newest", "if not (wrong := problem(path)):", 'if not (wrong := ""):')),
    _fault("a marker or state of any form", "checkpoints", (f"{_CHECKPOINT}:problem", "(OSError, ValueError, KeyError, TypeError, AttributeError, RunError)", "OSError")),
    _fault(
        "a folder checkpoint-²", "checkpoints",
        (f"{_CHECKPOINT}:folders", "if CHECKPOINT.fullmatch(path.name)", "if path.name.rpartition('-')[2].isdigit()"),
    ),
    _fault("records are read through links that lead out", "checkpoints", (f"{_FILES}:_text", "if path.is_symlink() and", "if False and")),
    _fault(
        "names of folders that lead out of a comparison", "comparisons",
        ("weftlora.compare.plan:Plan._check_folders", "if not _SLUG.fullmatch(slug):", "if False:"),
        ("weftlora.compare.plan:Plan._check_folders", "inside(top, self.folder(method.name, int(seed), lr))", "pass"),
    ),
    _fault("compare.json with wrong inner types", "comparisons", _TYPES, _KINDS),
    _fault("a selection with values of any type", "selections", ("weftlora.search.selection_file:read", "_check(content)", "pass")),
    _fault("damaged events", "events", ("weftlora.inspection.measures:rank_history", "(KeyError, TypeError, ValueError, OverflowError)", "ZeroDivisionError")),
    _fault("0-d tensors, and factors that do not fit", "safetensors tensors",
           ("weftlora.inspection.folders:_read_stock", "if (\n", "if False and (\n")),
    _fault("values that are no numbers", "safetensors tensors", ("weftlora.inspection.inspecting:_check_finite", "if not t.isfinite().all()", "if False")),
    _fault("tensors that do not fit the config", "adapter configs",
           ("weftlora.inspection.folders:bare_subject", "(KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError, ArithmeticError)",
            "ZeroDivisionError")),
    _fault("a header that is none", "safetensors headers", ("weftlora.inspection.folders:bare_subject", "(OSError, SafetensorError)", "OSError")),
    _fault("heads that are no matrices, in an adapter of the released code", "adapters of released code",
           ("weftlora.host.released_code:_by_site", "if tensor.dim() != 2 or not whole:", "if False:")),
    _fault("an index that names files elsewhere", "weights of a base",
           ("weftlora.data.paths:_sharded", "for name in names:", "for name in ():")),
    _fault("a saved dataset with null info, or damaged in any way", "data: saved datasets", ("weftlora.data.read:read_saved", "except Exception as error:", "except OSError as error:")),
    _fault("a saved dataset whose files are not checked before rows are read", "data: saved datasets",
           ("weftlora.data.read:read_saved", "part.data.table.validate(full=True)", "pass"),
           ("weftlora.data.read:Table.taken", "except (ValueError, TypeError, IndexError) as error:", "except ZeroDivisionError as error:")),
    _fault("rows that are not UTF-8", "data: .txt", ("weftlora.data.read:_decode", "except UnicodeDecodeError as error:", "except ZeroDivisionError as error:")),
    _fault("a row nested too deep: .jsonl", "data: .jsonl", ("weftlora.data.read:Lines._row", "(ValueError, RecursionError)", "ValueError")),
    _fault("a row nested too deep: .json", "data: .json", ("weftlora.data.read:_read_json", "(ValueError, RecursionError)", "ValueError")),
    _fault("a quote that does not end", "data: .csv", ("weftlora.data.read:_records", "except csv.Error as error:", "except ZeroDivisionError as error:")),
    _fault("a row of other columns than the header", "data: .tsv", ("weftlora.data.read:_records", "elif len(record) != len(header):", "elif False:")),
    _fault("a chat template that fails in its own way", "chat templates",
           ("weftlora.data.encode:render", "except Exception as error:", "except (TypeError, ValueError) as error:")),
    _fault("escape sequences in errors", "error messages", ("weftlora.errors:WeftError.__init__", "visible(redacted(each), lines=True)", "redacted(each)"),
           ("weftlora.errors:WeftError.__init__", "super()", "super(WeftError, self)")),
    _fault("errors as long as the value", "overrides", ("weftlora.foreign_text:shortened", "if len(text) <= limit:", "if True:")),
    _fault("escape sequences on the terminal", "terminal", ("weftlora.cli.output:show", "visible(redacted(shown), lines=True)", "redacted(shown)")),
    _fault("escape sequences in tables", "terminal",
           ("weftlora.cli.output:Screen.render", "text if control else visible(text, lines=True)", "text"),
           ("weftlora.cli.output:Screen.render", "super()", "super(Screen, self)"),
           ("weftlora.cli.output:Screen.render_str", "visible(text, lines=True)", "text"),
           ("weftlora.cli.output:Screen.render_str", "super()", "super(Screen, self)")),
    _fault("markup in names ([/b])", "terminal",
           ("weftlora.cli.output:Screen.render_str", '{"markup": False, "emoji": False}', '{"markup": True, "emoji": False}'),
           ("weftlora.cli.output:Screen.render_str", "super()", "super(Screen, self)")),
    _fault("escape sequences in log lines", "logs and warnings",
           ("weftlora.cli.output:_OneLine.format", "visible(redacted(super().format(record)), lines=True)", "logging.Formatter.format(self, record)")),
    _fault("HTML of names in pages", "pages", ("weftlora.report.web:_environment", "autoescape=True", "autoescape=False")),
    _fault("scripts ended by names in pages", "pages", ("weftlora.report.web:_json", '.replace("<", "\\\\u003c")', "")),
    _fault("hidden characters in pages", "pages", ("weftlora.report.web:_shown", "visible(redacted(value), lines=True)", "redacted(value)")),
    _fault("markup of names in cards", "model cards", ("weftlora.foreign_text:for_markdown", '_MARKUP.sub(r"\\\\\\1", visible(text))', "visible(text)")),
    _fault("packages' names raw in cards", "model cards", ("weftlora.adapter.spec:write_loading_note", "map(for_markdown, packages)", "packages")),
    _fault("records written with what is read back otherwise", "records", ("weftlora.disk.files:read_lines", ".splitlines()", ".split()")),
]  # fmt: skip
"""What a day of hostile files had found, and what this fuzzer found first, as far as reading and writing show it."""
