"""Data sets of the Hugging Face hub, by `datasets`: downloaded once, or a stream where they are large and few rows are wanted.

What can go wrong on the way is one sentence: no such data set, no right to it, no such config or split, a connection that breaks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from weftlora.data.config import DataConfig
from weftlora.data.read import Source, Table, first_line, of_splits, quiet
from weftlora.errors import ConfigError, DataError
from weftlora.foreign_text import shortened

LARGE = 5 * 2**30
"""Bytes from which on a data set counts as large."""
MORE = 4
"""Streamed rows for each that is wanted: some are empty, some too long, some are carved off."""


def read_hub(name: str, config_name: str | None, config: DataConfig, split: str) -> Source:
    """The rows of a data set; for the training split the others are its parts.

    Raises DataError where it cannot be had, ConfigError where it takes a config and none is named.
    """
    import datasets

    said = name if config_name is None else f"{name}:{config_name}"
    with _sentences(said):
        builder = datasets.load_dataset_builder(name, config_name)
        streamed = config.streaming
        if streamed is None:
            size = builder.info.download_size or builder.info.dataset_size or 0
            streamed = size > LARGE and config.limit is not None
        if streamed and config.limit is None:
            raise ConfigError(f"data.streaming takes the first rows of {said}: say how many with data.limit.")
        with quiet():
            held = datasets.load_dataset(name, config_name, streaming=streamed)
            if streamed:
                held = {each: _first(rows, config.limit or 0) for each, rows in held.items()}
        mark = _mark(builder)
    sources = {
        str(each): Source(
            f"{said} {each}", Table(rows, f"{said} {each}"), {f"hub:{said} {each}": f"{mark}-{len(rows)}"}, unit="row"
        )
        for each, rows in held.items()
        if len(rows)
    }
    if not sources:
        raise DataError(f"the data set {said} of the hub has no rows: name another.")
    wanted = config.split
    if split != "train" and wanted is None:
        wanted = next((each for each in _names(split) if each in sources), "train")
    return of_splits(sources, said, wanted, "use another data set")


def _names(split: str) -> tuple[str, ...]:
    from weftlora.data.read import VALIDATION_NAMES

    return VALIDATION_NAMES if split == "validation" else (split,)


def _first(rows: Any, limit: int) -> Any:
    """The first rows of a stream, as a table."""
    import datasets

    wanted = list(itertools.islice(rows, max(limit * MORE, 1000)))
    return datasets.Dataset.from_list(wanted, features=rows.features)


def _mark(builder: Any) -> str:
    """What a data set is, by the commit that its files are named with."""
    files = {str(split): sorted(map(str, names)) for split, names in (builder.config.data_files or {}).items()}
    return hashlib.sha256(json.dumps([str(builder.hash), files], sort_keys=True).encode()).hexdigest()


@contextmanager
def _sentences(said: str) -> Iterator[None]:
    """What `datasets` and the hub's client raise, as one sentence."""
    import datasets
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        chain = _chain(error)
        status = next(
            (s for each in chain if (s := getattr(getattr(each, "response", None), "status_code", None))), None
        )
        kinds = tuple(type(each) for each in chain)
        gated = any(issubclass(kind, GatedRepoError) for kind in kinds) or "gated dataset" in str(error)
        if gated or status in (401, 403):
            raise DataError(
                f"the hub does not let you read the data set {said} (it answers {status or 401}): log in with an account that may, or "
                "set HF_TOKEN."
            ) from None
        if status == 404 or any(
            issubclass(kind, (RepositoryNotFoundError, datasets.exceptions.DatasetNotFoundError)) for kind in kinds
        ):
            raise DataError(
                f"there is neither a file nor a data set of the hub called {said}: check the name; a private one needs HF_TOKEN."
            ) from None
        if any(issubclass(kind, OfflineModeIsEnabled) for kind in kinds):
            raise DataError(
                f"the data set {said} is not on this machine, and HF_HUB_OFFLINE is set: unset it once to download it."
            ) from None
        if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
            raise ConfigError(
                f"the data set {said} needs another config ({shortened(' '.join(str(error).split()), 400)}): write name:config."
            ) from None
        if "scripts are no longer supported" in str(error):
            raise DataError(
                f"the data set {said} is built by a Python script of its own, which weftlora does not run: use its parquet files."
            ) from None
        network = (HfHubHTTPError, OSError, EOFError)
        if any(issubclass(kind, network) for kind in kinds) or any("httpx" in kind.__module__ for kind in kinds):
            raise DataError(
                f"the data set {said} could not be read from the hub ({first_line(chain[-1])}): try again; what was "
                "downloaded is kept."
            ) from None
        raise DataError(f"the data set {said} cannot be read ({first_line(error)}): see its page on the hub.") from None


def _chain(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from."""
    out: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in out:
        out.append(at)
        at = at.__cause__ or at.__context__
    return out
