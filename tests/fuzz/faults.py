"""Faults that were fixed, each put back by a small change of the source: what the fuzzer finds again, and what tests do.

A fault names a function and replaces text of its source, as a patch would; `test_fuzz.py` holds that the text is still there. Run by
`python scripts/fuzz.py --faults`: those of readers and writers in a process that knows no other faults, those that no one input
shows (two processes, a kill, a run that goes on) in a copy of the source, in which the test that holds them must fail.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
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
    """A target of the fuzzer, or a test."""
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


def check(fault: PutBack) -> None:
    """Raises LookupError where the source has no longer what a change replaces."""
    for change in fault.changes:
        if change.old not in source_of(change):
            raise LookupError(f"{change.where} has no {change.old!r}")


def put_back(fault: PutBack) -> None:
    """Make the changes in this process: in the module, and wherever else the function was imported by name."""
    check(fault)
    by_function: dict[str, list[Change]] = {}
    for change in fault.changes:
        by_function.setdefault(change.where, []).append(change)
    for where, changes in by_function.items():
        module, holder, name = located(where)
        source = source_of(changes[0])
        for change in changes:
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


def patched(fault: PutBack, top: Path) -> Path:
    """A folder below `top` with weftlora's source in which the changes are made: the first entry of a PYTHONPATH."""
    package = Path(importlib.import_module("weftlora").__file__ or "").parent
    to = top / "src"
    shutil.copytree(package, to / "weftlora", ignore=shutil.ignore_patterns("__pycache__"))
    for change in fault.changes:
        _, holder, name = located(change.where)
        found = inspect.getattr_static(holder, name)
        function = inspect.unwrap(getattr(found, "__func__", found))
        lines, first = inspect.getsourcelines(function)
        place = to / "weftlora" / Path(inspect.getsourcefile(function) or "").relative_to(package)
        whole = place.read_text(encoding="utf-8").splitlines(keepends=True)
        for later in fault.changes:  # of one function, one after the other
            if later.where == change.where:
                lines = "".join(lines).replace(later.old, later.new).splitlines(keepends=True)
        size = len(inspect.getsourcelines(function)[0])
        place.write_text("".join([*whole[: first - 1], *lines, *whole[first - 1 + size :]]), encoding="utf-8")
    return to


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


_RECIPE, _RUN, _FILES, _CHECKPOINT, _SEARCH = (
    f"weftlora.{name}" for name in ("runs.recipe", "runs.run", "disk.files", "train.checkpoint", "search.driver")
)
_OWNERSHIP_MODULE = "weftlora.disk.ownership"
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
    _fault("an override below a key that is not a section", "overrides", (f"{_RECIPE}:apply", "elif section is not None and not isinstance(section, dict):", "elif False:")),
    _fault("a recipe's name that is not a text", "overrides", ("weftlora.recipes:check_fields", "not isinstance(name, str) or ", "")),
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
    _fault("values that are not numbers", "safetensors tensors", ("weftlora.inspection.inspecting:_check_finite", "if not t.isfinite().all()", "if False")),
    _fault("tensors that do not fit the config", "adapter configs",
           ("weftlora.inspection.folders:bare_subject", "(KeyError, ValueError, RuntimeError, IndexError, TypeError, AttributeError, ArithmeticError)",
            "ZeroDivisionError")),
    _fault("a header that is none", "safetensors headers", ("weftlora.inspection.folders:bare_subject", "(OSError, SafetensorError)", "OSError")),
    _fault("heads that are not matrices, in an adapter of the released code", "adapters of released code",
           ("weftlora.host.released_code:_by_site", "if tensor.dim() != 2 or not whole:", "if False:")),
    _fault("an index that names files elsewhere", "weights of a base",
           ("weftlora.data.paths:_sharded", "for name in names:", "for name in ():")),
    _fault("a saved dataset with null info, or damaged in any way", "data: saved datasets", ("weftlora.data.read:read_saved", "except Exception as error:", "except OSError as error:")),
    _fault("a saved dataset whose files are not checked before rows are read", "data: saved datasets",
           ("weftlora.data.read:read_saved", "part.data.table.validate(full=True)", "pass"),
           ("weftlora.data.read:Table.taken", "except Exception as error:", "except ZeroDivisionError as error:")),
    _fault("rows that are not UTF-8", "data: .txt", ("weftlora.data.read:_decode", "except UnicodeDecodeError as error:", "except ZeroDivisionError as error:")),
    _fault("a row nested too deep: .jsonl", "data: .jsonl", ("weftlora.data.read:Lines._row", "(ValueError, RecursionError)", "ValueError")),
    _fault("a row nested too deep: .json", "data: .json", ("weftlora.data.read:_read_json", "(ValueError, RecursionError)", "ValueError")),
    _fault("a quote that does not end", "data: .csv", ("weftlora.data.read:_records", "except csv.Error as error:", "except ZeroDivisionError as error:")),
    _fault("a row of other columns than the header", "data: .tsv", ("weftlora.data.read:_records", "elif len(record) != len(header):", "elif False:")),
    _fault("dates that Python does not have, in a table", "data: .parquet",
           ("weftlora.data.read:Table.taken", "except Exception as error:", "except (ValueError, TypeError, IndexError) as error:")),
    _fault("a parquet file that is none", "data: .parquet", ("weftlora.data.read:_read_parquet", "except Exception as error:", "except ZeroDivisionError as error:")),
    _fault("a gzip file that is cut", "data: .gz",
           ("weftlora.data.read:read", "except (EOFError, gzip.BadGzipFile, zlib.error) as error:", "except ZeroDivisionError as error:")),
    _fault("a template of prompts that names no column", "prompts",
           ("weftlora.train.prompting:Prompting.of_adapter", " and not template_columns(template)", " and template_columns(template) is None")),
    _fault("messages nested too deep", "prompts", _JSON),
    _fault("answers without a step, or that are no texts", "samples", (f"{_RUN}:Run.samples", "if is_row(row)", "")),
    _fault("a state of a search of any form", "states of a search",
           (f"{_SEARCH}:restore", "if (wrong := _damage(job, own, state)) is not None:", "if False:")),
    _fault("a state's own settings of its optimisers", "states of a search",
           (f"{_SEARCH}:restore", '{**optimizer.state_dict(), "state": saved["state"]}', "saved")),
    _fault("a header of GGUF that is cut", "GGUF headers",
           ("weftlora.runs.gguf:Header.read", "except (struct.error, ValueError, OSError) as error:", "except OSError as error:")),
    _fault("a GGUF file on which transformers falls over", "GGUF headers",
           ("weftlora.runs.gguf:_make", "except Exception as error:", "except ZeroDivisionError as error:")),
    _fault("a GGUF header of a model larger than its file", "GGUF headers", ("weftlora.runs.gguf:_make", "_check_size(header, settings, kind)", "pass")),
    _fault("a kept decomposition of another form than its weight", "kept decompositions",
           ("weftlora.adapted.frozen_weights:load", "_fits(sigma, side, shape)", "True")),
    _fault("kept rows whose record is of any form", "kept rows",
           ("weftlora.data.cache:Entry.read", "_Kept.model_validate_json((self.folder / \"loaded.json\").read_bytes())",
            "_Kept.model_construct(**json.loads((self.folder / \"loaded.json\").read_bytes()))"),
           ("weftlora.data.cache:Entry.read", "except Exception:", "except (OSError, ValueError):")),
    _fault("a precision that is infinitely fast", "the precision that was measured",
           ("weftlora.runs.precision:bfloat16_gain", "0 < kept < math.inf", "kept > 0")),
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
    _fault("HTML of names in pages", "pages", ("weftlora.report.web:environment", "autoescape=True", "autoescape=False")),
    _fault("scripts ended by names in pages", "pages", ("weftlora.report.web:_json", '.replace("<", "\\\\u003c")', "")),
    _fault("hidden characters in pages", "pages", ("weftlora.report.web:_shown", "visible(redacted(value), lines=True)", "redacted(value)")),
    _fault("markup of names in cards", "model cards", ("weftlora.foreign_text:for_markdown", '_MARKUP.sub(r"\\\\\\1", visible(text))', "visible(text)")),
    _fault("packages' names raw in cards", "model cards", ("weftlora.adapter.spec:write_loading_note", "map(for_markdown, packages)", "packages")),
    _fault("records written with what is read back otherwise", "records", ("weftlora.disk.files:read_lines", ".splitlines()", ".split()")),
]  # fmt: skip
"""What a day of hostile files had found, and what this fuzzer found first, as far as reading and writing show it."""


_LOCK, _OWNERSHIP, _IDENTITY = (
    f"tests/{name}.py::test" for name in ("disk/test_lock", "disk/test_ownership", "runs/test_identity")
)
_ANOTHER_BASE = f"{_IDENTITY}_another_base_is_refused_by_all_that_uses_a_run"
_DAMAGED = f"{_IDENTITY}_a_damaged_checkpoint_falls_back_to_the_one_before"
_OUTPUT = "tests/cli/test_outputs.py::test_a_file_that_is_something_else_is_kept[report]"
_SECRET = "tests/cli/test_secrets.py::test_a_token"
_FILES_OF_A_MARKER = (f"{_CHECKPOINT}:problem", 'in said.get("files", {}).items():', "in ():")

HELD_BY_TESTS = [
    _fault("code from a model folder runs, if somebody says yes", "tests/cli/test_no_code_runs.py::test_a_folder_that_is_nothing_without_its_code_is_refused[config.json]",
           ("weftlora.runs.base_model:find", "trust_remote_code=False", "")),
    _fault("a loading call that does not say that it trusts no code", "tests/cli/test_no_code_runs.py::test_every_loading_call_of_the_package_says_that_it_trusts_no_code",
           ("weftlora.export.stock_process:_run", "trust_remote_code=False, ", "")),
    _fault("two processes train into one folder at once", f"{_LOCK}_of_two_that_start_at_once_one_trains_and_one_is_refused",
           ("weftlora.disk.lock:holding", "lock.acquire()", "pass")),
    _fault("a run that is alive is resumed or replaced", f"{_LOCK}_a_run_that_is_alive_is_neither_resumed_nor_replaced_nor_joined",
           ("weftlora.disk.lock:holding", "lock.acquire()", "pass")),
    _fault("two exports into one folder at once", "tests/export/test_folder.py::test_two_exports_to_one_folder_do_not_mix",
           ("weftlora.disk.lock:holding", "lock.acquire()", "pass")),
    _fault("a folder of a comparison that leads out deletes there", "tests/compare/test_untrusted.py::test_a_run_whose_folder_became_a_link_meanwhile_is_not_carried_out",
           (f"{_OWNERSHIP_MODULE}:inside", "if not path.resolve().is_relative_to(top.resolve()):", "if False:")),
    _fault("temporary names that can be guessed", f"{_OWNERSHIP}_temporary_names_cannot_be_guessed", (f"{_OWNERSHIP_MODULE}:temporary", "secrets.token_hex(8)", "'0' * 16")),
    _fault("an export takes the user's files of its folder", f"{_OWNERSHIP}_an_export_keeps_what_is_the_users", (f"{_FILES}:write_folder", "keep_foreign(path, new, ours)", "pass")),
    _fault("--overwrite of a run deletes what lies in its folder", f"{_OWNERSHIP}_overwrite_takes_the_run_and_nothing_of_the_users",
           (f"{_OWNERSHIP_MODULE}:of_run", "return [path for path in found if", "return [path for path in (*found, *_listed(folder)) if")),
    _fault("--resume deletes a folder that is named like a checkpoint", f"{_OWNERSHIP}_resume_deletes_no_folder_that_is_named_like_a_checkpoint",
           (f"{_CHECKPOINT}:folders", "if CHECKPOINT.fullmatch(path.name)", "if path.name.rpartition('-')[2].isdecimal()")),
    _fault("an output replaces whatever is there", _OUTPUT, (f"{_FILES}:Output._is_earlier", "try:", "return True\n        try:")),
    _fault("an output is written through a link at a name that can be guessed", _OUTPUT,
           (f"{_FILES}:replacing", "partial = temporary(path)", "partial = path.with_name(path.name + '.part')"), (f"{_FILES}:replacing", 'partial.open("xb")', 'partial.open("wb")')),
    _fault("resumed on rows that were swapped", f"{_IDENTITY}_swapped_rows_are_other_rows",
           ("weftlora.train.resuming:check_same_input", 'if [*before.data["hashes"].values()] != [*run.data["hashes"].values()]:',
            'if sorted(before.data["hashes"].values()) != sorted(run.data["hashes"].values()):'),
           ("weftlora.train.resuming:check_same_input", "before.data.get(\"counts\", {}).items()", "()")),
    _fault("gone on with another tokenizer", f"{_ANOTHER_BASE}[tokenizer]", ("weftlora.runs.identity:check_files", "known != found:", "False:")),
    _fault("gone on with another activation", f"{_ANOTHER_BASE}[hidden_act]", ("weftlora.runs.identity:check_files", "known != found:", "False:")),
    _fault("gone on with another epsilon of the norms", f"{_ANOTHER_BASE}[rms_norm_eps]", ("weftlora.runs.identity:check_files", "known != found:", "False:")),
    _fault("gone on with weights that differ outside of a sample", f"{_ANOTHER_BASE}[a value]",
           ("weftlora.runs.identity:check_weights", "sorted(expected.values()) != sorted(found.values())", "False")),
    _fault("a checkpoint without its optimizer counts", f"{_DAMAGED}[optimizer missing]", _FILES_OF_A_MARKER),
    _fault("a checkpoint without its scheduler counts", f"{_DAMAGED}[scheduler missing]", _FILES_OF_A_MARKER),
    _fault("a checkpoint whose state is of another step than its marker counts", f"{_DAMAGED}[state of another step]", _FILES_OF_A_MARKER,
           (f"{_CHECKPOINT}:problem", "if told.is_file() and", "if False and")),
    _fault("losses are means since the resume", "tests/train/test_resuming.py::test_numbers_do_not_depend_on_an_interruption[3]",
           ("weftlora.train.trainer:_GoesOn.on_train_begin", "if kept is not None and state.global_step > 0:", "if False:")),
    _fault("train_loss is that of the steps since the resume", "tests/train/test_resuming.py::test_numbers_do_not_depend_on_an_interruption[10]",
           ("weftlora.train.loop:_final", '{"train_loss": losses[-1]} if losses else {}',
            '{"train_loss": trainer._total_loss_scalar / max(1, trainer.state.global_step)}')),
    _fault("a token in a setting is kept", f"{_SECRET}_in_a_setting_is_refused_and_not_repeated[train.args.hub_token=hf_abcdEFGH1234abcdEFGH1234abcdEFGH1234]",
           ("weftlora.train.arguments:check", 'secrets_in(config.args, "train.args")', "()")),
    _fault("a token that is in a record is shown", f"{_SECRET}_that_an_earlier_version_wrote_is_not_shown", ("weftlora.redaction:redacted", "return _redacted(value, _of_environment())", "return value")),
    _fault("a proof outlives its killed parent", "tests/export/test_proof.py::test_the_process_that_proves_does_not_outlive_a_killed_export",
           ("weftlora.export.stock_process:follow", "os._exit(1)", "pass")),
    _fault("a run that SIGTERM ended says that it is running", f"{_LOCK}_sigterm_ends_a_run_as_interrupted",
           ("weftlora.train.loop:_record_failure", "dataclasses.replace(run, status=status, metrics={}, figures={}).save()", "pass")),
    _fault("a run that was killed says that it is running", f"{_LOCK}_the_state_of_a_run_is_true",
           (f"{_RUN}:Run.load", 'if fields.get("status") == "running" and not is_held(path):', "if False:")),
]  # fmt: skip
"""What no one input of a reader or writer shows: the test that fails where it is put back."""
