"""Make peft know the type WEFT.

`register_peft_method` of peft takes only names of its closed `PeftType` enum, so the enum is extended by one member
first. Several places of peft and transformers read `.value` and `.name` of the type, which a real member has. This is the
one shim; it does nothing the second time and refuses if another package has taken the name.
"""

from __future__ import annotations

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from weftlora.errors import WeftError
from weftlora.glue.host_versions import bridge_saving
from weftlora.glue.tuner import PREFIX, WeftTuner
from weftlora.spec import WeftConfig

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
    bridge_saving()
