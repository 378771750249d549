"""Every family of the installed transformers that a shrunken config can build, with every recipe: what works, and why what does not.

    python scripts/model_families.py [--kinds causal vision ...] [--families llama bert ...] [--minutes 30] [--again]

A family is a config of transformers' auto classes with a model for its kind. Its default config is made small by the names of its
fields (`SIZES`), filled with random weights, and goes through these, with default targets and each recipe:

    attach      the adapter goes on and changes nothing
    step        two optimiser steps: the loss is finite, every adapted module trains or is named as idle
    fast        the fast path computes what the reference does
    reload      what is saved and loaded again computes the same, bit for bit
    generate    greedy tokens of a model that generates
    export      stock peft computes the same with the exported LoRA, or one sentence says why there is none

What has been run is in evidence/families.json and is not run again; with --minutes it stops in time and goes on at the next call.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evidence" / "families.json"
COMMAND = "python scripts/model_families.py"
CHECKS = ("attach", "step", "fast", "reload", "generate", "export")
LARGEST = 4_000_000
"""Parameters that a shrunken model may have; SIZES does not know the fields of one that has more."""

KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "encoder": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "vision and language": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "speech": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
}
"""Kind → transformers' table of its models; a family counts with the first kind that it has a model of."""

# ruff: noqa: E501
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*|entity_vocab_size", 96),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups|multi_query_group_num", 2),
    (r"(.*_)?num_(attention_|self_attention_|cross_attention_)?heads|n_heads?|num_heads|.*attention_heads|linear_num_(key|value)_heads", 4),
    (r"(qk_|v_|attention_|linear_(key|value)_|kv_|index_)?head_dim|d_kv|head_size|attention_head_size|global_head_dim|d_head", 8),
    (r"qk_nope_head_dim|qk_rope_head_dim|rotary_dim", 4),
    (r"(q|kv|o)_lora_rank|.*lora_rank.*|.*lora_.*_dim|.*low_rank_dim.*", 8),
    (r"num_(hidden_|encoder_|decoder_|text_|vision_)?layers|n_layers?|depth|num_hidden_layers|(encoder|decoder)_layers|num_blocks", 2),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts|num_moe_experts", 4),
    (r".*experts_per_tok(en)?|moe_topk|moe_k|top_?k", 2),
    (r"n_group|topk_group|n_shared_experts|moe_num_shared_experts|first_k_dense_replace|num_nextn_predict_layers", 1),
    (r"(moe_|shared_expert_|expert_)?intermediate_size|.*ffn_(dim|hidden_size|size)|.*ffw.*(dim|size)|d_ff|n_inner|inner_dim|d_inner|ffn_dim|dim_ff", 48),
    (r"moe_intermediate_size.*|shared_expert_intermediate_size|mlp_hidden_size", 16),
    (r"(.*_)?hidden_(size|dim)|d_model|n_embd|(.*_)?embed_dim|embedding_size|dim|emb_dim|word_embed_proj_dim|attention_hidden_size|d_embed|embed_size", 32),
    (r"(mamba_|ssm_)?(d_state|state_size)|mamba_d_state|conv_kernel.*|mamba_d_conv", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len(gth)?|seq_length|max_(source|target)_positions", 64),
    (r"image_size|img_size", 32),
    (r"patch_size|spatial_patch_size", 8),
    (r"num_mel_bins", 16),
    (r"out_hidden_size|projection_dim|classifier_proj_size|output_dim|proj_size", 32),
    (r"chunk_size|chunk_length|sliding_window|attention_window|local_attn_chunk_length|index_topk|window_size", 8),
    (r"lru_width|kv_channels_", 32),
)  # fmt: skip
"""Field of a config → its value when small; the first pattern that is the whole name wins."""


# ---------------------------------------------------------------------- small models


def families(kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    """(kind, family, class name) of every family, once."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    seen: set[str] = set()
    for kind in KINDS:
        for family, name in getattr(auto, KINDS[kind]).items():
            name = name[0] if isinstance(name, tuple | list) else name
            if family not in seen and name not in seen:
                seen |= {family, name}
                if kind in kinds:
                    yield kind, family, name


def small(config_class: type, **more: Any) -> Any:
    """The default config of a family with its sizes changed, its parts' configs too.

    Args:
        more: fields that this family needs at other values than SIZES gives.
    """
    fields = config_class().to_dict()
    return config_class(**_merged(_shrunk(fields), more))


def _merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `fields`, part by part where a field is a part's config."""
    own = {
        k: _merged(fields[k], v) if k.endswith("config") and isinstance(fields.get(k), dict) else v
        for k, v in more.items()
    }
    return {**fields, **own}


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        if name in (
            "model_type",
            "transformers_version",
            "architectures",
            "id2label",
            "label2id",
            "rope_parameters",
            "dtype",
        ):
            continue
        if isinstance(value, dict) and name.endswith("config"):
            found[name] = {
                **_shrunk(value),
                **({"model_type": value["model_type"]} if "model_type" in value else {}),
            }
        elif isinstance(value, bool) or not isinstance(value, (int, list)):
            found[name] = value
        elif isinstance(value, int):
            size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
            token = name.endswith("token_id") and value >= 90
            found[name] = 3 if token else value if size is None else min(size, value) if value > 0 else value
        else:
            found[name] = _list(name, value)
    return found


def _list(name: str, value: list[Any]) -> list[Any]:
    """Of a list with an entry per layer, two that differ if any do; other lists as they are."""
    if name in ("layer_types", "layers_block_type", "mlp_layer_types", "block_types") or (
        len(value) > 8 and all(isinstance(each, (str, int, bool)) for each in value)
    ):
        kinds = list(dict.fromkeys(value))
        return (kinds + kinds)[:2] if kinds else value
    return value


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MLA: dict[str, Any] = {"num_key_value_heads": 4, "num_experts_per_tok": 2, "head_dim": 4}
MROPE: dict[str, Any] = {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}}
"""Positions of three axes, which share the four angles of a head."""
NEMOTRON: dict[str, Any] = {
    "layers_block_type": ["mamba", "moe", "attention"],
    "num_hidden_layers": 3,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
}
OWN: dict[str, dict[str, Any]] = {
    "axk1": MLA,
    "axk2": MLA,
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": MLA,
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "gemma3n_text": {"activation_sparsity_pattern": [0.5, 0.0], "num_kv_shared_layers": 0},
    "glm_moe_dsa": MLA,
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8, "rope_parameters": ROPE},
    "hunyuan_v1_moe": {"head_dim": 8, "rope_parameters": ROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"pad_token_id": 0, "layer_types": ["chunked_attention", "full_attention"]},
    "longcat_flash": MLA,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"rope_parameters": ROPE, "head_dim": 8},
    "dots1": {
        **MLA,
        "first_k_dense_replace": 0,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
    },
    "glm46v": MROPE,
    "glm4v": MROPE,
    "glm4v_moe": {
        "text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
    },
    "glm_ocr": MROPE,
    "kimi_k25": {"text_config": MLA},
    "mistral_large4": {"text_config": MLA},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": NEMOTRON,
    "nemotron_h_omni": {"text_config": NEMOTRON},
    "paddleocr_vl": MROPE,
    "qwen2_5_omni_thinker": MROPE,
    "qwen2_5_vl": MROPE,
    "qwen2_vl": MROPE,
    "step3p7": {"text_config": {"sliding_window": 8}},
    "youtu": MLA,
}
"""Family → fields that SIZES cannot know."""


def built(family: str, name: str) -> Any:
    """The small model with random weights, in evaluation mode.

    Raises:
        Exception: whatever transformers says of the config, or that the model has not become small.
    """
    import torch
    import transformers

    config_class = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    config = small(config_class, **OWN.get(family, {}))
    kind = getattr(transformers, name)
    if not isinstance(config, kind.config_class):  # the model is a part of the family's
        config = config.get_text_config(decoder=True)
    with torch.device("meta"):
        count = sum(p.numel() for p in kind(copy.deepcopy(config)).parameters())
    if count > LARGEST:
        raise ValueError(f"has {count / 1e6:.0f} M parameters when made small")
    torch.manual_seed(0)
    model = kind(config).eval()
    for module in model.modules():
        for rate in ("layerdrop", "activation_dropout", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all():  # never written by the family's own initialisation
                p.normal_(0, 0.02)
            if p.dim() > 1 and p.abs().max() == 0:
                p.normal_(0, 0.02)
    return model


def inputs_of(model: Any, kind: str) -> dict[str, Any]:
    """Two rows of what the model's forward takes."""
    import torch

    generator = torch.Generator().manual_seed(1)
    config = model.config
    text = config.get_text_config()
    vocabulary = min(getattr(text, "vocab_size", 96) or 96, 90)
    ids = torch.randint(5, vocabulary, (2, 6), generator=generator)
    main = "input_ids" if kind == "vision and language" else model.main_input_name
    if main in ("input_ids", "decoder_input_ids"):
        given: dict[str, Any] = {"input_ids": ids}
    elif main == "pixel_values":
        side = getattr(config, "image_size", 32)
        side = side if isinstance(side, int) else side[0]
        given = {main: torch.randn(2, getattr(config, "num_channels", 3), side, side, generator=generator)}
    elif main == "input_values":
        given = {main: torch.randn(2, 4000, generator=generator)}
    elif main == "input_features":
        bins = getattr(config, "num_mel_bins", None) or getattr(config, "input_feat_per_channel", 16)
        length = 2 * getattr(config, "max_source_positions", 32)
        shape = (2, length, bins) if "speech_to_text" in config.model_type else (2, bins, length)
        given = {main: torch.randn(*shape, generator=generator)}
    else:
        raise ValueError(f"takes {main}")
    if config.is_encoder_decoder and kind != "causal":
        given["decoder_input_ids"] = ids
    return given


def logits(model: Any, given: dict[str, Any]) -> Any:
    """What the model computes of its inputs: its logits, or the first tensor of floats that it gives."""
    import torch

    out = model(**given)
    if (found := getattr(out, "logits", None)) is None:
        found = next(value for value in out.values() if isinstance(value, torch.Tensor) and value.is_floating_point())
    return found


# ---------------------------------------------------------------------- what is checked


def recipes(base: Any) -> dict[str, Callable[[], Any]]:
    """Name → a fresh config; what happens over time happens after the first step. Flexora's second stage is on the last block."""
    import weftlora
    from weftlora.adapted.targets import Blocks

    fields, last = {"r": 2}, max(0, len(Blocks(base).names) - 1)
    return {
        "lora": lambda: weftlora.PlainLoraConfig(**fields),
        "hydralora": lambda: weftlora.HydraLoraConfig(heads=2, **fields),
        "tied_lora": lambda: weftlora.TiedLoraConfig(**fields),
        "lora_dash": lambda: weftlora.LoraDashConfig(directions=2, after=1, **fields),
        "lora_init": lambda: weftlora.LoraInitConfig(after=1, **fields),
        "lora_tsd": lambda: weftlora.LoraTsdConfig(directions=2, after=1, **fields),
        "alora": lambda: weftlora.AllocLoraConfig(first=1, every=1, max_rounds=1, score="random", **fields),
        "flexora": lambda: weftlora.WeftConfig(layers=weftlora.Only([last]), **fields),
    }


class SaidError(Exception):
    """A check that did not pass, with what to write down."""


def cell(base: Any, given: dict[str, Any], make: Callable[[], Any]) -> dict[str, Any]:
    """Each check of one recipe on one model: True, or what went wrong; what was told on the way."""
    import torch

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state: dict[str, Any] = {"base": base, "given": given, "folder": Path(folder), "make": make}
        for check in CHECKS:
            torch.manual_seed(2)
            try:
                outcome = globals()[f"_{check}"](state)
            except Exception as error:
                ours = any(kind.__module__ == "weftlora.errors" for kind in type(error).__mro__)
                said = str(error) if ours or isinstance(error, SaidError) else f"{type(error).__name__}: {error}"
                found[check] = " ".join(said.split())[:300]
                if not ours and not isinstance(error, SaidError):
                    found["at"] = _place(error)
                if check in ("attach", "step"):
                    break
            else:
                found[check] = outcome
        found["modules"] = state.get("modules", 0)
        sentences = {" ".join(str(each.message).split())[:300] for each in told if _is_ours(each)}
    if sentences:
        found["told"] = sorted(sentences)
    return found


def _is_ours(warning: Any) -> bool:
    return bool(
        re.search(r"all-linear|default target|had no gradient|language part|the rank is larger", str(warning.message))
    )


def _place(error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}:{last.lineno}"


def _near(one: Any, other: Any, what: str, at: float = 1e-4) -> None:
    import torch

    if not torch.isfinite(one).all():
        raise SaidError(f"{what}: not finite")
    off = float((one.float() - other.float()).abs().max())
    if off > at * max(1.0, float(other.float().abs().max())):
        raise SaidError(f"{what}: off by {off:.1e}")


def _attach(state: dict[str, Any]) -> bool:
    import torch
    from peft import get_peft_model

    from weftlora.adapted.layer import WeftLinear

    with torch.no_grad():
        before = logits(state["base"], state["given"])
        state["model"] = get_peft_model(copy.deepcopy(state["base"]), state["make"]()).eval()
        state["layers"] = [m for m in state["model"].modules() if isinstance(m, WeftLinear)]
        state["modules"] = len(state["layers"])
        _near(
            logits(state["model"], state["given"]),
            before,
            "an adapter that has just been put on changes the model",
            1e-5,
        )
    return True


def _step(state: dict[str, Any]) -> bool:
    import torch

    import weftlora

    model = state["model"]
    weftlora.attach(model, total_steps=2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        loss = logits(model.train(), state["given"]).float().square().mean()
        if not torch.isfinite(loss):
            raise SaidError("the loss is not finite")
        loss.backward()
        optimizer.step()
    if not any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad):
        raise SaidError("no gradient reaches the adapter")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.05)
        state["after"] = logits(model.eval(), state["given"])
        _near(state["after"], state["after"], "after training")
    return True


def _fast(state: dict[str, Any]) -> bool:
    import torch

    from weftlora.kernel.switches import switched

    with torch.no_grad(), switched(reference=True):
        _near(logits(state["model"], state["given"]), state["after"], "the fast path and the reference")
    return True


def _reload(state: dict[str, Any]) -> bool:
    import torch
    from peft import PeftModel

    state["model"].save_pretrained(str(state["folder"] / "adapter"))
    again = PeftModel.from_pretrained(copy.deepcopy(state["base"]), str(state["folder"] / "adapter")).eval()
    with torch.no_grad():
        if not torch.equal(found := logits(again, state["given"]), state["after"]):
            _near(found, state["after"], "loaded again", 1e-6)
    return True


def _generate(state: dict[str, Any]) -> bool | None:
    import torch

    model = state["model"]
    if not getattr(state["base"], "can_generate", bool)() or getattr(state["base"], "generation_config", None) is None:
        return None
    given = {name: value for name, value in state["given"].items() if not name.startswith("decoder")}
    try:
        with torch.no_grad():
            state["base"].generate(**given, max_new_tokens=3, do_sample=False)
    except Exception:
        return None  # nor does it without an adapter
    model.generate(**given, max_new_tokens=3, do_sample=False)
    return True


def _export(state: dict[str, Any]) -> bool:
    import torch
    from peft import PeftModel

    import weftlora

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="stock peft takes")  # what a proof would have refused
        try:
            weftlora.export_lora(state["model"], state["folder"] / "lora", verify=False, base="memory")
        except UserWarning as told:
            raise SaidError(str(told)) from None
    stock = PeftModel.from_pretrained(copy.deepcopy(state["base"]), str(state["folder"] / "lora")).eval()
    with torch.no_grad():
        _near(logits(stock, state["given"]), state["after"], "stock peft with the exported LoRA")
    return True


# ---------------------------------------------------------------------- all of them


class _LateError(Exception):
    pass


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise _LateError(f"takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(
        signal.ITIMER_REAL, seconds, 5
    )  # again and again: one that comes in a callback of Python's is lost
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one(kind: str, family: str, name: str, seconds: int) -> dict[str, Any]:
    """All recipes on one family, or why it could not be built."""
    record: dict[str, Any] = {"kind": kind, "model": name}
    import torch

    try:
        with _limited(seconds), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = built(family, name)
            given = inputs_of(base, kind)
            with torch.no_grad():
                found = logits(base, given)
            if not torch.isfinite(found).all():
                raise ValueError("its logits are not finite")
            record["parameters"] = sum(p.numel() for p in base.parameters())
    except (Exception, _LateError) as error:
        return {**record, "unbuilt": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    record["recipes"] = {}
    for recipe, make in recipes(base).items():
        try:
            with _limited(seconds):
                record["recipes"][recipe] = cell(base, given, make)
        except _LateError as error:
            record["recipes"][recipe] = {"attach": str(error)}
    return record


def main() -> None:
    """Run what has not been run and write it down, family by family."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    given.add_argument("--families", nargs="+", help="only these")
    given.add_argument("--again", action="store_true", help="run these even where they have been run")
    given.add_argument("--minutes", type=float, help="stop after so many")
    given.add_argument("--seconds", type=int, default=60, help="that one recipe on one family may take")
    given.add_argument("--show", action="store_true", help="print what came out and write nothing")
    given.add_argument("--out", type=Path, default=RESULTS)
    args = given.parse_args()
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"families": {}}
    record |= {"command": COMMAND, "versions": {n: version(n) for n in ("transformers", "peft", "torch")}}
    ends = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    for kind, family, name in families(args.kinds):
        if args.families is not None and family not in args.families:
            continue
        if family in record["families"] and not (args.again or args.show):
            continue
        if ends is not None and time.monotonic() > ends:
            print("stopped in time; call again to go on")
            break
        if args.show:
            print(family, json.dumps(one(kind, family, name, args.seconds), indent=1))
            continue
        # what a process that is killed leaves behind, so that the next call goes on with the next family
        kept(record, args.out, family, {"kind": kind, "model": name, "unbuilt": "did not end"})
        found = one(kind, family, name, args.seconds)
        kept(record, args.out, family, found)
        print(kind, family, found.get("unbuilt") or faults(found) or "clean", flush=True)


def kept(record: dict[str, Any], out: Path, family: str, found: dict[str, Any]) -> None:
    """Write the record with this family in it, whole or not at all."""
    record["families"] = dict(sorted({**record["families"], family: found}.items()))
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(out)


def faults(found: dict[str, Any]) -> str:
    """The checks that did not pass, in a line."""
    cells = cast("dict[str, dict[str, Any]]", found.get("recipes", {}))
    return "; ".join(
        f"{recipe} {check}: {outcome[check][:70]}"
        for recipe, outcome in cells.items()
        for check in CHECKS
        if isinstance(outcome.get(check), str) and check != "export"
    )


if __name__ == "__main__":
    sys.exit(main())
