"""What a `data:` section names, read: the files of each split, and what is made of their columns.

A training source with further splits (a folder, a data set of the hub, the demo) supplies those that are not given. The columns of the
training rows are those of every split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

from weftlora.data import hub
from weftlora.data.config import DEMO, SPLITS, DataConfig, Format, Task, hub_name, named
from weftlora.data.demo import demo_rows
from weftlora.data.examples import Columns, Example, check_columns, example, find_columns
from weftlora.data.paths import resolve_path
from weftlora.data.read import Blocks, Row, Source, flat, read, taken
from weftlora.errors import ConfigError


@dataclass(frozen=True)
class Part:
    """One file of a split, with what its columns are and its weight in training."""

    source: Source
    columns: Columns
    weight: float = 1.0
    ignore: tuple[str, ...] = ()

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """The rows at `indices`, by role."""
        return [example(row, self.source, self.columns, self.ignore) for row in taken(self.source.rows, indices)]


def parts_of(
    config: DataConfig,
    base_dir: str | os.PathLike[str] | None,
    blocks: Blocks,
    task: Task | None,
    splits: Sequence[str] = SPLITS,
) -> dict[str, list[Part]]:
    """The files of each of `splits`, each with its columns; those of the training files are known to the other splits."""
    wanted: Format | None = "classification" if task == "classification" else None
    parts: dict[str, list[Part]] = {}
    for split, held in _sources(config, base_dir, blocks, splits).items():
        trained = parts.get("train", [])
        for source, weight in held:
            for one in flat(source):
                fits = [part.columns for part in trained if len(trained) == 1 or part.columns.fit(one.rows[0].values)]
                columns = check_columns(one, fits[0], config) if fits else find_columns(one, config, wanted)
                first = next(iter(trained or parts.get(split, [])), None)
                if first is not None and columns.format != first.columns.format:
                    raise ConfigError(
                        f"{one.name} is read as {columns.format} and {first.source.name} as {first.columns.format}: files of one run "
                        "need one format, which data.format and data.fields can say."
                    )
                parts.setdefault(split, []).append(Part(one, columns, weight, config.ignore))
    return parts


def _sources(
    config: DataConfig, base_dir: str | os.PathLike[str] | None, blocks: Blocks, splits: Sequence[str]
) -> dict[str, list[tuple[Source, float]]]:
    """The sources of each split that is given; one training source with further splits supplies those that are not."""
    sources: dict[str, list[tuple[Source, float]]] = {}
    _check_split(config, base_dir)
    for split in splits:
        written = named(getattr(config, split))
        if not written and config.train == DEMO:
            written = [(DEMO, 1.0)]
        for name, weight in written:
            sources.setdefault(split, []).append((_source(name, split, config, base_dir, blocks), weight))
        if not written and len(sources.get("train", ())) == 1 and split in (parts := sources["train"][0][0].parts):
            sources[split] = [(parts[split], 1.0)]
    return sources


def _check_split(config: DataConfig, base_dir: str | os.PathLike[str] | None) -> None:
    """Refuse to name a split of what has none. Raises ConfigError."""
    names = [(name, resolve_path(name, base_dir)) for name, _ in named(config.train) if name != DEMO]
    if config.split is None or any(path.is_dir() or hub_name(name, path) is not None for name, path in names):
        return
    raise ConfigError(
        f"data.split={config.split!r} names a split of a folder or of a data set, and data.train={config.train!r} has no splits: "
        "leave it out, or name the file of that split."
    )


def _source(
    name: str, split: str, config: DataConfig, base_dir: str | os.PathLike[str] | None, blocks: Blocks
) -> Source:
    if name == DEMO:
        return _demo(split)
    path = resolve_path(name, base_dir)
    alone = config if split == "train" else config.model_copy(update={"split": None})
    if (found := hub_name(name, path)) is not None:
        return hub.read_hub(*found, alone, split)
    return read(path, alone, blocks)


def _demo(split: str) -> Source:
    rows = demo_rows(split)
    digest = sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    held = [Row(dict(row), number) for number, row in enumerate(rows, start=1)]
    return Source(f"demo {split}", held, {f"demo {split}": digest}, unit="row")


def texts(config: DataConfig, *, base_dir: str | os.PathLike[str] | None = None) -> list[str]:
    """The training rows as text, without a tokenizer: prompt and answer, all messages, or the text without its label.

    Blocks of running text are cut at `max_length` words here, not tokens.

    Raises DataError and ConfigError as `load` does.
    """
    words = Blocks(lambda lines: [len(line.split()) for line in lines], config.max_length)
    alone = config.model_copy(update={"validation": None, "test": None})
    out = []
    for part in parts_of(alone, base_dir, words, None)["train"]:
        for row in part.examples(range(len(part.source.rows))):
            if part.columns.format == "classification":
                out.append(row.prompt)
            elif part.columns.format == "chat":
                out.append("\n".join(message["content"] for message in row.messages))
            else:
                out.append("\n".join(filter(None, (row.prompt, row.answer))))
    return out
