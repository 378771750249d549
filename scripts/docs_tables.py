"""The parts of the documents that are made from the code: `check_docs.py --write` puts them in, `check_docs.py` compares."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import demo
import docs_api
import docs_bench
import docs_formats
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

HELP_WIDTH = 100
BENCH = Path(__file__).resolve().parent.parent / "bench"
EVIDENCE = BENCH.parent / "evidence"

# What a key of a recipe file is for. A key without a line here, or a line without its key, is an error.
MEANING: dict[str, str] = {
    "model": "the frozen base; a bare string is its `path`",
    "data": "which rows; a bare string is `data.train`",
    "adapter": "which adapter; a bare string is a recipe's name",
    "train": "how long and how fast",
    "out": "the run folder, relative to the working folder",
    "model.path": "a folder, a GGUF file, a hub id, `demo` for the bundled model or `smollm2` for a "
    "[real one](#a-real-model-by-one-word); relative paths count from the recipe file",
    "model.dtype": "dtype of the base's weights; left out, `bfloat16` on a CPU that is faster with it if the checkpoint is in it too, "
    "else `float32`; `auto` is the checkpoint's own",
    "model.load_in_4bit": "NF4 with double quantisation, by bitsandbytes: [QLoRA](quantised.md)",
    "model.load_in_8bit": "LLM.int8(), by bitsandbytes",
    "model.quantization": "[any quantiser](quantised.md#what-a-recipe-says) of transformers, with the keys of its config",
    "model.task": "`auto` takes it from the model and the data",
    "model.trust_remote_code": "there is no other value: code from a model folder never runs",
    "model.attn_implementation": "passed to transformers",
    "data.train": "the training rows: a file, a folder, a data set of the hub (`owner/name:config`), `demo`; several as a list, or "
    "with weights",
    "data.validation": "the validation rows; left out, they are split off `train`",
    "data.test": "the rows `weftlora eval` uses",
    "data.split": "which split of a folder or data set is trained on; left out, `train`",
    "data.format": "`auto` looks at the columns of all rows",
    "data.fields": "role: column, where a column has another name",
    "data.separator": "for `.txt`: what stands between prompt and completion on a line",
    "data.quoting": "`none` for tables whose quotation marks are text",
    "data.unit": "for `.txt`: what makes a document",
    "data.prompt_template": "text with `{column}` in it, instead of one prompt column",
    "data.answers": "what is learned of a conversation: `all` answers, the `last`, or `each` as a row of its own",
    "data.system": "`fold` puts a system message before the first user's, for chat templates that take none",
    "data.ignore": "columns, and keys of messages, that are meant to be left out",
    "data.packing": "several training rows in one of up to `max_length` tokens, without seeing each other",
    "data.max_length": "tokens a row may have",
    "data.truncate": "what is cut of a row that is too long; every cut is counted",
    "data.validation_fraction": "share of `train` that is split off where no validation rows are given",
    "data.test_fraction": "share of `train` that is split off as test rows where none are given",
    "data.split_on": "`prompt` keeps all rows with one prompt on one side of that split",
    "data.limit": "draw this many rows of every split; rows that are empty or dropped are not among them",
    "data.validation_limit": "draw this many validation rows instead",
    "data.test_limit": "draw this many test rows instead",
    "data.seed": "of the split and the draws",
    "data.streaming": "take the first `limit` rows of a data set of the hub as they come; left out, where it is larger than 5 GB",
    "data.processes": "processes that encode the rows of a large file",
    "data.cache": "keep the encoded rows of 20,000 and more for the next start",
    "data.fields.prompt": "column of the prompt",
    "data.fields.completion": "column of the answer, which the loss is on",
    "data.fields.messages": "column of the chat messages",
    "data.fields.text": "column of the text",
    "data.fields.label": "column of the class",
    "data.fields.domain": "column of the domain, for per-domain figures",
    "train.steps": "optimiser steps",
    "train.epochs": "passes over the training rows; without `steps` and `epochs` it is one",
    "train.batch_size": "rows per forward pass",
    "train.accumulation": "forward passes per optimiser step",
    "train.lr": "peak learning rate; left out, [by method and model size](#what-is-taken-where-you-say-nothing)",
    "train.schedule": "a schedule's name in transformers",
    "train.warmup": "optimiser steps; below 1, a fraction of the run",
    "train.weight_decay": "AdamW's, on everything that is trained",
    "train.lora_plus_ratio": "factor on the rate of B, as in [LoRA+](hosts.md#pefts-own-optimisers) (16 is usual); left out, none",
    "train.freeze_down": "freeze A and train the rest, as in [LoRA-FA](hosts.md#pefts-own-optimisers)",
    "train.max_grad_norm": "gradients are scaled down to this norm; 0 is no limit",
    "train.optimizer": "an optimiser's name in transformers",
    "train.seed": "of the adapter's start, the order of the rows and dropout",
    "train.precision": "`bf16` and `fp16` train under autocast",
    "train.gradient_checkpointing": "recompute activations in the backward pass",
    "train.eval_every": "optimiser steps between validation losses; left out, one at the end",
    "train.samples": "prompts to answer at every measurement and at the end: of this many validation rows, or a list of yours",
    "train.sample_tokens": "tokens that such an answer may have",
    "train.follow_heads": "record at every measurement what heads and [routers](methods/hydralora.md#following-the-heads) do",
    "train.eval_rows": "validation rows measured each time, or `all`; left out, at most 512 and a quarter of the training's cost",
    "train.save_every": "optimiser steps between checkpoints; left out, about five in a run; 0, none",
    "train.keep": "complete checkpoints kept",
    "train.logging_every": "optimiser steps between lines of `metrics.jsonl`",
    "train.group_by_length": "rows of like length into one batch; left out, where random batches would be padded by 15 % or more",
    "train.num_threads": "torch threads",
    "train.report_to": "loggers of transformers",
    "train.trainer": "`sft` is trl's `SFTTrainer`",
    "train.best": "keep the adapter of the lowest validation loss; without `eval_every` it is measured ten times",
    "train.early_stopping": "stop after this many measurements without a lower loss, and keep the best",
    "train.from_adapter": "also `from`: an adapter or a run whose values are where training begins, on these rows",
    "train.args": "further arguments of transformers' `TrainingArguments`",
}


def refused() -> str:
    """Which choices do not go together, and why."""
    from weftlora.adapter.compat import REFUSED

    rows = [(f"{one} + {other}", f"{reason}.") for (one, other), reason in REFUSED.items()]
    return _table(("pair", "why"), rows)


def choices() -> str:
    """The choices of each axis, with their fields and defaults."""
    from weftlora.terms.axes import AXES

    rows = []
    for axis in AXES:
        shown = "<br>".join(f"`{cls.__name__}({_signature(cls)})`" for cls in AXES[axis].values())
        rows.append((f"`{axis}`", shown))
    return _table(("axis", "choices in this release"), rows)


def config_fields() -> str:
    """The fields of WeftConfig beside the axes, from its docstring."""
    from weftlora.adapter.spec import WeftConfig
    from weftlora.terms.axes import AXES

    defaults = {
        f.name: f.default if f.default is not dataclasses.MISSING else (f.default_factory or str)()  # type: ignore[misc]
        for f in dataclasses.fields(WeftConfig)
    }
    rows = []
    for names, text in _arguments(inspect.getdoc(WeftConfig) or ""):
        if not set(names) & set(AXES):
            shown = "<br>".join(f"`{name}`" for name in names)
            rows.append((shown, f"`{defaults[names[0]]}`", text))
    return _table(("field", "default", "meaning"), rows)


def recipes() -> str:
    """The recipes that a recipe file can name."""
    from weftlora.runs.recipe import BUILTIN

    rows = [(f"`{e.name}`", e.about, f"[{e.paper}](https://arxiv.org/abs/{e.paper[6:]})" if e.paper else "")
            for e in BUILTIN.values()]  # fmt: skip
    return _table(("name", "what it is", "paper"), rows)


def recipe_keys() -> str:
    """Every key of a recipe file: type, default, meaning."""
    from weftlora.runs.recipe import Recipe

    parts, seen = [], set()
    for title, prefix, fields in _sections(Recipe, ""):
        rows = []
        for name, info in fields.items():
            key = prefix + name
            if key not in MEANING:
                raise SystemExit(f"docs_tables.MEANING has no line for {key!r}")
            seen.add(key)
            rows.append((f"`{name}`", _type(info.annotation), _default(info), MEANING[key]))
        parts.append(f"### {title}\n\n" + _table(("key", "value", "default", "meaning"), rows))
    if stale := MEANING.keys() - seen:
        raise SystemExit(f"docs_tables.MEANING has lines for keys that are gone: {sorted(stale)}")
    return "\n".join(parts)


def command_help() -> str:
    """`--help` of every command and group of the app, as plain text that depends on no terminal."""
    from weftlora.cli.commands import app

    parts = []
    for context in _contexts(typer.main.get_command(app), "weftlora", None):
        text = context.command.get_help(context)
        lines = "\n".join(line.rstrip() for line in text.strip("\n").splitlines())
        parts.append(f"## {context.command_path}\n\n```text\n{lines}\n```\n")
    return "\n".join(parts)


def launch() -> str:
    """The launch of LoRA-Dash beside the published way, from the record of `weftlora bench launch`."""
    record = json.loads((BENCH / "launch.json").read_text(encoding="utf-8"))
    rows = []
    for row in record["results"]:
        ratio = row["ratio"]
        spread = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        seconds = (f"{row[key]:.2f}" for key in ("median_seconds", "median_published"))
        rows.append(
            (row["what"], str(row["sites"]), str(len(row["seconds"])), *seconds, spread, f"{row['agreed']:.0%}")
        )
    head = ("W, out x in", "modules", "n", "weftlora, s", "published, s", "weftlora / published", "same directions")
    how = f"{record['clock'].upper()} time of {record['threads']} thread: `{record['command']}`"
    return f"{_table(head, rows)}\nMedians [quartiles] over n rounds, {how}."


def extras() -> str:
    """What can be installed, and what for."""
    from weftlora.extras import PURPOSES

    core = (
        "`import weftlora`, `get_peft_model`, a training loop of your own or `Trainer`, save, load, search layers, `inspect`, "
        "`export_lora`, `merge`"
    )
    named = [(f'`"weftlora[{name}]"`', purpose) for name, purpose in PURPOSES.items()]
    rows = [("`weftlora`", core), *named, ('`"weftlora[all]"`', "everything above but `quant`")]
    return _table(("`pip install ...`", "what you can do"), rows)


def matrix() -> str:
    """The hosts of matrix.toml: their versions and what came of them."""
    rows = tomllib.loads((BENCH.parent / "matrix.toml").read_text(encoding="utf-8"))["row"]
    record = json.loads((BENCH.parent / "evidence" / "matrix.json").read_text(encoding="utf-8"))
    found = {result["name"]: result for result in record["rows"]}
    shown = ("torch", "transformers", "peft", "trl", "datasets", "accelerate", "huggingface_hub", "tokenizers")
    lines = []
    for row in rows:
        result = found.get(row["name"], {"status": "not run", "reason": "not tried yet"})
        outcome = result["status"]
        if outcome == "not run":
            outcome += f": {result['reason']}"
        else:
            outcome += (
                f", {result['passed']} of {result['passed'] + result['failed']} tests on Python {result['python']}"
            )
            outcome += f", torch {result['torch_build']}" if "torch_build" in result else ""
            outcome += "".join(f"; left out: {reason}" for reason in result["left_out"])
        versions = (row["versions"].get(name, "none") for name in shown)
        lines.append((f"`{row['name']}`: {row['host']}", row["python"], *versions, outcome))
    return _table(("host", "its Python", *shown, "result"), lines)


def peft_suite() -> str:
    """What peft's own tests say of every method that they were run with (`scripts/peft_suite.py`)."""
    record = json.loads((BENCH.parent / "evidence" / "peft-suite.json").read_text(encoding="utf-8"))
    kinds = ("refused", "names", "words", "defaults", "mathematics", "chance", "unexplained")
    rows = []
    for method, found in record["methods"].items():
        wanted = found["stock"] - sum(found.get(kind, 0) for kind in kinds[:5]) - found.get("skipped", 0)
        share = f"{found.get('passed', 0) / wanted:.1%}" if wanted else "none"
        files = len(record["files"][method])
        rows.append(
            (f"`{method}`", str(files), *(str(found.get(kind, 0)) for kind in ("stock", "passed", *kinds)), share)
        )
    head = ("method", "files", "stock LoRA passes", "passes", *kinds, "of what is offered")
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{_table(head, rows)}\n\nWith {versions}."


def hosts() -> str:
    """What was run in other trainers (`scripts/hosts.py`)."""
    record = json.loads((BENCH.parent / "evidence" / "hosts.json").read_text(encoding="utf-8"))
    rows = [
        (
            f"{each['host']} with transformers {each['versions']['transformers']}, peft {each['versions']['peft']}",
            each.get("way", "not run"),
            "; ".join([*each["did"], *each.get("left", [])]) or each["why"],
        )
        for each in record["hosts"]
    ]
    return _table(("host", "through", "what was run"), rows)


def demo_jobs() -> str:
    """Each method at the job it is for, beside plain LoRA (`scripts/demo.py`)."""
    runs = demo.committed()
    return _table(demo.columns(runs), [tuple(map(_code, cells)) for cells in demo.table_rows(runs)])


def _code(cell: str) -> str:
    """A recipe's name as code, linked to its page; other text as it is."""
    page = {"lora_init": "lora_tsd"}.get(cell, cell)
    return f"[`{cell}`](docs/methods/{page}.md)" if cell in demo.OURS else cell


def peft_examples() -> str:
    """What runs of peft's documentation with one line changed (`scripts/peft_examples.py`)."""
    record = json.loads((BENCH.parent / "evidence" / "peft-examples.json").read_text(encoding="utf-8"))
    rows = [
        (name.replace("_", " "), each["what"], each["stock"], each["weftlora"])
        for name, each in record["examples"].items()
    ]
    return _table(("subject", "what is shown", "`LoraConfig`", "`WeftConfig`"), rows)


STEPS = ("attach", "step", "fast", "reload", "generate")
"""The checks of `scripts/model_families.py` that a recipe has to pass on a family; the export has a column of its own."""


def model_families() -> str:
    """Every family of transformers that was built small, with every recipe, and what could not be built."""
    record = json.loads((BENCH.parent / "evidence" / "families.json").read_text(encoding="utf-8"))
    notes: dict[str, int] = {}
    parts, unbuilt = [], []
    for kind in dict.fromkeys(each["kind"] for each in record["families"].values()):
        rows = []
        for family, each in record["families"].items():
            if each["kind"] == kind and "recipes" in each:
                modules = each["recipes"]["lora"].get("modules", 0), each["recipes"]["tied_lora"].get("modules", 0)
                works, exports = (_in_words(each["recipes"], steps, notes) for steps in (STEPS, ("export",)))
                rows.append((f"`{family}`", each["model"], *map(str, modules), works, exports))
        unbuilt += [
            (f"`{family}`", kind, each["unbuilt"])
            for family, each in record["families"].items()
            if each["kind"] == kind and "unbuilt" in each
        ]
        head = ("family", "model", "modules", "of Tied-LoRA", "works", "exported")
        parts.append(f"### {kind[0].upper()}{kind[1:]}\n\n{_table(head, rows)}")
    said = "".join(f"{number}. {sentence}\n" for sentence, number in notes.items())
    built = sum("recipes" in each for each in record["families"].values())
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    top = f"{built} families were built and {len(unbuilt)} were not, with {versions}.\n\n"
    last = f"### Not built\n\n{_table(('family', 'kind', 'why'), unbuilt)}"
    return f"{top}{chr(10).join(parts)}\nThe reasons, by their numbers:\n\n{said}\n{last}"


def _in_words(recipes: dict[str, dict[str, Any]], steps: tuple[str, ...], notes: dict[str, int]) -> str:
    """ "all", or the recipes that do not pass one of the steps, each with the number of the reason."""
    found = []
    for recipe, outcome in recipes.items():
        if "export" in steps and "export" not in outcome:  # it did not get there
            continue
        reason = next((outcome[step] for step in steps if isinstance(outcome.get(step), str)), None)
        if reason is not None and "no exact export" not in str(reason):  # HydraLoRA's, said once above the tables
            plain = re.sub(r"\b[\w]+(\.\w+)+ is a ", "a module is a ", str(reason))
            plain = re.sub(r"the update of \S+ \(\d+ such modules\)", "their update", plain)
            plain = re.sub(r"off by \S+", "off", plain)
            found.append(f"{recipe} ({notes.setdefault(plain, len(notes) + 1)})")
    return f"all but {', '.join(found)}" if found else "all"


CONTRACT = {
    "structure": ("choice.Choice", "structure.Structure", "structure.StructureTerm", "structure.OutsideTerm"),
    "start": ("start.Start", "extra.ExtraTerm", "start.StartTerm"),
    "boost": ("boost.Boost", "extra.ExtraTerm", "boost.BoostTerm"),
    "ranks": ("ranks.Ranks",),
    "layers": ("layers.Layers", "layers.SearchedLayers"),
}
"""The classes that a choice of each axis, and what it keeps at a site, inherit from; `Choice` is shown once."""


def contract() -> str:
    """What a term of each axis has to write, and what it may set: every abstract method and class attribute of its protocols."""
    parts, shown = [], set[str]()
    for axis, classes in CONTRACT.items():
        parts.append(f"### {axis}\n")
        for path in classes:
            module, _, name = f"weftlora.terms.{path}".rpartition(".")
            if path in shown:
                parts.append(f"And what `{module}.{name}` asks, above.\n")
                continue
            shown.add(path)
            rows = [*_members(module, name)]
            if rows:
                parts.append(f"`{module}.{name}`\n\n{_table(('you write', 'what it is'), rows)}")
    return "\n".join(parts)


def _members(module: str, name: str) -> Iterator[tuple[str, str]]:
    """Abstract methods with their signatures, then attributes with their defaults, of one class; final methods are not yours."""
    source = ast.parse(Path(importlib.import_module(module).__file__ or "").read_text(encoding="utf-8"))
    kind = next(node for node in source.body if isinstance(node, ast.ClassDef) and node.name == name)
    for node in kind.body:
        if isinstance(node, ast.FunctionDef):
            marks = {ast.unparse(mark) for mark in node.decorator_list}
            if "abstractmethod" in marks:
                arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
                called = f"`{node.name}`" if "property" in marks else f"`{node.name}({arguments})`"
                returned = (
                    f" → `{ast.unparse(node.returns)}`" if node.returns and ast.unparse(node.returns) != "None" else ""
                )
                yield called + returned, _told(ast.get_docstring(node) or "")
    for node, after in itertools.pairwise([*kind.body, ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            default = f" = {ast.unparse(node.value)}" if node.value else ", to be set"
            yield f"`{ast.unparse(node.target)}`{default}", _told(str(after.value.value))


def _told(docstring: str) -> str:
    """A docstring as one line of a table, its arguments after it."""
    return " ".join(docstring.replace("Args:\n", " ").split())


WORLDS = {
    "ddp:2": "DDP, 2",
    "ddp:4": "DDP, 4",
    "fsdp2:2": "FSDP2, 2",
    "fsdp2:4": "FSDP2, 4",
    "fsdp1:2": "FSDP1, 2",
    "tp:2": "TP, 2",
    "zero2:2": "ZeRO-2, 2",
    "zero3:2": "ZeRO-3, 2",
}


WAYS = {
    "fsdp2-accumulation:2": "two micro-batches a step",
    "fsdp2-checkpointing:2": "checkpointing, not reentrant",
    "fsdp2-reentrant:2": "checkpointing, reentrant",
    "fsdp2-wrapper:2": "checkpointing by a wrapper",
    "fsdp2-offload:2": "CPU offload policy",
    "fsdp2-mixed:2": "mixed precision policy",
}


def scaling(worlds: dict[str, str]) -> str:
    """Method × engine: the largest difference to one process in fp64, where it was run."""
    found = json.loads((EVIDENCE / "scaling.json").read_text())["columns"]
    methods = list(dict.fromkeys(method for column in found.values() for method in column))

    def cell(world: str, method: str) -> str:
        got = found.get(world, {}).get(method)
        if got is None:
            return "not run"
        if "refused" in got or "ConfigError" in got.get("failed", ""):
            return "refused"
        if "failed" in got:
            return "fails"
        if "fp64" not in got:  # ZeRO
            same = got["fp32"]["difference"] <= 1e-5 and got["fp32"]["same_decisions"]
            return f"{got['fp32']['difference']:.0e} (fp32)" if same else f"differs ({got['fp32']['difference']:.0e})"
        # in a mixed policy fp64 weights are computed with in fp32, whose rounding is what may be left
        apart, allowed = max(got["fp64"]["difference"], 0.0), 1e-5 if "mixed" in world else 1e-9
        fine = "mixed" in world or got.get("fp32", {}).get("difference", 0.0) <= 1e-5
        kinds = [got[kind] for kind in ("fp64", "fp32") if kind in got and not (kind == "fp32" and "mixed" in world)]
        equal = apart <= allowed and fine and all(kind["same_decisions"] for kind in kinds)
        return f"{apart:.0e}" if equal else f"differs ({apart:.0e})"

    return _table(
        ("", *worlds.values()), [(f"`{method}`", *(cell(world, method) for world in worlds)) for method in methods]
    )


def scaling_bytes() -> str:
    """Method × engine: bytes of an adapter's part, and of the largest tensor that a step with its event made on a process."""
    found = json.loads((EVIDENCE / "scaling.json").read_text())["columns"]
    worlds = {name: WORLDS[name] for name in ("ddp:2", "fsdp2:2", "fsdp2:4")}
    methods = [name for name, got in found["fsdp2:2"].items() if "bytes" in got]

    def cell(world: str, method: str, name: str) -> str:
        got = found.get(world, {}).get(method, {}).get("bytes")
        return "not run" if got is None else f"{got[name]:,}"

    names = {"adapter_bytes": "adapter", "event_largest": "largest tensor", "event_peak": "most at once"}
    head = ("", *(f"{shown}: {world}" for shown in names.values() for world in worlds.values()))
    return _table(
        head,
        [(f"`{method}`", *(cell(world, method, name) for name in names for world in worlds)) for method in methods],
    )


def soak_engines() -> str:
    """Engine × what came of killing one of its processes, and in which part of its work that was (`scripts/soak_engines.py`)."""
    found = json.loads((EVIDENCE / "soak.json").read_text(encoding="utf-8"))["engines"]
    names = dict.fromkeys(name.partition(":")[0] for name in WORLDS)
    shown = {name: WORLDS[f"{name}:2"].partition(",")[0] for name in names}
    rows = [
        (
            shown[name],
            str(each["kills"]),
            f"{each['identical']} of {each['tries']}",
            str(each["other_number"]),
            ", ".join(f"`{method}`" for method in each["methods"]),
            ", ".join(f"{stage} {count}" for stage, count in each["stages"].items()),
        )
        for name in names
        if (each := found.get(name)) is not None
    ]
    head = (
        "",
        "kills",
        "runs that ended as the undisturbed one",
        "of them ended by one process",
        "methods, in turn",
        "where it was killed",
    )
    return _table(head, rows)


def peft_board(form: str) -> str:
    """What runs of peft's method comparison came to (`scripts/peft_board.py`)."""
    rows = []
    for each in json.loads((EVIDENCE / "peft-board.json").read_text(encoding="utf-8"))[form]:
        told, trained = each["run_info"], each["train_info"]
        last = trained["metrics"][-1]
        accuracy = (
            [] if form == "reduced" else ["" if last["test accuracy"] is None else f"{last['test accuracy']:.2f}"]
        )
        rows.append(
            (
                f"`{told['experiment_name'].partition('/')[0]}`, r = {told['peft_config']['r']}",
                f"{trained['num_trainable_params']:,}",
                f"{last['train loss']:.3f}",
                f"{last['test loss before']:.3f} → {last['test loss']:.3f}",
                f"{last['forgetting']:+.3f}",
                *accuracy,
                f"{trained['file_size'] / 2**20:.1f} MiB",
            )
        )
    head = ("experiment", "trainable parameters", "training loss", "loss of solutions", "forgetting")
    return _table((*head, *(["accuracy"] if form == "full" else []), "file"), rows)


TABLES: dict[str, Callable[[], str]] = {
    "demo-jobs": demo_jobs,
    "peft-board": lambda: peft_board("reduced"),
    "peft-board-full": lambda: peft_board("full"),
    "refused": refused,
    "contract": contract,
    "choices": choices,
    "config-fields": config_fields,
    "recipes": recipes,
    "recipe-keys": recipe_keys,
    "formats": docs_formats.rows_table,
    "templates": docs_formats.templates_table,
    "command-help": command_help,
    "api-weftlora": docs_api.of_weft,
    "api-packages": docs_api.of_packages,
    "launch": launch,
    "extras": extras,
    "matrix": matrix,
    "peft-suite": peft_suite,
    "scaling": lambda: scaling(WORLDS),
    "scaling-ways": lambda: scaling(WAYS),
    "scaling-bytes": scaling_bytes,
    "soak-engines": soak_engines,
    "hosts": hosts,
    "peft-examples": peft_examples,
    "model-families": model_families,
    "step-bf16": lambda: _table(*docs_bench.cases("step", "bf16")),
    "step-fp32": lambda: _table(*docs_bench.cases("step", "fp32")),
    "step-targets": lambda: _table(*docs_bench.targets("step")),
    "step-setting": lambda: _table(*docs_bench.setting("step")),
    "training": lambda: _table(*docs_bench.training("train")),
    "rows": lambda: _table(*docs_bench.encoding("rows")),
    "quantisers": lambda: _table(*docs_bench.quantisers()),
    "qlora-memory": lambda: _table(*docs_bench.qlora()),
    "step-dash": lambda: _table(*docs_bench.dash("step")),
}


def _contexts(command: Any, name: str, parent: Any) -> Iterator[Any]:
    """A context for the command and all below it: typer's plain help, not the boxes it draws to a terminal's width."""
    command.rich_markup_mode = None
    context = command.context_class(command, info_name=name, parent=parent, terminal_width=HELP_WIDTH, color=False)
    yield context
    for below, inner in getattr(command, "commands", {}).items():
        yield from _contexts(inner, below, context)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _signature(cls: type) -> str:
    shown = (
        f.name if f.default is dataclasses.MISSING else f"{f.name}={f.default!r}"
        for f in dataclasses.fields(cls)
        if f.init
    )
    return ", ".join(shown)


def _arguments(doc: str) -> Iterator[tuple[list[str], str]]:
    """(names, text) of the Args section of a docstring; continuation lines are joined."""
    section = doc.split("Args:\n", 1)[1].split("\n\n", 1)[0]
    for entry in re.split(r"\n(?=    \S)", "\n" + section):
        if found := re.match(r"\s*([\w, ]+): (.*)", entry, re.DOTALL):
            yield [name.strip() for name in found[1].split(",")], " ".join(found[2].split())


def _sections(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, dict[str, FieldInfo]]]:
    yield f"`{prefix.rstrip('.')}`" if prefix else "The file", prefix, model.model_fields
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _sections(info.annotation, f"{prefix}{name}.")


def _type(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " · ".join(f"`{value}`" for value in inner)
    if origin is Union or origin is type(int | None):
        return " · ".join(_type(part) for part in inner if part is not type(None))
    if origin in (dict, list, tuple):
        return "mapping" if origin is dict else "list"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "whole number", float: "number", bool: "`true` · `false`"}.get(
        annotation, str(annotation)
    )


def _default(info: FieldInfo) -> str:
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None or isinstance(value, (BaseModel, dict)):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"
