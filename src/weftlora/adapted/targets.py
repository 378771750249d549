"""What can carry an adapter, the sentence for what cannot, and the transformer blocks that the targets lie in.

Blocks are found by object: no naming scheme is assumed. A stack is an outermost `nn.ModuleList` whose entries hold linear modules
without being one; its entries are blocks. Blocks are numbered in the order in which the model lists them, through all of its stacks:

    Llama   model.layers.0 … n−1                      0 … n−1
    GPT-2   transformer.h.0 …                         0 …
    BERT    bert.encoder.layer.0 …                    0 …
    T5      encoder.block.0 …, decoder.block.0 …      0 … n−1, n … n+m−1

Lists inside a block (T5's sublayers, experts) belong to the block. A block that is listed twice counts once.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any, TypeVar, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from weftlora.adapted.attention import WeftAttention, check_attention
from weftlora.adapted.experts import check_experts, expert_parameters
from weftlora.adapted.layer import WeftWhole
from weftlora.adapted.quantised import is_quantised
from weftlora.adapted.reading import reading_of
from weftlora.adapted.sharing import attention_inputs
from weftlora.adapter.spec import WeftConfig
from weftlora.errors import NoMatchError, TargetError, suggest

T = TypeVar("T")


def check_adaptable(name: str, module: nn.Module, parent: nn.Module) -> tuple[int, int]:
    """(in, out) features of a module that can carry an adapter.

    Raises:
        TargetError: a transposed convolution, 3-D expert parameters, a module whose caller reads its weight instead of
            calling it, or anything else without in and out features; says what to do.
    """
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    kind = type(base).__name__
    if isinstance(parent, nn.MultiheadAttention):
        raise TargetError(
            f"{name} belongs to a torch MultiheadAttention, which reads its weight directly, so an adapter on it would do nothing: "
            f"leave it out, or name {name.rpartition('.')[0] or 'the attention'}, which is adapted as a whole."
        )
    if isinstance(parent, nn.TransformerEncoderLayer) and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"{name} belongs to a torch TransformerEncoderLayer, whose fast path skips adapters in evaluation: call "
            "torch.backends.mha.set_fastpath_enabled(False) first."
        )
    if isinstance(base, (nn.MultiheadAttention, WeftAttention)):
        return base.embed_dim, base.embed_dim
    if _is_state_space(parent) and _last(name) in READ_BY_STATE_SPACE:
        raise TargetError(
            f"{name} belongs to a state-space mixer ({type(parent).__name__}), which reads its weight without calling it, on every "
            "device or by its kernels: target in_proj instead."
        )
    if isinstance(base, Conv1D):
        fan_in, out = base.weight.shape
        return fan_in, out
    if isinstance(base, nn.Linear):
        if type(base).forward is not nn.Linear.forward and (why := why_not_linear(base)) is not None:
            raise TargetError(f"{name} is a {kind}, which {why}: leave it out.")
        return base.in_features, base.out_features
    if (reading := reading_of(base)) is not None:
        if isinstance(base, nn.modules.conv._ConvNd) and base.groups > 1 and _reads_weight(parent, _last(name)):
            raise TargetError(
                f"{name} belongs to a {type(parent).__name__}, whose code reads its weight without calling it, as mixers do while "
                "they generate: leave it out."
            )
        return reading.sides
    if isinstance(base, nn.modules.conv._ConvNd):
        raise TargetError(
            f"{name} is a {kind}; of convolutions Conv1d, Conv2d and Conv3d carry an adapter: leave it out, or train it with "
            "modules_to_save."
        )
    if cubes := expert_parameters(base):
        raise TargetError(
            f"{name} holds its experts as fused parameters ({cubes[0]}), not as linear modules: name them in target_parameters, as in "
            f"target_parameters=['{_last(name)}.{cubes[0]}']."
        )
    fan_in, out = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if isinstance(fan_in, int) and isinstance(out, int):
        return fan_in, out
    raise TargetError(
        f"{name} is a {kind}, which is not a linear module: name linear modules in target_modules, or use 'all-linear'."
    )


def _last(name: str) -> str:
    return name.rpartition(".")[2]


@torch.no_grad()
def why_not_linear(base: nn.Linear) -> str | None:
    """What a linear module with a forward of its own gives instead of one tensor [..., out], as a clause; None where it gives that.

    It is run on the meta device, without values and without touching the module. Quantised weights, which have kernels for real
    tensors alone, are left to their first forward.
    """
    needed = [
        p
        for p in inspect.signature(base.forward).parameters.values()
        if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    if len(needed) > 1:
        return f"takes {' and '.join(p.name for p in needed)} instead of one input"
    state = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    meta = {
        name: torch.empty_like(value, device="meta")
        for name, value in state.items()
        if type(value) in (Tensor, nn.Parameter)
    }
    if len(meta) < len(state) or not base.weight.is_floating_point() or base.weight.dtype.itemsize < 2:
        return None
    y: Any = None
    for lead in ((2, 3), (6,)):  # some take a list of tokens only
        x = torch.empty(*lead, base.in_features, device="meta", dtype=base.weight.dtype)
        try:
            y = functional_call(base, meta, (x,))
            break
        except NotImplementedError:  # an operation that the meta device does not have
            return None
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
            continue
    else:
        return f"does not take an input of {base.in_features} numbers per token, as a linear module does"
    if not isinstance(y, Tensor):
        return f"returns a {type(y).__name__} instead of one tensor, as routers do"
    if y.shape != (*lead, base.out_features):
        return f"gives another shape than a linear module, {list(y.shape)} for {list(x.shape)}"
    return None


def check_reading(config: WeftConfig, name: str, module: nn.Module) -> None:
    """Refuse an embedding, convolution or attention where the structure or its dropout is defined on the x of a linear module alone.

    Raises:
        TargetError: names the module.
    """
    check_attention(config, name, module)
    if reading_of(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module) is None:
        return
    structure = config.structure
    if structure.outside or (structure.per_head_dropout and config.lora_dropout):
        what = f"{structure.title} is outside the equation" if structure.outside else "a dropout mask per head is drawn"
        raise TargetError(
            f"{name} is a {type(module).__name__}, and {what}, which linear modules alone can have: leave it out."
        )


READ_BY_STATE_SPACE = ("out_proj", "dt_proj")
"""What a state-space mixer (Mamba and its kin) never calls on some device, by its last name. Stock peft refuses out_proj as well."""
READ_BY_KERNELS = (*READ_BY_STATE_SPACE, "x_proj")
"""What it does not call where its kernels are installed: a good target on a CPU, a dead one in training on a GPU."""


def _reads_weight(module: nn.Module, child: str) -> bool:
    """Whether the code of a module's class asks for the weight of the child called so; where it is and of which kind may be asked."""
    for kind in type(module).__mro__:
        if kind is nn.Module:
            break
        with suppress(OSError, TypeError):  # no source
            if re.search(
                rf"self\.{child}\.weight\b(?!\.(dtype|device|shape|size|dim|ndim)\b)", inspect.getsource(kind)
            ):
                return True
    return False


def _is_state_space(module: nn.Module) -> bool:
    """Whether this is the mixer of a state-space model: the decay A and the skip D of its recurrence are parameters of it."""
    return all(isinstance(getattr(module, name, None), nn.Parameter) for name in ("A_log", "D"))


# ---------------------------------------------------------------------- what is targeted where nobody names modules

HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Task → the heads that peft trains in full beside every adapter of it; it adds them to modules_to_save once targets are chosen."""
NOT_TEXT = ("vision_config", "audio_config")


def trained_in_full(config: WeftConfig, name: str) -> bool:
    """Whether the module `name` is, or is part of, one that is trained and saved in full beside the adapter."""
    task = getattr(config.task_type, "value", config.task_type)
    wanted = [*(config.modules_to_save or []), *HEADS.get(str(task), ())]
    return any(re.match(rf"(^|.*\.){head}($|\..*)", name) for head in wanted)


def all_linear(config: WeftConfig, model: nn.Module) -> set[str]:
    """The full names of the linear modules that can carry an adapter, but the output layer and what is trained in full.

    Whatever is linear and cannot is left out with a warning that says why.

    Raises:
        TargetError: there is none.
    """
    of = copy.copy(config)
    of.target_modules = "all-linear"
    found = cast("set[str]", _maybe_include_all_linear_layers(of, model).target_modules) | in_other_classes(model)
    of.target_modules = "all-linear"  # peft has put the names in its place
    modules = dict(model.named_modules())
    wrapped = tuple(f"{name}." for name, module in modules.items() if isinstance(module, AuxiliaryTrainingWrapper))
    found = {
        n for n in found if n and not (n.startswith(wrapped) or trained_in_full(config, n) or _excluded(config, n))
    }
    refused: dict[str, TargetError] = {}
    for name in sorted(found):
        parent = modules[name.rpartition(".")[0]]
        try:
            check_adaptable(name, modules[name], parent)
            if _is_state_space(parent) and _last(name) in READ_BY_KERNELS:
                raise TargetError(
                    f"{name} is read by the kernels of {type(parent).__name__} without being called: name it in "
                    "target_modules if you run "
                    "without those kernels."
                )
        except TargetError as error:
            refused[name] = error
    left = found - refused.keys()
    if refused and not left:
        raise next(iter(refused.values()))
    if not left:
        raise NoMatchError(no_match(of, model))
    if refused:
        names = list(refused)
        also = f" (and {len(names) - 1} more such modules)" if len(names) > 1 else ""
        warnings.warn(f"all-linear leaves out what cannot carry an adapter: {refused[names[0]]}{also}", stacklevel=6)
    return left


def in_other_classes(model: nn.Module) -> set[str]:
    """The full names of what a quantiser put in the place of linear modules in classes of its own (GPTQ, AWQ, HQQ), but the output
    layer's: peft's "all-linear" sees subclasses of torch's Linear alone."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is None:
        return set()
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return {
        name
        for name, module in model.named_modules()
        if not isinstance(module, (nn.Linear, BaseTunerLayer)) and module is not head and not [*module.children()]
        if isinstance(getattr(module, "out_features", None), int) and is_quantised(module)
        if not inside_adapter(model, name)
    }


def all_experts(config: WeftConfig, model: nn.Module) -> set[str]:
    """The full names of the fused parameters of experts that can carry an adapter, but what is excluded or trained in full.

    Whatever cannot is left out with a warning that says why.
    """
    wanted = [n for n in expert_parameters(model) if not (_excluded(config, n) or trained_in_full(config, n))]
    found: set[str] = set()
    refused: list[TargetError] = []
    for name in wanted:
        try:
            check_experts(config, name, model.get_submodule(name.rpartition(".")[0]))
            found.add(name)
        except TargetError as error:
            refused.append(error)
    if refused:
        also = f" (and {len(refused) - 1} more such parameters)" if len(refused) > 1 else ""
        warnings.warn(f"all-linear leaves out what cannot carry an adapter: {refused[0]}{also}", stacklevel=6)
    return found


def named_experts(config: WeftConfig, model: nn.Module) -> set[str]:
    """The full names of the parameters that target_parameters names, as peft reads it: a name, or the end of one.

    Raises:
        TargetError: a name is that of no parameter, or of one that is no experts'.
    """
    wanted = sorted(config.target_parameters or ())
    there = expert_parameters(model)
    found: set[str] = set()
    for target in wanted:
        mine = {n for n in there if n == target or n.endswith(f".{target}")}
        if not mine:
            known = sorted({".".join(n.split(".")[-2:]) for n in there})
            other = next((n for n, _ in model.named_parameters() if n == target or n.endswith(f".{target}")), None)
            what = (
                f"is the parameter {other}, and no experts' [experts, out, in]"
                if other
                else f"is none of {type(model).__name__}"
            )
            end = suggest(target, known) if known else "it has no fused experts; name linear modules in target_modules."
            raise TargetError(f"target_parameters names {target!r}, which {what}: {end}")
        found |= {n for n in mine if not (_excluded(config, n) or trained_in_full(config, n))}
    return found


def _excluded(config: WeftConfig, name: str) -> bool:
    """Whether exclude_modules takes the module `name` away, as peft reads it."""
    wanted = config.exclude_modules or ()
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in wanted)


def default_targets(config: WeftConfig, model: nn.Module) -> set[str]:
    """What a config without target_modules adapts, by full names: every linear module, or the attention inputs where the structure
    asks for them; of a generating model that also sees or hears, its language part."""
    if config.structure.targets == "experts" and expert_parameters(model):
        return set()
    found = all_linear(config, model)
    if (part := language_part(model)) is not None and (inside := {n for n in found if n.startswith(f"{part}.")}):
        if rest := len(found) - len(inside):
            warnings.warn(
                f"target_modules is not given, so the language part of {type(model).__name__} ({part}) is adapted and {rest} linear "
                "modules elsewhere are not: target_modules='all-linear' takes them too.",
                stacklevel=5,
            )
        found = inside
    if config.structure.targets != "attention inputs":
        return found
    taken = attention_inputs(found)
    blocks = Blocks(model)
    if taken and {blocks.of(name) for name in taken} >= {blocks.of(name) for name in found} - {None}:
        return taken
    return _by_shape(config, model, found, taken)


def by_last_names(model: nn.Module, names: set[str]) -> set[str]:
    """The same modules by their last names, where these mean no others."""
    lasts = {_last(name) for name in names}
    return lasts if {name for name, _ in model.named_modules() if _last(name) in lasts} == names else names


def _by_shape(config: WeftConfig, model: nn.Module, found: set[str], partly: set[str]) -> set[str]:
    """The modules of `found` that can share: of which several have one last name and one size.

    Raises:
        TargetError: none can.
    """
    modules = dict(model.named_modules())
    kinds = {n: (_last(n), check_adaptable(n, modules[n], modules[n.rpartition(".")[0]])) for n in found}
    members = Counter(kinds.values())
    if not (taken := {name for name, kind in kinds.items() if members[kind] > 1}):
        raise TargetError(
            f"no attention input projections found in {type(model).__name__}, {config.structure.method}'s default target, and no two "
            "linear modules of one name and shape: name target_modules, or use 'all-linear'."
        )
    lasts = _few(sorted({_last(name) for name in taken}))
    only = f"attention input projections in some of its blocks only ({_last(min(partly))} among them)" if partly else ""
    warnings.warn(
        f"{type(model).__name__} has {only or 'no attention input projections'}, {config.structure.method}'s default target, so all "
        f"{len(taken)} linear modules of which several have one name and shape are adapted ({lasts}): "
        "name target_modules to choose others.",
        stacklevel=6,
    )
    return taken


def language_part(model: nn.Module) -> str | None:
    """The name of the module that generates text in a model which sees or hears too; None where the whole model does, or nothing."""
    config, head = getattr(model, "config", None), getattr(model, "get_output_embeddings", lambda: None)
    if not any(getattr(config, name, None) is not None for name in NOT_TEXT) or head() is None:
        return None
    text = getattr(config, "get_text_config", lambda: config)()
    named = model.named_modules() if text is not config else ()
    return next((name for name, module in named if name and getattr(module, "config", None) is text), None)


def is_all_linear(config: WeftConfig) -> bool:
    """Whether target_modules is the short form for every linear module but the output layer."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"


def inside_adapter(model: nn.Module, name: str) -> bool:
    """Whether a module called `name` is a part of an adapted layer (its base, an adapter) rather than a target."""
    parts = name.split(".")
    above = (model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))
    return any(isinstance(module, (BaseTunerLayer, WeftWhole)) for module in above)


def linear_names(model: nn.Module) -> list[str]:
    """The last names of the model's linear modules, adapted ones included."""
    found = {
        _last(name)
        for name, module in model.named_modules()
        if isinstance(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module, (nn.Linear, Conv1D))
        and not inside_adapter(model, name)
    }
    found |= {_last(name) for name in in_other_classes(model)}
    return sorted(found - {""})


def check_saved_modules(config: WeftConfig, model: nn.Module) -> None:
    """Refuse a name in modules_to_save that no module has; it would be left untrained without a word.

    "classifier" and "score" may be absent: peft names both for every classification model.

    Raises:
        TargetError: names the entry and the nearest module.
    """
    names = [name for name, _ in model.named_modules()]
    for wanted in set(config.modules_to_save or []) - {"classifier", "score"}:
        if not any(re.match(rf"(^|.*\.){wanted}($|\..*)", name) for name in names):
            raise TargetError(
                f"modules_to_save names {wanted!r}, which {type(model).__name__} does not have: "
                f"{suggest(wanted, {_last(name) for name in names} - {''})}"
            )


def check_tokens(config: WeftConfig, model: nn.Module) -> None:
    """Refuse tokens that no embedding has, and an output layer that is trained twice: peft would fail in the first forward.

    Raises:
        TargetError: names the entry, and what to do.
    """
    if (wanted := config.trainable_token_indices) is None:
        return
    inputs = cast("nn.Module | None", getattr(model, "get_input_embeddings", lambda: None)())
    by_name = wanted if isinstance(wanted, Mapping) else None
    for name, tokens in (by_name or {"the input embeddings": cast("list[int]", wanted)}).items():
        found = [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}")] if by_name else [inputs]
        found = [m.original_module if isinstance(m, AuxiliaryTrainingWrapper) else m for m in found]
        rows = min((len(m.weight) for m in found if isinstance(m, (nn.Embedding, nn.Linear))), default=0)
        if not rows:
            names = {_last(n) for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
            raise TargetError(
                f"trainable_token_indices names {name!r}, which is not an embedding: {suggest(name, names)}"
            )
        if max(tokens) >= rows:
            raise TargetError(
                f"trainable_token_indices names token {max(tokens)}, and {name} has {rows} rows: call "
                "model.resize_token_embeddings(len(tokenizer)) first."
            )
    head = cast("nn.Module | None", getattr(model, "get_output_embeddings", lambda: None)())
    whole = [n for n, m in model.named_modules() if m is head and _last(n) in (config.modules_to_save or [])]
    if whole and getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        raise TargetError(
            f"trainable_token_indices and modules_to_save={[_last(whole[0])]} train one weight twice, because {type(model).__name__} "
            "ties its embeddings (trl asks for both where a chat template adds tokens): untie them first, with "
            "model.config.tie_word_embeddings = False and a copy of the weight in the output layer, or train the tokens alone."
        )


def warn_of_unmatched(config: WeftConfig, model: nn.Module) -> None:
    """Name the entries of target_modules that no module is called while others adapt, often a misspelt name, and those that are
    trained in full instead."""
    targets = config.target_modules
    if not isinstance(targets, set):
        return
    if heads := sorted(target for target in targets if trained_in_full(config, target)):
        warnings.warn(
            f"target_modules={_few(heads)} are trained in full beside the adapter (modules_to_save, or the head of the task), so they "
            "get no adapter: leave them out of target_modules.",
            stacklevel=5,
        )
    names = [name for name, _ in model.named_modules()]
    unused = sorted(t for t in targets if not any(name == t or name.endswith(f".{t}") for name in names))
    if unused:
        warnings.warn(
            f"target_modules={_few(unused)} match no module of {type(model).__name__} and adapt nothing: "
            f"{suggest(unused[0], linear_names(model))}",
            stacklevel=5,
        )


def _few(names: Collection[str]) -> str:
    names = list(names)
    return f"{names[:4]}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"


def no_match(config: WeftConfig, model: nn.Module) -> str:
    """Why nothing matched: 3-D expert parameters, a misspelt name, or a filter that leaves nothing."""
    targets = config.target_modules
    linear = linear_names(model)
    wanted = sorted(targets) if isinstance(targets, set) else [str(targets)]
    hit = [n for n in expert_parameters(model) if _last(n) in wanted or any(n.endswith(f".{w}") for w in wanted)]
    if hit:
        return (
            f"{hit[0]} is a fused parameter of experts, not a linear module: name it in target_parameters, as in "
            f"target_parameters=['{'.'.join(hit[0].split('.')[-2:])}']."
        )
    if not linear:
        return f"{type(model).__name__} has no linear module, so there is nothing that weftlora could adapt."
    names = {n for n, _ in model.named_modules()}
    found = [w for w in wanted if any(n == w or n.endswith(f".{w}") for n in names)]
    if is_all_linear(config):
        return (
            f"all-linear leaves no module of {type(model).__name__}: exclude_modules={config.exclude_modules}, modules_to_save="
            f"{config.modules_to_save} or the head of the task take all of them away."
        )
    if isinstance(targets, str):
        if any(re.fullmatch(targets, n) for n in names):
            return f"target_modules={targets!r} matches only modules that exclude_modules or modules_to_save take away."
        return f"target_modules={targets!r} matches no module of {type(model).__name__}, which has {', '.join(linear)}."
    if found:
        return (
            f"target_modules={_few(wanted)} match only modules that exclude_modules={config.exclude_modules}, modules_to_save="
            f"{config.modules_to_save} or layers_to_transform={config.layers_to_transform} leave out: relax one of them."
        )
    return f"target_modules={_few(wanted)} match no module of {type(model).__name__}: {suggest(wanted[0], linear)}"


def by_pattern(pattern: Mapping[str, T], name: str, default: T) -> T:
    """What rank_pattern or alpha_pattern says of the module `name`, as the host reads it: the first regex that matches."""
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def pattern_key(name: str, sites: Collection[str]) -> str:
    """A regex for one site; anchored where peft would take it for the end of another site's name too."""
    anchored = any(other.endswith(f".{name}") for other in sites)
    return f"^{re.escape(name)}" if anchored else re.escape(name)


def rank_and_alpha(config: WeftConfig, name: str, within: str | None = None) -> tuple[int, float]:
    """r and lora_alpha of the site called `name` at the start; of a matrix `within` a module that is adapted as a whole, what a
    pattern says of that, unless one names the matrix; so too of an expert `within` a fused parameter."""
    r, alpha = config.r, cast(float, config.lora_alpha)
    for each in (name,) if within is None else (within, name):
        r = by_pattern(config.at_start("rank_pattern"), each, r)
        alpha = by_pattern(config.at_start("alpha_pattern"), each, alpha)
    return r, alpha


class Blocks:
    """Names of the blocks of one model, in order; `number[name]` is a block's number."""

    def __init__(self, model: nn.Module):
        self.model_name = type(model).__name__
        self.modules = {name for name, _ in model.named_modules()}
        outer: list[str] = []
        names: dict[int, str] = {}
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList) or any(name.startswith(f"{before}.") for before in outer):
                continue
            outer.append(name)
            for i, entry in enumerate(module):
                if _is_block(entry):
                    names.setdefault(id(entry), f"{name}.{i}" if name else str(i))
        self.names = list(names.values())
        self.number = {name: i for i, name in enumerate(self.names)}

    def of(self, module_name: str) -> str | None:
        """The block that a module is in, by name; None outside of all blocks."""
        parts = module_name.split(".")
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        return next((prefix for prefix in prefixes if prefix in self.number), None)


def _is_block(entry: nn.Module) -> bool:
    return not _is_linear(entry) and any(_is_linear(module) for module in entry.modules())


def _is_linear(module: nn.Module) -> bool:
    """Whether a site could stand here: a linear module of any kind, plain, quantised or adapted already."""
    if isinstance(module, (nn.Linear, Conv1D, BaseTunerLayer)):
        return True
    return isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    )
