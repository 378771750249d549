"""What differs between the versions of peft, transformers and trl that weftlora runs on: here and nowhere else.

peft ≥ 0.21        a tuner says itself which tensors are saved and how they are called (three hooks of `BaseTuner`)
peft 0.18 to 0.20  `get_peft_model_state_dict` takes the adapter's name out of keys that end in it, or nearly; ours have it in the
                   middle, so it would stay in the file and no loader would find the tensors. `bridge_saving` makes
                   these versions write the same files, and refuse the same ones. It goes when the last such row of matrix.toml goes.
older              refused where a config is made (`why_not`)

What a version can do is read off what it has, never off its number.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from weftlora.errors import WeftError
from weftlora.host.loading import OtherShape, count_on_first_site, passing_over_sizes, tensor_mismatch

NEEDED: dict[str, tuple[str, ...]] = {
    "peft.utils": ("register_peft_method", "ModulesToSaveWrapper"),
    "peft.utils.other": ("get_pattern_key", "AuxiliaryTrainingWrapper"),
    "peft.tuners.tuners_utils": (
        "_maybe_include_all_linear_layers",
        "check_adapters_to_merge",
        "BaseTuner._cast_adapter_dtype",
        "BaseTuner._check_target_module_exists",
        "BaseTuner._get_tied_target_modules",
        "BaseTuner._replace_module",
        "BaseTuner._unload_and_optionally_merge",
        "BaseTunerLayer._move_adapter_to_device_of_base_layer",
    ),
}
"""What weftlora uses of peft beyond its documented names, by module."""
HOOKS = ("_get_adapter_state_dict", "_remove_adapter_name_from_key", "_remap_adapter_state_dict_for_load")
SUPPORTED = "peft>=0.18,<0.22"


# ---------------------------------------------------------------------- peft


def why_no_sft() -> str | None:
    """Why trl's SFTTrainer cannot compute its loss here, with any adapter, in one sentence; None if it can.

    trl 1.15 has its loss as a Triton kernel alone, and None in its place where Triton is not installed.
    """
    import trl
    from trl.trainer import utils

    if getattr(utils, "_ChunkedLogProbFunction", True) is not None:
        return None
    return f"trl {trl.__version__} computes its loss by Triton, which is not installed here"


def dequantising() -> dict[str, Any]:
    """Arguments of `from_pretrained` that make plain weights of a GGUF file.

    transformers ≥ 5.20 or so keeps them packed, unless told so; the versions before know nothing else.
    """
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@functools.cache
def why_not() -> str | None:
    """Why the installed peft cannot carry weftlora's adapters, in one sentence; None if it can."""
    import peft

    lacks = next((name for module, names in NEEDED.items() for name in names if not _has(module, name)), None)
    if lacks is None:
        lacks = "a way of saving that weftlora knows" if _saving() is None else None
    if lacks is None:
        return None
    return f"peft {peft.__version__} lacks {lacks}, which weftlora needs: pip install '{SUPPORTED}'."


def check_peft() -> None:
    """Refuse a peft that weftlora cannot use; to be called where a config is made.

    Raises:
        WeftError: the installed peft lacks something that is needed; the sentence names it and the versions that have it.
    """
    if reason := why_not():
        raise WeftError(reason)


def ties_weights() -> bool:
    """Whether the installed peft asks a tuner to train tied embeddings as one."""
    return _has("peft.tuners.tuners_utils", "BaseTuner._add_modules_to_save_to_tie")


def saves_biases() -> bool:
    """Whether the installed peft saves the biases that an adapter of another's type trains, and loads them again."""
    return _has("peft.tuners.tuners_utils", "BaseTuner._get_learnable_bias_state_dict")


@functools.cache
def asks_how_experts_lie() -> bool:
    """Whether stock LoRA reads matrices of experts as [out, in] unless their module says `is_transposed`; before peft 0.20 it reads
    all as [in, out]."""
    import torch
    from peft import LoraConfig, get_peft_model

    holder = torch.nn.Module()
    holder.experts = torch.nn.Module()
    holder.experts.weight = torch.nn.Parameter(torch.empty(2, 3, 4))
    with torch.random.fork_rng(devices=[]):  # A is drawn, and nothing of ours may be drawn otherwise for it
        get_peft_model(holder, LoraConfig(r=1, target_modules=[], target_parameters=["experts.weight"]))
    read = next(p for name, p in holder.named_parameters() if ".lora_A." in name)
    return int(read.shape[1]) == 4


def bridge_saving() -> None:
    """Let a peft without a tuner's hooks save and load weftlora's adapters as later ones do; where it has them, let the one for
    loading know whether tensors of another size are to be passed over, which peft does not tell it.

    The functions are replaced wherever they have been imported by name, so that no caller is left with peft's own.
    """
    module = importlib.import_module("peft.utils.save_and_load")
    hooked = (("set_peft_model_state_dict", _loaded_by_hook),)
    generic = (("get_peft_model_state_dict", _saved), ("set_peft_model_state_dict", _loaded))
    for name, wrap in hooked if _saving() == "hooks" else generic:
        original = getattr(module, name)
        if not hasattr(original, "__wrapped__"):
            _replace(name, original, wrap(original))


def _saving() -> str | None:
    """How the installed peft names what it saves: by "hooks" of the tuner, in a "generic" way, or None for one not known here."""
    if all(_has("peft.tuners.tuners_utils", f"BaseTuner.{name}") for name in HOOKS):
        return "hooks"
    return "generic" if _has("peft.utils.save_and_load", "_insert_adapter_name_into_state_dict") else None


def _has(module: str, dotted: str) -> bool:
    try:
        found: Any = importlib.import_module(module)
        for name in dotted.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return False
    return True


def _replace(name: str, original: object, ours: object) -> None:
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and vars(module).get(name) is original:
            setattr(module, name, ours)


# as torch says it
_SIZES = re.compile(
    r"size mismatch for (\S+): copying a param with shape \S+\(\[(.*?)\]\) from .*? model is \S+\(\[(.*?)\]\)"
)


def _saved(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    @functools.wraps(original)
    def get_peft_model_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given = _arguments(original, args, kwargs)
        model, name = getattr(given["model"], "_orig_mod", given["model"]), given["adapter_name"]
        found = original(*args, **kwargs)
        if not _is_ours(model, name):
            return found
        from weftlora.host.attach import say_ranks, warn_of_missing

        warn_of_missing(model, name)
        say_ranks(model, model.peft_config[name], name)
        return {_without(key, name): tensor for key, tensor in found.items() if _belongs(key, name)}

    return get_peft_model_state_dict


def _loaded_by_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, args, kwargs)
        before = passing_over_sizes.set(bool(given.get("ignore_mismatched_sizes")))
        try:
            return original(*args, **kwargs)
        finally:
            passing_over_sizes.reset(before)

    return set_peft_model_state_dict


def _loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def set_peft_model_state_dict(*args: Any, **kwargs: Any) -> Any:
        given = _arguments(original, args, kwargs)
        model, name = given["model"], given["adapter_name"]
        if not _is_ours(model, name):
            return original(*args, **kwargs)
        mark = f".weft_site.{name}."
        expected = [key for key in model.state_dict() if mark in key]
        tensors = count_on_first_site(dict(given["peft_model_state_dict"]), expected, f"{mark}steps")
        given["peft_model_state_dict"] = {_without(key, name): tensor for key, tensor in tensors.items()}
        try:
            result = original(**given)
        except RuntimeError as error:
            if not (
                wrong := [OtherShape(key, _shape(file), _shape(own)) for key, file, own in _SIZES.findall(str(error))]
            ):
                raise
            raise tensor_mismatch([], [], wrong) from None
        extra, missing = _of(result.unexpected_keys, ".weft_site."), _of(result.missing_keys, mark)
        if given.get("ignore_mismatched_sizes"):  # these versions take what is passed over out of the file first
            missing = [key for key in missing if _without(key, name) not in given["peft_model_state_dict"]]
        if extra or missing:
            raise tensor_mismatch(extra, missing, [])
        return result

    return set_peft_model_state_dict


def _arguments(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split(",") if side.strip())


def _is_ours(model: Any, name: str) -> bool:
    return str(getattr(model.peft_config.get(name), "peft_type", "")).rpartition(".")[2] == "WEFT"


def _belongs(key: str, name: str) -> bool:
    """Whether a key that peft would save is no tensor of another adapter: what has no name any more was this one's."""
    inside = key.partition(".weft_site.")[2]
    return "." not in inside or inside.startswith(f"{name}.")


def _without(key: str, name: str) -> str:
    return key.replace(f".weft_site.{name}.", ".weft_site.")


def _of(keys: Iterable[str], mark: str) -> list[str]:
    return sorted(key for key in keys if mark in key)


# ---------------------------------------------------------------------- arguments of trainers

RENAMED: dict[str, tuple[str, ...]] = {
    "activation_checkpointing": ("gradient_checkpointing",),
    "activation_checkpointing_kwargs": ("gradient_checkpointing_kwargs",),
}
"""Today's name of a trainer's argument, and what it was called before, newest first."""


def named(arguments_class: type, values: dict[str, Any]) -> dict[str, Any]:
    """`values` under the names that this version of an arguments class (of transformers or trl) has for them."""
    return {name_in(arguments_class, key): value for key, value in values.items()}


def grouped(arguments_class: type, by_length: bool) -> dict[str, Any]:
    """The argument that puts rows of like length into one batch; transformers 4 has a switch for it, 5 a name."""
    valid = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    if "train_sampling_strategy" in valid:
        return {"train_sampling_strategy": "group_by_length"} if by_length else {}
    return {"group_by_length": True} if by_length else {}


def name_in(arguments_class: type, name: str) -> str:
    """What `arguments_class` calls the argument that is called `name` today; `name` itself where it has none of the names."""
    valid = {field.name for field in dataclasses.fields(arguments_class) if field.init}
    return next((candidate for candidate in (name, *RENAMED.get(name, ())) if candidate in valid), name)
