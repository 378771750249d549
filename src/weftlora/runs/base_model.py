"""The frozen base: found, checked against the task, loaded, and known again by a fingerprint.

The fingerprint answers whether this is the base that an adapter was trained on, and costs no read of the whole checkpoint: type and
sizes in the config, and of the weights the shape of every tensor and 32 evenly spaced values of it, rounded to bfloat16, so that
loading in fp32 or bf16 gives the same fingerprint.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from weftlora.adapted.quantised import format_of, is_quantised, keep_differentiable
from weftlora.data.paths import locate
from weftlora.errors import AdapterError, ModelError
from weftlora.runs import quantisation
from weftlora.runs.gguf import dequantised
from weftlora.runs.precision import Precision, precision

if TYPE_CHECKING:
    from datasets import Dataset

    from weftlora.data import Loaded, Task
    from weftlora.runs.recipe import ModelConfig


HEADS = ("score", "classifier", "pre_classifier")
"""What a classification model may be missing: its head is new, trained and saved with the adapter."""

_AUTO = {
    "causal": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "classification": AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Wanted:
    """Which base, and how to load it: what a recipe's `model` section says, for those who have no recipe."""

    path: str
    dtype: str | None = "float32"
    """None: as `weftlora.runs.precision` chooses."""
    task: Literal["auto", "causal", "seq2seq", "classification"] = "auto"
    attn_implementation: str | None = None
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    quantization: dict[str, Any] | None = None


@dataclass(frozen=True)
class Base:
    """What is known of a base before its weights are loaded."""

    config: ModelConfig | Wanted
    source: str
    """Folder or hub id."""
    settings: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase

    precision: Precision
    """The type that its weights are held in."""

    @property
    def quantisation(self) -> dict[str, Any] | None:
        """How it is quantised as it is loaded, with the keys of transformers; None where it is taken as it is stored."""
        asked = self.config
        return quantisation.asked(asked.load_in_4bit, asked.load_in_8bit, asked.quantization, self.precision.dtype)

    @property
    def wants(self) -> Task | None:
        """The task the recipe names or the architecture implies; None leaves it to the data."""
        if self.config.task != "auto":
            return self.config.task
        return "seq2seq" if self.settings.is_encoder_decoder else None


def resolved(path: str, base_dir: Path) -> str:
    """The folder or hub id of a model as people write it: the one place where every command's model goes through.

    Raises:
        ModelError: no such folder or file, or a GGUF file that cannot be a base.
        MissingExtraError: a GGUF file, and the package `gguf` is not installed.
    """
    place = locate(path, base_dir)
    return str(dequantised(Path(place), path)) if Path(place).is_file() else place


def find(config: ModelConfig | Wanted, base_dir: Path) -> Base:
    """Locate a base, read its config and tokenizer.

    Raises:
        ModelError: no such folder or hub model, a folder without config, tokenizer or safetensors weights, or one that is
            quantised already and asked for in another form.
        ConfigError: a form of fewer bits that there is not.
        MissingExtraError: the package of its quantiser is not installed.
    """
    source = resolved(config.path, base_dir)
    try:
        settings = AutoConfig.from_pretrained(source, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"the model {config.path!r} cannot be used: {_first_line(error)}") from None
    _check_attention(settings, config.path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(f"the tokenizer of {config.path!r} has no padding, end or unknown token: give it a pad_token.")
    base = Base(config, source, settings, tokenizer, precision(config.dtype, settings))
    quantisation.check(base.quantisation, settings, config.path)
    if base.quantisation is not None:
        quantisation.loading(base.quantisation, config.path)  # what is wrong with it is said before rows are read
    return base


def _check_attention(settings: PretrainedConfig, path: str) -> None:
    """Refuse a config.json that names a kernel of the hub as its attention: transformers would download and run it."""
    for part in (settings, settings.get_text_config()):
        named = part._attn_implementation
        if named is not None and "/" in named:
            raise ModelError(
                f"the config.json of {path!r} asks for the attention kernel {named!r}, which is code: set "
                "model.attn_implementation to eager or sdpa in the recipe, and take it out of config.json."
            )


def load(base: Base, task: Task, labels: list[str] | None = None) -> PreTrainedModel:
    """The base with the head that `task` needs; a new classification head is drawn from torch's seed.

    Raises:
        ModelError: the architecture cannot do `task`, or weights other than a new head are missing.
    """
    _check_task(base, task)
    dtype = base.precision.dtype
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if base.quantisation is not None:
        options["quantization_config"] = quantisation.loading(base.quantisation, base.config.path)
    if base.config.attn_implementation:
        options["attn_implementation"] = base.config.attn_implementation
    if task == "classification":
        options |= {**_named(labels or []), "ignore_mismatched_sizes": True}
    loading = logging.getLogger("transformers.modeling_utils")
    level = loading.level
    loading.setLevel(logging.ERROR)  # it reports the new head, which is meant
    try:
        model, report = _AUTO[task].from_pretrained(
            base.source, use_safetensors=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {base.config.path!r} are damaged ({_first_line(error)}): copy them again."
        ) from None
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise ModelError(f"the model {base.config.path!r} cannot be loaded: {_first_line(error)}") from None
    finally:
        loading.setLevel(level)
    _check_complete(base, task, report["missing_keys"], report["mismatched_keys"])
    keep_differentiable(model)
    if model.config.get_text_config().pad_token_id is None:
        model.config.get_text_config().pad_token_id = base.tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id = base.tokenizer.pad_token_id
    return model


def _named(labels: list[str]) -> dict[str, Any]:
    """What a config says of the classes."""
    numbers = {"label2id": {name: index for index, name in enumerate(labels)}}
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), **numbers}


def skeleton(base: Base, task: Task, labels: list[str] | None = None) -> PreTrainedModel:
    """The base on the meta device: modules and shapes, no values.

    Raises:
        ModelError: the architecture cannot do `task`.
    """
    _check_task(base, task)
    settings = copy.deepcopy(base.settings)
    if task == "classification":
        for key, value in _named(labels or []).items():
            setattr(settings, key, value)
    with torch.device("meta"):
        return cast(PreTrainedModel, _AUTO[task].from_config(settings, trust_remote_code=False))


def is_encoder(settings: PretrainedConfig) -> bool:
    """Whether a model of this config reads its text from both sides, and writes none."""
    return settings.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(settings, "is_decoder", False)


def _check_task(base: Base, task: Task) -> None:
    kind, name = base.settings.model_type, base.config.path
    if task == "classification":
        if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
            raise ModelError(f"{name!r} ({kind}) has no classification form in transformers: give another base.")
        return
    if base.settings.is_encoder_decoder:
        if task == "causal":
            raise ModelError(f"{name!r} ({kind}) is an encoder-decoder: set model.task=seq2seq instead of causal.")
        if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
            raise ModelError(f"{name!r} ({kind}) cannot turn text into text: give another base.")
        return
    if task == "seq2seq":
        raise ModelError(f"{name!r} ({kind}) is not an encoder-decoder: set model.task=causal or give another base.")
    if is_encoder(base.settings) or kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{name!r} ({kind}) is an encoder and cannot generate: give text/label rows, or a decoder as the base."
        )


def _check_complete(base: Base, task: Task, missing: set[str], mismatched: Iterable[Any]) -> None:
    def foreign(keys: Iterable[str]) -> list[str]:
        new_head = task == "classification"
        return sorted(key for key in keys if not (new_head and (key.split(".")[0] in HEADS or "pooler" in key)))

    if wrong := foreign(entry if isinstance(entry, str) else entry[0] for entry in mismatched):
        raise ModelError(
            f"the weights of {base.config.path!r} do not fit its config.json: {len(wrong)} tensors have another shape, the "
            f"first is {wrong[0]!r}; put the weights and the config of one model together."
        )
    absent = foreign(missing)
    if absent:
        raise ModelError(
            f"the model {base.config.path!r} lacks weights for {task}: {len(absent)} tensors are missing, "
            f"the first is {absent[0]!r}; give a complete checkpoint or another task."
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".") + "."


def check_ids(base: Base, model: PreTrainedModel, data: Loaded) -> None:
    """Refuse tokens that the model's embedding has no row for.

    Raises:
        ModelError: a token of the rows, or the one that rows are padded with, is beyond it.
    """
    size = int(cast(Any, model.get_input_embeddings()).weight.shape[0])
    splits = [split for split in (data.train, data.validation, data.test) if split is not None]
    columns = ("input_ids",) if data.task == "classification" else ("input_ids", "labels")
    worst = max(largest(split, column) for split in splits for column in columns)
    pad = base.tokenizer.pad_token_id
    worst = max(worst, pad if isinstance(pad, int) else 0)
    if worst >= size:
        token = base.tokenizer.convert_ids_to_tokens(worst)
        use = "which rows are padded with" if worst == pad else "which is in the rows"
        raise ModelError(
            f"the tokenizer of {base.config.path!r} has the token {token!r} (id {worst}), {use}, and the model's embedding has {size} "
            "rows: call model.resize_token_embeddings(len(tokenizer)), save model and tokenizer into a folder, and give that, with "
            "adapter.modules_to_save=[embed_tokens, lm_head] if the new tokens mean something."
        )


_PLACES = re.compile(r"(?:^|\.)(?:wpe|\w*position\w*)$")
"""What families call the table that gives every place in a row a vector of its own."""
_NO_TEXT = ("relative", "vis", "image", "patch", "audio", "speech")
"""In the names of such tables that count no tokens of a text."""


def places(model: nn.Module) -> int | None:
    """The longest row that a model with such a table takes, in tokens; None for one without, where places are computed."""
    found = []
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and _PLACES.search(name) and not any(part in name for part in _NO_TEXT):
            first = getattr(table, "offset", None)  # of a class of its own, as OPT's and BART's
            if type(table) is nn.Embedding and table.padding_idx is not None:  # RoBERTa counts from behind its padding
                first = table.padding_idx + 1
            found.append(table.num_embeddings - (first if isinstance(first, int) else 0))
    return min(found, default=None)


def check_places(model: nn.Module, *splits: Dataset | None) -> None:
    """Refuse rows that are longer than the model's table of places. Raises ModelError."""
    import pyarrow.compute as pc

    if (most := places(model)) is None:
        return
    longest = 0
    for split in splits:
        for column in ("input_ids", "labels"):
            if split is not None and len(split) and isinstance(split[0][column], list):
                chunks = split.select_columns([column]).with_format("arrow")[:][column].chunks
                longest = max(longest, *(pc.max(pc.list_value_length(chunk)).as_py() for chunk in chunks))
    if longest > most:
        raise ModelError(
            f"rows have up to {longest} tokens, and the model has places for {most}: set data.max_length={most}."
        )


def largest(split: Dataset, column: str) -> int:
    """The largest token id in a column of lists."""
    import pyarrow.compute as pc

    found = [pc.max(chunk.flatten()).as_py() for chunk in split.with_format("arrow").data.column(column).chunks]
    return max((value for value in found if value is not None), default=0)


ALIKE = 1e-3
"""Rows of the output layer that differ by less, relative to their size, are one row to a greedy choice."""
FAINT = 1e-2
"""A row whose norm is below this share of the median one was never trained."""


def check_end(base: Base, model: PreTrainedModel, data: Loaded, trained: Iterable[str]) -> None:
    """Warn of answers whose end the frozen base cannot write, since nothing that an adapter learns could make it stop.

    It cannot where the row of the output layer for the token that ends answers is nothing, or that of other tokens too. Texts are
    learned all the same, so that it is no error.

    Args:
        trained: modules that are trained whole beside the adapter; the output layer among them can learn it.
    """
    head = model.get_output_embeddings()
    if data.task == "classification" or head is None or getattr(head, "weight", None) is None:
        return
    names = [name for name, module in model.named_modules() if module is head]
    if any(name == given or name.endswith(f".{given}") for name in names for given in trained):
        return
    weight = cast(torch.Tensor, head.weight).detach()
    if weight.is_meta or is_quantised(head):
        return
    for token in sorted(ends(data, base.tokenizer)):
        if token >= len(weight):
            continue
        why = _cannot_be_told(weight, cast("torch.Tensor | None", getattr(head, "bias", None)), token)
        if why:
            warnings.warn(
                f"answers end with {base.tokenizer.convert_ids_to_tokens(token)!r} (id {token}), which {base.config.path!r} cannot "
                f"write: {why}, so no adapter makes it stop; train that layer too with adapter.modules_to_save="
                f"[{(names or ['lm_head'])[0].rpartition('.')[2]}], or take the chat model of the same family.",
                stacklevel=3,
            )


def ends(data: Loaded, tokenizer: PreTrainedTokenizerBase, rows: int = 200) -> set[int]:
    """The special tokens that the first training rows end with."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    last = [[label for label in row if label >= 0][-1:] for row in data.train[:rows]["labels"]]
    return {ids[0] for ids in last if ids} & special


def _cannot_be_told(weight: torch.Tensor, bias: torch.Tensor | None, token: int) -> str:
    """Why a token cannot be told from others by its row of the output layer; empty where it can."""
    own = weight[token].float()
    alike, norms = 0, []
    for start in range(0, len(weight), 4096):  # a vocabulary at once is as large as the layer
        part = weight[start : start + 4096].float()
        norms.append(part.norm(dim=1))
        same = (part - own).abs().amax(1) <= ALIKE * own.abs().max()
        if bias is not None:
            same &= (bias[start : start + 4096] - bias[token]).abs() <= ALIKE
        alike += int(same.sum())
    if own.norm() <= FAINT * torch.cat(norms).median():
        return "its row of the output layer is close to zero, as in a row that was never trained"
    if alike > 1:
        others = "that of another token" if alike == 2 else f"those of {alike - 1} other tokens"
        return f"its row of the output layer is equal to {others}"
    return ""


_SIZES = ("hidden_size", "d_model", "n_embd", "num_hidden_layers", "num_layers", "n_layer", "vocab_size")


@dataclass(frozen=True)
class Fingerprint:
    """What a base is: `kind` to show a person, the hashes and the form to compare."""

    kind: str
    shapes: str
    values: str
    form: str = ""
    """How its weights are quantised, in words; empty where they are not."""

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Fingerprint:
        """That in a run's record of its base."""
        return cls(record["kind"], record["shapes"], record["values"], str(record.get("form", "")))


def fingerprint(model: PreTrainedModel) -> Fingerprint:
    """The fingerprint of a base, taken before any adapter is put into it; a new classification head is left out.

    Of a quantised layer only the sides are in it: how its bytes are laid out differs between machines and versions of the quantiser.
    """

    shapes, values = hashlib.sha256(), hashlib.sha256()
    form = format_of(model) or ""
    few: list[str] = []
    if form:
        for name, module in model.named_modules():
            if isinstance(getattr(module, "in_features", None), int) and is_quantised(module):
                few.append(f"{name}.")
                shapes.update(f"{name} {module.out_features} {module.in_features}\n".encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.split(".")[0] in HEADS or "pooler" in name or name.startswith(tuple(few)):
            continue
        shapes.update(f"{name} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().reshape(-1)
        picked = flat[:: max(1, flat.numel() // 32)][:32]
        values.update(picked.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    sizes = [f"{key}={value}" for key in _SIZES if (value := getattr(model.config, key, None)) is not None]
    kind = " ".join([model.config.model_type, *sizes])
    return Fingerprint(kind, shapes.hexdigest()[:16], values.hexdigest()[:16], form)


def check_same(trained: Fingerprint, given: Fingerprint, adapter: str, base: str) -> None:
    """Refuse a base other than the adapter's own.

    Raises:
        AdapterError: another architecture, or the same one with other weights or in another form.
    """
    if given.form != trained.form:
        before, now = (f"in {each.form}" if each.form else "that was not quantised" for each in (trained, given))
        raise AdapterError(
            f"the adapter {adapter} was trained on a base {before}, and {base} is one {now}: give the base in the form it was trained "
            "on."
        )
    if given.shapes != trained.shapes:
        raise AdapterError(
            f"the adapter {adapter} was trained on another base ({trained.kind}) than {base} ({given.kind}): "
            "give the base it was trained on."
        )
    if given.values != trained.values:
        raise AdapterError(
            f"the adapter {adapter} was trained on other weights than those of {base} (same architecture, {given.kind}): "
            "give the base it was trained on."
        )
