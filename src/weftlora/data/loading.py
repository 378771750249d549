"""A `data:` section into tokenised splits, with an account of every row that went in.

    read ─ rows ─ roles ─ examples ─┬─ carve ── train       ─ limit ─ encode ─ count
                                    └────────── validation  ─ limit ─ encode ─ count

Carving is deterministic and disjoint: each distinct row has a place in an order drawn from the seed and the row's own content, so
the split depends neither on the order of the file nor on Python's hash seed, and copies of a row always stand together.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from random import Random
from typing import TYPE_CHECKING, Any

from weftlora.data.config import DEMO, DataConfig, Format, Task
from weftlora.data.demo import demo_rows
from weftlora.data.encode import Encode, Encoded, Frame, causal, chat, classification, seq2seq, text
from weftlora.data.examples import Example, examples, find_columns, label_names
from weftlora.data.paths import resolve_path
from weftlora.data.read import Blocks, Row, Source, bad_row, read
from weftlora.errors import ConfigError, DataError, ModelError
from weftlora.settings import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def carve(keys: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training rows and of the validation rows, both in file order.

    Rows with equal keys are on the same side. Validation gets `round(fraction * len(keys))` rows, at least one; where
    groups of equal rows do not fit that number, it gets fewer, or the smallest group. Raises DataError without two
    different rows, since nothing would be left to train on.
    """
    groups: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    if len(groups) < 2:
        raise DataError(
            f"a validation split cannot be carved from {len(keys)} row(s), as it takes two that differ: "
            "give data.validation, or set data.validation_fraction: 0."
        )
    order = sorted(groups, key=lambda key: (_draw(seed, key), key))
    wanted = max(1, round(fraction * len(keys)))
    held: list[int] = []
    taken = 0
    for key in order:
        if len(held) + len(groups[key]) <= wanted and taken < len(groups) - 1:
            held += groups[key]
            taken += 1
    if not held:
        held = groups[min(order, key=lambda key: len(groups[key]))]
    chosen = set(held)
    return [index for index in range(len(keys)) if index not in chosen], sorted(chosen)


def _draw(seed: int, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()


def sample(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices 0 … count-1, drawn with `seed`, in order; all of them without a limit."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(Random(seed).sample(range(count), limit))


def repeats(keys: Sequence[Hashable]) -> int:
    """How many of `keys` have been seen before."""
    return len(keys) - len(set(keys))


@dataclass(frozen=True)
class Counts:
    """What became of the rows of one split: `read = unused + empty + dropped + kept`.

    `rows` are the dataset's rows: `kept`, or more where long documents of plain text became several. `unused` rows are
    beyond the limit, `empty` ones have no answer or no text (blank lines among them), `dropped` ones no answer within
    the length. Of the kept rows, `truncated` ones lost tokens and `repeated` ones are copies of an earlier row;
    `in_train` counts the rows of a given validation or test file that are copies of a training row. `tokens` are those
    of `input_ids`, `answer_tokens` those the loss is averaged over (0 for classification, which has one class a row).
    """

    read: int
    unused: int
    empty: int
    dropped: int
    kept: int
    rows: int
    truncated: int
    repeated: int
    in_train: int
    tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Split:
    """One split before encoding: its examples, the empty lines passed on the way, and how errors call it."""

    name: str
    rows: list[Example]
    blank: int = 0
    in_train: int = 0


def tally(split: Split, encode: Encode, limit: int | None, seed: int) -> tuple[Dataset, Counts]:
    """Draw, encode and count the rows of `split`. Raises DataError when none is left."""
    drawn = [split.rows[index] for index in sample(len(split.rows), limit, seed)]
    filled = [row for row in drawn if not row.empty]
    encoded = encode(filled)
    kept = [(row, parts) for row, parts in zip(filled, encoded, strict=True) if parts]
    flat = [(row, part) for row, parts in kept for part in parts]
    counts = Counts(
        read=len(split.rows) + split.blank,
        unused=len(split.rows) - len(drawn),
        empty=len(drawn) - len(filled) + split.blank,
        dropped=len(filled) - len(kept),
        kept=len(kept),
        rows=len(flat),
        truncated=sum(any(part.truncated for part in parts) for _, parts in kept),
        repeated=repeats([row.key() for row, _ in kept]),
        in_train=split.in_train,
        tokens=sum(len(part.input_ids) for _, part in flat),
        answer_tokens=sum(_answer_tokens(part) for _, part in flat),
    )
    if not flat:
        raise DataError(
            f"no row of {split.name} is left to use: of {counts.read}, {counts.empty} are empty and {counts.dropped} "
            "have no answer within data.max_length; raise it, or set data.truncate: completion."
        )
    return _dataset(flat), counts


def _answer_tokens(row: Encoded) -> int:
    """Labels of a decoder's first token bear no loss; those of a decoder that has its own input all do."""
    if isinstance(row.labels, int):
        return 0
    return sum(label != IGNORE for label in row.labels[row.shifted :])


def _dataset(flat: Sequence[tuple[Example, Encoded]]) -> Dataset:
    from datasets import Dataset

    columns: dict[str, list[Any]] = {
        "input_ids": [part.input_ids for _, part in flat],
        "attention_mask": [[1] * len(part.input_ids) for _, part in flat],
        "labels": [part.labels for _, part in flat],
    }
    if flat[0][1].prompt is not None:
        columns["prompt"] = [part.prompt for _, part in flat]
        columns["completion"] = [part.answer for _, part in flat]
    if flat[0][0].domain is not None:
        columns["domain"] = [row.domain for row, _ in flat]
    return Dataset.from_dict(columns)


TASKS: dict[Task, tuple[Format, ...]] = {
    "causal": ("prompt_completion", "chat", "text"),
    "seq2seq": ("prompt_completion",),
    "classification": ("classification",),
}
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Loaded:
    """Tokenised splits and the account of how they came about.

    Columns: `input_ids`, `attention_mask` and `labels` (lists of int; one int for classification), and where the format
    has them the raw `prompt`, `completion` and `domain`. `labels` are the class names by number, `domains` the names
    that occur, `hashes` the SHA-256 of each file read, `max_length` the length in tokens that rows were held to.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset | None
    task: Task
    format: Format
    labels: list[str] | None
    domains: list[str]
    counts: dict[str, Counts]
    hashes: dict[str, str]
    max_length: int


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    labels: Sequence[str] | None = None,
) -> Loaded:
    """Read, split and tokenise what `config` names.

    Args:
        base_dir: where relative paths start, the recipe file's folder; default the working folder.
        task: what the model does; by default `classification` for labelled text, else `causal`.
        labels: class names in the order of a model trained before; by default those of the training file.

    Validation rows are carved from the training rows when none are given (`validation_fraction`), deterministically and
    with no row on both sides. Everything is held in memory; no cache is written.

    Raises DataError on a missing file, a row that cannot be used (named by file and line) or a split with nothing left,
    ConfigError on settings that do not fit the data, ModelError on a tokenizer without what the format needs.
    """
    frame = Frame.of(tokenizer)
    max_length = _max_length(config, frame)
    sources = _sources(config, base_dir, Blocks(frame.lengths, max_length - len(frame.opened([]))))
    columns = find_columns(sources["train"], config, "classification" if task == "classification" else None)
    task = _task(task, columns.format)
    rows = {name: examples(source, columns) for name, source in sources.items()}
    names = _labels(rows, sources, labels) if task == "classification" else None
    limits = {"train": config.limit, "validation": config.validation_limit, "test": config.test_limit}
    done = {}
    for name, split in _splits(rows, sources, config).items():
        source = sources.get(name, sources["train"])
        encode = _encoder(task, columns.format, frame, max_length, config.truncate, source, names)
        done[name] = tally(split, encode, limits[name], config.seed)
    return Loaded(
        train=done["train"][0],
        validation=done["validation"][0] if "validation" in done else None,
        test=done["test"][0] if "test" in done else None,
        task=task,
        format=columns.format,
        labels=names,
        domains=sorted({row.domain for held in rows.values() for row in held if row.domain is not None}),
        counts={name: counts for name, (_, counts) in done.items()},
        hashes={file: digest for source in sources.values() for file, digest in source.hashes.items()},
        max_length=max_length,
    )


def texts(config: DataConfig, *, base_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """The training rows as text, without a tokenizer: prompt and answer, all messages, or the text without its label.

    Blocks of running text are cut at `max_length` words here, not tokens.

    Raises DataError and ConfigError as `load` does.
    """
    words = Blocks(lambda lines: [len(line.split()) for line in lines], config.max_length)
    source = _sources(config.model_copy(update={"validation": None, "test": None}), base_dir, words)["train"]
    columns = find_columns(source, config)
    held = examples(source, columns)
    if columns.format == "classification":
        return [row.prompt for row in held]
    if columns.format == "chat":
        return ["\n".join(message["content"] for message in row.messages) for row in held]
    return ["\n".join(filter(None, (row.prompt, row.answer))) for row in held]


def _max_length(config: DataConfig, frame: Frame) -> int:
    """The length rows are held to: the config's, but no more than the tokenizer says its model takes."""
    takes = frame.tokenizer.model_max_length or config.max_length
    if config.max_length > takes and "max_length" in config.model_fields_set:
        warnings.warn(
            f"data.max_length={config.max_length} is beyond the {takes} tokens of the model; {takes} is used.",
            stacklevel=3,
        )
    length = min(config.max_length, takes)
    if length < len(frame.prefix) + len(frame.suffix) + 2:
        raise ModelError(
            f"the tokenizer's model_max_length={takes} leaves no room for text: set it to the model's real length."
        )
    return length


def _sources(config: DataConfig, base_dir: str | os.PathLike[str] | None, blocks: Blocks) -> dict[str, Source]:
    """The source of each split that is given; a train source with further splits supplies those that are not."""
    sources = {}
    for split in SPLITS:
        written = getattr(config, split)
        if written == DEMO or (written is None and config.train == DEMO):
            sources[split] = _demo(split)
        elif written is not None:
            sources[split] = read(resolve_path(written, base_dir), config, blocks)
        elif split in sources["train"].parts:
            sources[split] = sources["train"].parts[split]
    return sources


def _demo(split: str) -> Source:
    rows = demo_rows(split)
    digest = sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    held = [Row(dict(row), number) for number, row in enumerate(rows, start=1)]
    return Source(f"demo {split}", held, {f"demo {split}": digest}, unit="row")


def _task(task: Task | None, form: Format) -> Task:
    if task is None:
        return "classification" if form == "classification" else "causal"
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}: use one of {', '.join(TASKS)}.")
    if form not in TASKS[task]:
        fit = next(other for other, forms in TASKS.items() if form in forms)
        raise ConfigError(
            f"data in format {form} does not fit the task {task}: set data.format to {' or '.join(TASKS[task])} "
            f"with its data.fields, or use a model for {fit}."
        )
    return task


def _labels(rows: dict[str, list[Example]], sources: dict[str, Source], known: Sequence[str] | None) -> list[str]:
    """The class names, from `known` or the training rows. Raises DataError on a row of another class."""
    names = list(known) if known is not None else label_names(rows["train"], sources["train"])
    valid = {*names, ""}
    for name, split in rows.items():
        for row in split:
            if row.answer not in valid:
                source = sources[name]
                whose = "the model's classes" if known is not None else "the classes of the training rows"
                raise bad_row(
                    source.name,
                    row.line,
                    f"label {row.answer!r} is not among {whose}, {', '.join(names)}.",
                    source.unit,
                )
    return names


def _splits(rows: dict[str, list[Example]], sources: dict[str, Source], config: DataConfig) -> dict[str, Split]:
    """The splits by name, in the order train, validation, test; validation carved where it is not given."""
    seen = {row.key() for row in rows["train"]}
    splits = {}
    for name, held in rows.items():
        copies = 0 if name == "train" else sum(row.key() in seen for row in held)
        if copies:
            warnings.warn(
                f"{copies} of the {len(held)} rows of {sources[name].name} are copies of training rows.", stacklevel=3
            )
        splits[name] = Split(sources[name].name, held, sources[name].blank, copies)
    if "validation" not in splits and config.validation_fraction > 0:
        splits |= _carved(splits["train"], config)
    return {name: splits[name] for name in SPLITS if name in splits}


def _carved(whole: Split, config: DataConfig) -> dict[str, Split]:
    """Training and validation split out of `whole`; its empty rows are no use to either and stay counted in training."""
    filled = [row for row in whole.rows if not row.empty]
    _, held = carve([row.key(config.split_on) for row in filled], config.validation_fraction, config.seed)
    validation = [filled[index] for index in held]
    out = {id(row) for row in validation}
    return {
        "train": replace(whole, rows=[row for row in whole.rows if id(row) not in out]),
        "validation": Split(f"the validation rows of {whole.name}", validation),
    }


def _encoder(
    task: Task,
    form: Format,
    frame: Frame,
    max_length: int,
    truncate: str,
    source: Source,
    names: Sequence[str] | None,
) -> Encode:
    if names is not None:
        return classification(frame, max_length, truncate, names)
    if task == "seq2seq":
        return seq2seq(frame, max_length, truncate)
    if form == "chat":
        return chat(frame, max_length, truncate, source.at)
    return text(frame, max_length) if form == "text" else causal(frame, max_length, truncate)
