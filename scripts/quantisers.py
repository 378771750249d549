"""Every quantiser against everything that weftlora does with a base, executed: what works, what it loses, what is refused.

    python scripts/quantisers.py                    all of them, into bench/quantisers.json (ten minutes on a quiet machine)
    python scripts/quantisers.py nf4 torchao-int8   these, beside what is in the file

The base is the bundled model, the rows are the bundled tasks, and each quantiser has a process of its own. A quantiser whose kernels
refuse the bundled model's sides has a row of that refusal and one, NAME-sides, on a random Llama with sides that it takes, quantised
once and saved. The packages of the
quantisers are no part of the environment, since peft imports some at every start: they go into .venv/quantisers, without dependencies,
the first time. A row is what `weftlora train` and its Python calls did:

    train         six steps of a method by recipe, with validation, and checkpoints after every three
    resume        the same run from its first checkpoint ends with the same adapter, bit for bit
    reload        the folder gives the loss that training ended with
    rank          LoRA-TSD ranks its directions on the base in memory, and on the original
    checkpointing gradients with both kinds of gradient checkpointing, after prepare_model_for_kbit_training, are those without
    export        a stock LoRA folder, proved by stock peft
    merge         into the base as it is quantised, into dequantised weights, into the original: the share of ‖ΔW‖ that is lost

    evaluated     how far the base's logits move when a model is evaluated and its adapter saved, ours and stock peft's

The environment variable QUANTISERS may name a folder with the packages to use instead of .venv/quantisers; the rows gptq and awq
need gptqmodel and what it imports in it (pypcre, device-smi, logbar, tokenicer, threadpoolctl, defuser, optimum, pillow).
"""

from __future__ import annotations

import argparse
import atexit
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "bench" / "quantisers.json"
PACKAGES = (
    *("bitsandbytes==0.50.2", "torchao==0.18.0", "optimum-quanto==0.2.7", "ninja==1.13.2", "hqq==0.2.8.post1"),
    *("einops==0.8.2", "termcolor==3.3.0"),
)
TEXTS = [f"mill turn kqzv -> row {n}" * 4 for n in range(32)]
"""What GPTQ chooses its roundings on."""
ROWS: dict[str, dict[str, Any]] = {
    "none": {},
    "nf4": {"load_in_4bit": True, "quantization": {"bnb_4bit_use_double_quant": False}},
    "nf4-double": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "quantization": {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}},
    "int8": {"load_in_8bit": True},
    "torchao-int8": {"quantization": {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}},
    "torchao-int8-dynamic": {
        "quantization": {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt8WeightConfig"}
    },
    "quanto-int8": {"quantization": {"quant_method": "quanto", "weights": "int8"}},
    "quanto-int4": {"quantization": {"quant_method": "quanto", "weights": "int4"}},
    "hqq": {"quantization": {"quant_method": "hqq", "nbits": 4, "group_size": 64}},
    "gptq": {"quantization": {"quant_method": "gptq", "bits": 4, "group_size": 32, "dataset": TEXTS}},
    "gptq-sides": {  # the kernel that it takes on a CPU unasked has no backward
        "quantization": {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 32,
            "dataset": TEXTS,
            "backend": "gptq_torch_aten",
        }
    },
    "awq": {"quantization": {"quant_method": "awq", "bits": 4}},
}
"""Name → the keys of a recipe's model section."""
SIDES: dict[str, dict[str, int]] = {
    "gptq-sides": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Name → the sides of a base with random weights, for a row whose base is not the bundled model."""
METHODS = ("lora", "hydralora", "tied_lora", "lora_dash", "alora", "flexora")
STEPS = 6
LINEAR = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
"""The linear modules of a Llama, by their last names."""


def recipe(row: str, method: str, out: Path) -> dict[str, Any]:
    """Six steps of a method on the demo's base and rows."""
    adapter: dict[str, Any] = {"recipe": method}
    if method != "tied_lora":
        adapter |= {"r": 4}
    if method == "flexora":
        adapter |= {"steps": 2, "outer_batches": 1, "val_size": 8}
    if method == "lora_dash":
        adapter |= {"after": 2, "directions": 8}
    if method == "alora":
        adapter |= {"first": 2, "every": 1, "max_rounds": 2, "rows": 8}
    return {
        "model": {"dtype": "float32", **base_section(row)},
        "data": {"train": "demo", "max_length": 64, "limit": 64},
        "adapter": adapter,
        "train": {"steps": STEPS, "batch_size": 8, "lr": 5e-3, "save_every": 3, "eval_every": 3, "keep": 9},
        "out": str(out),
    }


@cache
def original_of(row: str) -> str:
    """The folder of the unquantised base of a row: the bundled model, or a random one with the bundled tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from weftlora.data.demo import demo_model_path

    if row not in SIDES:
        return str(demo_model_path())
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SIDES[row])).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@cache
def base_section(row: str) -> dict[str, Any]:
    """The model section of a row's recipes. Of a base with sides of its own it names a folder that is quantised already, once."""
    if row not in SIDES:
        return {"path": "demo", **ROWS[row]}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from weftlora.runs import quantisation

    original = original_of(row)
    settings = quantisation.asked(False, False, ROWS[row]["quantization"], "float32")
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    how = quantisation.loading(settings or {}, original)
    AutoModelForCausalLM.from_pretrained(original, quantization_config=how).save_pretrained(folder)
    AutoTokenizer.from_pretrained(original).save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    said["quantization_config"] |= {
        k: v for k, v in ROWS[row]["quantization"].items() if k == "backend"
    }  # saved as auto
    (folder / "config.json").write_text(json.dumps(said), encoding="utf-8")
    return {"path": str(folder)}


def row(name: str, methods: list[str]) -> dict[str, Any]:
    """Everything about one quantiser, in this process."""
    import transformers

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    found: dict[str, Any] = {"model": ROWS[name], **({"sides": SIDES[name]} if name in SIDES else {})}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for method in methods:
            found[f"train {method}"] = told(lambda m=method: trained(name, m, folder))
        if "loss" not in found["train lora"]:
            return {key: found[key] for key in ("model", "sides", "train lora") if key in found}
        found["form"] = found["train lora"].pop("form")
        found["resume"] = told(lambda: resumed(name, folder))
        for where in ("memory", "original"):
            found[f"rank on {where}"] = told(lambda w=where: ranked(name, w))
        for kind in ("reentrant", "non_reentrant"):
            found[f"checkpointing {kind}"] = told(lambda k=kind: checkpointed(name, k))
        found["speaks"] = told(lambda: spoken(folder / "lora"))
        found["export"] = told(lambda: exported(folder))
        for way in ("as it is", "bfloat16", "original"):
            found[f"merge {way}"] = told(lambda w=way: merged(name, folder, w))
        found["merge in memory"] = told(lambda: merged_in_memory(name))
        found["evaluated"] = told(lambda: evaluated(name))
    return found


def told(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a call found, or the sentence that it was refused with, and seconds."""
    from weftlora.errors import WeftError

    began = time.perf_counter()
    try:
        result = call()
    except WeftError as error:
        result = {"refused": str(error)}
    except Exception as error:  # not ours: a fault, to be seen in the table
        result = {"fault": f"{type(error).__name__}: {str(error)[:300]}"}
    return {**result, "seconds": round(time.perf_counter() - began, 1)}


def trained(name: str, method: str, folder: Path) -> dict[str, Any]:
    """Train by recipe, and load the folder again: the logits are those that the model had when training ended."""
    import torch
    from transformers import TrainerCallback

    import weftlora
    from weftlora.runs.load import load_run

    ended: list[Any] = []

    def logits(model: Any) -> Any:
        with torch.no_grad():
            return model.eval()(input_ids=batch(model.config.vocab_size)).logits

    class Ended(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ended.append(logits(kwargs["model"]))

    run = weftlora.train(recipe(name, method, folder / method), callbacks=[Ended()])
    again = logits(load_run(weftlora.Run.load(run.folder)).model)
    loss = weftlora.evaluate(run, split="validation", answers=False).scores.loss
    return {"loss": loss, "form": run.base.get("form", ""), "off": float((again - ended[-1]).norm() / again.norm())}


def resumed(name: str, folder: Path) -> dict[str, Any]:
    """A run that is continued from its first checkpoint ends with the same adapter."""
    import torch
    from safetensors.torch import load_file

    import weftlora

    whole, cut = folder / "lora", folder / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "adapter")
    for late in (cut / "checkpoints").glob(f"*{STEPS}*"):
        shutil.rmtree(late)
    record = json.loads((cut / "run.json").read_text(encoding="utf-8")) | {"status": "interrupted"}
    (cut / "run.json").write_text(json.dumps(record), encoding="utf-8")
    weftlora.train(cut, resume=True)
    one, two = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (whole, cut))
    return {"same": one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)}


def base_of(name: str) -> Any:
    """The quantised base by itself."""
    from weftlora.runs import base_model
    from weftlora.runs.recipe import Recipe

    read = Recipe.read(recipe(name, "lora", Path("none")))
    return base_model.load(base_model.find(read.model, Path.cwd()), "causal")


def batch(size: int) -> Any:
    """Token numbers drawn from a seed."""
    import torch

    return torch.randint(size, (4, 16), generator=torch.Generator().manual_seed(0))


def ranked(name: str, where: str) -> dict[str, Any]:
    """LoRA-TSD on the base; how many of its first eight directions are those of the unquantised base, on average over modules."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import weftlora

    def launched(quantised: bool, original: str | None) -> dict[str, Any]:
        torch.manual_seed(0)
        plain = base_of(name) if quantised else AutoModelForCausalLM.from_pretrained(original_of(name))
        model = get_peft_model(plain, weftlora.LoraTsdConfig(r=4, after=2, directions=8))
        weftlora.attach(model, total_steps=4, original=original)
        optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=5e-3))
        ids = batch(plain.config.vocab_size)
        for _ in range(3):
            model.train()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                model(input_ids=ids)
        events = weftlora.state_dict(model)["default"]["events"]
        return next(event["sites"] for event in events if event["event"] == "dash_launch")

    mine, plain = launched(True, original_of(name) if where == "original" else None), launched(False, None)
    shared = [len({*mine[site]["index"]} & {*plain[site]["index"]}) / len(plain[site]["index"]) for site in plain]
    return {"on": sorted({each["ranked_on"] for each in mine.values()}), "shared": round(sum(shared) / len(shared), 3)}


def checkpointed(name: str, kind: str) -> dict[str, Any]:
    """How far gradients with checkpointing are from those without, relative to them."""
    import torch
    from peft import get_peft_model, prepare_model_for_kbit_training

    import weftlora

    def gradients(checkpointing: bool) -> Any:
        torch.manual_seed(0)
        plain = base_of(name)
        plain.config.use_cache = False
        told = {"use_reentrant": kind == "reentrant"}
        plain = prepare_model_for_kbit_training(plain, checkpointing, gradient_checkpointing_kwargs=told)
        if checkpointing and not plain.is_gradient_checkpointing:  # a base that is not quantised is left alone
            plain.gradient_checkpointing_enable(gradient_checkpointing_kwargs=told)
            plain.enable_input_require_grads()
        model = get_peft_model(plain, weftlora.PlainLoraConfig(r=4, init_lora_weights=False)).train()
        ids = batch(plain.config.vocab_size)
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    without, used = gradients(False), gradients(True)
    return {"off": float((used - without).norm() / without.norm())}


def spoken(run: Path) -> dict[str, Any]:
    """generate and chat answer."""
    import weftlora

    return {
        "generate": bool(weftlora.generate(run, "mill turn kqzv ->", max_new_tokens=4).text is not None),
        "chat": bool(weftlora.chat(run, max_new_tokens=4).say("mill turn kqzv ->").text is not None),
    }


def exported(folder: Path) -> dict[str, Any]:
    """A stock LoRA folder; the error is that of the proof."""
    import weftlora

    return {"error": weftlora.export_lora(folder / "lora", folder / "stock").proof.error}


def merged(name: str, folder: Path, way: str) -> dict[str, Any]:
    """A folder of merged weights; losses are taken whatever they are, and told."""
    import weftlora

    # a process of stock libraries takes seconds to start, and merges are proved in the tests
    options: dict[str, Any] = {"accept_loss": True, "verify": False}
    if way == "bfloat16":
        options["dtype"] = way
    if way == "original":
        options |= {"original": original_of(name), "dtype": "float32"}
    found = weftlora.merge(folder / "lora", folder / f"merged-{way}", **options)
    return {"dtype": found.dtype, "lost": found.lost, "lost_logits": found.lost_logits}


def merged_in_memory(name: str) -> dict[str, Any]:
    """peft's merge_adapter and unmerge_adapter: how far the merged model is off, and that what comes back is bit for bit."""
    import torch
    from peft import get_peft_model

    import weftlora

    torch.manual_seed(0)
    plain = base_of(name)
    model = get_peft_model(plain, weftlora.PlainLoraConfig(r=4, init_lora_weights=False)).eval()
    ids = batch(plain.config.vocab_size)

    def logits() -> Any:
        with torch.no_grad():
            return model(input_ids=ids).logits

    live = logits()
    with model.disable_adapter():
        bare = logits()
    model.merge_adapter()
    merged = logits()
    model.unmerge_adapter()
    return {"lost_logits": float((merged - live).norm() / (live - bare).norm()), "back": torch.equal(logits(), live)}


def evaluated(name: str) -> dict[str, Any]:
    """How far a base's logits move, relative to them, when it is evaluated and an adapter in it saved: ours, and stock peft's.

    The base is a random one with sides that bitsandbytes' packed layout takes; it fails on those of the bundled model.
    """
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    import weftlora
    from weftlora.runs import quantisation

    moved = {}
    with tempfile.TemporaryDirectory() as place:
        if name in SIDES:
            place, options = base_section(name)["path"], {}
        else:
            asked = [ROWS[name].get(key) for key in ("load_in_4bit", "load_in_8bit", "quantization")]
            settings = quantisation.asked(bool(asked[0]), bool(asked[1]), asked[2], "float32")
            options = {} if settings is None else {"quantization_config": quantisation.loading(settings, "demo")}
            sides = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**sides, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(place)
        stock = LoraConfig(r=4, target_modules=LINEAR)  # "all-linear" of stock peft sees no class of GPTQ's
        for who, config in (("weftlora", weftlora.PlainLoraConfig(r=4)), ("stock", stock)):
            plain = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
            ids = batch(plain.config.vocab_size)
            before = plain.train()(input_ids=ids).logits.detach()
            model = get_peft_model(plain, config).eval()
            with torch.no_grad():
                model(input_ids=ids)
            get_peft_model_state_dict(model)
            after = model.train()(input_ids=ids).logits.detach()
            moved[who] = float((after - before).norm() / before.norm())
    return moved


# ---------------------------------------------------------------------- the file


def install() -> Path:
    """The folder with the packages, made where it is not there."""
    given = os.environ.get("QUANTISERS")
    folder = Path(given) if given else ROOT / ".venv" / "quantisers"
    if not folder.is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", nargs="*", help="quantisers; all without")
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), help="recipes to train; lora is always among them"
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        methods = list(dict.fromkeys(["lora", *given.methods]))
        print("\n" + json.dumps({"row": row(given.one, methods), "versions": versions()}))
        return
    from weftlora.runs.precision import cpu_name

    if unknown := [name for name in given.rows if name not in ROWS]:
        parser.error(f"no quantiser {unknown[0]!r}: {', '.join(ROWS)}")
    folder = install()
    record = json.loads(given.out.read_text(encoding="utf-8")) if given.out.is_file() else {"rows": {}}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(folder))))
    for name in given.rows or ROWS:
        command = [sys.executable, __file__, "--one", name, "--methods", *given.methods]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        record["rows"][name] = found["row"]
        print(name, json.dumps(found["row"], ensure_ascii=False), flush=True)
        said = f"python scripts/quantisers.py --methods {' '.join(given.methods)}"
        head = {"command": said, "versions": found["versions"], "processor": cpu_name()}
        rows = {each: record["rows"][each] for each in ROWS if each in record["rows"]}
        record = {**head, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "torchao", "optimum-quanto", "hqq"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


if __name__ == "__main__":
    main()
