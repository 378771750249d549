"""weftlora in ms-swift: a file for `--external_plugins` that fills its table of tuners.

    # plugin.py
    from weftlora.integrations.ms_swift import register
    register("hydralora", heads=3)

    swift sft --external_plugins plugin.py --tuner_type hydralora --callbacks weft --lora_rank 16 ...

Importing this module registers every recipe but plain LoRA under its name with its own defaults, and the callback `weft`, which
schedules in fractions of the run and scores of rank slots need. Written for ms-swift 4.6. Its own names (`lora_rank`, `lora_alpha`,
`lora_dropout`, `target_modules`, `target_regex`, `modules_to_save`, `use_rslora`) say what they always say; where one is left at
ms-swift's default, the recipe's default holds.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from peft import PeftModel, get_peft_model
from swift.callbacks import callbacks_map
from swift.tuner_plugin import PeftTuner, tuners_map

import weftlora
from weftlora.errors import ConfigError
from weftlora.integrations import config_for, rows_to_score_on
from weftlora.recipes import RECIPES, SEARCHING

_TASKS = {"seq_cls": "SEQ_CLS", "reranker": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}


def register(recipe: str, name: str | None = None, **fields: Any) -> None:
    """Make `--tuner_type NAME` train a recipe with these fields.

    Args:
        recipe: as `weftlora recipes` lists them.
        name: what ms-swift is to call it; the recipe's own without one.
        fields: as in the `adapter:` section of a recipe file.

    Raises:
        ConfigError: an unknown recipe or field, or a name that ms-swift has for something else.
    """
    config_for({"recipe": recipe, **fields}, {}, "ms-swift")
    called = name or recipe
    there = tuners_map.get(called)
    if there is not None and not issubclass(there, _Recipe):
        raise ConfigError(f"ms-swift has a tuner {called!r} of its own: give register(..., name=...) another name.")
    tuners_map[called] = type(f"Weft_{called}", (_Recipe,), {"section": {"recipe": recipe, **fields}})


class _Recipe(PeftTuner):
    """A recipe as ms-swift asks for it; saving is peft's own."""

    section: dict[str, Any]

    @classmethod
    def prepare_model(cls, args: Any, model: Any) -> Any:
        """The model with a new adapter, from the section and ms-swift's arguments. Raises WeftError."""
        targets = _said(args, "target_regex") or _targets(_said(args, "target_modules"))
        return get_peft_model(
            model,
            config_for(
                cls.section,
                {
                    "r": ("--lora_rank", _said(args, "lora_rank")),
                    "lora_alpha": ("--lora_alpha", _said(args, "lora_alpha")),
                    "lora_dropout": ("--lora_dropout", _said(args, "lora_dropout")),
                    "target_modules": ("--target_modules", targets),
                    "modules_to_save": ("--modules_to_save", _said(args, "modules_to_save")),
                    "use_rslora": ("--use_rslora", _said(args, "use_rslora")),
                },
                "ms-swift",
                _TASKS.get(str(getattr(args, "task_type", "")), "CAUSAL_LM"),
            ),
        )

    @staticmethod
    def from_pretrained(model: Any, model_id: str, **kwargs: Any) -> Any:
        """The model with a saved adapter. Raises WeftError."""
        return PeftModel.from_pretrained(model, model_id, **kwargs)


class _Callback(weftlora.Callback):
    """`--callbacks weft`: ms-swift makes it of its arguments and its trainer."""

    def __init__(self, args: Any, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer  # which has neither its model nor its rows yet

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        self.validation = rows_to_score_on(model, getattr(self.trainer, "eval_dataset", None))
        super().on_train_begin(args, state, control, model=model, train_dataloader=train_dataloader, **kwargs)


def _said(args: Any, name: str) -> Any:
    """An argument that the user gave; None for one that is as ms-swift has it without."""
    defaults = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(args)
    }
    value = getattr(args, name, None)
    return None if value == defaults.get(name) else value


def _targets(given: Any) -> Any:
    """ "all-linear" is a list of one in ms-swift."""
    names = [given] if isinstance(given, str) else list(given or [])
    return "all-linear" if names == ["all-linear"] else names


for _name in RECIPES:
    if not _name.startswith("peft:") and _name not in SEARCHING and _name != "lora":  # which is ms-swift's own
        register(_name)
callbacks_map["weft"] = _Callback
