"""What an adapter is: the five choices, rank, scale, dropout and targets, as one peft config.

    WeftConfig(structure=Hydra(heads=3), start=Kaiming(), boost=None, ranks=Uniform(), layers=All(), r=8, ...)

A config that exists is valid: every choice checks itself, and `weftlora.adapter.compat` checks the pairs. The saved form is
versioned; a folder written by a newer format is refused by name instead of being misread.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, cast

from packaging.version import InvalidVersion, Version
from peft import LoraConfig, PeftConfig, PeftType

from weftlora.adapter import before_configs, compat
from weftlora.errors import AdapterError, ConfigError, suggest, unknown_key
from weftlora.foreign_text import for_markdown, from_json
from weftlora.settings import Epochs, is_number, is_whole
from weftlora.terms import registry
from weftlora.terms.axes import AXES, PROTOCOLS
from weftlora.terms.boost import Boost
from weftlora.terms.choice import Choice
from weftlora.terms.layers import Layers
from weftlora.terms.ranks import Ranks
from weftlora.terms.start import Start
from weftlora.terms.structure import Structure
from weftlora.terms.trust import from_folder
from weftlora.version import __version__

FORMAT_VERSION = 2
"""Of a saved config. 1: 0.1.0rc1. 2: moving ranks go on where every module lost a slot (`Choice.earlier`)."""

DROPOUT_MASKS = ("linear", "input")
BIASES = ("none", "all", "lora_only")


def encode_choice(choice: Choice | None) -> dict[str, Any] | None:
    """A choice as plain JSON: {"kind": "hydra", "heads": 3, ...}; None stays None."""
    if choice is None:
        return None
    fields = {f.name: getattr(choice, f.name) for f in dataclasses.fields(choice) if f.init}  # type: ignore[arg-type]
    plain = {name: dataclasses.asdict(v) if isinstance(v, Epochs) else v for name, v in fields.items()}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in plain.items()}
    return {**registry.encoded(choice), **plain}


def decode_choice(axis: str, value: Any, version: int = FORMAT_VERSION) -> Any:
    """The choice that `value` means on `axis`: an instance, a name ("tied"), {"kind": ...} or {"hydra": {"heads": 3}}.

    A plain value that stands for a choice is that: on the axis layers, a bare list is `Only`. A name that is not weftlora's own is
    looked up among the terms that installed packages offer (`weftlora.terms.registry`). `version` is the format of the config that
    it stands in.
    """
    if value is None:
        return None
    if isinstance(value, PROTOCOLS[axis].protocol):
        registry.adopt(cast(Choice, value))
        return value
    if isinstance(value, str):
        value = {"kind": value}
    kinds: dict[str, Any] = dict(AXES[axis])
    for cls in kinds.values():
        if isinstance(value, cls.takes):
            return cls(tuple(value))
    if not isinstance(value, Mapping) or not value:
        raise ConfigError(f"{axis}={value!r} is not a choice of this axis: {_choices(axis)}")
    if "kind" in value:
        kind, fields = str(value["kind"]).lower(), {k: v for k, v in value.items() if k != "kind"}
    elif len(value) == 1:
        [(name, inner)] = value.items()
        if not (inner is None or isinstance(inner, Mapping)):
            raise ConfigError(
                f"{axis}={dict(value)!r}: give the fields of {name!r} by name, as {{{name!r}: {{field: value}}}}."
            )
        kind, fields = str(name).lower(), dict(inner or {})
    else:
        raise ConfigError(f"{axis}={dict(value)!r} does not say which choice it is: add `kind`. {_choices(axis)}")
    if kind == "none":
        return None
    package, made_by = (
        (fields.pop(key, None) for key in ("package", "version")) if kind not in AXES[axis] else (None, None)
    )
    cls = registry.find(axis, kind, package, made_by)
    for format_version, meant in sorted(cls.earlier.items()):
        fields = {**(meant if version <= format_version else {}), **fields}
    return registry.from_plain(cls, axis, kind, fields)


def _choices(axis: str) -> str:
    return f"choose from {', '.join(AXES[axis])}."


def _default(axis: str) -> Callable[[], Any]:
    """What makes the choice of an axis that a config has unless it says otherwise."""
    return cast("Callable[[], Any]", PROTOCOLS[axis].default)


@dataclass
class WeftConfig(PeftConfig):
    """The configuration of a weftlora adapter; fields named as in peft's LoraConfig mean what they mean there.

    Args:
        structure: who owns A and B: `Plain()`, `Hydra(heads=3)`, `Tied(train="tl6")`.
        start: where A and B start: `Kaiming()`, or, after some steps, along W's own directions: `Directions(after=100)`.
        boost: extra slots along directions of W: None or `Dash(directions=8, after=100)`.
        ranks: which slots are live: `Uniform()`, or `Reallocate(max_rounds=8)`, which moves them between modules.
        layers: which blocks are adapted: `All()`, `Only([0, 3])` (a bare list will do) or `Search()`.
        r: rank, a whole number ≥ 1 (per head for Hydra).
        lora_alpha: the update is scaled by lora_alpha / r. None takes 2·r (Tied: r, as its paper does).
        lora_dropout: probability of dropping an input element of the adapter in training, 0 ≤ p < 1.
        dropout_mask: "linear", a mask per module as in peft, or "input", one for the modules that read one tensor (q, k, v of
            one attention, gate and up of one MLP), which is faster. Under torch.compile it is always "linear".
        target_modules: names (suffixes), one regex, or "all-linear". None takes "all-linear"; for Tied the attention
            input projections, as its paper does.
        target_parameters: names (suffixes) of fused parameters [experts, out, in] of a mixture of experts, each expert of which
            gets an adapter of its own: ["experts.gate_up_proj", "experts.down_proj"]. None takes all of them where target_modules is
            "all-linear" or takes it by default, else none; [] takes none. Without target_modules they alone are adapted.
        exclude_modules: names or one regex of modules to leave alone.
        layers_to_transform: block index or indices to adapt; not together with a regex.
        layers_pattern: name of the list of blocks, where peft cannot tell.
        rank_pattern, alpha_pattern: {regex of a module's name: its own rank or alpha}; the first match wins. Expert 3 of a fused
            parameter is called "experts.gate_up_proj.3".
        patterns_at_start: of a saved adapter whose rank slots have moved: the two patterns as you gave them, {"rank_pattern": ...,
            "alpha_pattern": ...}. It is loaded by these, and its own two say each module's rank now, with the alpha of an unchanged
            scale. Written when it is saved; leave it out.
        modules_to_save: modules trained and saved in full beside the adapter, such as a classification head.
        trainable_token_indices: numbers of tokens whose embeddings are trained and saved beside the adapter, such as those that
            a chat template adds (trl fills it in): a list, for the input embeddings, or {name of an embedding: list}.
        bias: which biases of the base are trained and saved beside the adapter, as in peft: "none", "all", or "lora_only", those of
            adapted modules. Needs peft 0.21 or newer; such an adapter is not exported.
        use_rslora: scale by lora_alpha / √r instead.
        init_lora_weights: False fills the factor that starts at zero too, as in peft: an adapter that changes the base from the start,
            for tests. It has no part in what is trained later.
        ensure_weight_tying: on a model that ties its embeddings, modules_to_save and trainable_token_indices train them as one, as
            in peft; an adapter on a tied embedding cannot be tied.

    What else LoraConfig has is accepted at the value that changes nothing there (`use_dora=False`), so that a config of
    stock LoRA needs no line taken out; fan_in_fan_out at both, since weftlora sees a Conv1D by itself.

    Raises:
        ConfigError (a ValueError): a value that cannot work, an unknown key, or two choices that do not go together.
        AdapterError (a ValueError): the config is in the format of a newer version of weftlora.
    """

    structure: Structure = field(default_factory=_default("structure"))
    start: Start = field(default_factory=_default("start"))
    boost: Boost | None = None
    ranks: Ranks = field(default_factory=_default("ranks"))
    layers: Layers = field(default_factory=_default("layers"))
    r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    dropout_mask: str = "linear"
    target_modules: list[str] | set[str] | str | None = None
    target_parameters: list[str] | set[str] | None = None
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    patterns_at_start: dict[str, dict[str, Any]] | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    bias: str = "none"
    use_rslora: bool = False
    init_lora_weights: bool = True
    ensure_weight_tying: bool = False
    format_version: int = FORMAT_VERSION

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Made, copied or unpickled: peft's tables have the type before there is a config of it."""
        for told in before_configs:
            told()
        return super().__new__(cls)

    def __post_init__(self) -> None:
        try:
            super().__post_init__()
        except ValueError as error:  # peft's own check of task_type
            raise ConfigError(f"peft refuses this config: {error}") from None
        self.peft_type = PeftType("WEFT")  # the host reads its .value
        for axis in AXES:
            setattr(self, axis, decode_choice(axis, getattr(self, axis), self.format_version))
        self.format_version = FORMAT_VERSION  # from here on it names what it means
        for axis, one in PROTOCOLS.items():
            if one.default is not None and getattr(self, axis) is None:
                raise ConfigError(
                    f"{axis} must not be None, since every adapter has one of its choices: {_choices(axis)}"
                )
        compat.check(self.structure, self.start, self.boost, self.ranks, self.layers)
        _check_rank(self.r, "r")
        if self.lora_alpha is None:
            alpha = self.structure.alpha_per_rank * self.r
            self.lora_alpha = int(alpha) if alpha == int(alpha) else alpha
        _check_alpha(self.lora_alpha, "lora_alpha")
        if not is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"lora_dropout={self.lora_dropout!r} is not a probability below 1: use 0 for none, or 0.05."
            )
        if self.dropout_mask not in DROPOUT_MASKS:
            raise ConfigError(f"dropout_mask={self.dropout_mask!r}: {suggest(str(self.dropout_mask), DROPOUT_MASKS)}")
        if self.bias not in BIASES:
            raise ConfigError(f"bias={self.bias!r}: {suggest(str(self.bias), BIASES)}")
        if not isinstance(self.init_lora_weights, bool):
            raise ConfigError(
                f"init_lora_weights={self.init_lora_weights!r} is a way of starting that only stock LoRA has: write True or False, or "
                "start=weftlora.Directions() for a start along directions of W."
            )
        for name in ("use_rslora", "ensure_weight_tying"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r} is neither true nor false: use one of the two.")
        self.structure.check(self.lora_dropout)
        self._check_targets()

    def _check_targets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                if not value and not (name == "target_modules" and self.target_parameters):
                    raise ConfigError(f"{name}=[] names no module: name some, or leave it out.")
                _check_names(value, name)
                setattr(self, name, set(value))
            elif not (value is None or isinstance(value, str)):
                raise ConfigError(
                    f"{name}={value!r} is neither a list of names nor a regex: write names such as ['q_proj']."
                )
            elif isinstance(value, str):
                _check_regex(value, name)
        if self.target_parameters is not None:
            _check_names(self.target_parameters, "target_parameters")
            self.target_parameters = set(self.target_parameters)
        if self.modules_to_save is not None:
            _check_names(self.modules_to_save, "modules_to_save")
        if self.trainable_token_indices is not None:
            _check_tokens(self.trainable_token_indices)
        self._check_layers()
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(pattern := getattr(self, name) or {}, Mapping):
                raise ConfigError(f"{name}={pattern!r} is not a table: write {{regex of a module's name: value}}.")
            setattr(self, name, dict(pattern))
        for regex in (*self.rank_pattern, *self.alpha_pattern):
            _check_regex(regex, "rank_pattern" if regex in self.rank_pattern else "alpha_pattern")
        moved = self.patterns_at_start is not None
        for regex, rank in self.rank_pattern.items():
            if not (moved and is_whole(rank) and rank == 0):  # a module may have given all of its slots away
                _check_rank(rank, f"rank_pattern[{regex!r}]")
        for regex, alpha in self.alpha_pattern.items():
            _check_alpha(alpha, f"alpha_pattern[{regex!r}]")
        if moved:
            self._check_start()

    def _check_start(self) -> None:
        """The patterns that a saved adapter began with are two tables of the same kinds."""
        given = self.patterns_at_start
        if not isinstance(given, Mapping) or given.keys() != {"rank_pattern", "alpha_pattern"}:
            raise ConfigError(
                f"patterns_at_start={given!r} is not {{'rank_pattern': ..., 'alpha_pattern': ...}}, as it is written where rank slots "
                "have moved: leave it out."
            )
        for name, pattern in given.items():
            if not isinstance(pattern, Mapping):
                raise ConfigError(f"patterns_at_start has {name}={pattern!r}, which is not a table: leave it out.")
            for regex, value in pattern.items():
                _check_regex(regex, f"patterns_at_start of {name}")
                (_check_rank if name == "rank_pattern" else _check_alpha)(
                    value, f"patterns_at_start: {name}[{regex!r}]"
                )

    def at_start(self, name: str) -> dict[str, Any]:
        """rank_pattern or alpha_pattern as it was given: what an adapter is built of, whose rank slots may have moved since."""
        given: dict[str, Any] = getattr(self, name) if self.patterns_at_start is None else self.patterns_at_start[name]
        return given

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None and self.layers.named is not None:
            raise ConfigError(
                f"layers={list(self.layers.named)} and layers_to_transform={layers!r} both choose blocks: keep one of the two."
            )
        if layers is None:
            if self.layers_pattern:
                raise ConfigError(
                    f"layers_pattern={self.layers_pattern!r} does nothing without layers_to_transform: name block numbers too, "
                    "or leave it out."
                )
            return
        if isinstance(layers, (list, tuple, set, range)):
            self.layers_to_transform = list(layers)
            if not layers:
                raise ConfigError(
                    "layers_to_transform=[] would adapt every layer in peft: name block numbers, or leave it out."
                )
        for number in layers if isinstance(layers, (list, tuple, set, range)) else [layers]:
            if not is_whole(number, 0):
                raise ConfigError(
                    f"layers_to_transform={layers!r}: {number!r} is not a block number; use whole numbers from 0 up."
                )
        if isinstance(self.target_modules, str) and self.target_modules.lower() != "all-linear":
            raise ConfigError(
                f"layers_to_transform={layers!r} does not work with the regex target_modules={self.target_modules!r}: "
                "write the block numbers into the regex, or list module names."
            )

    def to_dict(self) -> dict[str, Any]:
        """The config as plain JSON values, choices as {"kind": ...}, names in sorted order."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for axis in AXES:
            out[axis] = encode_choice(out[axis])
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            out[name] = sorted(out[name]) if isinstance(out[name], set) else out[name]
        unsaid = {"bias": "none", "init_lora_weights": True, "ensure_weight_tying": False}
        unsaid |= {"target_parameters": None, "patterns_at_start": None}
        for name, usual in unsaid.items():
            if out[name] == usual:  # files of those who do not ask for it are as they were
                del out[name]
        out["peft_type"] = "WEFT"
        out["weft_version"] = __version__
        return out

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, and into the folder's README.md how to load the adapter (it needs `import weftlora`)."""
        super().save_pretrained(save_directory, **kwargs)
        write_loading_note(Path(save_directory), self.packages())

    def packages(self) -> list[str]:
        """The packages, other than weftlora, whose terms this adapter needs."""
        offers = [registry.encoded(choice) for choice in self.choices().values()]
        return sorted({str(said["package"]) for said in offers if said.get("package")})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Any:
        """How the host makes a config of a folder's adapter_config.json."""
        with from_folder():
            return super().from_peft_type(**kwargs)

    def choices(self) -> dict[str, Choice]:
        """Axis → its choice; an axis without one is left out."""
        return {axis: choice for axis in AXES if (choice := getattr(self, axis)) is not None}

    def label(self) -> str:
        """The choices of the axes in a line; what is the default of an axis is not said."""
        return " + ".join(said for choice in self.choices().values() if (said := choice.label()) is not None)

    def scale(self, r: int, alpha: float) -> float:
        """What multiplies B A of a site of rank r: α/r, or α/√r with rsLoRA."""
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _strict(init: Callable[..., None]) -> Callable[..., None]:
    """The dataclass's own __init__, after refusing what it does not know: peft would drop such keys with a warning."""
    valid = [f.name for f in dataclasses.fields(WeftConfig) if f.init]

    @functools.wraps(init)
    def strict(self: WeftConfig, *args: Any, **kwargs: Any) -> None:
        saved = bool(
            {"peft_type", "weft_version"} & kwargs.keys()
        )  # only what was saved says so: not the user's own words
        made_by, made_with = kwargs.pop("weft_version", None), kwargs.get("peft_version")
        version = kwargs.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise AdapterError(
                f"this adapter has format {version!r}, written by weftlora {made_by or 'of a later version'}; this is weftlora "
                f"{__version__}, which reads formats up to {FORMAT_VERSION}: upgrade weftlora."
            )
        with from_folder() if saved else nullcontext():
            try:
                for key in [key for key in kwargs if key not in valid]:
                    if not _is_neutral(key, kwargs.pop(key)):
                        raise unknown_key(key, valid, type(self).__name__)
                init(self, *args, **kwargs)
            except ConfigError as error:
                if saved and made_by != __version__:  # what is wrong here may be right there
                    raise type(error)(f"{error} {_written_by(made_by, made_with)}") from None
                raise

    return strict


_ELSEWHERE = {
    "use_dora": "weftlora has no DoRA",
    "lora_bias": "an update has no bias of its own",
    "layer_replication": "no layer of the base is doubled",
}
"""What a LoraConfig can ask for and weftlora refuses: why, where there is more to say than that it is stock LoRA's."""


def _is_neutral(key: str, value: Any) -> bool:
    """Whether this is a field of peft's LoraConfig at the value that changes nothing; False for a name that it does not have.

    Raises:
        ConfigError: a field of LoraConfig that weftlora does not have, at a value that would do something.
    """
    known = {f.name: f for f in dataclasses.fields(LoraConfig)}
    if key not in known:
        return False
    of = known[key]
    neutral = of.default_factory() if of.default_factory is not dataclasses.MISSING else of.default
    if value is None or value == neutral or (key == "fan_in_fan_out" and isinstance(value, bool)):
        return True
    why = _ELSEWHERE.get(key, "weftlora's adapters do not have it")
    raise ConfigError(f"{key}={value!r} works in stock LoRA only ({why}): leave it out, or use peft's LoraConfig.")


def _written_by(made_by: Any, made_with: Any) -> str:
    """Which versions a saved config that cannot be read says it is from, and what to do."""
    if made_by is None:
        return f"The file does not say which weftlora wrote it; this is {__version__}."
    with_peft = f" with peft {made_with}" if made_with else ""
    try:
        later = Version(str(made_by)) > Version(__version__)
    except InvalidVersion:
        later = False
    end = ": upgrade weftlora." if later else "."
    return f"The file was written by weftlora {made_by}{with_peft}; this is {__version__}{end}"


WeftConfig.__init__ = _strict(WeftConfig.__init__)  # type: ignore[method-assign]


def _check_regex(regex: str, name: str) -> None:
    try:
        re.compile(regex)
    except re.error as error:
        raise ConfigError(
            f"{name}={regex!r} is not a regular expression ({error}): escape its special characters."
        ) from None


def _check_rank(r: Any, name: str) -> None:
    if not is_whole(r, 1):
        raise ConfigError(f"{name}={r!r} is not a rank: use a whole number from 1 up (8 is usual).")


def _check_names(names: Any, field_name: str) -> None:
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{field_name}={names!r} is not a list of names: write names such as ['classifier'].")


def _check_tokens(value: Any) -> None:
    lists = list(value.values()) if isinstance(value, Mapping) else [value]
    good = all(isinstance(tokens, (list, tuple)) and tokens for tokens in lists) and bool(lists)
    if not good or not all(is_whole(token, 0) for tokens in lists for token in tokens):
        raise ConfigError(
            f"trainable_token_indices={value!r} names no tokens: write their numbers, such as [417, 418], or "
            "{'embed_tokens': [417, 418]}."
        )
    if isinstance(value, Mapping):
        _check_names(list(value), "trainable_token_indices")


def _check_alpha(alpha: Any, name: str) -> None:
    if not is_number(alpha) or not 0 < alpha < math.inf:
        raise ConfigError(f"{name}={alpha!r} is not a positive number: use one, such as 2 * r.")


FIRST_LINE = (
    "**`import weftlora` before you load this adapter** (`pip install weftlora`), or peft says `KeyError: 'WEFT'`; "
    "`weftlora export` makes a stock LoRA of it, which needs neither."
)
LOADING_NOTE = """
## Loading this adapter

This is a weftlora adapter. peft knows the type once weftlora is imported:

```python
import weftlora  # registers the WEFT type with peft
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/to/this/folder")
```
"""
TRUST_NOTE = """
Its terms come from {packages}, whose code it needs. Before you load it:

```python
weftlora.trust_terms({names})
```
"""
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def write_loading_note(folder: Path, packages: list[str] | None = None) -> None:
    """Say in the first line of the folder's README.md, below its metadata, and in a section, what loading needs; once.

    `packages`: those that offer terms of the adapter.
    """
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    said = text
    if FIRST_LINE not in text:
        front = _FRONT_MATTER.match(text)
        head, body = (front[0] + "\n", text[front.end() :]) if front else ("", text)
        said = f"{head}{FIRST_LINE}\n\n{body.lstrip()}"
    if LOADING_NOTE.strip() not in said:
        said = said.rstrip() + "\n" + LOADING_NOTE
    if packages:
        shown = " and ".join(map(for_markdown, packages))
        trust = TRUST_NOTE.format(packages=shown, names=", ".join(map(repr, packages)))
        said += "" if trust in said else trust
    if said != text:
        readme.write_text(said, encoding="utf-8")


def read_config(folder: str | Path) -> WeftConfig:
    """The weftlora config saved in `folder`; raises `AdapterError` where there is none or it is not a weftlora adapter."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise AdapterError(f"{folder} has no adapter_config.json: give the folder that save_pretrained wrote.")
    try:
        data = from_json(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError("no object at its top")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{path} is not valid JSON ({error}): the folder is damaged, save the adapter again."
        ) from None
    if data.get("peft_type") != "WEFT":
        raise AdapterError(
            f"{path} describes a {data.get('peft_type')} adapter, not a weftlora one: load it with peft."
        )
    with from_folder():
        return WeftConfig(**data)
