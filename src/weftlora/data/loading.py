"""A `data:` section into tokenised splits, with an account of every row that went in.

    read ─ columns ─ look at every row ─┬─ carve ── train       ─ limit ─ encode ─ count
                                        └────────── validation  ─ limit ─ encode ─ count

Carving is deterministic and disjoint: each distinct row has a place in an order drawn from the seed and the row's own content, so
the split depends neither on the order of the file nor on Python's hash seed, and copies of a row always stand together.

Of a row that was looked at only numbers are kept. A large source is read a second time when its rows are encoded, in as many
processes as `data.processes` says, straight into a file that `datasets` maps into memory; what memory is needed does not grow with
the rows. That file stays in the user's cache folder (`weftlora.data.cache`).
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import warnings
from array import array
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from weftlora.data import cache
from weftlora.data.collate import packed
from weftlora.data.config import SPLITS, DataConfig, Format, Task
from weftlora.data.encode import Encode, Encoded, Frame, causal, chat, classification, seq2seq, text
from weftlora.data.examples import Example, example, label_names
from weftlora.data.loaded import BOOKS, Counts, Loaded
from weftlora.data.read import Blocks, Source, bad_row, quiet
from weftlora.data.sources import Part, parts_of
from weftlora.errors import ConfigError, DataError, ModelError
from weftlora.settings import IGNORE

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
Numbers = np.ndarray[Any, np.dtype[Any]]

LARGE = 20_000
"""Rows from which on a split is encoded into a file, and kept for the next start."""
AT_ONCE = 500
"""Rows that are encoded in one call, ..."""
TEXT_AT_ONCE = 1 << 20
"""... and characters of them: a token and its offsets take some 200 bytes while they are Python's."""


def carve(keys: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the training rows and of the validation rows, both in file order.

    Rows with equal keys are on the same side. Validation gets `round(fraction * len(keys))` rows, at least one; where
    groups of equal rows do not fit that number, it gets fewer, or the smallest group. Raises DataError without two
    different rows, since nothing would be left to train on.
    """
    train, held = carved(np.array([place_of(key, seed) for key in keys], np.uint64), fraction)
    return train.tolist(), held.tolist()


def carved(places: Numbers, fraction: float, name: str = "validation") -> tuple[Numbers, Numbers]:
    """As `carve`, of the rows' places in the order; `name` is what errors call the split."""
    _, inverse, sizes = np.unique(places, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise DataError(
            f"{len(places)} row{'' if len(places) == 1 else 's'} cannot be divided into training and {name} rows, which takes two "
            f"that differ: give more rows or data.{name}, or set data.{name}_fraction: 0."
        )
    wanted = max(1, round(fraction * len(places)))
    chosen: list[int] = []
    taken_rows = 0
    for group, size in enumerate(sizes.tolist()):
        if taken_rows + size <= wanted and len(chosen) < len(sizes) - 1:
            chosen.append(group)
            taken_rows += size
            if taken_rows == wanted:
                break
    out = np.zeros(len(sizes), bool)
    out[chosen or [int(sizes.argmin())]] = True
    held = out[inverse]
    return np.flatnonzero(~held), np.flatnonzero(held)


def place_of(key: str, seed: int) -> int:
    """The place of a row in the order that `seed` draws, by its content: the first 8 bytes of a SHA-256."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")


def sample(count: int, limit: int | None, seed: int) -> list[int]:
    """`limit` of the indices 0 … count-1, drawn with `seed`, in order; all of them without a limit."""
    if limit is None or limit >= count:
        return list(range(count))
    return sorted(Random(seed).sample(range(count), limit))


def repeats(keys: Sequence[Hashable] | Numbers) -> int:
    """How many of `keys` have been seen before."""
    return len(keys) - (len(np.unique(keys)) if isinstance(keys, np.ndarray) else len(set(keys)))


# ---------------------------------------------------------------------- looking at every row


@dataclass(frozen=True)
class Looked:
    """Every row of a split in numbers. A row is known by the number of its part and its index there.

    `key` is equal for copies; `place` is the row's in the order that carving goes by.
    """

    parts: tuple[Part, ...]
    key: Numbers
    place: Numbers
    empty: Numbers
    starts: tuple[int, ...]
    answers: set[str] = field(default_factory=set)  # of classified rows
    domains: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.key)

    @classmethod
    def at(cls, parts: Sequence[Part], config: DataConfig) -> Looked:
        """Look at every row once. Raises DataError on the first that cannot be used."""
        key, place, empty = array("Q"), array("Q"), bytearray()
        answers: set[str] = set()
        domains: set[str] = set()
        starts = [0]
        by_prompt = config.split_on == "prompt"
        for part in parts:
            for row in part.source.rows:
                found = example(row, part.source, part.columns, part.ignore)
                held = found.key()
                key.append(place_of(held, config.seed))
                if by_prompt:
                    place.append(place_of(found.key("prompt"), config.seed))
                empty.append(found.empty)
                if part.columns.format == "classification":
                    answers.add(found.answer)
                if found.domain is not None:
                    domains.add(found.domain)
            starts.append(len(key))
        keys = np.frombuffer(key, np.uint64)
        return cls(
            tuple(parts),
            keys,
            np.frombuffer(place, np.uint64) if by_prompt else keys,
            np.frombuffer(empty, bool),
            tuple(starts),
            answers,
            domains,
        )

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """The rows at `indices` (of the whole split), in that order."""
        return [found for found, _ in self.where(indices)]

    def where(self, indices: Sequence[int]) -> list[tuple[Example, Source]]:
        """As `examples`, each with the file it is from."""
        numbers = np.searchsorted(self.starts, np.asarray(indices, np.int64), side="right") - 1
        out: list[tuple[Example, Source]] = []
        at = 0
        while at < len(indices):  # runs of rows of one file
            part, end = int(numbers[at]), at
            while end < len(indices) and numbers[end] == part:
                end += 1
            held = self.parts[part]
            start = self.starts[part]
            out += [(row, held.source) for row in held.examples([int(index) - start for index in indices[at:end]])]
            at = end
        return out

    def weighted(self, indices: Numbers, seed: int) -> Numbers:
        """Rows as often as the weights of their files say: whole copies, and a drawn share of the rest."""
        if all(part.weight == 1 for part in self.parts):
            return indices
        out = []
        for number, part in enumerate(self.parts):
            own = indices[(indices >= self.starts[number]) & (indices < self.starts[number + 1])]
            whole, share = divmod(part.weight, 1)
            drawn = sample(len(own), round(share * len(own)), seed + number) if share else []
            out += [own] * int(whole) + [own[drawn]]
        return np.sort(np.concatenate(out), kind="stable")


@dataclass(frozen=True)
class Split:
    """One split before encoding: which rows, the empty lines passed on the way, and how errors call it."""

    name: str
    looked: Looked
    indices: Numbers
    blank: int = 0
    in_train: int = 0


# ---------------------------------------------------------------------- encoding

Made = tuple[int, str | None, list[Encoded]]
"""A row's index, its domain, and the rows of tokens that came of it."""


def draw(split: Split, encode: Encode, limit: int | None, seed: int) -> Iterator[Made]:
    """The rows that are looked at with what becomes of them: all in order, or in a drawn order until `limit` are of use."""
    order = split.indices.tolist()
    if limit is not None and limit < len(order):
        random = Random(seed)
        first = random.sample(range(len(order)), limit)
        rest = sorted(set(range(len(order))) - set(first))
        random.shuffle(rest)
        order = [order[at] for at in first + rest]
    else:
        limit = None
    useful = 0
    while order:
        size = AT_ONCE if limit is None else min(AT_ONCE, limit - useful)
        if size <= 0:
            return
        some, order = order[:size], order[size:]
        made = {each[0]: each for each in encoded_rows(split, encode, some)}
        for index in some:
            _, _, parts = each = made.get(index, (index, None, []))
            useful += bool(parts)
            yield each


def encoded_rows(split: Split, encode: Encode, indices: Sequence[int]) -> list[Made]:
    """The rows at `indices` that are not empty, with what becomes of them."""
    held = [index for index in indices if not split.looked.empty[index]]
    rows = split.looked.examples(held)
    made = [parts for some in _by_size(rows) for parts in encode(some)]
    return [(index, row.domain, parts) for index, row, parts in zip(held, rows, made, strict=True)]


def _by_size(rows: Sequence[Example]) -> Iterator[Sequence[Example]]:
    """`rows` in runs of at most TEXT_AT_ONCE characters, or of one row."""
    start = size = 0
    for at, row in enumerate(rows):
        if size and size + row.size > TEXT_AT_ONCE:
            yield rows[start:at]
            start, size = at, 0
        size += row.size
    yield rows[start:]


def features(form: Format, task: Task, domain: bool) -> Any:
    """The columns of a split on disk."""
    from datasets import Features, List, Value

    columns: dict[str, Any] = {
        "input_ids": List(Value("int32")),
        "attention_mask": List(Value("int8")),
        "labels": Value("int64") if task == "classification" else List(Value("int32")),
    }
    if form != "text":
        columns |= {"prompt": Value("string"), "completion": Value("string")}
    if domain:
        columns["domain"] = Value("string")
    return Features(columns | {name: Value(kind) for name, kind in BOOKS.items()})


def _columns(made: Sequence[Made], names: Sequence[str]) -> dict[str, list[Any]]:
    """Rows of tokens by column; each with the index and the domain of the row it came of."""
    flat = [(index, domain, part) for index, domain, parts in made for part in parts]
    columns: dict[str, list[Any]] = {
        "input_ids": [part.input_ids for _, _, part in flat],
        "attention_mask": [[1] * len(part.input_ids) for _, _, part in flat],
        "labels": [part.labels for _, _, part in flat],
        "prompt": [part.prompt for _, _, part in flat],
        "completion": [part.answer for _, _, part in flat],
        "domain": [domain for _, domain, _ in flat],
        "index": [index for index, _, _ in flat],
        "truncated": [part.truncated for _, _, part in flat],
        "joined": [part.joined for _, _, part in flat],
        "answer_tokens": [_answer_tokens(part) for _, _, part in flat],
    }
    return {name: columns[name] for name in names}


def _answer_tokens(row: Encoded) -> int:
    """Labels of a decoder's first token bear no loss; those of a decoder that has its own input all do."""
    if isinstance(row.labels, int):
        return 0
    return sum(label != IGNORE for label in row.labels[row.shifted :])


@dataclass(frozen=True)
class Encoder:
    """How the rows of a split become a dataset."""

    encode: Encode
    types: Any
    seed: int
    place: cache.Workplace
    """Where a large split is written."""
    processes: int = 1

    def __call__(self, split: Split, name: str, limit: int | None) -> tuple[Dataset, Counts, int]:
        """The rows of `split`, their account, and how many have a token that joins prompt and answer.

        Raises DataError when none is left.
        """
        large = limit is None and len(split.indices) >= LARGE
        held, looked = self._to_file(split, name) if large else self._in_memory(split, limit)
        books, tokens = _books(held)
        index = books.get("index", np.zeros(0, np.int64))
        kept = looked[np.isin(looked, index)]  # as often as their weight says
        empty = int(split.looked.empty[looked].sum())
        counts = Counts(
            read=len(split.indices) + split.blank,
            unused=len(split.indices) - len(looked),
            empty=empty + split.blank,
            dropped=len(looked) - empty - len(kept),
            kept=len(kept),
            rows=len(held),
            truncated=int(np.isin(looked, index[books["truncated"]]).sum()) if len(held) else 0,
            repeated=repeats(split.looked.key[kept]),
            in_train=split.in_train,
            tokens=tokens,
            answer_tokens=int(books["answer_tokens"].sum()) if len(held) else 0,
        )
        if not counts.read:
            raise DataError(
                f"no row of {split.name} is drawn with the weight that data.train gives it: raise the weight."
            )
        if not len(held):
            raise DataError(
                f"no row of {split.name} is left to use: of {counts.read}, {counts.empty} are empty and {counts.dropped} "
                "have no answer within data.max_length; raise it, or set data.truncate: completion."
            )
        joined_rows = len(np.unique(index[books["joined"]]))
        return held.remove_columns(list(BOOKS)), counts, joined_rows

    def _in_memory(self, split: Split, limit: int | None) -> tuple[Dataset, Numbers]:
        from datasets import Dataset, concatenate_datasets

        drawn, looked, parts = draw(split, self.encode, limit, self.seed), list[int](), list[Dataset]()
        while some := list(itertools.islice(drawn, AT_ONCE)):  # as Python's numbers, tokens take many times their place
            looked += [index for index, _, _ in some]
            parts.append(Dataset.from_dict(_columns(some, list(self.types)), features=self.types))
        held = (
            concatenate_datasets(parts)
            if parts
            else Dataset.from_dict({name: [] for name in self.types}, features=self.types)
        )
        if looked != sorted(looked):
            order = np.argsort(np.asarray(held.with_format("numpy")["index"][:]), kind="stable")
            with quiet():
                held = held.select(order).flatten_indices(keep_in_memory=True)
        return held, np.sort(np.array(looked, np.int64))

    def _to_file(self, split: Split, name: str) -> tuple[Dataset, Numbers]:
        from datasets import Dataset

        folder = self.place.folder()

        def encoded(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
            return _columns(encoded_rows(split, self.encode, batch["index"]), list(self.types))

        with quiet(), _same_environment():
            held = Dataset.from_dict({"index": split.indices}).map(
                encoded,
                batched=True,
                batch_size=AT_ONCE,
                writer_batch_size=2 * AT_ONCE,
                num_proc=self.processes if self.processes > 1 else None,
                features=self.types,
                remove_columns=["index"],
                load_from_cache_file=False,
                cache_file_name=str(folder / f"{name}.arrow"),
                new_fingerprint=f"{folder.name[-16:]}-{name}",
            )
        return held, split.indices


@contextmanager
def _same_environment() -> Iterator[None]:
    """`os.environ` is afterwards what it was.

    Where `datasets` maps in several processes it leaves a copy in its place, so that whoever holds the first, as rich does, sees no
    later change; and a setting of tokenizers.
    """
    held, before = os.environ, dict(os.environ)
    try:
        yield
    finally:
        os.environ = held  # noqa: B003 - the very object, not new contents
        for name in held.keys() - before.keys():
            del held[name]
        held.update(before)


def _books(held: Dataset) -> tuple[dict[str, Numbers], int]:
    """The columns that rows are counted by, and the tokens of all; nothing where there is no row."""
    import pyarrow.compute as pc

    found: dict[str, list[Numbers]] = {name: [] for name in BOOKS}
    tokens = 0
    for batch in _batches(held) if len(held) else ():
        tokens += pc.sum(pc.list_value_length(batch.column("input_ids"))).as_py() or 0
        for name, parts in found.items():
            parts.append(np.array(batch.column(name).to_numpy(zero_copy_only=False)))
    return {name: np.concatenate(parts) for name, parts in found.items() if parts}, tokens


def _batches(held: Dataset) -> Iterator[Any]:
    """The rows, some at a time. Those of a file are read from its start to its end: of what is mapped into memory, whole
    neighbourhoods of each value that is looked at would count as held."""
    import pyarrow as pa

    for each in held.cache_files:
        with pa.OSFile(each["filename"]) as file, pa.ipc.open_stream(file) as rows:
            yield from rows
    if not held.cache_files:
        yield from held.data.table.to_batches()


# ---------------------------------------------------------------------- loading

TASKS: dict[Task, tuple[Format, ...]] = {
    "causal": ("prompt_completion", "chat", "text"),
    "seq2seq": ("prompt_completion",),
    "classification": ("classification",),
}


def load(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_dir: str | os.PathLike[str] | None = None,
    task: Task | None = None,
    labels: Sequence[str] | None = None,
    only: str | None = None,
) -> Loaded:
    """Read, split and tokenise what `config` names.

    Args:
        base_dir: where relative paths start, the recipe file's folder; default the working folder.
        task: what the model does; by default `classification` for labelled text, else `causal`.
        labels: class names in the order of a model trained before; by default those of the training file.
        only: read the rows of this split and no others, to be measured; they are the result's `train`.

    Validation rows are carved from the training rows when none are given (`validation_fraction`), deterministically and
    with no row on both sides. Splits of 20,000 rows and more are encoded into the user's cache folder, smaller ones in memory.

    Raises DataError on a missing file, a row that cannot be used (named by file and line) or a split with nothing left,
    ConfigError on settings that do not fit the data, ModelError on a tokenizer without what the format needs.
    """
    frame = Frame.of(tokenizer)
    max_length = _max_length(config, frame)
    kept = cache.Entry.of(config, tokenizer, base_dir, (task, labels, max_length, only))
    found = kept.read() if kept is not None else None
    if found is None:
        place = cache.Workplace(kept)
        try:
            found = place.finish(_load(config, frame, base_dir, task, labels, max_length, place, only))
        finally:
            place.leave()
    for note in found.notes:
        warnings.warn(note, stacklevel=2)
    return found


def _load(
    config: DataConfig,
    frame: Frame,
    base_dir: str | os.PathLike[str] | None,
    task: Task | None,
    labels: Sequence[str] | None,
    max_length: int,
    place: cache.Workplace,
    only: str | None,
) -> Loaded:
    blocks = Blocks(frame.lengths, max_length - len(frame.opened([])))
    if only is None:
        parts = parts_of(config, base_dir, blocks, task)
    else:
        parts = {"train": parts_of(config, base_dir, blocks, task, (only,))[only]}
        config = config.model_copy(
            update={
                "limit": getattr(config, f"{only}_limit", None) or config.limit,
                "validation_fraction": 0.0,
                "test_fraction": None,
                "packing": False,
            }
        )
    form = parts["train"][0].columns.format
    task = _task(task, form)
    looked = {name: Looked.at(held, config) for name, held in parts.items()}
    if config.packing and task != "causal":
        raise ConfigError(f"data.packing is for causal models, and this task is {task}: leave it out.")
    names = _labels(looked, labels) if task == "classification" else None
    domains = sorted({domain for held in looked.values() for domain in held.domains})
    limits = {
        "train": config.limit,
        "validation": config.validation_limit or config.limit,
        "test": config.test_limit or config.limit,
    }
    splits, notes = _splits(looked, config)
    done = {}
    for name, split in splits.items():
        encode = _encoder(task, form, frame, max_length, config, names)
        has_domain = any("domain" in part.columns.of for part in split.looked.parts)
        encoder = Encoder(encode, features(form, task, has_domain), config.seed, place, config.processes)
        held, counts, joined_rows = encoder(split, name, limits[name])
        if name == "train" and config.packing:
            with quiet():
                held = packed(held, max_length, place.folder() if held.cache_files else None)
            counts = replace(counts, rows=len(held))
        done[name] = (held, counts)
        if joined_rows:
            notes.append(
                f"in {joined_rows} of the {counts.rows} {name} rows what stands before an answer is not the prompt that a server "
                "sends, token for token: the tokenizer joins its end with the answer, or the chat template writes it otherwise."
            )
    return Loaded(
        train=done["train"][0],
        validation=done["validation"][0] if "validation" in done else None,
        test=done["test"][0] if "test" in done else None,
        task=task,
        format=form,
        labels=names,
        domains=domains,
        counts={name: counts for name, (_, counts) in done.items()},
        hashes={
            file: digest for held in parts.values() for part in held for file, digest in part.source.hashes.items()
        },
        max_length=max_length,
        columns=tuple(dict.fromkeys(f"{part.source.name}: {part.columns}" for part in parts["train"])),
        notes=tuple(notes),
        sources=tuple((part.source.name, len(part.source.rows)) for held in parts.values() for part in held),
    )


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


def _labels(looked: dict[str, Looked], known: Sequence[str] | None) -> list[str]:
    """The class names, from `known` or the training rows. Raises DataError on a row of another class."""
    names = list(known) if known is not None else label_names(looked["train"].answers, looked["train"].parts[0].source)
    valid = {*names, ""}
    whose = "the model's classes" if known is not None else "the classes of the training rows"
    for held in looked.values():
        if held.answers <= valid:
            continue
        for row, source in held.where(range(len(held))):
            if row.answer not in valid:
                raise bad_row(
                    source.name,
                    row.line,
                    f"label {row.answer!r} is not among {whose}, {', '.join(names)}.",
                    source.unit,
                )
    return names


def _splits(looked: dict[str, Looked], config: DataConfig) -> tuple[dict[str, Split], list[str]]:
    """The splits by name, in the order train, validation, test; those that are not given carved. And what to say of them."""
    seen = looked["train"].key
    splits, notes = {}, []
    for name, held in looked.items():
        said = held.parts[0].source.name if len(held.parts) == 1 else f"the {name} files"
        copies = 0 if name == "train" else int(np.isin(held.key, seen).sum())
        if copies:
            notes.append(f"{copies} of the {len(held)} rows of {said} are copies of training rows.")
        blank = sum(part.source.blank for part in held.parts)
        splits[name] = Split(said, held, np.arange(len(held)), blank, copies)
    if "test" not in splits and config.test_fraction:
        splits |= _carved(splits["train"], "test", config.test_fraction)
    if "validation" not in splits and config.validation_fraction > 0:
        splits |= _carved(splits["train"], "validation", config.validation_fraction)
    train = splits["train"]
    splits["train"] = replace(train, indices=train.looked.weighted(train.indices, config.seed))
    return {name: splits[name] for name in SPLITS if name in splits}, notes


def _carved(whole: Split, name: Literal["validation", "test"], fraction: float) -> dict[str, Split]:
    """Training rows and those of another split out of `whole`, whose empty rows are no use to either and stay counted in training."""
    empty = whole.looked.empty[whole.indices]
    filled = whole.indices[~empty]
    train, held = carved(whole.looked.place[filled], fraction, name)
    rest = np.sort(np.concatenate([filled[train], whole.indices[empty]]))
    return {
        "train": replace(whole, indices=rest),
        name: Split(f"the {name} rows of {whole.name}", whole.looked, filled[held]),
    }


def _encoder(
    task: Task, form: Format, frame: Frame, max_length: int, config: DataConfig, names: Sequence[str] | None
) -> Encode:
    if names is not None:
        return classification(frame, max_length, config.truncate, names)
    if task == "seq2seq":
        return seq2seq(frame, max_length, config.truncate)
    if form == "chat":
        return chat(frame, max_length, config.truncate, config.answers, config.system == "fold")
    return text(frame, max_length) if form == "text" else causal(frame, max_length, config.truncate)
