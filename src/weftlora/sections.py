"""Sections of recipe files: pydantic models that refuse unknown keys and name the nearest valid one."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from weftlora.errors import ConfigError, unknown_key


class RecipeSection(BaseModel):
    """Base of every section of a recipe file: frozen, no unknown keys, no silent coercion of strings to numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)
    where: ClassVar[str] = "this section"

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise unknown_key(str(key), cls.model_fields, cls.where)
        return data

    @classmethod
    def parse(cls, data: Any) -> Self:
        """Validate `data`; a failure is one `ConfigError` sentence naming the field and the value given."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            if isinstance(cause := first.get("ctx", {}).get("error"), ConfigError):
                raise cause from None
            field = ".".join(str(part) for part in first["loc"]) or cls.where
            if first["type"] == "missing":
                raise ConfigError(f"{cls.where} lacks {field}: add it.") from None
            raise ConfigError(f"{cls.where}: {field}={first.get('input')!r} is not valid: {first['msg']}.") from None
