"""weftlora in axolotl: a plugin that axolotl finds by itself, through the entry point group `axolotl.plugins`.

    adapter: weft
    weft: {recipe: hydralora, heads: 3}
    lora_r: 16
    lora_alpha: 32
    lora_target_linear: true

Written for axolotl 0.21. Its own names (`lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`, `lora_target_linear`,
`lora_modules_to_save`, `lora_rank_pattern`, `lora_alpha_pattern`, `lora_model_dir`, `peft_use_rslora`) say what they always say.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from pydantic import BaseModel, Field, model_validator

from weftlora.errors import ConfigError
from weftlora.integrations import config_for, rows_to_score_on

NAME = "weft"
_OWN = ("lora_plus_ratio", "freeze_down", "export")
"""Keys of the section that are about the run, and none of the config."""
_FOR_STOCK = {
    "loraplus_lr_ratio": "write weft.lora_plus_ratio, which asks the adapter for its up factors",
    "peft_use_dora": "leave it out; weftlora's recipes have no such form",
    "peft_init_lora_weights": "leave it out; the recipe says how an adapter starts",
    "lora_target_parameters": "name them in weft, as in a recipe's adapter section",
    "relora": "leave it out; it merges and restarts stock LoRA",
    "lora_mlp_kernel": "leave it out; weftlora has a fused path of its own",
    "lora_qkv_kernel": "leave it out; weftlora has a fused path of its own",
    "lora_o_kernel": "leave it out; weftlora has a fused path of its own",
    "merge_lora": "leave it out and run weftlora export --merge afterwards",
}
"""Keys of axolotl that work on stock LoRA's tensors by name, and what to do instead."""


class WeftArgs(BaseModel):
    """What the plugin adds to axolotl's config."""

    weft: dict[str, Any] | None = Field(
        default=None,
        description="With adapter: weft, the adapter as in a recipe file of weftlora: recipe, and its fields; also lora_plus_ratio, "
        "freeze_down, and export: true for a stock LoRA beside the adapter.",
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_cannot_work(cls, data: Any) -> Any:
        """Refuse it while axolotl reads its file, before a model is loaded."""
        if not isinstance(data, dict) or data.get("adapter") != NAME:
            if isinstance(data, dict) and data.get("weft"):
                raise ValueError(f"weft: is given, but adapter is {data.get('adapter')!r}: write adapter: weft.")
            return data
        if not data.get("weft") and not data.get("lora_model_dir"):
            raise ValueError("adapter: weft needs to know which: write weft: {recipe: hydralora}, for example.")
        for key, instead in _FOR_STOCK.items():
            if data.get(key):
                raise ValueError(f"{key} works on stock LoRA alone: {instead}.")
        try:
            _config(data)
        except ConfigError as error:  # pydantic shows a ValueError as its own
            raise ValueError(str(error)) from None
        return data


class WeftPlugin(BasePlugin):
    """Trains an adapter of weftlora where axolotl's file says `adapter: weft`; does nothing otherwise."""

    def get_input_args(self) -> str:
        return "weftlora.integrations.axolotl.WeftArgs"

    def get_adapter_capabilities(self) -> list[Any]:
        return [AdapterCapabilities(name=NAME, lora_like=True)]

    def load_adapter(self, model: Any, cfg: Any, inference: bool = False, config_only: bool = False) -> Any:
        """The adapted model and its config; None for any other adapter.

        Raises:
            WeftError: the section, or the saved adapter of `lora_model_dir`, does not fit the model.
        """
        if cfg.adapter != NAME:
            return None
        from peft import PeftModel, get_peft_model

        if cfg.lora_model_dir:
            from weftlora.adapter.spec import read_config

            if config_only:
                return None, read_config(cfg.lora_model_dir)
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference)
            return model, model.peft_config["default"]
        config = _config(cfg)
        if config_only:
            return None, config
        model = get_peft_model(model, config)
        model.print_trainable_parameters()
        return model, config

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Rates by role, where the section asks for them."""
        section = _section(cfg)
        chosen = {key: section[key] for key in ("lora_plus_ratio", "freeze_down") if section.get(key) is not None}
        if cfg.adapter != NAME or not chosen:
            return
        import weftlora

        made, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        lr = options.pop("lr")
        groups = weftlora.param_groups(trainer.model, lr=lr, weight_decay=trainer.args.weight_decay, **chosen)
        trainer.optimizer = made(groups, lr=lr, **options)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
        """What tells the adapter how long the run is, and marks checkpoints that are whole."""
        if cfg.adapter != NAME:
            return []
        import weftlora

        return [weftlora.Callback(validation=rows_to_score_on(trainer.model, trainer.eval_dataset))]

    def post_train(self, cfg: Any, model: Any) -> None:
        """With `export: true`, a stock LoRA in `stock-lora` of the output folder, or the reason why there is none."""
        if cfg.adapter != NAME or not _section(cfg).get("export") or model is None:
            return
        import weftlora

        out = Path(cfg.output_dir) / "stock-lora"
        if not out.exists():  # axolotl calls this twice
            weftlora.export_lora(model, out)


def _section(cfg: Any) -> dict[str, Any]:
    found = cfg.get("weft") or {}
    return dict(found if isinstance(found, dict) else dict(found))


def _config(cfg: Any) -> Any:
    """The config that axolotl's file, as it was read or as it is written, describes."""
    section = {key: value for key, value in _section(cfg).items() if key not in _OWN}
    targets = cfg.get("lora_target_modules")
    if cfg.get("lora_target_linear"):
        if targets:
            raise ConfigError(
                "lora_target_linear and lora_target_modules both say what is adapted: leave one of them out."
            )
        targets = "all-linear"
    return config_for(
        section,
        {
            "r": ("lora_r", cfg.get("lora_r")),
            "lora_alpha": ("lora_alpha", cfg.get("lora_alpha")),
            "lora_dropout": (
                "lora_dropout",
                cfg.get("lora_dropout") or None,
            ),  # 0.0 where the file says nothing, as with us
            "target_modules": ("lora_target_modules", targets),
            "modules_to_save": ("lora_modules_to_save", cfg.get("lora_modules_to_save")),
            "rank_pattern": ("lora_rank_pattern", cfg.get("lora_rank_pattern")),
            "alpha_pattern": ("lora_alpha_pattern", cfg.get("lora_alpha_pattern")),
            "use_rslora": ("peft_use_rslora", cfg.get("peft_use_rslora")),
        },
        "axolotl",
    )
