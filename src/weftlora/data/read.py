"""Files into rows, each with the line it came from, and the file's hash.

    .jsonl .ndjson  one JSON object a line        .csv .tsv   a header line, then one record each
    .json           one list of objects           .txt        plain text, see `DataConfig.unit` and `separator`
    .parquet        a table                       *.gz        any of them, compressed
    folder          saved by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, or one of such files, by split

Tables are read by `datasets`, which maps them into memory. Text is read here, because a row that cannot be used is named by file and
line, and because a value stays what the file says: `datasets` gives every row the columns and the types of all, so that "007" in a
.csv becomes 7 and a message gains the keys of other messages. Lines of JSON are not held: they are found once and read when asked for.

A row that cannot be read stops the load; nothing is skipped silently.
"""

from __future__ import annotations

import atexit
import csv
import gzip
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from weftlora.data.config import ENDINGS, DataConfig, ending, missing
from weftlora.disk.files import check_regular, file_digest
from weftlora.errors import ConfigError, DataError
from weftlora.foreign_text import from_json

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, slots=True)
class Row:
    """One record. `line` counts from 1; it is the row's number where the source has no lines."""

    values: dict[str, Any]
    line: int
    whole: bool = True  # False: cut out of running text, so its end is not the end of a document


@dataclass(frozen=True)
class Source:
    """The rows of one file or split. `unit` says what `Row.line` counts; `blank` how many empty lines were passed."""

    name: str
    rows: Sequence[Row]
    hashes: dict[str, str]
    unit: str = "line"
    blank: int = 0
    parts: dict[str, Source] = field(default_factory=dict)  # the other splits of a folder that holds several

    def at(self, line: int) -> str:
        return place(self.name, line, self.unit)


def place(name: str | Path, line: int, unit: str = "line") -> str:
    """How an error names a row: `rows.jsonl, line 17`; what is no row has no line (0)."""
    return f"{name}, {unit} {line}" if line else str(name)


def bad_row(name: str | Path, line: int, what: str, unit: str = "line") -> DataError:
    """The error for one row; `what` goes on after the colon and says what to do."""
    return DataError(f"{place(name, line, unit)}: {what}")


def taken(rows: Sequence[Row], indices: Sequence[int]) -> list[Row]:
    """The rows at `indices`; what is stored may give them at once."""
    return rows.taken(indices) if isinstance(rows, Stored) else [rows[index] for index in indices]


class Stored(Sequence[Row]):
    """Rows that are made when they are asked for."""

    @abstractmethod
    def taken(self, indices: Sequence[int]) -> list[Row]:
        """The rows at `indices`."""

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return self.taken(range(*index.indices(len(self))))
        return self.taken([index])[0]


# ---------------------------------------------------------------------- tables


class Table(Stored):
    """Rows of a `Dataset`, made when they are asked for. Class labels are read as their names."""

    def __init__(self, dataset: Dataset, name: str) -> None:
        import datasets

        self.name = name
        self.dataset = dataset.with_format(None)
        self.names = {
            column: feature.names
            for column, feature in self.dataset.features.items()
            if isinstance(feature, datasets.ClassLabel)
        }

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), 1000):
            yield from self.taken(range(start, min(start + 1000, len(self))))

    def taken(self, indices: Sequence[int]) -> list[Row]:
        try:
            columns = self.dataset[list(indices)]
            return [
                self._row({name: column[at] for name, column in columns.items()}, index)
                for at, index in enumerate(indices)
            ]
        except Exception as error:  # no UTF-8, a class without a name, a date or time zone that Python lacks
            raise DataError(f"a row of {self.name} cannot be read ({first_line(error)}): save it again.") from None

    def _row(self, values: dict[str, Any], index: int) -> Row:
        for column, known in self.names.items():  # -1 is no label, as in hidden test sets
            held = values[column]
            values[column] = known[held] if held is not None and held >= 0 else None
        return Row({name: _without_none(value) for name, value in values.items()}, index + 1)


def _without_none(value: Any) -> Any:
    """A table gives every struct the keys of all rows; those that a row does not have are None."""
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value


VALIDATION_NAMES = ("validation", "valid", "val", "dev")
"""What other projects call the validation split of a DatasetDict."""


def of_splits(held: dict[str, Source], name: str, split: str | None, hint: str) -> Source:
    """The source of what is trained on, the others its parts, by the names that splits have. Raises DataError without one."""
    chosen = split or "train"
    if chosen not in held:
        raise DataError(
            f"{name} has the splits {', '.join(held)} but no {chosen}: {hint}, or name one with data.split."
        )
    parts = {}
    if found := next((other for other in VALIDATION_NAMES if other in held and other != chosen), None):
        parts["validation"] = held[found]
    if "test" in held and chosen != "test":
        parts["test"] = held["test"]
    train = held[chosen]
    return Source(train.name, train.rows, train.hashes, train.unit, train.blank, parts)


def read_saved(folder: Path, split: str | None = None) -> Source:
    """The rows of a saved `Dataset`, or the `train` split of a `DatasetDict` with the others as `parts`.

    Raises DataError when the folder is no saved dataset or lacks the split.
    """
    import datasets

    _check_names(folder)
    try:
        saved = datasets.load_from_disk(str(folder))
        for part in [saved] if isinstance(saved, datasets.Dataset) else saved.values():
            part.data.table.validate(full=True)  # a damaged file has offsets and indices that lead out of it
    except Exception as error:  # files of Arrow are read by C++, which has errors of many kinds
        raise DataError(
            f"{folder} is a folder but not a complete saved Hugging Face dataset ({first_line(error)}): "
            "write it with Dataset.save_to_disk, or name a file in it."
        ) from None
    if isinstance(saved, datasets.Dataset):
        if split is not None:
            raise DataError(f"{folder} is one saved split, not several, so it has no {split!r}: leave out data.split.")
        return _source(saved, folder)
    held = {str(name): _source(part, folder / str(name)) for name, part in saved.items()}
    return of_splits(held, str(folder), split, "name one split's folder instead")


def _check_names(folder: Path) -> None:
    """Refuse a saved dataset whose records name files or splits elsewhere: `load_from_disk` would read them. Raises DataError."""
    records = [folder / "dataset_dict.json", folder / "state.json", *folder.glob("*/state.json")]
    for path in records:
        try:
            said = from_json(path.read_text(encoding="utf-8"))
            names = [*said.get("splits", ()), *(file["filename"] for file in said.get("_data_files", ()))]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            continue  # what is no record is found by `load_from_disk`, with its reason
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise DataError(f"{path} names {name!r}, which is not in its folder: save the dataset again.")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _source(dataset: Dataset, split: Path) -> Source:
    if not len(dataset):
        raise DataError(f"the saved dataset {split} has no rows: give one with at least one.")
    hashes = {str(file): file_digest(file) for file in sorted(split.glob("*.arrow"))}
    return Source(str(split), Table(dataset, str(split)), hashes, unit="row")


@contextmanager
def quiet() -> Iterator[None]:
    """`datasets` without its progress bars and its log, whose errors are raised too; both are as they were afterwards."""
    from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    before, level = are_progress_bars_disabled(), logging.get_verbosity()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if not before:
            enable_progress_bars()


def _read_parquet(path: Path) -> Source:
    import datasets

    digest = file_digest(path)
    try:
        with quiet():
            table = datasets.Dataset.from_parquet(str(path))
    except Exception as error:  # read by C++, which has errors of many kinds
        reason = error.__cause__ or error
        raise DataError(f"{path} is not a readable parquet file ({first_line(reason)}): copy it again.") from None
    if not len(table):
        raise DataError(f"the data file {path} has no rows: give a file with at least one.")
    return Source(str(path), Table(table, str(path)), {str(path): digest}, unit="row")


# ---------------------------------------------------------------------- files


@dataclass(frozen=True)
class Blocks:
    """How running text is cut: `lengths` counts the tokens of each line, a block holds at most `room` of them."""

    lengths: Callable[[list[str]], list[int]]
    room: int


def read(path: Path, config: DataConfig, blocks: Blocks) -> Source:
    """All rows of `path`. Raises DataError on a missing, unreadable, empty or malformed file.

    `blocks` says how `.txt` files without `separator` are cut.
    """
    check_regular(path, DataError)
    if path.is_dir():
        return _read_folder(path, config, blocks)
    kind = ending(path)
    if kind not in ENDINGS:
        raise DataError(
            f"{path} is not a kind of file weftlora reads: use {', '.join(ENDINGS)}, each also as .gz, or a folder of them."
        )
    if config.separator is not None and kind != ".txt":
        raise ConfigError(f"data.separator={config.separator!r} is for .txt files, not for {path.name}: leave it out.")
    if config.format == "prompt_completion" and kind == ".txt" and config.separator is None:
        raise ConfigError(f"data.format=prompt_completion needs data.separator to divide the lines of {path.name}.")
    try:
        plain = path if not path.name.lower().endswith(".gz") else _unzipped(path)
        if kind == ".parquet":
            return _read_parquet(plain)
        if kind in (".jsonl", ".ndjson"):
            lines = Lines(str(path), plain)
            rows: Sequence[Row] = lines
            blank, digest = lines.blank, lines.digest if plain is path else file_digest(path)
        else:
            raw = plain.read_bytes()
            rows, blank = READERS[kind](_decode(path, raw), path, config, blocks)
            digest = hashlib.sha256(raw).hexdigest() if plain is path else file_digest(path)
    except FileNotFoundError:
        raise missing(path) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({first_line(error)}): copy it again.") from None
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read ({error.strerror}): check its permissions.") from None
    if not len(rows):
        raise DataError(f"the data file {path} has no rows: give a file with at least one.")
    return Source(str(path), rows, {str(path): digest}, blank=blank)


def _unzipped(path: Path) -> Path:
    """What a compressed file holds, in a file that lives as long as this process; a name, since processes that encode open it too."""
    handle, name = tempfile.mkstemp(prefix="weftlora-", suffix=ending(path))
    plain = Path(name)
    atexit.register(plain.unlink, missing_ok=True)
    with gzip.open(path, "rb") as packed, os.fdopen(handle, "wb") as file:
        shutil.copyfileobj(packed, file, 1 << 20)
    return plain


def _split_of(path: Path, top: Path) -> str | None:
    """The split that a file's name, or a folder's above it, says it is of: train-00000-of-00002.parquet → train."""
    for part in reversed(path.relative_to(top).parts):
        words = set("".join(c if c.isalpha() else " " for c in part.lower()).split())
        for split, names in {"train": ("train", "training"), "validation": VALIDATION_NAMES, "test": ("test",)}.items():
            if words.intersection(names):
                return split
    return None


def _read_folder(folder: Path, config: DataConfig, blocks: Blocks) -> Source:
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
        return read_saved(folder, config.split)
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and ending(path) in ENDINGS
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    if not files:
        raise DataError(
            f"{folder} is not a complete saved Hugging Face dataset and holds no file that weftlora reads "
            f"({', '.join(ENDINGS)}): name a folder of such files, or a file."
        )
    by_split: dict[str, list[Path]] = {}
    for path in files:
        by_split.setdefault(_split_of(path, folder) or "train", []).append(path)
    alone = config.model_copy(update={"split": None})
    held = {
        split: joined(
            str(folder if len(by_split) == 1 else folder / split), [read(path, alone, blocks) for path in paths]
        )
        for split, paths in by_split.items()
    }
    return of_splits(held, str(folder), config.split, "name files in it")


class Several(Sequence[Row]):
    """The rows of several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self.starts = [0]
        for source in sources:
            self.starts.append(self.starts[-1] + len(source.rows))

    def __len__(self) -> int:
        return self.starts[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        raise TypeError("rows of several files are read file by file: use flat()")

    def __iter__(self) -> Iterator[Row]:
        for source in self.sources:
            yield from source.rows


def joined(name: str, sources: Sequence[Source]) -> Source:
    """One source of several files."""
    if len(sources) == 1:
        return sources[0]
    hashes = {file: digest for source in sources for file, digest in source.hashes.items()}
    return Source(name, Several(sources), hashes, blank=sum(source.blank for source in sources))


def flat(source: Source) -> list[Source]:
    """The files of a source, each a source by itself."""
    return source.rows.sources if isinstance(source.rows, Several) else [source]


class Lines(Stored):
    """The objects of a file with one JSON object a line. Where lines begin is known, and no row is held."""

    def __init__(self, name: str, path: Path, piece: int = 1 << 24) -> None:
        import numpy as np

        self.name, self.path = name, path
        digest = hashlib.sha256()
        starts, ends, numbers = [*map(list[Any], ((), (), ()))]
        self.blank = passed = at = 0
        held = b""
        with path.open("rb") as file:
            if file.read(3) == b"\xef\xbb\xbf":
                digest.update(b"\xef\xbb\xbf")
                at = 3
            file.seek(at)
            while chunk := file.read(piece):
                digest.update(chunk)
                chunk = held + chunk
                marks = np.frombuffer(chunk, np.uint8)
                breaks = np.flatnonzero(marks == 10)
                self._found(chunk, marks, breaks, at, passed, (starts, ends, numbers))
                passed += len(breaks)
                cut = int(breaks[-1]) + 1 if len(breaks) else 0
                at, held = at + cut, chunk[cut:]
        if held:
            held += b"\n"
            self._found(
                held, np.frombuffer(held, np.uint8), np.array([len(held) - 1]), at, passed, (starts, ends, numbers)
            )
        self.digest = digest.hexdigest()
        none = np.zeros(0, np.int64)
        self.starts, long, numbered = (np.concatenate(each) if each else none for each in (starts, ends, numbers))
        long -= self.starts
        self.lengths, self.numbers = (  # half the memory, where every value fits
            each.astype(np.uint32) if not len(each) or each.max() < 2**32 else each for each in (long, numbered)
        )
        self._open: tuple[int, int] | None = None

    def _found(self, chunk: bytes, marks: Any, breaks: Any, at: int, passed: int, out: Any) -> None:
        """The lines in `chunk` that are not blank, appended to the lists in `out`."""
        import numpy as np

        if not len(breaks):
            return
        begins = np.concatenate([[0], breaks[:-1] + 1])
        keep = np.ones(len(breaks), bool)
        for index in np.flatnonzero(marks[begins] != 123):  # what begins with a brace is not blank
            keep[index] = bool(chunk[begins[index] : breaks[index]].strip())
        self.blank += int(len(keep) - keep.sum())
        for held, values in zip(
            out, (begins + at, breaks + at, np.arange(passed + 1, passed + 1 + len(breaks))), strict=True
        ):
            held.append(values[keep].astype(np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None}

    def __del__(self) -> None:
        opened = getattr(self, "_open", None)
        if opened is not None and opened[0] == os.getpid():
            os.close(opened[1])

    def __len__(self) -> int:
        return len(self.starts)

    def taken(self, indices: Sequence[int]) -> list[Row]:
        if self._open is None or self._open[0] != os.getpid():
            self._open = (os.getpid(), os.open(self.path, os.O_RDONLY))
        out = []
        for index in indices:
            line = os.pread(self._open[1], int(self.lengths[index]), int(self.starts[index]))
            out.append(self._row(line, int(self.numbers[index])))
        return out

    def __iter__(self) -> Iterator[Row]:
        with self.path.open("rb") as file:
            for at in range(0, len(self), 4096):  # whole arrays as Python's numbers are many times as large
                parts = (each[at : at + 4096].tolist() for each in (self.starts, self.lengths, self.numbers))
                for start, length, number in zip(*parts, strict=True):
                    file.seek(start)
                    yield self._row(file.read(length), number)

    def _row(self, line: bytes, number: int) -> Row:
        try:
            values = _JSON.decode(line.decode())
        except UnicodeDecodeError as error:
            raise bad_row(
                self.name, number, f"byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8."
            ) from None
        except KeyError as error:
            raise bad_row(self.name, number, error.args[0]) from None
        except (ValueError, RecursionError) as error:
            raise bad_row(self.name, number, f"not valid JSON ({error}); correct or delete the line.") from None
        return Row(_object(values, self.name, number), number)


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise bad_row(path, line, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8.") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        yield number, line.removesuffix("\n")


def _object(values: Any, path: str | Path, line: int) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise bad_row(path, line, f"{_short(values)} is not a JSON object; write {{column: value, ...}}.")
    return values


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, which lets a key pass that stands in it twice; what came first would be lost. Raises KeyError, in words."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise KeyError(f"the key {_short(twice)} stands more than once in one object; keep one of them.")
    return values


_JSON = json.JSONDecoder(object_pairs_hook=_each_once)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(text: str, path: Path, config: DataConfig, blocks: Blocks) -> tuple[list[Row], int]:
    """A list of objects, read item by item so that each row knows its line."""
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    decode = _JSON.raw_decode
    at = skip(text, 0).end()
    if text[at : at + 1] != "[":
        raise bad_row(path, 1, "a .json file must be one list of objects; name a file with one object a line .jsonl.")
    rows: list[Row] = []
    line, counted = 1, 0
    at = skip(text, at + 1).end()
    while text[at : at + 1] != "]" or rows:
        line, counted = line + text.count("\n", counted, at), at
        try:
            values, at = decode(text, at)
        except KeyError as error:
            raise bad_row(path, line, error.args[0]) from None
        except (ValueError, RecursionError) as error:
            raise bad_row(path, getattr(error, "lineno", line), f"not valid JSON ({error}); correct it.") from None
        rows.append(Row(_object(values, path, line), line))
        at = skip(text, at).end()
        if text[at : at + 1] != ",":
            break
        at = skip(text, at + 1).end()
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line = text.count("\n", 0, at) + 1
        raise bad_row(path, line, "not valid JSON (the list should continue with ',' or end with ']'); correct it.")
    return rows, 0


@contextmanager
def _long_fields() -> Iterator[None]:
    """csv refuses fields beyond 128 KiB, which whole stories exceed; its limit is process-wide, so it is put back."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_table(text: str, path: Path, config: DataConfig, blocks: Blocks) -> tuple[list[Row], int]:
    with _long_fields():
        return _records(text, path, config)


def _records(text: str, path: Path, config: DataConfig) -> tuple[list[Row], int]:
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter="\t" if ending(path) == ".tsv" else ",",
        quoting=csv.QUOTE_NONE if config.quoting == "none" else csv.QUOTE_MINIMAL,
        strict=True,
    )
    header: list[str] | None = None
    rows: list[Row] = []
    blank = 0
    while True:
        line = reader.line_num + 1  # a quoted record may span lines; it is named by its first
        try:
            record = next(reader)
        except StopIteration:
            return rows, blank
        except csv.Error as error:
            raise bad_row(
                path,
                line,
                f"not valid {ending(path)[1:]} ({error}); correct it, or set quoting: none if quotes are text.",
            ) from None
        if not record:
            blank += 1
        elif header is None:
            header = _header(record, path, line)
        elif len(record) != len(header):
            raise bad_row(path, line, f"{len(record)} columns where the header has {len(header)}; correct the row.")
        else:
            rows.append(Row(dict(zip(header, record, strict=True)), line))


def _header(record: list[str], path: Path, line: int) -> list[str]:
    header = [name.strip() for name in record]
    if "" in header or len(set(header)) < len(header):
        raise bad_row(path, line, f"the header {header} has an empty or repeated name; name each column once.")
    return header


def _read_text(text: str, path: Path, config: DataConfig, blocks: Blocks) -> tuple[list[Row], int]:
    if config.separator is not None or config.unit == "line":
        lines = list(_lines(text))
        full = [(number, line) for number, line in lines if line.strip()]
        return [_from_line(line, number, path, config.separator) for number, line in full], len(lines) - len(full)
    if config.unit == "paragraph":
        return _paragraphs(text), 0
    return _cut(text, blocks), 0


def _from_line(line: str, number: int, path: Path, separator: str | None) -> Row:
    if separator is None:
        return Row({"text": line}, number)
    prompt, found, completion = line.partition(separator)
    if not found:
        raise bad_row(path, number, f"no {separator!r} in {_short(line)}; write prompt{separator}completion.")
    return Row({"prompt": prompt.strip(), "completion": completion.strip()}, number)


def _paragraphs(text: str) -> list[Row]:
    rows: list[Row] = []
    open_lines: list[str] = []
    start = 1
    for number, line in [*_lines(text), (0, "")]:
        if line.strip():
            start = start if open_lines else number
            open_lines.append(line)
        elif open_lines:
            rows.append(Row({"text": "\n".join(open_lines)}, start))
            open_lines = []
    return rows


def _cut(text: str, blocks: Blocks) -> list[Row]:
    """Consecutive whole lines whose token counts add up to at most `blocks.room`; no line is lost or repeated."""
    lines = list(_lines(text))
    sizes = blocks.lengths([line + "\n" for _, line in lines])
    rows: list[Row] = []
    block: list[str] = []
    start, used = 1, 0
    for (number, line), size in zip(lines, sizes, strict=True):
        if block and used + size > blocks.room:
            rows.append(Row({"text": "\n".join(block) + "\n"}, start, whole=False))
            block, used = [], 0
        start = start if block else number
        block.append(line)
        used += size
    if block:
        rows.append(Row({"text": "\n".join(block)}, start, whole=False))
    return [row for row in rows if row.values["text"].strip()]


READERS: dict[str, Callable[[str, Path, DataConfig, Blocks], tuple[list[Row], int]]] = {
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
