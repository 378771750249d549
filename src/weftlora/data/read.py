"""Files into rows, each with the line it came from, and the file's hash.

    .jsonl   one JSON object a line          .csv .tsv   a header line, then one record each
    .json    one list of objects             .txt        plain text, see `DataConfig.unit` and `separator`
    folder   saved by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, read into memory

A row that cannot be read is named by file and line and stops the load; nothing is skipped silently.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weftlora.data.config import DataConfig, missing
from weftlora.disk.files import check_regular
from weftlora.errors import ConfigError, DataError


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
    rows: list[Row]
    hashes: dict[str, str]
    unit: str = "line"
    blank: int = 0
    parts: dict[str, Source] = field(default_factory=dict)  # the other splits of a folder that holds several

    def at(self, line: int) -> str:
        return place(self.name, line, self.unit)


def place(name: str | Path, line: int, unit: str = "line") -> str:
    """How an error names a row: `rows.jsonl, line 17`."""
    return f"{name}, {unit} {line}"


def bad_row(name: str | Path, line: int, what: str, unit: str = "line") -> DataError:
    """The error for one row; `what` goes on after the colon and says what to do."""
    return DataError(f"{place(name, line, unit)}: {what}")


# What other projects call the validation split of a DatasetDict.
VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def read_saved(folder: Path) -> Source:
    """The rows of a saved `Dataset`, or the `train` split of a `DatasetDict` with the others as `parts`.

    Class labels are read as their names. Raises DataError when the folder is no saved dataset or has no train split.
    """
    import datasets

    _check_names(folder)
    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{folder} is a folder but not a complete saved Hugging Face dataset ({_first_line(error)}): "
            "write it with Dataset.save_to_disk, or name a file in it."
        ) from None
    if isinstance(saved, datasets.Dataset):
        return _source(saved, folder)
    if "train" not in saved:
        raise DataError(f"{folder} has the splits {', '.join(saved)} but no train: name one split's folder instead.")
    parts = {}
    if held := next((name for name in VALIDATION_NAMES if name in saved), None):
        parts["validation"] = _source(saved[held], folder / held)
    if "test" in saved:
        parts["test"] = _source(saved["test"], folder / "test")
    train = _source(saved["train"], folder / "train")
    return Source(train.name, train.rows, train.hashes, unit="row", parts=parts)


def _check_names(folder: Path) -> None:
    """Refuse a saved dataset whose records name files or splits elsewhere: `load_from_disk` would read them. Raises DataError."""
    records = [folder / "dataset_dict.json", folder / "state.json", *folder.glob("*/state.json")]
    for path in records:
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            names = [*said.get("splits", ()), *(file["filename"] for file in said.get("_data_files", ()))]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            continue  # what is no record is found by `load_from_disk`, with its reason
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or "\0" in name:
                raise DataError(f"{path} names {name!r}, which does not lie in its folder: save the dataset again.")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _source(dataset: Any, split: Path) -> Source:
    import datasets

    plain = dataset.with_format(None)
    names = {
        column: feature.names for column, feature in plain.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    rows = [Row(_named(values, names), line) for line, values in enumerate(plain, start=1)]
    if not rows:
        raise DataError(f"the saved dataset {split} has no rows: give one with at least one.")
    hashes = {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(split.glob("*.arrow"))}
    return Source(str(split), rows, hashes, unit="row")


def _named(values: dict[str, Any], names: dict[str, list[str]]) -> dict[str, Any]:
    """Class ids as names; -1 (no label, as in hidden test sets) and null become None."""
    for column, known in names.items():
        held = values[column]
        values[column] = known[held] if held is not None and held >= 0 else None
    return values


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
        return read_saved(path)
    if path.suffix not in READERS:
        raise DataError(
            f"{path} is not a kind of file weftlora reads: use {', '.join(READERS)} or a saved dataset folder."
        )
    if config.separator is not None and path.suffix != ".txt":
        raise ConfigError(f"data.separator={config.separator!r} is for .txt files, not for {path.name}: leave it out.")
    if config.format == "prompt_completion" and path.suffix == ".txt" and config.separator is None:
        raise ConfigError(f"data.format=prompt_completion needs data.separator to divide the lines of {path.name}.")
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise missing(path) from None
    except OSError as error:
        raise DataError(f"the data file {path} cannot be read ({error.strerror}): check its permissions.") from None
    rows, blank = READERS[path.suffix](_decode(path, raw), path, config, blocks)
    if not rows:
        raise DataError(f"the data file {path} has no rows: give a file with at least one.")
    return Source(str(path), rows, {str(path): hashlib.sha256(raw).hexdigest()}, blank=blank)


def _decode(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise bad_row(path, line, f"byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8.") from None


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. JSON strings may hold breaks other than \\n, \\r\\n and \\r."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        yield number, line.removesuffix("\n")


def _read_jsonl(text: str, path: Path, config: DataConfig, blocks: Blocks) -> tuple[list[Row], int]:
    rows, blank = [], 0
    for number, line in _lines(text):
        if not line.strip():
            blank += 1
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_row(path, number, f"not valid JSON ({error}); correct or delete the line.") from None
        rows.append(Row(_object(values, path, number), number))
    return rows, blank


def _object(values: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise bad_row(path, line, f"{_short(values)} is not a JSON object; write {{column: value, ...}}.")
    return values


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _read_json(text: str, path: Path, config: DataConfig, blocks: Blocks) -> tuple[list[Row], int]:
    """A list of objects, read item by item so that each row knows its line."""
    skip = json.decoder.WHITESPACE.match  # type: ignore[attr-defined]
    decode = json.JSONDecoder().raw_decode
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
        except (ValueError, RecursionError) as error:
            raise bad_row(path, getattr(error, "lineno", line), f"not valid JSON ({error}); correct it.") from None
        rows.append(Row(_object(values, path, line), line))
        at = skip(text, at).end()
        if text[at : at + 1] != ",":
            break
        at = skip(text, at + 1).end()
    if text[at : at + 1] != "]" or text[at + 1 :].strip():
        line = text.count("\n", 0, at) + 1
        raise bad_row(path, line, "not valid JSON (the list should go on with ',' or end with ']'); correct it.")
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
        delimiter="\t" if path.suffix == ".tsv" else ",",
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
                f"not valid {path.suffix[1:]} ({error}); correct it, or set quoting: none if quotes are text.",
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
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".txt": _read_text,
}
