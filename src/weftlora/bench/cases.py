"""What is measured: one frozen base, the same base under each adapter, and how exact each of them is.

Every model of one measurement holds the very same frozen weight tensors. Every adapter sits on all linear modules but
the head, at its recipe's α, with all of its factors away from zero, so that no gradient vanishes for a trivial reason.

Exact is a case whose gradients are those of the equation. The same step is taken on `weftlora.kernel.reference`, in the dtype
that is measured and with the same dropout masks (same seed):

    error = max over tensors of ‖g − g_ref‖ / ‖g_ref‖      over the input's gradient and every trained tensor's
"""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from weftlora import change_rates
from weftlora.adapted.experts import expert_parameters
from weftlora.adapter.site import Site
from weftlora.errors import ConfigError, suggest
from weftlora.kernel import use_reference
from weftlora.recipes import RECIPES

Dtype = Literal["fp32", "bf16"]
Build = Callable[[nn.Module, int, float], nn.Module]  # (base, r, dropout) → the model to step

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEAD_SIZE = 64


class Benched(NamedTuple):
    """How a recipe is stepped: at which ranks, and with which of its fields, so that every step is like the one before."""

    ranks: tuple[int, ...]
    fields: Mapping[str, Any] = MappingProxyType({})


BENCHED: dict[str, Benched] = {
    "peft:lora": Benched((8, 16)),
    "lora": Benched((8, 16)),
    "hydralora": Benched((8,)),
    "tied_lora": Benched((16,)),
    "lora_dash": Benched((8,)),
    "alora": Benched((12,), {"max_rounds": 0, "max_rank": 16}),  # its ranks are moved by hand
    "flexora": Benched(
        (16,), {"granularity": "module"}
    ),  # a gate on every module costs what a block's does, and one block will do
}
"""The recipes that are measured, in the order of the tables."""


@dataclass(frozen=True)
class Shape:
    """A Llama-type model and its batch: `batch` × `seq` tokens through `layers` blocks of width `hidden`.

    Attention heads are 64 wide, three share one key/value head where three divides their number, and the MLP is 8/3
    hidden wide (rounded up to 64). With `experts` the model is of the Qwen3-MoE type, and in the place of every MLP are that many
    experts, half of hidden wide (rounded up to 64), of which every token is sent to four.
    """

    hidden: int = 768
    layers: int = 4
    vocab: int = 2048
    batch: int = 4
    seq: int = 256
    experts: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < (name != "experts"):
                raise ConfigError(f"{name}={value} leaves nothing to measure: use a whole number from 1 up.")
        if self.hidden % HEAD_SIZE:
            raise ConfigError(
                f"hidden={self.hidden} is not a multiple of {HEAD_SIZE}, the width of one attention head."
            )


@dataclass(frozen=True)
class Case:
    """One model to step: the frozen base ("floor"), a recipe of `BENCHED`, or one of your own.

    `adapter` is the dtype of the adapter's parameters: fp32, or the base's (`autocast_adapter_dtype=False`). `mask`: "linear", or
    "input" for one dropout mask per input (`dropout_mask`). `compiled`: each block under torch.compile.
    """

    kind: str
    r: int = 0
    p: float = 0.0
    adapter: Dtype = "fp32"
    mask: str = "linear"
    compiled: bool = False

    def __str__(self) -> str:
        words = [self.kind] if self.kind == "floor" else [self.kind, f"r={self.r}", f"p={self.p:g}", self.adapter]
        words += [] if self.mask == "linear" else ["one-mask"]
        return " ".join([*words, *(["compiled"] if self.compiled else [])])

    @property
    def is_weft(self) -> bool:
        """Whether weftlora computes its update."""
        return self.kind in BENCHED and not self.kind.startswith("peft:")


def cases(dtype: Dtype, kinds: Sequence[str], dropouts: Sequence[float], experts: bool = False) -> list[Case]:
    """The floor, then every case of the kinds asked for at every rank, dropout and adapter dtype on a base of `dtype`.

    On experts stock LoRA has no dropout, and every recipe is stepped at one rank.
    """
    if unknown := [kind for kind in kinds if kind not in BENCHED]:
        raise ConfigError(f"there is no case {unknown[0]!r}: {suggest(unknown[0], BENCHED)}")
    adapters: tuple[Dtype, ...] = ("fp32",) if dtype == "fp32" else ("fp32", "bf16")
    found = [Case(kind, r, p, a) for kind in kinds for p in dropouts for r in BENCHED[kind].ranks for a in adapters]
    if experts:
        found = [
            case
            for case in found
            if case.r == BENCHED[case.kind].ranks[0] and not (case.kind == "peft:lora" and case.p)
        ]
    return [Case("floor"), *found]


def cases_of_builders(names: Iterable[str], dropouts: Sequence[float], dtype: Dtype) -> list[Case]:
    """The cases of `own_builders`, whose keys are "name" or "name@RANK"."""
    return [Case(*split_rank(name), p, dtype) for name in names for p in dropouts]


def table_cases(dtype: Dtype) -> list[Case]:
    """The cases of the project's table of figures on a base of `dtype`: all of `weftlora bench step --all`."""
    p = 0.05
    found = [Case("floor"), Case("floor", compiled=True)]
    for dropout in (0.0, p):
        found.append(Case("peft:lora", 16, dropout))
        if dtype == "bf16":
            found.append(Case("peft:lora", 16, dropout, "bf16"))
        found += [Case("lora", 16, dropout), Case("lora", 16, dropout, compiled=True)]
        rest = [kind for kind in BENCHED if kind not in ("peft:lora", "lora")]
        found += [Case(kind, BENCHED[kind].ranks[0], dropout) for kind in rest]
    return [*found, Case("lora", 16, p, mask="input"), Case("hydralora", 8, p, mask="input")]


def split_rank(name: str) -> tuple[str, int]:
    """Name and rank of a key such as "mine@8"; the rank is 16 where none is written."""
    kind, _, rank = name.partition("@")
    if rank and not rank.isdecimal():
        raise ConfigError(f"case {name!r} has the rank {rank!r}: write name@RANK=module:function with a whole number.")
    return kind, int(rank or 16)


def own_builders(specs: Sequence[str]) -> dict[str, Build]:
    """The functions of "name[@RANK]=module:function", called as function(base, r, dropout) with a frozen base to adapt.

    Raises:
        ConfigError: not of that form, a name that is taken, or a function that is not there.
    """
    found: dict[str, Build] = {}
    for spec in specs:
        name, _, target = spec.partition("=")
        module, _, function = target.partition(":")
        if not (name and module and function):
            raise ConfigError(f"case {spec!r} is not of the form name=module:function.")
        if split_rank(name)[0] in {"floor", *BENCHED}:
            raise ConfigError(f"case {spec!r} takes a name that is built in: choose another.")
        try:
            found[name] = cast(Build, getattr(importlib.import_module(module), function))
        except (ImportError, AttributeError) as error:
            raise ConfigError(f"case {spec!r} cannot be used: {error}.") from None
    return found


def frozen_base(shape: Shape, dtype: Dtype) -> PreTrainedModel:
    """A Llama-type causal model, or one of experts, with random weights, frozen, in training mode, without a KV cache."""
    heads = shape.hidden // HEAD_SIZE
    common: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "intermediate_size": -(-8 * shape.hidden // (3 * 64)) * 64,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 3 if heads % 3 == 0 else heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.seq,
        "use_cache": False,
    }
    model: PreTrainedModel
    if shape.experts:
        of_experts = {
            "num_experts": shape.experts,
            "num_experts_per_tok": min(4, shape.experts),
            "moe_intermediate_size": -(-shape.hidden // 128) * 64,
            "head_dim": HEAD_SIZE,
        }
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **of_experts))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
    return model.to(DTYPES[dtype]).requires_grad_(False).train()


def build(case: Case, base: nn.Module, own: dict[str, Build]) -> nn.Module:
    """The model of a case, in training mode; it shares the base's weight tensors and leaves the base as it was."""
    model = copy.deepcopy(base, {id(t): t for t in [*base.parameters(), *base.buffers()]})
    if case.kind not in ("floor", *BENCHED):
        name = case.kind if case.kind in own else f"{case.kind}@{case.r}"
        return own[name](model, case.r, case.p).train()
    adapted = model if case.kind == "floor" else _adapted(case, model)
    if case.compiled:
        for block in model.model.layers:  # type: ignore[union-attr]
            block.compile(dynamic=False)
    return adapted.train()


def _adapted(case: Case, model: nn.Module) -> nn.Module:
    fields = dict(BENCHED[case.kind].fields) | ({} if case.mask == "linear" else {"dropout_mask": case.mask})
    targets: dict[str, Any] = {"target_modules": "all-linear"}
    if experts := expert_parameters(model):  # stock LoRA's all-linear would take routers, too
        targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "target_parameters": experts}
    config = RECIPES[case.kind](r=case.r, lora_dropout=case.p, **targets, **fields)
    adapted = get_peft_model(model, config, autocast_adapter_dtype=case.adapter == "fp32")
    leave_the_start(adapted)
    launch_anywhere(adapted)
    move_ranks(adapted)
    set_gates(adapted)
    return cast(nn.Module, adapted)


def leave_the_start(model: nn.Module) -> None:
    """Give every trained tensor that starts at 0 or 1 random values, as after some training."""
    with torch.no_grad():
        for p in model.parameters():
            if not p.requires_grad:
                continue
            if not p.any():
                p.normal_(std=0.02 if p.dim() > 1 else 0.1)
            elif bool((p == 1).all()):
                p.normal_(mean=1.0, std=0.1)


def launch_anywhere(model: nn.Module) -> None:
    """Launch every Dash site on random orthonormal directions: a step costs the same along any."""
    for site in _sites(model):
        if site.boost is not None:
            slots = site.boost.slots(1.0, None, None)
            (out, s), fan_in = slots.up.shape, slots.down.shape[1]
            up, down = (torch.linalg.qr(torch.randn(n, s)).Q for n in (out, fan_in))
            site.boost.launch(change_rates.Directions(torch.arange(s), torch.ones(s), torch.ones(s), up, down.T))


def move_ranks(model: nn.Module) -> None:
    """Where ranks are reallocated: every other site has lost its first slots to the next one, which is full."""
    sites = [site for site in _sites(model) if site.mask is not None]
    with torch.no_grad():
        for place, site in enumerate(sites[: len(sites) // 2 * 2]):
            mask, f = cast(Tensor, site.mask), site.structure.factors(1.0)
            moved = len(mask) - site.initial_rank
            if place % 2:
                f.A[site.initial_rank :].normal_(std=0.02)
                mask.fill_(1)
            else:
                mask[:moved] = 0
            f.A[mask == 0] = 0.0
            f.B[:, mask == 0] = 0.0


def _sites(model: nn.Module) -> Iterator[Site]:
    """The sites of one matrix each."""
    for held in model.modules():
        if isinstance(held, Site):
            yield from (held.expert(e) for e in range(held.experts)) if held.experts else [held]


def set_gates(model: nn.Module) -> None:
    """Where layers are gated: gates of a search that went on for a while, in one of its steps."""
    for site in model.modules():
        if isinstance(site, Site) and site.layer_gate is not None:
            site.awaits_search = False
            site.layer_gate.normal_(mean=1.0, std=0.1)


@dataclass(frozen=True)
class Batch:
    """Input embeddings that require grad (so that the floor computes dX of every linear) and the tokens to predict."""

    embeddings: Tensor  # [batch, seq, hidden]
    labels: Tensor  # [batch, seq]

    @classmethod
    def draw(cls, shape: Shape, dtype: Dtype) -> Batch:
        """A random batch, from torch's global generator."""
        x = torch.randn(shape.batch, shape.seq, shape.hidden).to(DTYPES[dtype])
        labels = torch.randint(shape.vocab, (shape.batch, shape.seq))
        return cls(x.requires_grad_(True), labels)

    def loss(self, model: nn.Module) -> Tensor:
        """Mean cross-entropy, in fp32."""
        logits: Tensor = model(inputs_embeds=self.embeddings).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), self.labels.flatten())


TOLERANCE = {"fp32": 1e-5, "bf16": 4e-2}
"""What rounding alone may do. In bf16 it reaches 2e-2 in the smallest tensors (the r numbers of Tied's u, a router): fp32 is
what finds a wrong formula, bf16 what finds a lost cast."""


@dataclass(frozen=True)
class Agreement:
    """The largest relative gradient error, the tensor it belongs to, and the smallest gradient norm of the reference."""

    error: float
    where: str
    smallest_gradient: float


def agreement(model: nn.Module, batch: Batch, seed: int) -> Agreement | None:
    """Compare one step's gradients with the reference kernel's; None for a model without weftlora sites."""
    if not any(isinstance(module, Site) for module in model.modules()):
        return None
    fast = gradients(model, batch, seed)
    with use_reference(), torch.compiler.set_stance("force_eager"):
        slow = gradients(model, batch, seed)
    errors = {name: relative_error(fast[name], slow[name]) for name in slow}
    where = max(errors, key=errors.__getitem__)
    return Agreement(errors[where], where, min(g.norm().item() for g in slow.values()))


def gradients(model: nn.Module, batch: Batch, seed: int) -> dict[str, Tensor]:
    """Gradients of the input ("input") and of every trained tensor by name, in fp64; leaves no gradient behind."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        batch.loss(model).backward()
    trained = {"input": batch.embeddings, **{n: p for n, p in model.named_parameters() if p.requires_grad}}
    zero = torch.zeros(())
    found = {name: (zero if p.grad is None else p.grad).double() for name, p in trained.items()}
    for p in trained.values():
        p.grad = None
    return found


def relative_error(g: Tensor, reference: Tensor) -> float:
    """‖g − reference‖ / ‖reference‖; infinite where the reference vanishes or a value is not finite."""
    error = ((g - reference).norm() / reference.norm()).item()
    return error if math.isfinite(error) else math.inf
