"""peft's own tests with weftlora's configs in place of LoraConfig, and stock LoRA beside them as the control.

    python scripts/peft_suite.py [--methods plain hydra ...] [--files test_custom_models ...] [--again] [--select EXPRESSION]

The tests are those in the source distribution of the installed peft, which the package index has; the models that they name on a hub
are made here: tiny, of the same architectures, with random weights, in a cache of their own under --work. Nothing else is looked
up. A part is one file with one method and takes seconds to minutes; what has been run is kept under --work, so that a suite that was
stopped goes on where it was, and every run writes all parts there are into evidence/peft-suite.json.

Only tests that use LoraConfig are run, and only what stock LoRA passes on these models counts. In the tests' modules the name
LoraConfig means the method's config. Where a test asks for an adapter that is not zero (`init_lora_weights=False`), directions are
launched too, at random. A test that fails belongs to a class:

    refused       weftlora says in one sentence that it does not offer this (the sentence is kept)
    names         the test reads or writes names that only stock LoRA's layers and files have (`lora_A`, `scaling`), or takes
                  every saved tensor for one of its matrices
    words         it looks for the words of peft's own refusal, and weftlora refuses in others (which are kept)
    defaults      it expects what stock LoRA adapts where no targets are named
    mathematics   what it asks for does not exist for the method: a routed update depends on the token, so it has no ΔW
    chance        the last digits of fp32, or a draw without a seed, decide it, as they do with stock LoRA
    unexplained   everything else: work to do

Run as a pytest plugin in the tests' process by itself (`-p peft_suite`).
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import inspect
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evidence" / "peft-suite.json"
COMMAND = "python scripts/peft_suite.py"
CONTROL = "lora"
METHODS: tuple[str, ...] = (CONTROL, "plain", "hydra", "tied", "dash", "init", "tsd", "alora")
FILES = (
    "test_token_classification_qa",
    "test_seq_classifier",
    "test_low_level_api",
    "test_mixed",
    "test_vision_models",
    "test_trainable_tokens",
    "test_feature_extraction_models",
    "test_encoder_decoder_models",
    "test_decoder_models",
    "test_config",
    "test_other",
    "test_tuners_utils",
    "test_custom_models",
    "test_initialization",
)
BESIDE = ("diffusers", "pillow", "parameterized", "attrs")
"""What the tests import and weftlora's environment may lack; installed without dependencies into a folder of the work folder."""

MADE = "made-2"
"""The mark that the models are there; its number goes up with what is made."""

CLASSED: tuple[tuple[str, str, str, str], ...] = (
    # pattern of methods, pattern of ids, class, why
    (
        ".*",
        r"TestMixedAdapterTypes|test_mixed_model_raises|rejects_duplicate_name_without_mutation\[True\]"
        r"|test_mixed_model_from_pretrained|PeftMixedModel",
        "refused",
        "mixed=True takes peft's own types alone, a closed list of peft's",
    ),
    (
        ".*",
        r"merge_layers_nan|raises_target_layer_not_found",
        "words",
        "refused as stock LoRA refuses it, in words of our own",
    ),
    (".*", r"test_get_peft_model_state_dict$", "names", "the names of saved tensors have to contain 'lora'"),
    (".*", r"test_prefixes_select_correct_state_dict_keys", "names", "it lists the names of saved tensors"),
    (".*", r"test_module_type_large", "names", "it lists the classes of stock LoRA's layers"),
    (".*", r"all_linear_does_not_target_classifier_head", "names", "it counts the layers that are stock LoRA's"),
    (
        ".*",
        r"TestLoraNestedConfigRoundTrip",
        "names",
        "it sets a field that only LoraConfig has on a config that is made",
    ),
    (
        "(?!plain).*",
        r"test_nb_params_|test_model_with_injected_layers",
        "mathematics",
        "it counts the parameters of a pair A, B, and this structure has others",
    ),
    (
        ".*",
        r"test_targeting_trainable_tokens_raises",
        "names",
        "peft's sentence names the class of the layer, and it is stock LoRA's that the test expects",
    ),
    (
        ".*",
        r"test_inject_from_state_dict_low_cpu_mem_usage",
        "names",
        "it takes every saved tensor for a matrix of LoRA; counts of steps and numbers of directions are whole numbers, kept in memory",
    ),
    (
        ".*",
        r"target_same_layers\[LoRA-Roberta\]",
        "defaults",
        "it names no targets; the default here has the head, whose two outputs are fewer than the rank, which a warning says",
    ),
    (
        ".*",
        r"TestHotSwapping|hotswap",
        "refused",
        "peft's own hotswap_adapter takes stock LoRA alone, a closed list of peft's; weftlora.hotswap is for its own adapters",
    ),
    (
        ".*",
        r"test_get_peft_model_(with_task_type_)?low_cpu_mem_usage_works",
        "names",
        "it looks at the devices of tensors with 'lora_' in their names",
    ),
    (
        ".*",
        r"test_mha_exposes_attributes",
        "names",
        "it asks that the attention's out_proj be the base's own object; here it is the adapted one, with the same weight",
    ),
    (
        ".*",
        r"test_get_base_model_state_dict\[MHA",
        "names",
        "peft takes base_layer out of the keys of its own kinds of layers alone, and an attention as a whole is none",
    ),
    (
        ".*",
        r"test_error_raised_if_rank_not_divisible_by_groups",
        "mathematics",
        "an adapter of a convolution with groups reads the patch of a group, so the rank has nothing to be divided by",
    ),
    (
        ".*",
        r"test_from_pretrained_missing_keys_warning",
        "names",
        "it takes a tensor out of the file by stock LoRA's name",
    ),
    (
        ".*",
        r"test_safe_merge\[MHA 2|partly_overlapping_target_layers\[LoRA",
        "chance",
        "fp32 rounds two ways of computing the same apart by 5e-6 and 2e-5 (logits up to 90), and it allows 1e-6 and 1e-5 of each number",
    ),
    (
        ".*",
        r"test_only_params_are_updated\[Embedding \+ transformers Conv1D 2 LoRA",
        "chance",
        "it sets no seed, and some tensor moves by less than it asks for in 3 of 20 draws with stock LoRA, and in 7 of 20 here",
    ),
    (".*", r"TestDefaultTargetModules", "defaults", "it names no targets"),
    (
        ".*",
        r"TestDynamicDispatch",
        "names",
        "it registers a layer of its own with a method that only LoraConfig has",
    ),
    (
        ".*",
        r"test_mha_gradients_set_correctly",
        "names",
        "it looks for stock LoRA's layer inside the attention",
    ),
    (".*", r"TestRankAndAlphaPattern", "defaults", "lora_alpha that is left out is 2 r, and 8 in stock LoRA"),
    (".*", r"(Excluded|Targeted)ModuleNames::test_realistic_example", "defaults", "it names no targets"),
    (
        ".*",
        r"TestPeftFeatureExtractionModel::test_training",
        "defaults",
        "all-linear, the default here, has a pooler that the test's loss does not reach; stock LoRA's default leaves it out",
    ),
)
"""What no rule below can see, by method and test; the first row that matches wins."""

NAMES = re.compile(
    r"lora_(A|B|embedding|magnitude|variant|bias|dropout|alpha)|\blora\b\.|LoraLayer|LoraModel|\bscaling\b|peft_type|\"lora_|'lora_"
)


# ---------------------------------------------------------------------- the parts, from outside


def main() -> None:
    """Run what has not been run and write the table."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    given.add_argument("--files", nargs="+", choices=FILES, default=list(FILES))
    given.add_argument("--again", action="store_true", help="run these parts even where they have been run")
    given.add_argument("--select", help="of these files, only the tests that pytest -k selects; nothing is kept")
    given.add_argument("--work", type=Path, default=ROOT / "build" / "peft-suite")
    given.add_argument("--timeout", type=int, default=120, help="seconds a test may take")
    args = given.parse_args()
    work = args.work.resolve()
    tests = prepare(work)
    for file in args.files:
        for method in args.methods:
            part = work / "parts" / f"{file}-{method}.json"
            if args.select:
                show(run(work, tests, file, method, args.timeout, args.select))
            elif args.again or not part.is_file():
                try:
                    found = run(work, tests, file, method, args.timeout)
                except NoOutcomeError as error:
                    print(error, flush=True)
                    continue
                part.parent.mkdir(parents=True, exist_ok=True)
                part.write_text(json.dumps(found, indent=0), encoding="utf-8")
                print(f"{file} {method}: {dict(Counter(each['outcome'] for each in found.values()))}", flush=True)
    if not args.select:
        write(work / "parts")


class NoOutcomeError(Exception):
    """A file whose tests could not be collected."""


def prepare(work: Path) -> Path:
    """The folder with peft's tests, and the models and packages that they need; made where it is not there."""
    work.mkdir(parents=True, exist_ok=True)
    source = work / f"peft-{version('peft')}"
    if not (source / "tests").is_dir():
        load = ["download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "peft", "--dest", str(work)]
        _pip(*load, f"peft=={version('peft')}")
        with tarfile.open(next(work.glob("peft-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
    (source / "tests" / "__init__.py").touch()
    if not (work / "beside").is_dir():
        _pip("install", "--quiet", "--no-deps", "--target", str(work / "beside"), *BESIDE)
    if not (work / "hub" / MADE).is_file():
        subprocess.run([sys.executable, __file__, "--make-models"], env=_environment(work), check=True)
    return source / "tests"


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def _environment(work: Path, **more: str) -> dict[str, str]:
    where = [str(ROOT / "src"), str(ROOT / "scripts"), str(work / "beside")]
    path = os.pathsep.join([*where, *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"HF_HOME": str(work / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **own, "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", **more}


def run(work: Path, tests: Path, file: str, method: str, timeout: int, select: str | None = None) -> dict[str, Any]:
    """Outcome, and for a failure what it says, of every test of `file` with `method`, by id."""
    out = work / "outcome.json"
    out.unlink(missing_ok=True)
    options = [
        "-p",
        "peft_suite",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:randomly",
        "-q",
        "--no-header",
        "--tb=short",
        "-c",
        os.devnull,
    ]
    options += ["--rootdir", str(tests.parent), f"--timeout={timeout}", *(["-k", select] if select else ["--tb=no"])]
    environment = _environment(work, WEFT_SUITE_METHOD=method, WEFT_SUITE_OUT=str(out))
    log = None if select else subprocess.DEVNULL
    subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"tests/{file}.py"],
        cwd=tests.parent,
        env=environment,
        stdout=log,
        check=False,
    )
    if not out.is_file() or not (found := json.loads(out.read_text(encoding="utf-8"))):
        raise NoOutcomeError(
            f"{file} with {method} gave no outcome of any test: see it with --select '' --files {file} --methods {method}."
        )
    return dict(found)


def show(found: dict[str, Any]) -> None:
    """What came out of selected tests."""
    for test, each in found.items():
        print(each["outcome"], test, each.get("says", ""))


def classed(method: str, test: str, each: dict[str, str]) -> tuple[str, str]:
    """(class, why) of a failure."""
    if each.get("ours"):
        return (
            "mathematics" if each["kind"] == "MergeError" and "depends on the token" in each["says"] else "refused"
        ), each["says"]
    for methods, ids, kind, why in CLASSED:
        if re.fullmatch(methods, method) and re.search(ids, test):
            return kind, why
    if each["says"].startswith("Failed: DID NOT WARN") and each.get("refusal"):
        return "refused", each["refusal"]
    if "Regex pattern did not match" in each["says"] and each.get("refusal", True):
        return "words", each.get("refusal") or each["says"].partition("Actual message:")[2].strip()
    expected = each["says"].startswith("AssertionError: Expected (") and "lora_" in each["says"]
    if (
        expected
        or NAMES.search(each.get("at", ""))
        or re.search(r"(object|module) has no attribute '(lora_|scaling|embedding)|KeyError: '.*lora", each["says"])
    ):
        return "names", each.get("at", "")
    return "unexplained", each["says"]


def write(parts: Path) -> None:
    """All parts there are, as one table by method and one by test."""
    counts: dict[str, Any] = {}
    failing: dict[str, Any] = defaultdict(lambda: defaultdict(list))
    for file in FILES:
        control = _part(parts, file, CONTROL)
        passed = {test for test, each in control.items() if each["outcome"] == "passed"}
        for method in METHODS[1:]:
            found = _part(parts, file, method)
            if not control or not found:
                continue
            kinds: Counter[str] = Counter()
            by_name = {_numberless(test): each for test, each in found.items()}
            for test in sorted(passed):
                each = by_name.get(_numberless(test), {"outcome": "failed", "says": "the test was not found"})
                if each["outcome"] == "failed":
                    kind, why = classed(method, test, each)
                    failing[f"{file}: {kind}: {shortened(why)}"][test.partition("::")[2]].append(method)
                else:
                    kind = each["outcome"]
                kinds[kind] += 1
            counts.setdefault(method, {})[file] = {"stock": len(passed), **kinds}
    _keep_others(counts, failing)
    total = {method: dict(sum((Counter(c) for c in of.values()), Counter())) for method, of in counts.items()}
    record = {
        "command": COMMAND,
        "versions": {name: version(name) for name in ("peft", "transformers", "torch")},
        "methods": total,
        "files": counts,
        "failing": {why: {test: " ".join(names) for test, names in of.items()} for why, of in sorted(failing.items())},
    }
    RESULTS.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for method, kinds in total.items():
        print(method, kinds)


def _keep_others(counts: dict[str, Any], failing: dict[str, Any]) -> None:
    """What an earlier record of the same peft says of parts that are not in this work folder."""
    if not RESULTS.is_file():
        return
    before = json.loads(RESULTS.read_text(encoding="utf-8"))
    if before["versions"]["peft"] != version("peft"):
        return
    kept = {(m, f) for m, of in before["files"].items() for f in of if f not in counts.get(m, {})}
    for method, file in sorted(kept):
        counts.setdefault(method, {})[file] = before["files"][method][file]
    for why, tests in before["failing"].items():
        for test, names in tests.items():
            failing[why][test] += [m for m in names.split() if (m, why.partition(":")[0]) in kept]
    for why in list(failing):
        failing[why] = {test: names for test, names in failing[why].items() if names}
        if not failing[why]:
            del failing[why]


def _numberless(test: str) -> str:
    """An id without its file, and without the number of its config among those of other methods, which the class of a config decides."""
    return re.sub(r"mandatory_kwargs\d+", "mandatory_kwargs", test.partition("::")[2])


def shortened(why: str) -> str:
    """A sentence without what differs from test to test."""
    plain = re.sub(r"0x[0-9a-f]+|/tmp/\S+", "…", " ".join(why.split()))
    return plain if len(plain) <= 160 else plain[:159] + "…"


def _part(parts: Path, file: str, method: str) -> dict[str, Any]:
    path = parts / f"{file}-{method}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---------------------------------------------------------------------- the models that the tests name

SMALL: dict[str, Any] = {
    "vocab_size": 1100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
PLACES: dict[str, Any] = {"max_position_embeddings": 128}
DECODER: dict[str, Any] = {**SMALL, **PLACES, "num_key_value_heads": 2}
OPT: dict[str, Any] = {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 1}
GPT: dict[str, Any] = {
    "vocab_size": 1100,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5: dict[str, Any] = {
    "vocab_size": 1100,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {"vocab_size": 1100, "d_model": 32, **PLACES} | {
    f"{part}_{what}": value
    for part in ("encoder", "decoder")
    for what, value in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))
}
VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
RESNET: dict[str, Any] = {
    "embedding_size": 10,
    "hidden_sizes": [10, 20],
    "depths": [1, 1],
    "num_channels": 3,
    "num_labels": 3,
}

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", "OPTConfig", {**SMALL, **PLACES, **OPT}),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", "OPTConfig", {**SMALL, **PLACES, **OPT}),
    "facebook/opt-125m": ("OPTForCausalLM", "OPTConfig", {**SMALL, **PLACES, **OPT}),
    "peft-internal-testing/tiny-random-OPTForCausalLM-extended-vocab": (
        "OPTForCausalLM",
        "OPTConfig",
        {**SMALL, **PLACES, **OPT},
    ),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "peft-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "hf-internal-testing/tiny-random-gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": ("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 4}),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**SMALL, **PLACES},
    ),
    "peft-internal-testing/tiny-random-BloomForCausalLM": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 1100, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        "LlamaConfig",
        {**DECODER, "pad_token_id": 0},
    ),
    "hf-internal-testing/tiny-random-MistralForCausalLM": ("MistralForCausalLM", "MistralConfig", DECODER),
    "peft-internal-testing/tiny-dummy-qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "Qwen/Qwen2-0.5B": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**DECODER, "head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": ("T5ForConditionalGeneration", "T5Config", T5),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
    ),
    "google/flan-t5-small": ("T5ForConditionalGeneration", "T5Config", {**T5, "feed_forward_proj": "gated-gelu"}),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "BartForConditionalGeneration",
        "BartConfig",
        BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", "BertConfig", {**SMALL, **PLACES}),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "BertForSequenceClassification",
        "BertConfig",
        {**SMALL, **PLACES},
    ),
    "bert-base-uncased": ("BertForMaskedLM", "BertConfig", {**SMALL, **PLACES}),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", "RobertaConfig", {**SMALL, **PLACES}),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "RobertaForSequenceClassification",
        "RobertaConfig",
        {**SMALL, **PLACES},
    ),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", "DebertaConfig", {**SMALL, **PLACES}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", "DebertaV2Config", {**SMALL, **PLACES}),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        RESNET,
    ),
    "hf-internal-testing/tiny-random-ResNetForImageClassification": (
        "ResNetForImageClassification",
        "ResNetConfig",
        RESNET,
    ),
    "peft-internal-testing/tiny-clip-text-2": ("CLIPTextModel", "CLIPTextConfig", {**SMALL, **PLACES}),
    "tiiuae/falcon-mamba-tiny-dev": (
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
}
"""Id that a test names → class, config class, and what makes it tiny."""


def make_models() -> None:
    """Every model of MODELS in the cache of this process, as a download would have left it, with a tokenizer beside it."""
    import torch
    import transformers
    from huggingface_hub.constants import HF_HUB_CACHE
    from transformers import AutoTokenizer

    from weftlora.data.demo import demo_model_path

    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    for name, (kind, config, fields) in MODELS.items():
        torch.manual_seed(0)
        folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
        here = folder / "snapshots" / "made"
        getattr(transformers, kind)(getattr(transformers, config)(**fields)).save_pretrained(here)
        tokenizer.save_pretrained(here)
        if "ImageClassification" in kind:
            transformers.ConvNextImageProcessorPil(size={"shortest_edge": 32}).save_pretrained(here)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text("made", encoding="utf-8")
    Path(os.environ["HF_HOME"], MADE).touch()


# ---------------------------------------------------------------------- inside the tests' process

_found: dict[str, dict[str, Any]] = {}


def _choices(method: str) -> Callable[[], dict[str, Any]]:
    import weftlora

    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "plain": dict,
        "hydra": lambda: {"structure": weftlora.Hydra(heads=2)},
        "tied": lambda: {"structure": weftlora.Tied()},
        "dash": lambda: {"boost": weftlora.Dash(directions=2)},
        "init": lambda: {"start": weftlora.Directions()},
        "tsd": lambda: {"boost": weftlora.Dash(directions=2), "start": weftlora.Directions()},
        "alora": lambda: {"ranks": weftlora.Reallocate()},
    }
    return makers[method]


def _stand_in(method: str) -> type:
    """A class that the tests take for LoraConfig and that makes the method's configs."""
    from peft import PeftType

    import weftlora

    choices = _choices(method)

    class Kind(type(weftlora.WeftConfig)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, weftlora.WeftConfig)

    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        fresh = choices() if not {"structure", "weft_version"} & kwargs.keys() else {}
        weftlora.WeftConfig.__init__(self, *args, **{**fresh, **kwargs})

    made.__signature__ = inspect.signature(weftlora.WeftConfig.__init__)  # type: ignore[attr-defined]
    fields = {"__init__": made, "peft_type": PeftType("WEFT"), "__module__": __name__}
    globals()["LoraConfig"] = Kind("LoraConfig", (weftlora.WeftConfig,), fields)  # where pickle looks for it
    return globals()["LoraConfig"]


def _launch_at_random() -> None:
    """Where an adapter is to be non-zero from the start, its directions are launched too."""
    import torch

    from weftlora.adapter.site import Site

    filled = Site.fill_zero_factor

    @functools.wraps(filled)
    @torch.no_grad()
    def fill(self: Site) -> None:
        filled(self)
        for term in (self.boost, self.start):
            for name in ("down", "up", "gain"):
                value = getattr(term, name, None)
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    value.copy_(torch.randn(value.shape) / 4)
            if term is not None:
                term.launched.fill_(True)
                term.index.copy_(torch.arange(len(term.index)))

    Site.fill_zero_factor = fill  # type: ignore[method-assign]


@contextlib.contextmanager
def _nothing_online(_: str) -> Iterator[None]:
    yield


def _image() -> Any:
    """In place of the cat that the tests would download: any image will do."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), dtype=np.uint8))


def pytest_configure(config: Any) -> None:
    """Put the method's config where the tests find LoraConfig, and keep them from the hub."""
    if (method := os.environ.get("WEFT_SUITE_METHOD")) is None:
        return
    import peft
    import torch

    torch.set_num_threads(1)
    sys.path.insert(0, str(config.rootpath))
    if method != CONTROL:
        _launch_at_random()
        peft.LoraConfig = _stand_in(method)
    from tests import testing_utils  # type: ignore[import-not-found]

    testing_utils.hub_online_once = _nothing_online
    testing_utils.load_cat_image = _image


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep the tests that use LoraConfig."""
    if "WEFT_SUITE_METHOD" not in os.environ:
        return
    from peft import LoraConfig, PeftConfig

    def uses(item: Any) -> bool:
        values = list(getattr(getattr(item, "callspec", None), "params", {}).values())
        kinds = [value if isinstance(value, type) else type(value) for value in values]
        named = [kind for kind in kinds if issubclass(kind, PeftConfig)]
        if named:
            return any(kind is LoraConfig for kind in named)
        owner = [item.cls] if item.cls is not None else []
        return any("LoraConfig" in _source(each) for each in (item.function, *owner))

    kept = [uses(item) for item in items]
    config.hook.pytest_deselected(items=[item for item, one in zip(items, kept, strict=True) if not one])
    items[:] = [item for item, one in zip(items, kept, strict=True) if one]


def _is_ours(kind: type) -> bool:
    return any(base.__module__ == "weftlora.errors" for base in kind.__mro__)


@functools.cache
def _statements(path: str) -> dict[int, str]:
    """Line of a file → the statement that it belongs to, of a compound one its head; pytest's own parses the file at every look."""
    text = Path(path).read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.walk(ast.parse(text)):  # those inside come after what they are in
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = body[0].lineno - 1 if isinstance(body, list) and body else node.end_lineno or node.lineno
            whole = " ".join(line.strip() for line in lines[node.lineno - 1 : max(end, node.lineno)])
            found |= dict.fromkeys(range(node.lineno, max(end, node.lineno) + 1), whole)
    return found


@functools.cache
def _source(of: Any) -> str:
    """What a test or its class is written as; read once, since Python parses the file for a class."""
    with contextlib.suppress(OSError, TypeError):
        return inspect.getsource(of)
    return ""


def pytest_runtest_makereport(item: Any, call: Any) -> None:
    """Note what came out, what it says and where in the test."""
    if call.when == "call" or call.excinfo is not None:
        each: dict[str, Any] = _found.setdefault(item.nodeid, {"outcome": "passed"})
        if call.excinfo is not None:
            skipped = call.excinfo.typename in ("Skipped", "XFailed")
            each["outcome"] = "skipped" if skipped else "failed"
            kind, said = call.excinfo.type, str(call.excinfo.value)
            each["says"] = f"{kind.__name__}: {said}".split("\n\n")[0][:300]
            before = call.excinfo.value.__context__
            each["refusal"] = str(before)[:300] if before is not None and _is_ours(type(before)) else ""
            if _is_ours(kind):
                each["ours"], each["kind"], each["says"] = True, kind.__name__, said[:300]
            own = [entry for entry in call.excinfo.traceback if "/tests/test" in str(entry.path)]
            each["at"] = _statements(str(own[-1].path)).get(own[-1].lineno + 1, "")[:200] if own else ""


def pytest_sessionfinish(session: Any) -> None:
    """Write it all down."""
    if out := os.environ.get("WEFT_SUITE_OUT"):
        Path(out).write_text(json.dumps(dict(sorted(_found.items()))), encoding="utf-8")


if __name__ == "__main__":
    make_models() if sys.argv[1:] == ["--make-models"] else main()
