"""What the file of a saved selection may hold: every value is checked when it is read, so that none fails later on.

People read the file, and edit it: what they choose by hand belongs into a recipe (`layers: [0, 3]`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from weftlora.data.config import RecipeSection
from weftlora.disk.files import check_regular
from weftlora.errors import ConfigError, unknown_key
from weftlora.foreign_text import from_json
from weftlora.search.hypergradient import Inner
from weftlora.terms.axes import AXES
from weftlora.terms.layers.search import Search


class _Group(RecipeSection):
    where: ClassVar[str] = "a group"

    name: Annotated[str, Field(min_length=1)]
    block: Annotated[int, Field(ge=0)] | None
    modules: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    alpha: float
    alpha_hat: float
    distance: float
    selected: bool
    near: bool
    filled: bool
    gradient_norm: float


class _File(RecipeSection):
    where: ClassVar[str] = "a selection"

    format: Annotated[int, Field(ge=1)]
    layers: list[int | str]
    candidates: Annotated[list[_Group], Field(min_length=1)]
    granularity: Literal["block", "module"]
    adapter: dict[str, Any]
    search: dict[str, Any]
    inner: dict[str, Any]
    record: dict[str, Any]
    seconds: Annotated[float, Field(ge=0)]


class Lora(RecipeSection):
    """What a stock LoRA takes over from the searched adapter; the other settings of the adapter are for people to read."""

    where: ClassVar[str] = "adapter"

    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, float] | None = None
    modules_to_save: list[str] | None = None
    task_type: str | None = None


def read(path: str | Path, newest: int) -> dict[str, Any]:
    """The content of a saved selection, as JSON has it. Raises ConfigError, naming the file and the key, if it is none.

    `newest`: the highest format that can be read.
    """
    check_regular(Path(path), ConfigError)
    try:
        content = from_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} is not a saved selection ({error}): give the file that Selection.save wrote."
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise ConfigError(f"{path} is not a saved selection: give the file that Selection.save wrote.")
    if type(content["format"]) is int and content["format"] > newest:
        raise ConfigError(
            f"{path} has selection format {content['format']}, this weftlora reads up to {newest}: upgrade weftlora."
        )
    try:
        _check(content)
    except ConfigError as error:
        raise ConfigError(
            f"{path} is a damaged selection ({str(error).rstrip('.')}): search again, or name the blocks by hand (layers=[0, 3])."
        ) from None
    return content


def _check(content: dict[str, Any]) -> None:
    file = _File.parse(content)
    Lora.parse({key: file.adapter[key] for key in Lora.model_fields if key in file.adapter})
    own = dict(file.search)
    searched = AXES["layers"].get(str(own.pop("kind", Search.kind)))
    if searched is not None:  # of a choice from elsewhere nothing is made here, so its fields are for people to read
        _make(searched, own, "search")
    _make(Inner, file.inner, "inner")
    for i, group in enumerate(file.candidates):
        if group.selected and group.block is None and file.granularity == "block":
            raise ConfigError(f"candidates.{i}.block=None is selected, and blocks are selected by their numbers")
    by_block = file.granularity == "block"
    chosen = [group.block if by_block else group.name for group in file.candidates if group.selected]
    if not chosen:
        raise ConfigError("candidates: none is selected")
    if file.layers != chosen:
        raise ConfigError(f"layers={file.layers} is not what the candidates say, which is {chosen}")


def _make(section: Callable[..., Any], given: dict[str, Any], name: str) -> None:
    known = section.__dataclass_fields__  # type: ignore[attr-defined]
    for key in given:
        if key not in known:
            raise unknown_key(key, known, name)
    section(**given)
