"""weftlora in LLaMA-Factory's v1: `name: weft` in its `peft_config`.

    peft_config: {name: weft, recipe: hydralora, heads: 3, r: 16, target_modules: all}

LLaMA-Factory 0.9.5 loads no plug-in of other packages by itself, so whoever starts it imports this module first, for instance in a
script of two lines: `import weftlora.integrations.llamafactory`, then `from llamafactory.cli import main; main()` with USE_V1=1.
Nothing of LLaMA-Factory is changed; the module registers one more entry in its table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin
from peft import PeftModel, get_peft_model

from weftlora.integrations import config_for


@PeftPlugin("weft").register()  # type: ignore[untyped-decorator]
def weft_model(model: Any, config: Mapping[str, Any], is_train: bool = False) -> Any:
    """The model with a new adapter, or with that of `adapter_name_or_path`.

    Args:
        config: `peft_config` of LLaMA-Factory: `name`, `adapter_name_or_path`, and the `adapter:` section of a recipe file;
            `target_modules: all` means every linear module.
        is_train: whether the adapter is to be trained.

    Raises:
        WeftError: the section or the saved adapter cannot work, or does not fit the model.
    """
    fields = {key: value for key, value in config.items() if key != "name"}
    saved = fields.pop("adapter_name_or_path", None)
    if saved:
        path = saved[0] if isinstance(saved, list) and len(saved) == 1 else saved
        return PeftModel.from_pretrained(model, path, is_trainable=is_train)
    if fields.get("target_modules") in ("all", ["all"]):
        fields["target_modules"] = "all-linear"
    made = config_for(fields, {}, "LLaMA-Factory")
    made.inference_mode = not is_train
    return get_peft_model(model, made)
