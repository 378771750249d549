"""A folder that `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote, read into memory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from weftlora.data.source import Row, Source
from weftlora.errors import DataError

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
