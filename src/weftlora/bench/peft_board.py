"""Our methods as experiments of the method comparison in peft's repository, and that comparison run on them.

    experiments/METHOD/NAME/adapter_config.json    what the comparison reads, a folder per experiment
    results/METHOD--NAME.json                      a run of the full protocol, in the shape of the board's results
    reduced/METHOD--NAME.json                      a run of anything less: the same shape, with what is less under "reduced"
    full.sh                                        every experiment under the full protocol, a process each, for a GPU

    forgetting = loss per token of text that nobody trained on, after the training − before it

The board's own run.py reads the experiments too, where `import weftlora` comes before it; ALoRA scores rank slots on the validation
rows and Flexora searches on them, which that script has no place for, and this module has. Accuracy is the board's: the number after
the last marker of an answer, of a greedy continuation. The loss of solution tokens stands beside it, and is the only score of the
reduced form, in which "test accuracy" is null: no reader can rank such a row among the board's.
"""

from __future__ import annotations

import copy
import gc
import itertools
import math
import os
import platform
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import GenerationConfig, get_cosine_schedule_with_warmup, set_seed

from weftlora.adapter.spec import WeftConfig
from weftlora.bench.rounds import torch_threads
from weftlora.data.paths import resolve_path
from weftlora.disk.files import read_json, read_lines, write_json, write_text
from weftlora.errors import ConfigError, DataError, RunError, suggest
from weftlora.extras import needs
from weftlora.host.attach import attach
from weftlora.progress import Progress, Tick, ignore
from weftlora.recipes import RECIPES
from weftlora.records import NUMBER, Record, check_kinds
from weftlora.runs.base_model import Base, Wanted, find, load
from weftlora.search import search_layers
from weftlora.settings import IGNORE
from weftlora.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Form = Literal["full", "reduced"]


@dataclass(frozen=True)
class Protocol:
    """What the board calls a train config, under its names."""

    model_id: str = "meta-llama/Llama-3.2-3B"
    dtype: str = "bfloat16"
    max_seq_length: int = 768
    batch_size: int = 4
    batch_size_eval: int = 50
    max_steps: int = 5000
    eval_steps: int = 250
    compile: bool = False
    query_template: str = "Question: {query} Think step by step.\nAnswer:"
    seed: int = 0
    grad_norm_clip: float = 1.0
    optimizer_type: str = "AdamW"
    optimizer_kwargs: dict[str, float] = field(default_factory=lambda: {"lr": 1e-4, "weight_decay": 0.1})
    lr_scheduler: str = "cosine"
    use_amp: bool = False
    autocast_adapter_dtype: bool = True
    generation_kwargs: dict[str, int] = field(default_factory=lambda: {"max_length": 800, "max_new_tokens": 300})
    attn_implementation: str | None = None


@dataclass(frozen=True)
class Rows:
    """Where rows are, and how many are taken. A file of JSON lines, or a data set of the hub as NAME or NAME:CONFIG."""

    train: str = "meta-math/MetaMathQA"
    validation: str = "openai/gsm8k:main"
    validation_rows: int = 50
    test: str = "openai/gsm8k:main"
    test_rows: int | None = None
    texts: str = "HuggingFaceFW/finewiki"
    text_rows: int = 100


GSM8K, TALES = "${WEFT_DATA}/tasks/gsm8k/", "${WEFT_DATA}/tasks/fairytaleqa/"
FORMS: dict[str, tuple[Protocol, Rows]] = {
    "full": (Protocol(), Rows()),
    "reduced": (
        Protocol(
            model_id="smollm2", max_seq_length=192, batch_size_eval=4, max_steps=12, eval_steps=12,
            optimizer_kwargs={"lr": 1e-3, "weight_decay": 0.1}, generation_kwargs={},
        ),
        Rows(
            f"{GSM8K}train.jsonl", f"{GSM8K}train.jsonl", 8, f"{GSM8K}test.jsonl", 16, f"{TALES}stories.test.jsonl", 8,
        ),
    ),
}  # fmt: skip
"""Form → its settings and rows. The reduced one generates no answers, which takes minutes on a CPU."""

CHARACTERS, BUCKET, WARMUP, PASSAGE = 1300, 20, 0.1, 768
"""Of the protocol: rows up to this length, batches that are sorted by length together, share of warm-up, tokens of a text."""
ANSWERS = ("The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ")
"""What stands before the number of an answer, the first of these that an answer has."""


def experiments(protocol: Protocol, validation_rows: int) -> dict[str, WeftConfig]:
    """Every method as the board's LoRA of rank 32 is: on q and v, α = 2 r (Tied-LoRA: α = r). Times fit the number of steps.

    HydraLoRA has half the rank, and with its three heads about as many trainable parameters. Experiment name → config.
    """
    slug = re.sub(r"[^\w.-]+", "-", Path(protocol.model_id).name)
    slug = {"Llama-3.2-3B": "llama-3.2-3B"}.get(slug, slug)
    steps = protocol.max_steps
    after = max(steps // 50, min(8, steps // 3), 1)
    rows = min(32, validation_rows)
    own: dict[str, dict[str, Any]] = {
        "lora": {},
        "hydralora": {"r": 16},
        "tied_lora": {"lora_alpha": 32},
        "lora_dash": {"after": after},
        "lora_init": {"after": after},
        "lora_tsd": {"after": after},
        "alora": {"rows": rows, "max_rounds": max(1, min(8, steps // 3))},
        "flexora": {"steps": max(1, steps // 8), "val_size": validation_rows, "outer_batches": 2},
    }
    found: dict[str, WeftConfig] = {}
    for method, fields in own.items():
        r = fields.pop("r", 32)
        usual = {"r": r, "lora_alpha": 2 * r, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        config = RECIPES[method](**{**usual, **fields})
        found[f"weft_{method}/{slug}-rank{r}"] = cast(WeftConfig, config)
    return found


# ---------------------------------------------------------------------- the call


@dataclass(frozen=True)
class Experiment:
    """What one experiment came to; all None where it was only written."""

    name: str
    trainable: int | None = None
    train_loss: float | None = None
    accuracy: float | None = None
    loss: float | None = None
    """Per token of the test rows' solutions."""
    loss_before: float | None = None
    forgetting: float | None = None
    file_bytes: int | None = None
    seconds: float | None = None
    failed: str | None = None


@dataclass(frozen=True)
class PeftBoard(Record):
    """The experiments in a folder, and what the runs of one form of them came to."""

    command: str
    folder: str
    form: str | None
    less: dict[str, Any]
    """In what a run is less than the full protocol: field → its value here. Empty for the full one."""
    experiments: list[Experiment]


def peft(
    folder: str | Path,
    *,
    run: Form | None = None,
    only: Sequence[str] = (),
    model: str | None = None,
    scale: float = 1.0,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
    texts: str | None = None,
    seed: int = 0,
    threads: int = 1,
    progress: Progress = ignore,
) -> PeftBoard:
    """Write our methods as experiments of peft's method comparison; with `run`, train and measure them as it does.

    What has a result already is passed over, so that a run that was stopped goes on. One that fails leaves its result too, with
    the status "canceled", and the others are run.

    Args:
        folder: where experiments and results go.
        run: "full", the board's protocol (a GPU; hours); "reduced", SmolLM2 on GSM8K's solutions, 12 steps (a CPU).
        only: methods, such as "hydralora"; all without.
        model: another base: a folder, a GGUF file, a hub id.
        scale: share of the steps, of the rows that are evaluated and of an answer's tokens; 1 is the form's.
        train, validation, test, texts: other rows: files of JSON lines with query and response (or question and answer), and with
            text; or data sets of the hub.
        seed: of the adapter's start and the order of the search.
        threads: torch's intra-op threads.
        progress: called with a `Tick` after every step.

    Raises:
        ConfigError: no such form or method, or a scale that is none.
        DataError: rows that cannot be read.
        ModelError: no such base.
        RunError: the folder cannot be written.
    """
    if run is not None and run not in FORMS:
        raise ConfigError(f"run={run!r} is not a form of the comparison: {suggest(run, FORMS)}")
    if not 0 < scale <= 1:
        raise ConfigError(f"scale={scale} is not a share of the protocol: use a number up to 1, such as 0.01.")
    protocol, rows = FORMS[run or "full"]
    protocol = replace(protocol, seed=seed, model_id=model or protocol.model_id)
    given: dict[str, Any] = {"train": train, "validation": validation, "test": test, "texts": texts}
    rows = replace(rows, **{name: value for name, value in given.items() if value})
    if scale < 1:
        protocol, rows = _scaled(protocol, rows, scale)
    place = Path(folder)
    chosen = _chosen(experiments(protocol, rows.validation_rows), only)
    for name, config in chosen.items():
        _write_experiment(place / "experiments" / name, config, protocol)
    if not (place / "full.sh").exists():
        write_text(place / "full.sh", SCRIPT)
    less = _less(protocol, rows)
    words = [f"--{name.replace('_', '-')} {value}" for name, value in {"model": model, **given}.items() if value]
    words += [f"--only {each}" for each in only] + ([f"--scale {scale:g}"] if scale < 1 else [])
    words = [f"--run {run}", *words] if run else words
    command = " ".join(["weftlora bench peft", str(folder), *words])
    done = [Experiment(name) for name in chosen]
    if run is not None:
        with torch_threads(threads):
            done = _run_all(place, chosen, protocol, rows, less, progress)
    return PeftBoard(command, str(folder), run, less if run else {}, done)


def _scaled(protocol: Protocol, rows: Rows, scale: float) -> tuple[Protocol, Rows]:
    """So much of a protocol, of each part at least one."""

    def part(count: int) -> int:
        return max(1, round(scale * count))

    steps = part(protocol.max_steps)
    tested = part(rows.test_rows or 1319)  # of GSM8K
    answers = protocol.generation_kwargs
    if answers:
        answers = {**answers, "max_new_tokens": max(16, part(answers["max_new_tokens"]))}
    protocol = replace(protocol, max_steps=steps, eval_steps=max(1, steps // 2), generation_kwargs=answers)
    held = max(2, part(rows.validation_rows))
    return protocol, replace(rows, validation_rows=held, test_rows=tested, text_rows=part(rows.text_rows))


def _chosen(every: dict[str, WeftConfig], only: Sequence[str]) -> dict[str, WeftConfig]:
    methods = {name.partition("/")[0].removeprefix("weft_"): name for name in every}
    for name in only:
        if name not in methods:
            raise ConfigError(f"there is no experiment for the method {name!r}: {suggest(name, methods)}")
    return {methods[name]: every[methods[name]] for name in only or methods}


def _write_experiment(folder: Path, config: WeftConfig, protocol: Protocol) -> None:
    """The two files of an experiment. Raises RunError where another is there."""
    usual = asdict(Protocol())
    training = {key: value for key, value in asdict(protocol).items() if value != usual[key]}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("adapter_config.json", config.to_dict()), ("training_params.json", training)):
        file = folder / name
        there = read_json(file) if file.exists() else content
        keys = sorted(key for key in {*there, *content} - {"weft_version"} if there.get(key) != content.get(key))
        if keys:
            raise RunError(
                f"{file} is of another experiment (its {keys[0]} differs): take another folder, or delete it."
            )
        if not file.exists():
            write_json(file, content)


def _less(protocol: Protocol, rows: Rows) -> dict[str, Any]:
    full: dict[str, Any] = {**asdict(Protocol(seed=protocol.seed)), **asdict(Rows())}
    return {key: value for key, value in {**asdict(protocol), **asdict(rows)}.items() if value != full[key]}


SCRIPT = """#!/bin/sh
# Every experiment under the full protocol, one process after the other, on a GPU and with a connection to the hub (the base asks
# for its licence to be accepted there). What has a result is passed over: start it again to go on. Options, such as --model FOLDER
# or --scale 0.01, are handed on.
cd "$(dirname "$0")" || exit 1
for method in lora hydralora tied_lora lora_dash lora_init lora_tsd alora flexora; do
  weftlora bench peft . --run full --only "$method" "$@" || exit
done
"""


# ---------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Tokens:
    """The rows of a comparison as token ids."""

    train: list[list[int]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    texts: list[list[int]]


def _run_all(
    place: Path,
    chosen: dict[str, WeftConfig],
    protocol: Protocol,
    rows: Rows,
    less: dict[str, Any],
    progress: Progress,
) -> list[Experiment]:
    results = place / ("reduced" if less else "results")
    results.mkdir(parents=True, exist_ok=True)
    files = {name: results / (name.replace("/", "--") + ".json") for name in chosen}
    if any(not file.exists() for file in files.values()):
        base = find(Wanted(protocol.model_id, protocol.dtype, "causal", protocol.attn_implementation), Path.cwd())
        tokens = _tokens(base.tokenizer, protocol, rows)
        for name, file in files.items():
            if not file.exists():
                content = _one(name, chosen[name], base, protocol, tokens, progress)
                if less:
                    content = {"reduced": {"note": "not a row of the board", **less}, **content}
                check_result(content, file)
                write_json(file, content)
    return [_experiment(read_json(file), file) for file in files.values()]


def _experiment(content: dict[str, Any], file: Path) -> Experiment:
    check_result(content, file)
    told, trained = content["run_info"], content["train_info"]
    if trained["status"] != "success":
        return Experiment(told["experiment_name"], failed=told["error_msg"])
    last = trained["metrics"][-1]
    return Experiment(
        told["experiment_name"],
        trained["num_trainable_params"],
        last["train loss"],
        last["test accuracy"],
        last["test loss"],
        last["test loss before"],
        last["forgetting"],
        trained["file_size"],
        told["total_time"],
    )


def check_result(content: dict[str, Any], file: Path) -> None:
    """Refuse a result that the board's reader would not take, or that it could take for more than it is.

    Raises:
        RunError: names the file and what is wrong in it.
    """
    whole: dict[str, Any] = {
        **{f"run_info.{name}": str for name in ("created_at", "experiment_name", "peft_branch", "error_msg")},
        "run_info.total_time": NUMBER,
        "run_info.train_config.model_id": str,
        "run_info.peft_config.peft_type": str,
        **{f"train_info.accelerator_memory_{name}": int for name in ("reserved_avg", "max", "reserved_99th")},
        "train_info.train_time": NUMBER,
        "train_info.file_size": int,
        "train_info.num_trainable_params": int,
        "train_info.num_total_params": int,
        "train_info.status": str,
        "train_info.metrics": list,
        **{f"meta_info.package_info.{name}-version": (str, type(None)) for name in PACKAGES},
        "meta_info.system_info": dict,
    }
    check_kinds(content, whole, file, needed=True)
    if content["train_info"]["status"] != "success":
        return
    last = content["train_info"]["metrics"][-1] if content["train_info"]["metrics"] else {}
    numbers: dict[str, Any] = {"train loss": NUMBER, "train samples": int, "train total tokens": int}
    numbers |= dict.fromkeys(("forgetting", "test loss", "test loss before"), NUMBER)
    check_kinds(last, {**numbers, "test accuracy": (*NUMBER, type(None))}, file, needed=True)
    if last["test accuracy"] is None and not content.get("reduced"):
        raise RunError(f"{file} is damaged: it has no accuracy and is not marked as reduced.")


PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def _one(
    name: str, config: WeftConfig, base: Base, protocol: Protocol, tokens: Tokens, progress: Progress
) -> dict[str, Any]:
    """One experiment, from the base to its result."""
    began, created = time.perf_counter(), datetime.now(UTC).replace(microsecond=0).isoformat()
    set_seed(protocol.seed)
    job = _Job(name, config, base, protocol, tokens, progress)
    status, said = "success", ""
    try:
        job.run()
    except (KeyboardInterrupt, SystemExit):
        raise
    except Exception as error:
        status, said = "canceled", f"{type(error).__name__}: {error}"
    asked = {**job.config.to_dict(), "base_model_name_or_path": protocol.model_id}
    return {
        "run_info": {
            "created_at": created,
            "total_time": time.perf_counter() - began,
            "experiment_name": name,
            "peft_branch": f"weftlora {__version__}",
            "train_config": asdict(protocol),
            "peft_config": asked,
            "error_msg": said,
        },
        "train_info": {**job.measured(), "status": status, "metrics": job.metrics},
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {},
            "package_info": {f"{each}-version": _version(each) for each in PACKAGES},
            "system_info": {
                **{key: getattr(platform, key)() for key in ("system", "release", "version", "machine", "processor")},
                "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
            },
            "pytorch_info": torch.__config__.show(),
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class _Job:
    """One experiment while it runs."""

    def __init__(
        self, name: str, config: WeftConfig, base: Base, protocol: Protocol, tokens: Tokens, progress: Progress
    ) -> None:
        self.name, self.config, self.base, self.protocol, self.tokens = name, config, base, protocol, tokens
        self.progress = progress
        self.metrics: list[dict[str, Any]] = []
        self.reserved: list[int] = []
        self.train_seconds = 0.0
        self.sizes = {"num_trainable_params": 0, "num_total_params": 0, "file_size": 0}
        self.pad = int(cast(int, base.tokenizer.pad_token_id))

    def run(self) -> None:
        """Measure the base, search where layers are searched, train, measure again."""
        p, device = self.protocol, torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        bare: nn.Module = load(self.base, "causal").to(cast(Any, device))
        before = self._text_loss(bare), self._test_loss(bare)
        if self.config.layers.search is not None:
            found = search_layers(
                bare,
                self._training_rows(),
                self.tokens.validation,
                config=self.config,
                collate=self._batch,
                lr=p.optimizer_kwargs["lr"],
                batch_size=p.batch_size,
                accumulation=1,
                seed=p.seed,
            )
            self.config = copy.deepcopy(self.config)
            self.config.layers = found.layers
        model = get_peft_model(
            cast(Any, bare), self.config, adapter_name="default", autocast_adapter_dtype=p.autocast_adapter_dtype
        )
        assert isinstance(model, PeftModel)
        trained, total = model.get_nb_trainable_parameters()
        self.sizes |= {"num_trainable_params": int(trained), "num_total_params": int(total)}
        attach(
            model,
            total_steps=p.max_steps,
            validation=self.tokens.validation if self.config.ranks.needs_data else None,
            tokens_per_step=p.batch_size * sum(map(len, self.tokens.train)) / len(self.tokens.train),
        )
        self._train(model)
        self.sizes["file_size"] = _size_of(model)
        model.eval()
        last = self.metrics.pop()
        self.metrics += [last] if "valid accuracy" in last else []
        self.metrics.append(
            {
                **{k: last[k] for k in ("step", "train loss", "train samples", "train total tokens")},
                "test accuracy": self._accuracy(model, self.tokens.test) if p.generation_kwargs else None,
                "test loss": self._test_loss(model),
                "test loss before": before[1],
                "forgetting": self._text_loss(model) - before[0],
            }
        )

    def measured(self) -> dict[str, Any]:
        """Sizes, times and memory of the accelerator; a CPU has none."""
        cuda = torch.cuda.is_available()
        ordered = sorted(self.reserved) or [0]
        return {
            "accelerator_memory_reserved_avg": int(sum(ordered) / len(ordered)),
            "accelerator_memory_max": int(torch.cuda.max_memory_reserved()) if cuda else 0,
            "accelerator_memory_reserved_99th": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
            "train_time": self.train_seconds,
            **self.sizes,
        }

    def _train(self, model: nn.Module) -> None:
        p = self.protocol
        optimizer = torch.optim.AdamW(
            [each for each in model.parameters() if each.requires_grad], **cast(Any, p.optimizer_kwargs)
        )
        rate = get_cosine_schedule_with_warmup(optimizer, int(WARMUP * p.max_steps), p.max_steps)
        losses: list[float] = []
        samples = tokens = 0
        model.train()
        batches = itertools.islice(_batches(self.tokens.train, p.batch_size), p.max_steps)
        for step, rows in enumerate(batches, 1):
            began = time.perf_counter()
            batch = self._batch([{"input_ids": row, "labels": row} for row in rows], model)
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            if p.grad_norm_clip:
                nn.utils.clip_grad_norm_(model.parameters(), p.grad_norm_clip)
            optimizer.step()
            rate.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise RunError(f"the loss of {self.name} is {losses[-1]} at step {step}: try a lower rate.")
            samples, tokens = samples + len(rows), tokens + sum(map(len, rows))
            if torch.cuda.is_available():
                self.reserved.append(torch.cuda.memory_reserved())
            self.train_seconds += time.perf_counter() - began
            self.progress(Tick(self.name, step, p.max_steps, losses[-1]))
            if step % p.eval_steps == 0 or step == p.max_steps:
                recent = losses[-p.eval_steps :]
                told = {"step": step, "train loss": sum(recent) / len(recent), "train samples": samples}
                if p.generation_kwargs and step % p.eval_steps == 0:
                    model.eval()
                    told["valid accuracy"] = self._accuracy(model, self.tokens.validation)
                    model.train()
                self.metrics.append({**told, "train total tokens": tokens})

    def _training_rows(self) -> list[dict[str, Any]]:
        """As many of them as a search goes over."""
        needed = self.protocol.batch_size * self.protocol.max_steps
        return [{"input_ids": row, "labels": row} for row in self.tokens.train[:needed]]

    def _batch(self, rows: Sequence[dict[str, Any]], model: nn.Module | None = None, left: bool = False) -> Any:
        """Rows of unequal lengths as one batch, where `model` is."""
        longest = max(len(row["input_ids"]) for row in rows)

        def padded(values: Sequence[int], filler: int) -> list[int]:
            more = [filler] * (longest - len(values))
            return [*more, *values] if left else [*values, *more]

        batch = {
            "input_ids": torch.tensor([padded(row["input_ids"], self.pad) for row in rows]),
            "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in rows]),
        }
        if all("labels" in row for row in rows):
            batch["labels"] = torch.tensor([padded(row["labels"], IGNORE) for row in rows])
        device = next(model.parameters()).device if model is not None else torch.device("cpu")
        return {key: value.to(device) for key, value in batch.items()}

    @torch.no_grad()
    def _loss(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> float:
        """The mean over all labelled tokens of `rows`."""
        was, total, count = model.training, 0.0, 0
        model.eval()
        for start in range(0, len(rows), self.protocol.batch_size):
            batch = self._batch(rows[start : start + self.protocol.batch_size], model)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += float(
                F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="sum")
            )
            count += int((labels != IGNORE).sum())
        model.train(was)
        return total / max(count, 1)

    def _text_loss(self, model: nn.Module) -> float:
        return self._loss(model, [{"input_ids": ids, "labels": ids} for ids in self.tokens.texts])

    def _test_loss(self, model: nn.Module) -> float:
        return self._loss(model, self.tokens.test)

    @torch.inference_mode()
    def _accuracy(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> float:
        """The share of greedy continuations that end in the right number."""
        p, tokenizer, right = self.protocol, self.base.tokenizer, 0
        for start in range(0, len(rows), p.batch_size_eval):
            part = rows[start : start + p.batch_size_eval]
            batch = self._batch([{"input_ids": row["prompt_ids"]} for row in part], model, left=True)
            width = batch["input_ids"].shape[1]
            longest = min(p.generation_kwargs["max_length"] - width, p.generation_kwargs["max_new_tokens"])
            config = GenerationConfig(
                max_new_tokens=longest, pad_token_id=self.pad, eos_token_id=tokenizer.eos_token_id
            )
            ids = cast(Any, model).generate(**batch, generation_config=config)
            said = cast("list[str]", tokenizer.batch_decode(ids, skip_special_tokens=True))
            right += sum(is_right(text, row["response"]) for text, row in zip(said, part, strict=True))
        return right / len(rows)


def _size_of(model: PeftModel) -> int:
    """Of the adapter's file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return os.stat(Path(folder) / "adapter_model.safetensors").st_size


def _batches(rows: Sequence[list[int]], size: int) -> Iterator[list[list[int]]]:
    """In the order of the data, for ever; of every 20 batches the longest rows first, so that little is padded."""
    while True:
        for start in range(0, len(rows), BUCKET * size):
            bucket = sorted(rows[start : start + BUCKET * size], key=len, reverse=True)
            for at in range(0, len(bucket), size):
                yield bucket[at : at + size]


# ---------------------------------------------------------------------- rows


def _tokens(tokenizer: PreTrainedTokenizerBase, protocol: Protocol, rows: Rows) -> Tokens:
    def encode(text: str, limit: int) -> list[int]:
        return cast("list[int]", tokenizer(text)["input_ids"])[:limit]

    def row(query: str, response: str) -> dict[str, Any]:
        prompt = encode(protocol.query_template.format(query=query), protocol.max_seq_length)
        ids = [*encode(protocol.query_template.format(query=query) + response, 10**6), tokenizer.eos_token_id]
        ids = ids[: protocol.max_seq_length]
        labels = [IGNORE] * min(len(prompt), len(ids)) + ids[len(prompt) :]
        return {"input_ids": ids, "labels": labels, "prompt_ids": prompt, "response": response}

    needed = protocol.max_steps * protocol.batch_size
    pairs = [pair for pair in _pairs(rows.train, "train") if sum(map(len, pair)) < CHARACTERS]
    held = pairs[-rows.validation_rows :] if rows.validation == rows.train else _pairs(rows.validation, "train")
    if rows.validation == rows.train:
        pairs = pairs[: -rows.validation_rows]
    if not pairs or not held:
        raise DataError(
            f"{rows.train} has no {rows.validation_rows + 1} rows of at most {CHARACTERS} characters: add some."
        )
    tested = _pairs(rows.test, "test")[: rows.test_rows]
    texts = [encode(text, min(PASSAGE, protocol.max_seq_length)) for text in _texts(rows.texts, rows.text_rows)]
    scored = [row(*pair) for pair in held[: rows.validation_rows]]
    return Tokens([row(*pair)["input_ids"] for pair in pairs[:needed]], scored, [row(*pair) for pair in tested], texts)


def _pairs(source: str, split: str) -> list[tuple[str, str]]:
    return [
        (_text_of(row, ("query", "question"), source), _text_of(row, ("response", "answer"), source))
        for row in _read(source, split)
    ]


def _texts(source: str, count: int) -> list[str]:
    return [_text_of(row, ("text",), source) for row in itertools.islice(_read(source, "train"), count)]


def _text_of(row: Any, names: tuple[str, ...], source: str) -> str:
    for name in names:
        if isinstance(value := row.get(name), str):
            return value
    raise DataError(f"a row of {source} has no {' or '.join(names)}: name rows that have it.")


def _read(source: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of JSON lines or of a data set of the hub."""
    if source.endswith(".jsonl"):
        path = resolve_path(source)
        if not path.is_file():
            raise DataError(
                f"there is no file {str(path)!r}: give another with --train, --validation, --test or --texts."
            )
        yield from read_lines(path)
        return
    with needs("train", "weftlora bench peft on rows of the hub"):
        import datasets
    name, _, config = source.partition(":")
    try:
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[:1]
        raise DataError(f"the data set {source} cannot be read ({''.join(said)}): give files instead.") from None


# ---------------------------------------------------------------------- answers


def number_in(text: str) -> Fraction | str | None:
    """What stands after the last marker of an answer: a number where it is one, its text where not; None without a marker.

    >>> number_in("2 + 2 is 4.\\n#### 4")
    Fraction(4, 1)
    """
    text = text.strip().rstrip(".!?")
    marker = next((each for each in ANSWERS if each in text), None)
    if marker is None:
        return None
    said = text.rpartition(marker)[2].strip().split("\n", 1)[0].strip(" .!?$%")
    try:
        return Fraction(said.replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        return said


def is_right(answer: str, solution: str) -> bool:
    """Whether both end in the same number."""
    expected = number_in(solution)
    return expected is not None and number_in(answer) == expected
