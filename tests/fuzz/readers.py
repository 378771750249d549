"""Every reader of files: what it is called with, inputs that it takes, and how they are changed.

A reader is called as the command that reads such a file calls it, in one process, with no model loaded. What it may do is give a value
or raise an error of weftlora's tree.
"""

from __future__ import annotations

import functools
import itertools
import json
import random
import re
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations as m
from mutations import Case

SEEDS = Path(__file__).parent / "seeds"


@dataclass(frozen=True)
class Target:
    """A reader or a writer."""

    name: str
    seeds: Callable[[], list[Case]]
    """Inputs that are as they should be."""
    mutate: Callable[[random.Random, Case], Case]
    call: Callable[[Path, Case], None]
    """Read or write the case in the folder. Raises AssertionError where what was written does not hold what was promised."""
    base: Callable[[], Case] = dict
    """What lies in the folder beside the case."""
    writer: bool = False
    not_promised: tuple[str, ...] = ()
    """Kinds of fault that docs/security.md says may happen: counted apart."""


def one_file(change: m.Mutate, *names: str) -> Callable[[random.Random, Case], Case]:
    """Mutates one of these files of a case, by default any."""

    def mutate(rng: random.Random, case: Case) -> Case:
        name = rng.choice([name for name in case if not names or name in names])
        content = case[name]
        return {**case, name: change(rng, content)} if isinstance(content, bytes) else case

    return mutate


def now_and_then(case: Case, every: int) -> bool:
    """Whether an input is one of those that a slower way is tried with: of the input, not of chance, so that it happens again."""
    return zlib.crc32(repr(sorted(case.items())).encode("utf-8", "backslashreplace")) % every == 0


@functools.cache
def folders() -> dict[str, bytes]:
    """Records of runs, a search and a comparison that took place."""
    content: dict[str, str] = json.loads((SEEDS / "folders.json").read_text(encoding="utf-8"))
    return {name: text.encode() for name, text in content.items()}


def below(top: str) -> dict[str, bytes]:
    """The records of one of these folders."""
    return {name.removeprefix(f"{top}/"): text for name, text in folders().items() if name.startswith(f"{top}/")}


# ---------------------------------------------------------------------- recipes

RECIPES = [
    "model: demo\ndata: demo\nadapter: lora\nout: runs/a\n",
    "model: {path: demo, dtype: bfloat16, task: causal}\n"
    "data:\n  train: demo\n  max_length: 64\n  fields: {prompt: question, completion: answer}\n  limit: 100\n"
    "adapter:\n  recipe: hydralora\n  r: 8\n  heads: 3\n  target_modules: [q_proj, v_proj]\n"
    "train:\n  steps: 150\n  batch_size: 32\n  lr: 5e-3\n  warmup: 0.1\n  args: {adam_beta2: 0.95}\nout: runs/hydra\n",
    "model: &m {path: demo}\ndata: {<<: {train: demo}, max_length: 32}\nadapter: {recipe: lora, r: 4}\nout: runs/m\n",
    "model: demo\ndata: {train: demo}\nadapter:\n  <<: &x {r: 4}\n  structure: {kind: hydra, heads: 2}\n  boost: {kind: dash, after: 0.1}\n"
    "  layers: [0, 3]\n  rank_pattern: {q_proj: 2}\ntrain: {epochs: 0.5, seed: 3, lora_plus_ratio: 16.0, report_to: [none]}\nout: runs/x\n",
    "model: demo\ndata: demo\nadapter: {recipe: alora, first: 0.2, every: {epochs: 0.5}, max_rounds: 2, score: random}\n"
    "train: {steps: 40}\nout: runs/alora\n",
    "model: demo\ndata: demo\nadapter: {recipe: flexora, steps: 8, val_size: 32}\ntrain: {steps: 40, trainer: sft}\nout: runs/f\n",
    "model: demo\ndata: demo\nadapter: {recipe: tied_lora, train: tl6}\ntrain: {steps: 4}\nout: runs/t\n",
    "model: demo\ndata: demo\nadapter: {recipe: 'peft:adalora', target_r: 4}\ntrain: {steps: 4}\nout: ~/runs/t\n",
]
COMPARISONS = [
    "model: demo\ndata: demo\nmethods: [lora, hydralora, none]\nout: runs/c\n",
    "model: demo\ndata: {train: demo, limit: 64}\ntrain: {steps: 8}\nmethods:\n  - lora\n  - {recipe: lora, structure: hydra, name: mine}\n"
    "  - {control: random_layers, count: 2}\n  - random_moves\nbudget: {equal: parameters, r: 4}\nscale: own\nseeds: [0, 3]\n"
    "rates: {values: [1e-3, 2e-3], seeds: 2}\nmetric: exact_match\nbaseline: lora\nout: runs/c\n",
]


def _asked(source: Any, *overrides: str) -> None:
    from transformers import set_seed

    from weftlora.runs.adapter import adapter_config
    from weftlora.runs.recipe import asked
    from weftlora.train import arguments

    recipe, _ = asked(source, overrides)
    arguments.check(recipe.train)
    set_seed(recipe.train.seed)  # as training does first of all
    adapter_config(recipe.adapter, total_steps=100)


def _recipe(folder: Path, case: Case) -> None:
    _asked(folder / "recipe.yaml")


def _comparison_recipe(folder: Path, case: Case) -> None:
    from transformers import set_seed

    from weftlora.compare.methods import contenders
    from weftlora.compare.recipe import CompareRecipe
    from weftlora.train import arguments

    recipe = CompareRecipe.read(folder / "recipe.yaml")
    recipe.check_places()
    found = contenders(recipe.methods)
    arguments.check(recipe.train)
    for each in found:
        _ = each.slug, each.search
    for seed in recipe.all_seeds[:5]:
        set_seed(seed)


OVERRIDES = [
    ["train.lr=1e-3"],
    ["adapter.r=16", "adapter.lora_dropout=0.1"],
    ["model=demo", "data.train=demo", "out=runs/x"],
    ["adapter.layers=[0, 3]", "train.steps=5"],
    ["data.fields.prompt=question", "data.format=prompt_completion"],
    ["adapter.recipe=lora_dash", "adapter.after=0.1"],
    ["train.args.adam_beta2=0.9", "train.report_to=[none]"],
    ["model.path=demo", "model.dtype=auto", "data.separator= -> "],
]
KEYS = [
    "model",
    "model.path",
    "model.dtype",
    "model.task",
    "model.attn_implementation",
    "data",
    "data.train",
    "data.validation",
    "data.format",
    "data.fields.prompt",
    "data.fields",
    "data.separator",
    "data.quoting",
    "data.unit",
    "data.prompt_template",
    "data.max_length",
    "data.truncate",
    "data.limit",
    "data.seed",
    "data.validation_fraction",
    "adapter",
    "adapter.recipe",
    "adapter.r",
    "adapter.lora_alpha",
    "adapter.heads",
    "adapter.layers",
    "adapter.target_modules",
    "adapter.rank_pattern",
    "adapter.structure",
    "adapter.start",
    "adapter.boost",
    "adapter.ranks",
    "adapter.after",
    "adapter.modules_to_save",
    "train",
    "train.steps",
    "train.epochs",
    "train.lr",
    "train.batch_size",
    "train.seed",
    "train.warmup",
    "train.schedule",
    "train.optimizer",
    "train.num_threads",
    "train.save_every",
    "train.report_to",
    "train.args",
    "train.args.seed",
    "train.args.hub_token",
    "train.trainer",
    "out",
]


def _overrides(folder: Path, case: Case) -> None:
    from weftlora.runs.recipe import builtin

    given = json.loads(case["overrides"])
    _asked(builtin("hydralora"), *given)


def _change_overrides(rng: random.Random, case: Case) -> Case:
    """Overrides with another key, another value or other characters; they come from a shell, so none holds a NUL."""
    given: list[str] = [*json.loads(case["overrides"])]
    for _ in range(rng.choice((1, 1, 2))):
        number = rng.randrange(len(given)) if given else 0
        key, _, value = given[number].partition("=") if given else ("", "", "")
        kind = rng.randrange(6)
        if kind == 0:
            key = rng.choice(KEYS)
        elif kind == 1:
            key = rng.choice((key + ".x", "." + key, key.replace(".", ".."), rng.choice(m.TEXTS), key[:-1]))
        elif kind == 2:
            value = m.write_tree(rng, m.value(rng)).decode("utf-8", "surrogateescape")
        elif kind == 3:
            value = rng.choice(m.TEXTS)
        elif kind == 4:
            value = m.change_bytes(rng, value.encode("utf-8", "surrogatepass"), m.YAML).decode(
                "utf-8", "surrogateescape"
            )
        else:
            given = [*given, f"{rng.choice(KEYS)}={rng.choice(m.TEXTS)}"]
            continue
        made = f"{key}={value}" if rng.random() < 0.97 else key + value
        given[number : number + 1] = [made.replace("\0", "")]
    return {"overrides": json.dumps(given).encode()}


# ---------------------------------------------------------------------- run folders


def _run_record(folder: Path, case: Case) -> None:
    from weftlora.cli.output import run_summary
    from weftlora.compare import load
    from weftlora.runs.load import _wanted, recipe_of
    from weftlora.runs.run import Run, check_continues

    run = Run.load(folder)
    for step in (
        lambda: run_summary(run.whole()),
        lambda: _wanted(run),
        lambda: check_continues(run, recipe_of(run).model_dump(mode="json")),
        lambda: load([folder]),
    ):
        _refused_or_not(step)


def _refused_or_not(step: Callable[[], Any]) -> None:
    """A step of several that may each refuse: what is refused by one is tried with the others."""
    from weftlora.errors import WeftError

    try:
        step()
    except WeftError as error:
        check_message(error)


def check_message(error: Exception) -> None:
    """An error's text is short, and nothing in it steers a terminal or hides. Raises AssertionError."""
    text = str(error)
    assert text, f"{type(error).__name__} says nothing"
    assert len(text) <= 2000, f"the message of {type(error).__name__} has {len(text)} characters"
    assert not (hidden := unseen(text, "\n\t")), f"the message of {type(error).__name__} holds {hidden[:3]!r}"


def unseen(text: str, allowed: str = "") -> list[str]:
    """What a terminal would obey, or a reader not see."""
    return [c for c in _hidden().findall(text) if c not in allowed]


@functools.cache
def _hidden() -> re.Pattern[str]:
    """Controls, formats, surrogates, private characters and separators of lines; without the joiners, which scripts need."""
    import unicodedata

    kinds = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    every = [n for n in range(0x110000) if unicodedata.category(chr(n)) in kinds and n not in (0x200C, 0x200D)]
    ends = [n for n, after in zip(every, [*every[1:], -1], strict=True) if after != n + 1]
    starts = [every[0], *(after for n, after in itertools.pairwise(every) if after != n + 1)]
    return re.compile(
        "[" + "".join(f"{re.escape(chr(a))}-{re.escape(chr(b))}" for a, b in zip(starts, ends, strict=True)) + "]"
    )


def _run_folder() -> Case:
    return {"run.json": folders()["alora/run.json"]}


def _metrics(folder: Path, case: Case) -> None:
    from weftlora.compare import load
    from weftlora.compare.workers import _has_diverged
    from weftlora.runs.run import Run

    Run.load(folder).history()
    _has_diverged(folder)
    load([folder])


def _change_metrics(rng: random.Random, case: Case) -> Case:
    return {"metrics.jsonl": m.json_lines(rng, case["metrics.jsonl"])}  # type: ignore[arg-type]


def _events(folder: Path, case: Case) -> None:
    from weftlora.inspection.inspecting import inspect

    found = inspect(folder, base=False, spectra=0)
    if now_and_then(case, 20):
        from weftlora.cli.inspect import shown

        on_screen(shown(found))


def without_libraries() -> None:
    """Pages without the megabytes of Vega, which hold nothing of anybody's."""
    from weftlora.report import web

    web._bundle = lambda: "/* the libraries */"  # type: ignore[assignment]


def on_screen(renderable: Any) -> str:
    """What a terminal of 100 columns would get."""
    import io

    from weftlora.cli import output

    screen = output.Screen(file=io.StringIO(), width=100)
    screen.print(renderable)
    text: str = screen.file.getvalue()  # type: ignore[attr-defined]
    return text


# ---------------------------------------------------------------------- adapters


def _tiny(name: str) -> Case:
    """An adapter of a recipe on a Llama of 2 layers, as peft saves it: on q_proj alone, its tensors random."""
    import tempfile

    import torch
    from peft import get_peft_model

    import families
    import weftlora

    common: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"]}
    made = {
        "lora": lambda: weftlora.PlainLoraConfig(**common, layers=weftlora.Only([0, 1])),
        "hydra": lambda: weftlora.HydraLoraConfig(**common, heads=2),
        "tied": lambda: weftlora.TiedLoraConfig(r=2),
        "dash": lambda: weftlora.LoraTsdConfig(**common, directions=2, after=2),
        "alora": lambda: weftlora.AllocLoraConfig(**common, first=2, every=2, max_rounds=2, score="random"),
        "stock": lambda: __import__("peft").LoraConfig(**common),
    }[name]()
    torch.manual_seed(0)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
        warnings.simplefilter("ignore")
        model = get_peft_model(families.FAMILIES["llama"].build(), made)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.uniform_(-0.1, 0.1)
        model.save_pretrained(top)
        return {name: (Path(top) / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}


@functools.cache
def adapters() -> dict[str, Case]:
    return {name: _tiny(name) for name in ("lora", "hydra", "tied", "dash", "alora", "stock")}


def _adapter(folder: Path, case: Case) -> None:
    from weftlora.inspection.inspecting import inspect
    from weftlora.runs.load import _read_config

    _refused_or_not(lambda: _read_config(folder))
    found = inspect(folder, base=False, spectra=0)
    if now_and_then(case, 20):
        from weftlora.cli.inspect import shown

        on_screen(shown(found))


def _adapter_seeds() -> list[Case]:
    return [dict(case) for case in adapters().values()]


@functools.cache
def _released() -> list[Case]:
    """Adapters as the released code of HydraLoRA and LoRA-Dash writes them, in safetensors."""
    import torch
    from safetensors.torch import save

    site = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    hydra = {f"{site}A.weight": torch.ones(2, 4), f"{site}route.weight": torch.ones(2, 4)}
    hydra |= {f"{site}B{n}.weight": torch.ones(4, 2) for n in range(2)}
    dash = {
        f"{site}A.weight": torch.ones(2, 4),
        f"{site}B.weight": torch.ones(4, 2),
        f"{site}index.weight": torch.ones(1, 3),
    }
    dash |= {f"{site}w_u": torch.ones(4, 3), f"{site}w_vt": torch.ones(3, 4)}
    settings = json.dumps({"r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}).encode()
    return [{"adapter_config.json": settings, "adapter_model.safetensors": save(each)} for each in (hydra, dash)]


def _released_adapter(folder: Path, case: Case) -> None:
    import shutil

    from weftlora.host.released_code import import_hydralora, import_lora_dash

    for read in (import_hydralora, import_lora_dash):
        shutil.rmtree(folder / "made", ignore_errors=True)
        _refused_or_not(lambda read=read: read(folder, folder / "made"))  # type: ignore[misc]


def _change_released(rng: random.Random, case: Case) -> Case:
    if rng.random() < 0.4:
        return one_file(m.json_file, "adapter_config.json")(rng, case)
    change = m.safetensors_tensors if rng.random() < 0.8 else m.safetensors_header
    return one_file(change, "adapter_model.safetensors")(rng, case)


def _base_weights(folder: Path, case: Case) -> None:
    from weftlora.adapted.frozen_weights import Checkpoint
    from weftlora.data.paths import locate

    locate(str(folder), folder)
    found = Checkpoint(folder)
    for name in [*found.where][:3]:
        _refused_or_not(lambda name=name: found.read(name.removesuffix(".weight")))  # type: ignore[misc]


@functools.cache
def _weights() -> list[Case]:
    """A model folder in two files, with their index."""
    import torch
    from safetensors.torch import save

    names = {f"model.layers.{n}.self_attn.q_proj.weight": f"model-0000{n}.safetensors" for n in (0, 1)}
    files: Case = {file: save({name: torch.ones(4, 4)}) for name, file in names.items()}
    index = json.dumps({"metadata": {"total_size": 128}, "weight_map": names}).encode()
    return [{"config.json": b"{}", "model.safetensors.index.json": index, **files}]


def _change_weights(rng: random.Random, case: Case) -> Case:
    if rng.random() < 0.4:
        return one_file(m.json_file, "model.safetensors.index.json")(rng, case)
    change = m.safetensors_tensors if rng.random() < 0.3 else m.safetensors_header
    return one_file(change, "model-00000.safetensors", "model-00001.safetensors")(rng, case)


# ---------------------------------------------------------------------- searches, comparisons, checkpoints


def _selection(folder: Path, case: Case) -> None:
    from weftlora.cli.output import controls
    from weftlora.search import Selection

    found = Selection.load(folder / "selection.json")
    _ = found.layers, found.blocks, found.margin, found.near_ties, found.filled, found.others
    _refused_or_not(found.peft_config)
    controls(found)
    assert Selection.load(folder / "selection.json").text() == found.text() or "nan" in found.text().lower()


def _comparison(folder: Path, case: Case) -> None:
    from weftlora.cli.compare import plan_table, result
    from weftlora.compare import load
    from weftlora.compare.plan import Plan

    _refused_or_not(lambda: on_screen(plan_table(Plan.load(folder))))
    found = load([folder])
    if now_and_then(case, 3):
        on_screen(result(found))
    if now_and_then(case, 20):
        from weftlora.report.comparison.page import page
        from weftlora.report.comparison.runs import gather

        without_libraries()
        page(gather(found))


def _comparison_folder() -> Case:
    return {name: text for name, text in below("comparison").items() if "/adapter/" not in name}


def _change_comparison(rng: random.Random, case: Case) -> Case:
    """The plan, mostly; else a record of one of its runs, or a link where a folder was."""
    kind = rng.random()
    if kind < 0.75:
        return {**case, "compare.json": m.json_file(rng, case.get("compare.json", below("comparison")["compare.json"]))}  # type: ignore[arg-type]
    base = _comparison_folder()
    name = rng.choice([name for name in base if name != "compare.json"])
    if kind < 0.95:
        change = m.json_lines if name.endswith("l") else m.json_file
        was = case.get(name, base[name])
        return {
            **case,
            name: change(rng, base[name] if isinstance(was, str) else was),
        }  # a link was there: a file again
    if kind < 0.98:
        problem = {"status": rng.choice(("failed", "diverged", "x")), "problem": rng.choice(m.TEXTS)}
        return {**case, f"{Path(name).parent}/problem.json": m.json_file(rng, json.dumps(problem).encode())}
    return {**case, name: f"../../../../{m.OUTSIDE}/{Path(name).name}"}


def _checkpoint_case() -> Case:
    """Two checkpoints with small files, marked as they should be."""
    import hashlib

    state = folders()["alora/checkpoints/checkpoint-3/trainer_state.json"]
    case: Case = {}
    for step in (3, 6):
        files = {
            "trainer_state.json": state.replace(b'"global_step": 3', f'"global_step": {step}'.encode()),
            "optimizer.pt": b"x" * 8,
        }
        digests = {name: [len(text), hashlib.sha256(text).hexdigest()] for name, text in files.items()}
        marker = json.dumps({"step": step, "files": digests}).encode()
        case |= {
            f"checkpoints/checkpoint-{step}/{name}": text for name, text in {**files, "complete.json": marker}.items()
        }
    return case


def _checkpoints(folder: Path, case: Case) -> None:
    from weftlora.runs.run import Run, settle
    from weftlora.train import checkpoint
    from weftlora.train.resuming import check_can_resume, resume_point

    run = Run.load(folder)
    _refused_or_not(lambda: _is_whole(checkpoint.newest(run.checkpoints)))
    _refused_or_not(lambda: check_can_resume(run))
    _refused_or_not(lambda: resume_point(run, main=True))
    settle(folder)
    checkpoint.rotate(run.checkpoints, 1)


def _is_whole(chosen: Path | None) -> None:
    """Training goes on from no checkpoint that lacks a file, or has another than its marker says. Raises AssertionError."""
    if chosen is None:
        return
    try:
        marker = json.loads((chosen / "complete.json").read_text(encoding="utf-8"))
        sizes = {name: size for name, (size, _) in marker.get("files", {}).items()}
        whole = int(chosen.name.removeprefix("checkpoint-")) == marker["step"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise AssertionError("a checkpoint with a damaged marker is gone on from") from None
    whole = whole and all(
        (chosen / name).is_file() and (chosen / name).stat().st_size == size for name, size in sizes.items()
    )
    assert whole, "a checkpoint that is not what its marker says is gone on from"


def _change_checkpoints(rng: random.Random, case: Case) -> Case:
    """Another marker, state or file; another name of a folder; a link, or something missing."""
    kind = rng.random()
    name = rng.choice([*case])
    content = case[name]
    if kind < 0.5 and isinstance(content, bytes):
        marks = [n for n in case if n.endswith(".json") and isinstance(case[n], bytes)]
        if marks:
            name = rng.choice(marks)
        return {**case, name: m.json_file(rng, case[name])}  # type: ignore[arg-type]
    if kind < 0.6:
        return {key: value for key, value in case.items() if key != name} or case
    if kind < 0.8:
        step = rng.choice(
            (
                "²",
                "-1",
                "00007",
                "9",
                "٣",
                "1e3",
                "6 ",
                "9" * 17,
                "9" * 30,
                "keep-1",
                "",
                "\x1b[31m",
                "x\ny",
                "3/nested",
            )
        )
        old = [*name.split("/"), ""][1]
        return {
            key.replace(f"/{old}/", f"/checkpoint-{step}/") if rng.random() < 0.9 else key: value
            for key, value in case.items()
        }
    if kind < 0.9:
        return {
            **case,
            rng.choice((name, "checkpoints/checkpoint-9", "metrics.jsonl", f".run.weft-{'0' * 16}")): m.OUTSIDE,
        }
    if kind < 0.95:
        return {
            **case,
            rng.choice(
                (f".run.weft-{'a' * 16}/run.json", "checkpoints/checkpoint-7/trainer_state.json", "checkpoints/x/")
            ): b"{}",
        }
    return {**case, "metrics.jsonl": m.json_lines(rng, folders()["alora/metrics.jsonl"])}


# ---------------------------------------------------------------------- states of a search


@functools.cache
def _searches() -> list[Any]:
    """Two searches of a tiny Llama, by Adam and by plain descent, each after two of its five steps."""
    import torch
    from peft import get_peft_model

    import families
    import weftlora
    from weftlora.search.driver import LayerSearch
    from weftlora.search.hypergradient import Inner

    draw, found = torch.Generator().manual_seed(0), []
    ids = [torch.randint(3, 20, (6,), generator=draw) for _ in range(12)]
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    for outer, inner in (("adam", "adamw"), ("sgd", "sgd")):
        torch.manual_seed(0)
        search = weftlora.Search(
            steps=5, val_size=4, outer_batches=2, inner_steps=1, alpha_optimizer=outer, alpha_lr=0.1
        )  # type: ignore[arg-type]
        config = weftlora.PlainLoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1, layers=search)
        model = get_peft_model(families.FAMILIES["llama"].build(), config)
        job = LayerSearch(model, search, Inner(batch_size=2, accumulation=1, optimizer=inner), rows)  # type: ignore[arg-type]
        job.step()
        job.step()
        found.append(job)
    return found


@functools.cache
def _states() -> list[Case]:
    import tempfile

    found: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
        for number, job in enumerate(_searches()):
            job.save(Path(top) / "state.pt")
            found.append({"state.pt": (Path(top) / "state.pt").read_bytes(), "search": str(number).encode()})
    return found


def _state(folder: Path, case: Case) -> None:
    """What is gone on from lets the search go on to its end; what is refused is refused before the first step."""
    import io

    import torch

    number = int(case.get("search", b"0")) % 2  # type: ignore[arg-type]
    job, whole = _searches()[number], _states()[number]["state.pt"]
    job.load(folder / "state.pt")  # one that is refused has changed nothing
    try:
        job.step()
        job.selection()
    finally:
        job.load_state_dict(torch.load(io.BytesIO(whole), weights_only=True))  # type: ignore[arg-type]


def _change_state(rng: random.Random, case: Case) -> Case:
    import io

    import torch

    content: bytes = case["state.pt"]  # type: ignore[assignment]
    if rng.random() < 0.25:
        return {**case, "state.pt": m.lines_and_bytes(rng, content)}
    if rng.random() < 0.05:
        return {**case, "search": b"1" if case["search"] == b"0" else b"0"}
    try:
        tree = torch.load(io.BytesIO(content), weights_only=True)
        for _ in range(rng.choice((1, 1, 2, 3))):
            tree = _change_tensors(rng, tree)
        made = io.BytesIO()
        torch.save(tree, made)
    except Exception:  # it is damaged already, or holds what cannot be written
        return {**case, "state.pt": m.change_bytes(rng, content)}
    return {**case, "state.pt": made.getvalue()}


def _change_tensors(rng: random.Random, root: Any) -> Any:
    """A tree with one value changed, as `mutations.change_tree` does; tensors become others."""
    import torch

    if isinstance(root, dict) and root and rng.random() < 0.85:
        key = rng.choice(list(root))
        if rng.random() < 0.85:
            return {**root, key: _change_tensors(rng, root[key])}
        kept = {name: value for name, value in root.items() if name != key}
        return kept if rng.random() < 0.5 else {**kept, rng.choice((f"{key}x", 7, None, key)): root[key]}
    if isinstance(root, list) and root and rng.random() < 0.85:
        number = rng.randrange(len(root))
        if rng.random() < 0.85:
            return [*root[:number], _change_tensors(rng, root[number]), *root[number + 1 :]]
        return rng.choice((root[:number], [*root, root[number]]))
    if isinstance(root, torch.Tensor):
        kind = rng.randrange(6)
        if kind == 0:
            return torch.zeros(
                rng.choice(((), (0,), (1,), (3,), (2, 2), (*root.shape, 1), tuple(root.shape)[:-1])), dtype=root.dtype
            )
        if kind == 1:
            return root.to(
                rng.choice((torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8, torch.complex64))
            )
        if kind == 2:
            return torch.full_like(root, rng.choice((0, 1, 255)))
        if kind == 3 and root.is_floating_point():
            return torch.full_like(root, rng.choice((float("nan"), float("inf"), 1e38, -1.0)))
        if kind == 4:
            return root.to_sparse() if root.dim() and rng.random() < 0.5 else root.tolist()
        return m.value(rng)
    return m.change_tree(rng, root)


# ---------------------------------------------------------------------- caches of ours


@functools.cache
def _matrices() -> list[Any]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return [torch.randn(6, 4, generator=draw), torch.randn(4, 6, generator=draw).to(torch.bfloat16), torch.eye(3)]


@functools.cache
def _decompositions() -> list[Case]:
    """A folder with the decomposition of each matrix, and the number of the one that is asked for."""
    import tempfile

    from weftlora.adapted.frozen_weights import Decomposer

    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
        for w in _matrices():
            Decomposer(Path(top))("m", w)
        files: Case = {path.name: path.read_bytes() for path in sorted(Path(top).iterdir())}
    return [{**files, "matrix": str(number).encode()} for number in range(len(_matrices()))]


def _decomposition(folder: Path, case: Case) -> None:
    """A damaged file is computed again; whatever is taken fits its matrix, and rates and directions come of it."""
    import torch

    from weftlora import change_rates
    from weftlora.adapted.frozen_weights import Decomposer

    w = _matrices()[int(case.get("matrix", b"0")) % len(_matrices())]  # type: ignore[arg-type]
    found = Decomposer(folder)("m", w)
    a, b = torch.ones(2, w.shape[1]), torch.ones(w.shape[0], 2)
    moved = change_rates.moved(found, w, a, b)
    chosen = change_rates.pick(found, w, change_rates.change_rate(found, moved), 2)
    assert chosen.up.shape == (w.shape[0], len(chosen.index)), "directions do not fit their matrix"
    assert moved.dtype == torch.float64, "a decomposition is not in fp64"


def _change_decomposition(rng: random.Random, case: Case) -> Case:
    """Another file; half of those that are still one carry what would be right for their content."""
    import hashlib

    names = [name for name in case if name != "matrix"]
    if rng.random() < 0.1 or not names:
        return {**case, "matrix": str(rng.randrange(3)).encode()}
    name = rng.choice(names)
    content: bytes = case[name]  # type: ignore[assignment]
    about = (m.split_safetensors(content) or ({}, b""))[0].get("__metadata__")
    made = m.safetensors_header(rng, content) if rng.random() < 0.4 else m.safetensors_tensors(rng, content)
    if (found := m.split_safetensors(made)) is not None and rng.random() < 0.7:
        header, data = found
        said = dict(about) if isinstance(about, dict) else {}
        whole = hashlib.sha256()
        try:
            for each in ("sigma", "side"):
                begin, end = header[each]["data_offsets"]
                whole.update(data[begin:end])
        except (KeyError, TypeError, ValueError):
            pass
        said |= {"content": whole.hexdigest(), "key": name.partition(".")[0], "format": "weft-spectrum-1"}
        if rng.random() < 0.3:
            said["tall"] = rng.choice(("yes", "no", "x"))
        if rng.random() < 0.1 and said:
            said.pop(rng.choice(list(said)))
        written = json.dumps({**header, "__metadata__": {str(key): str(value) for key, value in said.items()}}).encode()
        made = m.join_safetensors(written + b" " * (-len(written) % 8), data)
    return {**case, name: made}


def _in_cache(folder: Path) -> None:
    """The user's cache is this folder, and nothing is measured."""
    import os

    from weftlora.runs import precision

    os.environ["XDG_CACHE_HOME"] = str(folder)
    precision.measured_gain = lambda: 1.5


def _gain(folder: Path, case: Case) -> None:
    import math

    from weftlora.runs import precision

    _in_cache(folder / "cache")
    precision.bfloat16_gain.__wrapped__()
    [file] = (folder / "cache").rglob("*.json")
    file.write_bytes(case["precision.json"])  # type: ignore[arg-type]
    gain = precision.bfloat16_gain.__wrapped__()
    assert isinstance(gain, float), "a gain is no number"
    assert 0 < gain < math.inf, "a gain is no number of times"
    assert precision.bfloat16_gain.__wrapped__() == gain, "a gain is another when it is asked for again"


@functools.cache
def _kept() -> list[Case]:
    """Encoded rows as the cache keeps them: of one split, and of two with labels."""
    import tempfile

    import datasets

    from weftlora.data.cache import Entry
    from weftlora.data.loaded import Counts, Loaded

    rows = datasets.Dataset.from_list(
        [{"input_ids": [1, 2], "attention_mask": [1, 1], "labels": [1, 2], "domain": "a"}] * 3
    )
    counts = Counts(3, 0, 0, 0, 3, 3, 0, 0, 0, 6, 6)
    said: dict[str, Any] = {
        "hashes": {"rows.jsonl": "0" * 64},
        "max_length": 64,
        "columns": ("x",),
        "sources": (("rows.jsonl", 3),),
    }
    one = Loaded(rows, None, None, "causal", "text", None, [], {"train": counts}, **said)
    two = Loaded(
        rows,
        rows,
        None,
        "classification",
        "classification",
        ["no", "yes"],
        ["a"],
        {"train": counts, "validation": counts},
        **said,
    )
    found: list[Case] = []
    for loaded in (one, two):
        with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
            made, place = Path(top) / "made", Path(top) / "entry"
            made.mkdir()
            Entry(place).write(loaded, made)
            found.append({f"entry/{path.name}": path.read_bytes() for path in sorted(place.iterdir())})
    return found


def _kept_rows(folder: Path, case: Case) -> None:
    """What is damaged is as if it were not there; whatever is taken is what loading would have given."""
    from weftlora.data.cache import Entry

    found = Entry(folder / "entry").read()
    if found is None:
        return
    for split in (found.train, found.validation, found.test):
        if split is not None:
            _ = [row["input_ids"] for row in split.select(range(min(2, len(split))))]
    _ = (
        sum(each.read + each.tokens for each in found.counts.values()),
        found.max_length + 1,
        sum(n for _, n in found.sources),
    )
    for text in (
        *(found.labels or ()),
        *found.domains,
        *found.hashes,
        *found.hashes.values(),
        *found.columns,
        *found.notes,
    ):
        assert isinstance(text, str), "a kept name is no text"


def _change_kept(rng: random.Random, case: Case) -> Case:
    name = "entry/loaded.json"
    if name in case and rng.random() < 0.8:
        return {**case, name: m.json_file(rng, case[name])}  # type: ignore[arg-type]
    arrow = rng.choice([name for name in case if name.endswith(".arrow")] or [*case])
    kind = rng.random()
    if kind < 0.3 and len(case) > 1:
        return {key: value for key, value in case.items() if key != arrow}
    content: bytes = case[arrow]  # type: ignore[assignment]
    return {**case, arrow: content[: rng.randrange(len(content) + 1)] if kind < 0.8 else b""}


# ---------------------------------------------------------------------- GGUF


@functools.cache
def _gguf_files() -> list[Case]:
    """A tiny Llama with its tokenizer, in two types of tensors."""
    import tempfile

    from gguf import GGMLQuantizationType

    from tiny_gguf import write_gguf

    found: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
        for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0):
            write_gguf(Path(top) / "tiny.gguf", kind)
            found.append({"tiny.gguf": (Path(top) / "tiny.gguf").read_bytes()})
    return found


def _gguf(folder: Path, case: Case) -> None:
    """The header, always; now and then the folder that is made of the file."""
    from weftlora.data.paths import check_gguf
    from weftlora.runs import gguf

    _in_cache(folder / "cache")
    file = folder / "tiny.gguf"
    check_gguf(file)
    header = gguf.Header.read(file, str(file))
    check_message(header.unknown(str(file)))
    header.check(str(file))
    parts = m.split_gguf(case["tiny.gguf"])  # type: ignore[arg-type]
    if parts is not None and now_and_then({"header": repr(parts[:3])}, 12):
        gguf.dequantised(file, str(file))


# ---------------------------------------------------------------------- prompts and answers

PROMPTS = [
    {"format": "prompt_completion", "prompt_template": "Say {prompt} again", "system": None},
    {"format": "prompt_completion", "prompt_template": "{a} and {b}", "system": None},
    {"format": "chat", "prompt_template": None, "system": "fold"},
    {"format": "text", "prompt_template": None, "system": "keep"},
    {"format": "classification", "prompt_template": None, "system": None},
]
MESSAGES = [
    [{"role": "user", "content": "a"}],
    {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ]
    },
]


def _prompts(folder: Path, case: Case) -> None:
    """What an adapter folder says that prompts become, and a file of messages."""
    from weftlora.data.encode import encode_prompt
    from weftlora.train.prompting import Prompting, read_messages

    known, messages = Prompting.of_adapter(folder), list[Any]()
    _refused_or_not(lambda: messages.extend(read_messages(folder / "messages.json")[0]))
    check_message(ValueError(known.trained_on))
    check_message(ValueError(known.reason(_tokenizer(), False)))
    given = [
        "word",
        '{"a": "1", "b": 2}',
        {"prompt": "x"},
        {"a": "x", "b": "y"},
        messages,
        [{"role": "user", "content": "x"}],
    ]
    for prompt in given:
        for system in (None, "s"):
            _refused_or_not(
                lambda prompt=prompt, system=system: encode_prompt(_tokenizer(), known.written(prompt, system))
            )  # type: ignore[misc]


def _prompt_seeds() -> list[Case]:
    messages = [json.dumps(each).encode() for each in MESSAGES]
    return [
        {"prompts.json": json.dumps(each).encode(), "messages.json": messages[number % 2]}
        for number, each in enumerate(PROMPTS)
    ]


SAMPLES = [
    {
        "step": step,
        "prompt": f"p{n}",
        "given": f"<p{n}>",
        "text": f"answer {n} after {step}",
        **({"reference": "r"} if n else {}),
    }
    for step in (0, 4, 8)
    for n in range(2)
]


def _samples(folder: Path, case: Case) -> None:
    """Answers of a run that go on with another, and that a page shows."""
    import dataclasses

    from writers import _comparison

    from weftlora.report.comparison.runs import Evidence, samples
    from weftlora.runs.run import Run

    run = Run.load(folder)
    other = dataclasses.replace(run, folder=folder / "other")
    other.folder.mkdir()
    other.keep_until(4, run)
    assert all(row["step"] <= 4 for row in other.samples()), "a sample of a later step is kept"
    found = _comparison()
    for part in samples(Evidence(found, runs={outcome.folder: run for outcome in found.outcomes[:2]})):
        for line in part.sheet.lines:
            assert all(len(str(cell.text)) < 2000 for cell in line.cells), "a page shows more of an answer than it says"


# ---------------------------------------------------------------------- rows

SECTIONS: list[dict[str, Any]] = [
    {}, {"format": "prompt_completion"}, {"format": "chat"}, {"format": "text"}, {"format": "classification"},
    {"quoting": "none"}, {"separator": " -> "}, {"separator": "\t"}, {"unit": "line"}, {"unit": "paragraph"},
    {"prompt_template": "{prompt} is"}, {"prompt_template": "{a:>5}{b!r}"}, {"fields": {"prompt": "a", "completion": "b"}},
    {"fields": {"domain": "d"}}, {"max_length": 8}, {"prompt_template": "{prompt:>99999999}"},
]  # fmt: skip
"""data sections beside `train`; one of them is part of a case, by its number."""
ROWS: list[list[dict[str, Any]]] = [
    [{"prompt": f"p{n}", "completion": f"c{n}", "domain": "ab"[n % 2]} for n in range(4)],
    [{"text": f"some words {n}", "label": n % 2} for n in range(4)],
    [{"text": f"words {n}"} for n in range(3)],
    [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{n}"}]} for n in range(3)],
]


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from weftlora.data.demo import demo_model_path

    made = AutoTokenizer.from_pretrained(demo_model_path(), trust_remote_code=False)
    made.chat_template = TEMPLATES[0]
    return made


def _rows(name: str) -> Callable[[Path, Case], None]:
    """Reads the file of this name in a case, or the one that begins with it."""

    def call(folder: Path, case: Case) -> None:
        import tempfile

        import datasets

        from weftlora.data import DataConfig, load
        from weftlora.data.examples import examples, find_columns, label_names
        from weftlora.data.read import Blocks, read

        tempfile.tempdir = str(folder)  # for what a compressed file holds
        datasets.config.HF_DATASETS_CACHE = folder / "cache"
        number, file = case.get("section", b"0"), next(each for each in sorted(case) if each.startswith(name))
        config = DataConfig.parse({"train": str(folder / file), **SECTIONS[int(number) % len(SECTIONS)]})  # type: ignore[arg-type]
        source = read(folder / file, config, Blocks(lambda lines: [len(line) for line in lines], 60))
        columns = find_columns(source, config)
        rows = examples(source, columns)
        if columns.format == "classification":
            _refused_or_not(lambda: label_names([row.answer for row in rows], source))
        if now_and_then(case, 50):
            load(config, _tokenizer(), base_dir=folder)

    return call


def _change_rows(name: str, change: m.Mutate) -> Callable[[random.Random, Case], Case]:
    def mutate(rng: random.Random, case: Case) -> Case:
        if rng.random() < 0.15:
            return {**case, "section": str(rng.randrange(len(SECTIONS))).encode()}
        return {**case, name: change(rng, case[name])}  # type: ignore[arg-type]

    return mutate


def _as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _as_table(rows: list[dict[str, Any]], comma: str) -> bytes:
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    return "".join(comma.join(line) + "\n" for line in lines).encode()


def _row_targets() -> list[Target]:
    table = [_as_table(rows, ",") for rows in ROWS[:3]]
    spelt: dict[str, tuple[list[bytes], m.Mutate]] = {
        "jsonl": ([_as_jsonl(rows) for rows in ROWS], m.json_lines),
        "json": ([json.dumps(rows, indent=1).encode() for rows in ROWS], m.json_file),
        "csv": ([*table, b'prompt,completion\n"a, b","c ""d"""\n"two\nlines",x\n'], m.lines_and_bytes),
        "tsv": ([text.replace(b",", b"\t") for text in table], m.lines_and_bytes),
        "txt": (
            [b"one line\nanother\n\nafter a blank\n", b"what -> that\nwho -> them\n", b"a\tb\nc\td\n"],
            m.lines_and_bytes,
        ),
    }
    found = []
    for suffix, (seeds, change) in spelt.items():
        name = f"rows.{suffix}"
        made = functools.partial(lambda name, seeds: [{name: seed, "section": b"0"} for seed in seeds], name, seeds)
        found.append(Target(f"data: .{suffix}", made, _change_rows(name, change), _rows(name)))
    packed = functools.partial(_packed_seeds, {suffix: seeds[0] for suffix, (seeds, _) in spelt.items()})
    return [
        *found,
        Target("data: .parquet", _parquet_seeds, _change_rows("rows.parquet", _change_parquet), _rows("rows.parquet")),
        Target("data: .gz", packed, _change_packed, _rows("rows.")),
    ]


def _parquet(table: Any, **how: Any) -> bytes:
    import io

    import pyarrow.parquet

    held = io.BytesIO()
    pyarrow.parquet.write_table(table, held, **how)
    return held.getvalue()


def _parquet_seeds() -> list[Case]:
    import pyarrow as pa

    found = [
        _parquet(pa.Table.from_pylist(rows), compression=how)
        for rows, how in zip(ROWS, ("none", "snappy", "zstd", "gzip"), strict=True)
    ]
    return [{"rows.parquet": content, "section": b"0"} for content in found]


def _change_parquet(rng: random.Random, content: bytes) -> bytes:
    """A file with bytes changed, in its pages or its footer; or a whole one, of columns that nobody wrote."""
    import pyarrow as pa

    kind = rng.random()
    if kind < 0.25:
        return m.lines_and_bytes(rng, content)
    if kind < 0.5:
        cut = max(0, len(content) - 600)
        return content[:cut] + m.lines_and_bytes(rng, content[cut:])
    count = rng.choice((0, 1, 3, 3, 3, 40))
    names = rng.sample(("prompt", "completion", "text", "label", "messages", "domain", "a", "b"), rng.choice((1, 2, 3)))
    if rng.random() < 0.3:
        names[0] = rng.choice((names[-1], rng.choice(m.TEXTS).encode("utf-8", "replace").decode()))
    try:
        table = pa.Table.from_arrays([_odd_column(rng, count) for _ in names], names=names)
        how = {
            "compression": rng.choice(("none", "snappy", "gzip", "zstd", "brotli")),
            "use_dictionary": rng.random() < 0.5,
        }
        return _parquet(table, row_group_size=rng.choice((1, 2, 100)), **how)
    except (pa.ArrowException, ValueError, TypeError, OverflowError, AttributeError):  # what no file can hold
        return m.lines_and_bytes(rng, content)


def _odd_column(rng: random.Random, count: int) -> Any:
    """A column of a type and of values that rows do not have."""
    import pyarrow as pa

    def texts() -> list[str | None]:
        return [
            rng.choice((None, rng.choice(m.TEXTS).encode("utf-8", "replace").decode(), "a b")) for _ in range(count)
        ]

    turns = [
        [{"role": rng.choice(("user", "assistant", "x", None)), "content": text}] * rng.choice((0, 1, 2))
        for text in texts()
    ]
    made: list[Callable[[], Any]] = [
        lambda: pa.array(texts(), rng.choice((pa.string(), pa.large_string()))),
        lambda: pa.array([rng.choice((b"\xff", b"a\xc3\x28", b"x")) for _ in range(count)], pa.binary()).view(pa.string()),
        lambda: pa.array([rng.randbytes(4) for _ in range(count)], rng.choice((pa.binary(), pa.binary(4)))),
        lambda: pa.array([rng.choice((0, 1, -1, None, 2**31, 2**63 - 1)) for _ in range(count)], pa.int64()),
        lambda: pa.array([rng.choice((0, 1, 2**64 - 1)) for _ in range(count)], pa.uint64()),
        lambda: pa.array([rng.choice((0.5, float("nan"), float("inf"), None)) for _ in range(count)], rng.choice((pa.float64(), pa.float32()))),
        lambda: pa.array([rng.choice((True, False, None)) for _ in range(count)]),
        lambda: pa.nulls(count),
        lambda: pa.array(turns),
        lambda: pa.array([[text] for text in texts()], pa.list_(pa.string())),
        lambda: pa.array([{"role": text, "content": {"text": text}} for text in texts()]),
        lambda: pa.array([[(text or "", 1)] for text in texts()], pa.map_(pa.string(), pa.int64())),
        lambda: pa.array(texts()).dictionary_encode(),
        lambda: pa.array([rng.choice((0, -(2**63), 2**62)) for _ in range(count)], pa.timestamp(rng.choice(("s", "ms", "us", "ns")), rng.choice((None, "UTC", "No/Where")))),
        lambda: pa.array([rng.choice((0, 2**31 - 1, -(2**31))) for _ in range(count)], pa.date32()),
        lambda: pa.array([rng.choice((0, 86_399_999_999)) for _ in range(count)], pa.time64("us")),
        lambda: pa.array([rng.choice((0, 2**62)) for _ in range(count)], pa.duration("s")),
        lambda: pa.array([1] * count, pa.int64()).cast(pa.decimal128(30, 5)),
        lambda: pa.array([[[[text]]] for text in texts()]),
    ]  # fmt: skip
    return rng.choice(made)()


def _packed_seeds(spelt: dict[str, bytes]) -> list[Case]:
    import gzip

    import pyarrow as pa

    every = {**spelt, "parquet": _parquet(pa.Table.from_pylist(ROWS[0]))}
    return [{f"rows.{suffix}.gz": gzip.compress(text, mtime=0), "section": b"0"} for suffix, text in every.items()]


def _change_packed(rng: random.Random, case: Case) -> Case:
    """Other rows in a whole file, several files in one, or a damaged one."""
    import gzip

    name = next(name for name in case if name.startswith("rows."))
    content: bytes = case[name]  # type: ignore[assignment]
    kind = rng.random()
    if kind < 0.1:
        return {**case, "section": str(rng.randrange(len(SECTIONS))).encode()}
    if kind < 0.15:
        other = rng.choice(
            ("rows.jsonl.gz", "rows.txt.gz", "rows.parquet.gz", "rows.json.gz", "rows.x.gz", "rows.jsonl.gz.gz")
        )
        return {**{key: value for key, value in case.items() if key != name}, other: content}
    if kind < 0.55:
        return {**case, name: m.lines_and_bytes(rng, content)}
    try:
        inner = gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        return {**case, name: m.change_bytes(rng, content)}
    changes: dict[str, m.Mutate] = {"jsonl": m.json_lines, "json": m.json_file, "parquet": _change_parquet}
    made = changes.get(name.split(".")[1], m.lines_and_bytes)(rng, inner)
    packed = gzip.compress(made, rng.choice((0, 6)), mtime=0)
    if kind > 0.95:
        packed += rng.choice((gzip.compress(made, mtime=0), b"\0" * 9, b"x", packed[:15]))
    return {**case, name: packed}


@functools.cache
def _saved() -> list[Case]:
    """Datasets as `save_to_disk` writes them: one split, two of them, and one with classes."""
    import tempfile

    import datasets

    plain = datasets.Dataset.from_list(ROWS[0])
    labelled = datasets.Dataset.from_list(ROWS[1]).cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    found = []
    for made in (plain, datasets.DatasetDict({"train": plain, "test": plain}), labelled):
        with tempfile.TemporaryDirectory(prefix="weft-fuzz-") as top:
            made.save_to_disk(f"{top}/saved")
            found.append({str(p.relative_to(top)): p.read_bytes() for p in sorted(Path(top).rglob("*")) if p.is_file()})
    return found


def _change_saved(rng: random.Random, case: Case) -> Case:
    name = rng.choice([name for name in case if isinstance(case[name], bytes)])
    kind = rng.random()
    if kind < 0.05:
        return {key: value for key, value in case.items() if key != name} or case
    if name.endswith(".arrow"):
        return {**case, name: m.change_bytes(rng, case[name])}  # type: ignore[arg-type]
    return {**case, name: m.json_file(rng, case[name])}  # type: ignore[arg-type]


def _saved_dataset(folder: Path, case: Case) -> None:
    from weftlora.data import DataConfig
    from weftlora.data.examples import examples, find_columns
    from weftlora.data.read import Blocks, read

    config = DataConfig.parse(str(folder / "saved"))
    source = read(folder / "saved", config, Blocks(lambda lines: [len(line) for line in lines], 60))
    for each in (source, *source.parts.values()):
        _refused_or_not(lambda each=each: examples(each, find_columns(each, config)))  # type: ignore[misc]


# ---------------------------------------------------------------------- chat templates

TEMPLATES = [
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[INST] ' + m['content'] | trim + ' [/INST]' if m.role == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}",
    "{% set ns = namespace(x=0) %}{%- for m in messages -%}{% set ns.x = ns.x + 1 %}{{ m.role | upper ~ ': ' ~ m.content | replace('a', 'b') }}\n"
    "{%- endfor -%}{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    "{% macro say(m) %}{{ m.role }}: {{ m.content }}\n{% endmacro %}{% for m in messages %}{{ say(m) }}{% endfor %}",
]
JINJA = [
    *(b"{{ ", b" }}", b"{% ", b" %}", b"{# ", b" #}", b"{% endfor %}", b"{% endif %}", b"{% raw %}", b"{{ messages }}", b"{{ x.y.z }}", b"{{ 1/0 }}"),
    *(b"{{ ''.__class__.__mro__ }}", b"{{ messages.__class__ }}", b"{{ cycler.__init__.__globals__.os.popen('x') }}", b"{{ self }}", b"{{ raise_exception(1) }}"),
    *(b"{% include 'x' %}", b"{% import 'x' as y %}", b"{% extends 'x' %}", b"{{ messages[9] }}", b"{{ messages[0]['nothing'] + 1 }}", b"{{ 'a' * 999 }}"),
    *(b"{{ none }}", b"{{ messages|tojson }}", b"{{ '%s' % 3 }}", b"{{ '{0.__class__}'.format(1) }}", b"{% break %}", b"{{ strftime_now(1) }}", b"{{ 9**9**3 }}"),
    *(b"{% set messages = 3 %}", b"{{ messages|sort }}", b"{{ 'a'|int + [] }}", b"{{ {}[[]] }}", b"{{ messages.append(1) }}", b"{{ loop.index }}", b"{{ undefined.x() }}"),
    *(b"{{ '\\x1b[31m' }}", b"{{ raise_exception('\\x1b[31m[/b]') }}", b"{{ raise_exception('x' * 99999) }}", b"{{ say(3) }}", b"{{ 'a'.encode() }}", b"{{ [1]|map('x')|list }}"),
]  # fmt: skip
TALKS = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [{"role": "system", "content": "s"}, *({"role": role, "content": role} for role in ("user", "assistant") * 2)],
    [{"role": "assistant", "content": ""}],
]


def _template(folder: Path, case: Case) -> None:
    from weftlora.data.encode import Frame, chat, encode_prompt
    from weftlora.data.examples import Example

    tokenizer = _tokenizer()
    tokenizer.chat_template = case["template"].decode("utf-8", "replace")  # type: ignore[union-attr]
    for talk in TALKS:
        row = Example("", talk[-1]["content"], None, 3, tuple(talk), file="rows.jsonl")
        _refused_or_not(lambda row=row: chat(Frame.of(tokenizer), 64, "completion")([row]))  # type: ignore[misc]
    encode_prompt(tokenizer, TALKS[0])


# ---------------------------------------------------------------------- all of them


def _yaml(texts: list[str]) -> Callable[[], list[Case]]:
    return lambda: [{"recipe.yaml": text.encode()} for text in texts]


def readers() -> list[Target]:
    """Every reader, in the order of a recipe's life."""
    return [
        Target("recipes", _yaml(RECIPES), one_file(m.yaml_file), _recipe),
        Target(
            "overrides",
            lambda: [{"overrides": json.dumps(o).encode()} for o in OVERRIDES],
            _change_overrides,
            _overrides,
        ),
        Target("comparison recipes", _yaml(COMPARISONS), one_file(m.yaml_file), _comparison_recipe),
        *_row_targets(),
        Target("data: saved datasets", _saved, _change_saved, _saved_dataset),
        Target(
            "chat templates",
            lambda: [{"template": text.encode()} for text in TEMPLATES],
            one_file(lambda rng, text: m.change_bytes(rng, text, JINJA)),
            _template,
            not_promised=("a hang at data/encode.py:render",),  # a template is a program, and may loop
        ),
        Target(
            "run.json",
            lambda: [
                {"run.json": folders()[f"{name}/run.json"]} for name in ("alora", "flexora", "comparison/runs/lora/s0")
            ],
            one_file(m.json_file),
            _run_record,
            base=lambda: {"metrics.jsonl": folders()["alora/metrics.jsonl"]},
        ),
        Target(
            "metrics",
            lambda: [{"metrics.jsonl": below("alora")["metrics.jsonl"]}],
            _change_metrics,
            _metrics,
            base=lambda: {"run.json": below("comparison/runs/lora/s0")["run.json"]},
        ),
        Target(
            "events",
            lambda: [{"events.jsonl": below("alora")["events.jsonl"]}],
            one_file(m.json_lines),
            _events,
            base=lambda: {**_run_folder(), **{f"adapter/{name}": text for name, text in adapters()["alora"].items()}},
        ),
        Target(
            "samples",
            lambda: [{"samples.jsonl": _as_jsonl(SAMPLES)}],
            one_file(m.json_lines),
            _samples,
            base=lambda: {"run.json": below("comparison/runs/lora/s0")["run.json"]},
        ),
        Target("prompts", _prompt_seeds, one_file(m.json_file), _prompts),
        Target("checkpoints", lambda: [_checkpoint_case()], _change_checkpoints, _checkpoints, base=_run_folder),
        Target(
            "selections",
            lambda: [{"selection.json": below("flexora")["selection.json"]}],
            one_file(m.json_file),
            _selection,
        ),
        Target("states of a search", _states, _change_state, _state),
        Target(
            "comparisons",
            lambda: [{"compare.json": below("comparison")["compare.json"]}],
            _change_comparison,
            _comparison,
            base=_comparison_folder,
        ),
        Target("adapter configs", _adapter_seeds, one_file(m.json_file, "adapter_config.json"), _adapter),
        Target(
            "safetensors headers", _adapter_seeds, one_file(m.safetensors_header, "adapter_model.safetensors"), _adapter
        ),
        Target(
            "safetensors tensors",
            _adapter_seeds,
            one_file(m.safetensors_tensors, "adapter_model.safetensors"),
            _adapter,
        ),
        Target("adapters of released code", _released, _change_released, _released_adapter),
        Target("weights of a base", _weights, _change_weights, _base_weights),
        Target("GGUF headers", _gguf_files, one_file(m.gguf_header), _gguf),
        Target("kept decompositions", _decompositions, _change_decomposition, _decomposition),
        Target("kept rows", _kept, _change_kept, _kept_rows),
        Target(
            "the precision that was measured",
            lambda: [{"precision.json": json.dumps({"gain": 1.4, "cpu": "x", "torch": "2", "threads": "1"}).encode()}],
            one_file(m.json_file),
            _gain,
        ),
    ]
