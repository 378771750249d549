"""A folder onto the hub: a run's adapter, a bare adapter, or an export.

What goes there says nothing of this machine: a base that was loaded from a folder is called by its name on the hub, which must be
given. The token is the hub client's own (HF_TOKEN, or its login), and is neither asked for nor kept here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weftlora.errors import ConfigError, RunError
from weftlora.records import Record
from weftlora.runs.run import Run, check_source

_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
NEVER = {"checkpoints", "search", "run.json", "metrics.jsonl", "events.jsonl"}


@dataclass(frozen=True)
class Pushed(Record):
    """What is on the hub."""

    repo: str
    url: str
    files: list[str]
    private: bool


def push(source: str | Path, repo: str, base_name: str | None, private: bool, message: str) -> Pushed:
    """See `weftlora.push`."""
    if not _NAME.fullmatch(repo):
        raise ConfigError(f"{repo!r} is not a repository: write owner/name.")
    folder = _folder(Path(source))
    with tempfile.TemporaryDirectory(prefix="weft-push-") as made:
        place = Path(made) / "folder"
        shutil.copytree(folder, place, ignore=lambda _, names: [n for n in names if n.startswith(".") or n in NEVER])
        _rename_base(place, base_name)
        files = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
        return Pushed(repo, _upload(place, repo, private, message), files, private)


def _folder(source: Path) -> Path:
    """The folder to push. Raises AdapterError, RunError."""
    if (source / "config.json").is_file() and not (source / "run.json").is_file():
        return source  # merged weights
    check_source(source)
    if not (source / "run.json").is_file():
        return source
    run = Run.load(source)
    if not run.adapter_folder.is_dir():
        raise RunError(f"{source} has no adapter: the run is {run.status}; finish it with --resume.")
    return run.adapter_folder


def _rename_base(place: Path, base_name: str | None) -> None:
    """Call the base by its name on the hub, in the config and in the card. Raises ConfigError."""
    file = place / "adapter_config.json"
    if not file.is_file():
        return
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    named = str(config.get("base_model_name_or_path") or "")
    local = os.path.isabs(named) or named.startswith((".", "~")) or Path(named).is_dir()
    if base_name is None and local:
        raise ConfigError(
            f"the adapter names its base by a folder of this machine ({named}): say what the hub calls it with --base-name "
            "owner/model."
        )
    if base_name is None or not named:
        return
    config["base_model_name_or_path"] = base_name
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    card = place / "README.md"
    if card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(named, base_name), encoding="utf-8")


def _upload(place: Path, repo: str, private: bool, message: str) -> str:
    """Make the repository, unless it is there, and commit the folder. Raises RunError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=str(place), commit_message=message)
    except LocalTokenNotFoundError:
        raise RunError("pushing needs an account of the hub: set HF_TOKEN, or log in with `hf auth login`.") from None
    except OfflineModeIsEnabled:
        raise RunError("the hub client is offline (HF_HUB_OFFLINE): unset that variable to push.") from None
    except HfHubHTTPError as error:
        code = int(getattr(error.response, "status_code", 0))
        why = {
            401: "it does not know your token: set HF_TOKEN, or log in with `hf auth login`",
            403: "your token may not write there",
        }
        raise RunError(
            f"{repo} was not pushed: {why.get(code, f'the hub answered {code}')}; push again to send what is missing."
        ) from None
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"{repo} was not pushed: the hub cannot be reached ({type(error).__name__}); try again."
        ) from None
    return url
