"""Make peft know the type WEFT.

`register_peft_method` of peft takes only names of its closed `PeftType` enum, so the enum is extended by one member
first. Several places of peft and transformers read `.value` and `.name` of the type, which a real member has. It does nothing
the second time and refuses if another package has taken the name.

The card is the other shim. A process that has not imported weftlora gets a KeyError from peft, which nothing can change from
outside, so the README of every folder says it first. transformers' Trainer writes a card of its own before it pushes and then
has peft complete it: where peft completes the card of a weftlora adapter, the line is put back.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from weftlora.errors import WeftError
from weftlora.glue.tuner import PREFIX, WeftTuner
from weftlora.spec import WeftConfig, write_loading_note

NAME = "WEFT"


def register() -> None:
    """Add WEFT to peft's types and tables.

    Raises:
        WeftError: another package has registered a peft type or prefix of this name.
    """
    if NAME in PeftType.__members__:
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[NAME]) is WeftConfig:
            return
        raise WeftError(
            "another package has already registered a peft type named WEFT: uninstall it, or do not import both."
        )
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    member.__objclass__, member._sort_order_ = PeftType, len(PeftType._member_names_)
    setattr(
        PeftType, NAME, member
    )  # before the map: an enum refuses to set what is a member. From Python 3.12 on this is what is read
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    try:
        register_peft_method(
            name=NAME.lower(), config_cls=WeftConfig, model_cls=WeftTuner, prefix=PREFIX, is_mixed_compatible=False
        )
    except KeyError as error:
        raise WeftError(
            f"peft does not accept the type WEFT ({error}): another package uses its name or prefix."
        ) from None
    PeftModel.create_or_update_model_card = _with_note(PeftModel.create_or_update_model_card)


def _with_note(card: Any) -> Any:
    """peft's method that completes a model card, and then, for a weftlora adapter, the line on how to load it."""

    @functools.wraps(card)
    def completed(self: PeftModel, output_dir: str, *args: Any, **kwargs: Any) -> Any:
        made = card(self, output_dir, *args, **kwargs)
        if any(isinstance(config, WeftConfig) for config in self.peft_config.values()):
            write_loading_note(Path(output_dir))
        return made

    return completed
