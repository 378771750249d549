"""A base in fewer bits: what a recipe asks for, as transformers takes it; what a base is; and what it needs to be installed.

    model.load_in_4bit: true                     NF4 with double quantisation (QLoRA, arXiv 2305.14314, section 3), by bitsandbytes
    model.load_in_8bit: true                     LLM.int8() (arXiv 2208.07339), by bitsandbytes
    model.quantization: {quant_method: ...}      any quantiser of transformers, by the keys of its config; beside the two, what differs

What is not quantised (norms, embeddings, the output layer) is held in `model.dtype`, which 4-bit layers compute in too, unless
`bnb_4bit_compute_dtype` says otherwise.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from weftlora.errors import ConfigError, MissingExtraError, ModelError, suggest
from weftlora.extras import EXTRAS, install_line

METHOD = "quant_method"
PACKAGES = {
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "torchao": ("torchao", "torchao"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "hqq": ("hqq", "hqq"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "aqlm": ("aqlm", "aqlm"),
    "eetq": ("eetq", "eetq"),
    "higgs": ("flute", "flute-kernel"),
    "auto-round": ("auto_round", "auto-round"),
}
"""Quantiser, as transformers calls it → the module that it is imported as, and its distribution."""


def asked(four: bool, eight: bool, section: Mapping[str, Any] | None, dtype: str) -> dict[str, Any] | None:
    """What `load_in_4bit`, `load_in_8bit` and `quantization` of a recipe mean, with the keys of transformers; None for none of them.

    Raises:
        ConfigError: two of them say different things, or none says which quantiser.
    """
    given = dict(section or {})
    four, eight = bool(given.pop("load_in_4bit", four) or four), bool(given.pop("load_in_8bit", eight) or eight)
    if not (four or eight or section is not None):
        return None
    if four and eight:
        raise ConfigError("model.load_in_4bit and model.load_in_8bit are both true: keep one of them.")
    method = given.pop(METHOD, None)
    if not (four or eight):
        if method is None:
            raise ConfigError(
                "model.quantization does not say how: add load_in_4bit: true or load_in_8bit: true, or the quant_method of another "
                f"quantiser ({', '.join(sorted(PACKAGES))})."
            )
        return {METHOD: str(method), **given}
    if method not in (None, "bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"):
        which = "load_in_4bit" if four else "load_in_8bit"
        raise ConfigError(f"model.{which} is bitsandbytes', and model.quantization names {method!r}: keep one of them.")
    if eight:
        return {METHOD: "bitsandbytes", "load_in_8bit": True, **given}
    computed = "float32" if dtype == "auto" else dtype
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": computed}
    return {METHOD: "bitsandbytes", "load_in_4bit": True, **defaults, **given}


def loading(settings: Mapping[str, Any], path: str) -> Any:
    """transformers' config object for these settings.

    Raises:
        ConfigError: an unknown quantiser, key or value.
        MissingExtraError: its package is not installed.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KNOWN

    given = dict(settings)
    method = str(given.pop(METHOD))
    name = method if method != "bitsandbytes" else "bitsandbytes_4bit"
    if name not in KNOWN:
        raise ConfigError(
            f"model.quantization.quant_method={method!r} is not a quantiser of transformers: {suggest(method, KNOWN)}"
        )
    kind = KNOWN[name]
    valid = [key for key in inspect.signature(kind).parameters if key not in ("kwargs", "args")]
    for key in given:
        if key not in valid and not (method == "torchao" and key == "settings"):
            raise ConfigError(f"model.quantization has no key {key!r} for {method}: {suggest(key, valid)}")
    installed(method, f"the model {path!r} in {method}")
    try:
        if method == "torchao":
            given = _torchao(given)
        return kind(**given)
    except ConfigError:
        raise
    except Exception as error:  # the quantiser's own word on a value, whatever its type
        said = " ".join(str(error).split()).rstrip(".")[:300]
        raise ConfigError(f"model.quantization cannot work: {said}.") from None


def _torchao(given: dict[str, Any]) -> dict[str, Any]:
    """torchao's settings are objects of its own: `quant_type` names one, and `settings` holds what it is given."""
    import torchao.quantization as kinds

    name, values = str(given.pop("quant_type", "Int8WeightOnlyConfig")), given.pop("settings", None) or {}
    known = sorted(each for each in dir(kinds) if each.endswith("Config"))
    if name not in known:
        raise ConfigError(f"model.quantization.quant_type={name!r} is not a config of torchao: {suggest(name, known)}")
    return {**given, "quant_type": getattr(kinds, name)(**values)}


def of_checkpoint(config: Any) -> str | None:
    """The quantiser that a checkpoint was saved with, by its config; None where its weights are plain."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    said = found if isinstance(found, Mapping) else found.to_dict()
    method = said.get(METHOD)
    return str(getattr(method, "value", method) or "bitsandbytes")


def check(settings: Mapping[str, Any] | None, config: Any, path: str) -> None:
    """Refuse a base that is quantised already where another way is asked for, and one whose quantiser is not installed.

    Raises:
        ModelError: it is quantised already.
        MissingExtraError: the package that it was quantised with is not installed.
    """
    found = of_checkpoint(config)
    if found is None:
        return
    if settings is not None:
        raise ModelError(
            f"the model {path!r} is stored in fewer bits already ({found}), and the recipe would quantise it by {settings[METHOD]}: "
            "leave model.load_in_4bit, model.load_in_8bit and model.quantization out, or give the unquantised model."
        )
    installed(found, f"the model {path!r}, which is stored in {found},")


def installed(method: str, what: str) -> None:
    """Raise `MissingExtraError` with the line to install the package of a quantiser by, where it is not there."""
    module, package = PACKAGES.get(method.removesuffix("_4bit").removesuffix("_8bit"), ("", ""))
    if module and not _is_there(module):
        line = install_line("quant") if module in EXTRAS["quant"] else f"pip install {package}"
        raise MissingExtraError(f"{what} needs {package}, which is not installed: {line}")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        return False


def described(model: Any) -> dict[str, Any]:
    """What a run's record says of a quantised base: how, and by which version of which package; empty for a plain one."""
    method = of_checkpoint(getattr(model, "config", None))
    if method is None or getattr(model, "hf_quantizer", None) is None:
        return {}
    settings = model.config.quantization_config
    package = PACKAGES.get(method, ("", method))[1]
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "unknown"
    return {
        "quantisation": {
            "settings": settings if isinstance(settings, dict) else settings.to_dict(),
            "package": package,
            "version": found,
        }
    }
