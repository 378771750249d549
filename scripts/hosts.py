"""weftlora inside the trainers of hosts.toml: an adapter is trained there, saved, loaded again and exported.

    python scripts/hosts.py                  every host: evidence/hosts.json, and the table of docs/hosts.md
    python scripts/hosts.py axolotl trl      these

A host's packages go, without dependencies, into a folder in front of those of its row of matrix.toml, kept under .venv/hosts by its
content. What is tried in it is a function below, in a process that sees these packages: a host with a command is started by that
command. The model is the bundled one, the rows are made here, and six steps are taken.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "evidence" / "hosts.json"
LIMIT = 900
"""Seconds after which a host is given up."""
SUMS = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(48)]


def main() -> int:
    """Exit 1 where a host that was asked for does not do what is tried in it."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("names", nargs="*", help="hosts; all without")
    options.add_argument("--inside", metavar="NAME", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.inside:
        print(json.dumps(INSIDE[args.inside]()))
        return 0
    hosts = {host["name"]: host for host in tomllib.loads((ROOT / "hosts.toml").read_text(encoding="utf-8"))["host"]}
    if unknown := [name for name in args.names if name not in hosts]:
        options.error(f"hosts.toml has no host {unknown[0]!r}: use one of {', '.join(hosts)}")
    kept = json.loads(RESULTS.read_text(encoding="utf-8"))["hosts"] if RESULTS.is_file() else []
    found = {each["name"]: each for each in kept}
    failed = False
    for name in args.names or hosts:
        found[name] = tried(hosts[name])
        failed |= not found[name]["ran"]
        print(json.dumps(found[name], indent=1), flush=True)
    record = {"command": "make hosts", "hosts": [found[name] for name in hosts if name in found]}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(failed)


# ---------------------------------------------------------------------- a host's packages


def tried(host: dict[str, Any]) -> dict[str, Any]:
    """What came of a host: its version, and what was done in it, or why it did not go."""
    import matrix

    row = {each["name"]: each for each in tomllib.loads(matrix.ROWS.read_text(encoding="utf-8"))["row"]}[host["row"]]
    _, path, _ = matrix.shared(row)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(packages(host)), *path, str(ROOT / "src")]),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "AXOLOTL_DO_NOT_TRACK": "1",
    }
    said = host["packages"][0] if host["packages"] else f"{host['name']}=={row['versions'][host['name']]}"
    about = {"name": host["name"], "host": said.replace("==", " "), "versions": row["versions"]}
    with tempfile.TemporaryDirectory() as folder:
        env["MODELSCOPE_CACHE"] = folder
        env["PYTHONPATH"] = os.pathsep.join([str(offered(Path(folder) / "offered")), env["PYTHONPATH"]])
        done = subprocess.run(
            [sys.executable, str(Path(__file__).resolve()), "--inside", host["name"]],
            env=env, cwd=folder, capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-4000:], file=sys.stderr)
        return {**about, "ran": False, "did": [], "why": done.stderr.strip().splitlines()[-1][:300]}
    return {**about, "ran": True, **json.loads(done.stdout.splitlines()[-1])}


def packages(host: dict[str, Any]) -> Path:
    """The folder with a host's packages, made if it is not there."""
    import matrix

    kept = Path(sys.prefix).resolve() / "hosts"
    content = json.dumps([sys.version, host["packages"], host.get("sources", {})])
    folder = kept / f"{host['name']}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    kept.mkdir(exist_ok=True)
    for old in kept.glob(f"{host['name']}-*"):
        shutil.rmtree(old)
    making = Path(tempfile.mkdtemp(dir=kept, prefix="making-"))
    if host["packages"]:
        matrix.pip(sys.executable, "--ignore-requires-python", "--no-deps", "--target", str(making), *host["packages"])
    for source, inside in host.get("sources", {}).items():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
            subprocess.run([*command, "--no-build-isolation", "-d", download, source], check=False, capture_output=True)
            with tarfile.open(next(Path(download).glob("*.tar.gz"))) as archive:
                archive.extractall(download, filter="data")
            shutil.copytree(next(Path(download).glob(f"*/{inside}")), making / host["into"], dirs_exist_ok=True)
    making.rename(folder)
    return folder


def offered(folder: Path) -> Path:
    """What an installed weftlora tells its hosts: the entry points that pyproject.toml has now."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / "weftlora-0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: weftlora\nVersion: 0\n", encoding="utf-8")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {where}" for name, where in points.items())])
        for group, points in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n\n".join(groups) + "\n", encoding="utf-8")
    return folder


# ---------------------------------------------------------------------- inside a host's environment


def command(*arguments: str) -> str:
    """Run one of the host's own commands here; what it said, or an error with its end."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, timeout=LIMIT)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout + done.stderr


def demo() -> str:
    from weftlora.data.demo import demo_model_path

    return str(demo_model_path())


def base() -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo(), trust_remote_code=False, dtype=torch.float32).eval()


def logits(model: Any) -> Any:
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(input_ids=torch.arange(5, 25)[None]).logits
    model.train(training)
    return found


def train(model: Any, steps: int, lr: float) -> None:
    """A loop of our own over tokens drawn at random."""
    import torch

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        model(input_ids=(ids := torch.randint(5, 60, (4, 16))), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loaded(folder: Path, method: str) -> list[str]:
    """Load what a host has saved, with peft alone, and say what was checked: it has learnt, had its event, and is of the method."""
    import torch
    from peft import PeftModel

    plain = logits(base())
    model = PeftModel.from_pretrained(base(), folder)
    if torch.equal(logits(model), plain):
        raise RuntimeError("the adapter that was saved computes what the base does")
    if not any(name.endswith(".boost.directions") or ".boost." in name for name, _ in model.named_buffers()):
        raise RuntimeError("the launch of LoRA-Dash did not happen")
    return [f"{method} trained, with its launch", "saved and loaded by PeftModel"]


def in_axolotl() -> dict[str, Any]:
    """axolotl's own command on a YAML with `adapter: weft`; then what it refuses."""
    import torch
    from peft import PeftModel

    Path("rows.jsonl").write_text(
        "\n".join(json.dumps({"instruction": row["prompt"], "output": row["completion"]}) for row in SUMS),
        encoding="utf-8",
    )
    form = {"field_instruction": "instruction", "field_output": "output"} | dict.fromkeys(
        ("format", "no_input_format"), "{instruction}"
    )
    settings: dict[str, Any] = {
        "base_model": demo(),
        "adapter": "weft",
        "weft": {"recipe": "lora_dash", "after": 3, "directions": 2, "lora_plus_ratio": 4, "export": True},
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "datasets": [{"path": "rows.jsonl", "ds_type": "json", "type": form}],
        "val_set_size": 0.1,
        "sequence_len": 64,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 6,
        "learning_rate": 0.001,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "save_steps": 3,
        "output_dir": "out",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "flash_attention": False,
        "logging_steps": 1,
        "special_tokens": {"pad_token": "<pad>"},
    }
    Path("run.yaml").write_text(json.dumps(settings), encoding="utf-8")  # JSON is YAML
    command("-m", "axolotl.cli.train", "run.yaml")
    did = [
        "the plug-in found by its entry point",
        *loaded(Path("out"), "LoRA-Dash, LoRA+ rates by role,"),
        "checkpoints marked as whole",
    ]
    if not (Path("out") / "checkpoint-6" / "complete.json").is_file():
        raise RuntimeError("a checkpoint has no marker")
    apart = (
        (logits(PeftModel.from_pretrained(base(), "out")) - logits(PeftModel.from_pretrained(base(), "out/stock-lora")))
        .abs()
        .max()
    )
    if not torch.isfinite(apart) or apart > 1e-4:
        raise RuntimeError(f"the export is {apart} off")
    for wrong, says in (
        ({"loraplus_lr_ratio": 16}, "lora_plus_ratio"),
        ({"weft": {"recipe": "hydralora", "haeds": 3}}, "heads"),
        ({"weft": {"recipe": "lora_dash", "r": 8}}, "lora_r"),
        ({"adapter": "lora"}, "write adapter: weft"),
    ):
        Path("wrong.yaml").write_text(json.dumps({**settings, **wrong, "output_dir": "no"}), encoding="utf-8")
        try:
            command("-m", "axolotl.cli.train", "wrong.yaml")
        except RuntimeError as error:
            if says not in str(error):
                raise
        else:
            raise RuntimeError(f"{wrong} was accepted")
    did += ["exported as stock LoRA, equal logits", "four wrong files refused before the model is loaded"]
    return {"way": "its command `axolotl.cli.train`", "did": did}


def in_ms_swift() -> dict[str, Any]:
    """ms-swift's own command with a plug-in file of two lines."""
    turns = [[("user", row["prompt"]), ("assistant", row["completion"])] for row in SUMS]
    rows = [{"messages": [{"role": role, "content": text} for role, text in each]} for each in turns]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    Path("plugin.py").write_text(
        'from weftlora.integrations.ms_swift import register\nregister("lora_dash", name="dash", after=3, directions=2)\n',
        encoding="utf-8",
    )
    given = {
        "model": demo(), "use_hf": "true", "model_type": "llama", "template": "chatml", "external_plugins": "plugin.py",
        "tuner_type": "dash", "callbacks": "weft", "dataset": "rows.jsonl", "split_dataset_ratio": "0.1", "max_steps": "6",
        "save_steps": "3", "per_device_train_batch_size": "4", "learning_rate": "1e-3", "lora_rank": "4",
        "target_modules": "all-linear", "max_length": "128", "output_dir": "out",
        "gradient_checkpointing": "false", "torch_dtype": "float32", "report_to": "none",
    }  # fmt: skip
    command("-m", "swift.cli.sft", *(part for name, value in given.items() for part in (f"--{name}", value)))
    folder = next(Path("out").glob("*/checkpoint-6"))
    if not (folder / "complete.json").is_file():
        raise RuntimeError("the callback has marked no checkpoint")
    rank = json.loads((folder / "adapter_config.json").read_text())["r"]
    if rank != 4:
        raise RuntimeError(f"--lora_rank 4 became {rank}")
    return {"way": "its command `swift sft`", "did": [*loaded(folder, "LoRA-Dash"), "checkpoints marked as whole"]}


def in_llamafactory() -> dict[str, Any]:
    """LLaMA-Factory's v1 trainer from a script of three lines, since it loads no plug-in by itself; then its table of adapters."""
    import torch
    from peft import PeftModel

    Path("train.py").write_text(
        "import weftlora.integrations.llamafactory\nfrom llamafactory.cli import main\n\nmain()\n", encoding="utf-8"
    )
    rows = [{"instruction": row["prompt"], "output": row["completion"]} for row in SUMS]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = {"rows": {"path": "rows.jsonl", "source": "local", "converter": "alpaca"}}
    Path("rows.yaml").write_text(json.dumps(source), encoding="utf-8")  # JSON is YAML
    settings: dict[str, Any] = {
        "model": demo(), "template": "chatml", "train_dataset": "rows.yaml", "output_dir": "out", "max_steps": 6,
        "micro_batch_size": 2, "global_batch_size": 4, "cutoff_len": 128, "learning_rate": 0.001, "bf16": False,
        "batching_workers": 0,
        "peft_config": {"name": "weft", "recipe": "lora_dash", "after": 3, "directions": 2, "r": 4, "target_modules": "all"},
    }  # fmt: skip
    Path("run.yaml").write_text(json.dumps(settings), encoding="utf-8")
    os.environ["USE_V1"] = "1"
    command("train.py", "sft", "run.yaml")
    did = loaded(Path("out"), "LoRA-Dash")
    wrong = {**settings, "peft_config": {"name": "weft", "recipe": "hydralora", "haeds": 3}, "output_dir": "no"}
    Path("wrong.yaml").write_text(json.dumps(wrong), encoding="utf-8")
    try:
        command("train.py", "sft", "wrong.yaml")
    except RuntimeError as error:
        if "heads" not in str(error):
            raise
    else:
        raise RuntimeError("a misspelt field was accepted")

    import weftlora.integrations.llamafactory  # noqa: F401, I001  # before its table is asked
    from llamafactory.v1.plugins.model_plugins.peft import PeftPlugin

    again = PeftPlugin("weft")(base(), {"name": "weft", "adapter_name_or_path": "out"}, False)
    if not torch.equal(logits(again), logits(PeftModel.from_pretrained(base(), "out"))):
        raise RuntimeError("adapter_name_or_path gives another adapter")
    did += ["adapter_name_or_path loads it", "a misspelt field refused"]
    return {"way": "its v1 trainer, `USE_V1=1 python train.py sft`", "did": did}


def in_trl() -> dict[str, Any]:
    """trl's trainers: a new adapter, and one that was trained before, whose copy is the reference policy."""
    import torch
    import trl
    from datasets import Dataset
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import weftlora

    tokenizer = AutoTokenizer.from_pretrained(demo(), trust_remote_code=False)
    pairs = Dataset.from_list([{**row, "chosen": row["completion"], "rejected": "no"} for row in SUMS]).remove_columns(
        "completion"
    )
    labelled = Dataset.from_list([{**row, "label": n % 2 == 0} for n, row in enumerate(SUMS)])
    asked = Dataset.from_list([{"prompt": row["prompt"]} for row in SUMS])
    common: dict[str, Any] = {
        "output_dir": "out",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": [],
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "gradient_checkpointing": False,
    }
    drawn = {"num_generations": 2, "max_completion_length": 4}

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(each)) for each in completions]

    def dash() -> Any:
        return weftlora.LoraDashConfig(r=4, after=3, directions=2, target_modules="all-linear", task_type="CAUSAL_LM")

    def trained() -> Any:
        """An adapter after its launch."""
        torch.manual_seed(0)
        model = get_peft_model(base(), dash())
        train(model, 5, 1e-2)
        return model

    def reference(policy: Any, other: Any) -> Any:
        """What the reference computes: a model of its own, or the adapter `ref` of the policy."""
        if other is not None:
            return logits(other)
        policy.set_adapter("ref")
        found = logits(policy)
        policy.set_adapter("default")
        return found

    trials: dict[str, Callable[[Any, Any], Any]] = {
        "SFT": lambda model, config: trl.SFTTrainer(
            model, args=trl.SFTConfig(**common, max_length=64), train_dataset=Dataset.from_list(SUMS),
            processing_class=tokenizer, peft_config=config),
        "DPO": lambda model, config: trl.DPOTrainer(
            model, args=trl.DPOConfig(**common), train_dataset=pairs, processing_class=tokenizer, peft_config=config),
        "KTO": lambda model, config: trl.KTOTrainer(
            model, args=trl.KTOConfig(**common), train_dataset=labelled, processing_class=tokenizer, peft_config=config),
        "GRPO": lambda model, config: trl.GRPOTrainer(
            model, reward, args=trl.GRPOConfig(**common, **drawn, beta=0.1), train_dataset=asked, processing_class=tokenizer,
            peft_config=config),
        "RLOO": lambda model, config: trl.RLOOTrainer(
            model, reward, args=trl.RLOOConfig(**common, **drawn), train_dataset=asked, processing_class=tokenizer,
            peft_config=config),
    }  # fmt: skip
    from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trials["ORPO"] = lambda model, config: ORPOTrainer(
        model,
        args=ORPOConfig(**common, max_length=64),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=config,
    )
    online = {"max_new_tokens": 4, "max_length": 64}
    trials["Online DPO"] = lambda model, config: OnlineDPOTrainer(
        model, reward_funcs=reward, args=OnlineDPOConfig(**common, **online), train_dataset=asked,
        processing_class=tokenizer, peft_config=config)  # fmt: skip
    did, not_run = [], []
    for name, make in trials.items():
        trainer = make(base(), dash())
        trainer.train()
        trainer.save_model(f"out-{name}")
        loaded(Path(f"out-{name}"), "LoRA-Dash")
        did.append(f"{name} from a new adapter, launched, saved and loaded")
        if name == "SFT":
            continue
        model = trained()
        expected = logits(model)
        trainer = make(model, None)
        policy: Any = trainer.accelerator.unwrap_model(trainer.model)
        other = getattr(trainer, "ref_model", None)
        if other is None and "ref" not in policy.peft_config:
            not_run.append(f"{name} makes no reference of a trained adapter")
            continue
        if apart := float((reference(policy, other) - expected).abs().max()):
            raise RuntimeError(f"{name}: the reference policy is {apart} off the policy that it is a copy of")
        trainer.train()
        if torch.equal(logits(policy), expected):
            raise RuntimeError(f"{name}: the policy has not moved")
        if not torch.equal(reference(policy, other), expected):
            raise RuntimeError(f"{name}: the reference policy has moved")
        did.append(f"{name} from a trained adapter: the reference equals it, and rests")

    def scored() -> Any:
        """A base with a head for one number, the same at every call."""
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(
            demo(), trust_remote_code=False, num_labels=1
        ).float()
        model.config.pad_token_id = tokenizer.pad_token_id
        return model.eval()

    config = weftlora.LoraDashConfig(r=4, after=3, directions=2, target_modules="all-linear", task_type="SEQ_CLS")
    trainer = trl.RewardTrainer(
        scored(), args=trl.RewardConfig(**common), train_dataset=pairs, processing_class=tokenizer, peft_config=config
    )
    trainer.train()
    trainer.save_model("out-Reward")
    model = PeftModel.from_pretrained(scored(), "out-Reward")
    if not any(".boost." in name for name, _ in model.named_buffers()) or torch.equal(logits(model), logits(scored())):
        raise RuntimeError("Reward: the adapter that was saved has not learnt, or has not launched")
    if not torch.equal(logits(model), logits(trainer.accelerator.unwrap_model(trainer.model))):
        raise RuntimeError("Reward: the adapter that was saved gives other rewards")
    did.append("Reward from a new adapter, launched, saved and loaded")
    return {
        "way": "`peft_config=` of its trainers, or a model with an adapter",
        "did": did,
        **({"left": not_run} if not_run else {}),
    }


def in_unsloth() -> dict[str, Any]:
    """A model of unsloth's loader, adapted by peft's own `get_peft_model`; and what its ways to adapt and save make of one."""
    from unsloth import FastLanguageModel  # noqa: I001  # before the libraries that it patches

    import datasets
    import torch
    import trl
    from peft import get_peft_model

    import weftlora

    def theirs() -> Any:
        return FastLanguageModel.from_pretrained(demo(), max_seq_length=64, load_in_4bit=False, dtype=torch.float32)

    def trained(model: Any, config: Any) -> Any:
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        train(model, 6, 1e-2)
        return model

    configs = {
        "LoRA-Dash": lambda: weftlora.LoraDashConfig(r=4, after=3, directions=2, target_modules="all-linear"),
        "HydraLoRA": lambda: weftlora.HydraLoraConfig(r=4, heads=3, target_modules="all-linear"),
    }
    did = []
    for name, config in configs.items():
        found, expected = logits(trained(theirs()[0], config())), logits(trained(base(), config()))
        apart = float((found - expected).abs().max())
        if apart or torch.equal(found, logits(base())):
            raise RuntimeError(f"{name} on its model is {apart} off what it comes to on transformers'")
        did.append(f"{name} in a loop: the logits of the same training without unsloth, bit for bit")
    model, tokenizer = theirs()
    texts = datasets.Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in SUMS])
    model = get_peft_model(model, configs["LoRA-Dash"]())
    settings = trl.SFTConfig(
        output_dir="out", max_steps=6, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", gradient_checkpointing=False,
    )  # fmt: skip
    trl.SFTTrainer(model, args=settings, train_dataset=texts, processing_class=tokenizer).train()
    model.save_pretrained("sft")
    loaded(Path("sft"), "LoRA-Dash")
    did.append("LoRA-Dash in SFTTrainer, launched, saved, loaded by peft without unsloth")
    before = logits(model)
    apart = float((logits(model.merge_and_unload()) - before).abs().max())
    if apart > 1e-4:
        raise RuntimeError(f"merged, it is {apart} off")
    did.append("merged by merge_and_unload")
    left = []
    try:
        FastLanguageModel.get_peft_model(theirs()[0], r=4, peft_config=configs["HydraLoRA"]())
    except TypeError as error:
        left.append(f"not through FastLanguageModel.get_peft_model, which makes a LoraConfig ({error})")
    return {
        "way": "peft's `get_peft_model` on the model of `FastLanguageModel.from_pretrained`, on a CPU",
        "did": did,
        "left": [*left, "not run: its kernels, which need a GPU"],
    }


def batches(count: int) -> Any:
    """Token ids for so many batches of 4 rows, the same at every call."""
    import torch

    draw = torch.Generator().manual_seed(3)
    return torch.randint(5, 60, (4 * count, 16), generator=draw)


def adapted(after: int = 3) -> Any:
    """The base under a new adapter with a launch, the same at every call."""
    import torch
    from peft import get_peft_model

    import weftlora

    torch.manual_seed(0)
    return get_peft_model(base(), weftlora.LoraDashConfig(r=4, after=after, directions=2, target_modules="all-linear"))


def in_lightning() -> dict[str, Any]:
    """Lightning's Trainer on a module of a user's: through accumulation, stopped after step 4 of 6 and resumed."""
    import lightning
    import torch
    from torch.utils.data import DataLoader

    import weftlora

    class Module(lightning.LightningModule):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model, self.schedule = model, None

        def training_step(self, ids: Any, _: int) -> Any:
            return self.model(input_ids=ids, labels=ids).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["weftlora"] = weftlora.state_dict(self.model)

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.schedule = checkpoint["weftlora"]

        def on_train_start(self) -> None:
            if (
                self.schedule is not None
            ):  # by now the module's own state is loaded, which Lightning does after the hook above
                weftlora.load_state_dict(self.model, self.schedule)

    def fitted(epochs: int, *, start: str | None = None) -> Any:
        """Two steps an epoch. It is stopped between two, since inside one Lightning begins with the first row again."""
        module = Module(adapted())
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator="cpu", devices=1, accumulate_grad_batches=2, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches(4), batch_size=4), ckpt_path=start)
        if epochs < 3:
            trainer.save_checkpoint("stopped.ckpt")
        return module.model

    model = fitted(3)
    model.save_pretrained("out")
    did = loaded(Path("out"), "LoRA-Dash")
    fitted(2)
    if not torch.equal(logits(fitted(3, start="stopped.ckpt")), logits(model)):
        raise RuntimeError("resumed from its checkpoint, it ends in another adapter")
    return {
        "way": "its `Trainer.fit` on a `LightningModule`",
        "did": [*did, "the launch counts optimiser steps, not micro-batches", "stopped and resumed: the same adapter"],
    }


def in_accelerate() -> dict[str, Any]:
    """A loop of a user's with accelerate: through accumulation, stopped after step 4 and resumed."""
    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    import weftlora

    class Schedule:
        """What `save_state` keeps of an adapter beside its parameters."""

        def __init__(self, model: Any) -> None:
            self.model = model

        def state_dict(self) -> dict[str, Any]:
            return weftlora.state_dict(self.model)

        def load_state_dict(self, state: dict[str, Any]) -> None:
            weftlora.load_state_dict(self.model, state)

    def looped(steps: int, *, start: str | None = None) -> Any:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = adapted().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(batches(12), batch_size=4))
        accelerator.register_for_checkpointing(Schedule(model))
        done = 0
        if start is not None:
            accelerator.load_state(start)
            loader, done = accelerator.skip_first_batches(loader, 8), 4
        for ids in loader:
            if done == steps:
                break
            with accelerator.accumulate(model):
                accelerator.backward(model(input_ids=ids, labels=ids).loss)
                optimizer.step()
                optimizer.zero_grad()
                done += accelerator.sync_gradients
        if steps < 6:
            accelerator.save_state("stopped")
        accelerator.free_memory()
        return accelerator.unwrap_model(model)

    model = looped(6)
    model.save_pretrained("out")
    did = loaded(Path("out"), "LoRA-Dash")
    looped(4)
    if not torch.equal(logits(looped(6, start="stopped")), logits(model)):
        raise RuntimeError("resumed from its state, it ends in another adapter")
    return {
        "way": "a loop of one's own with `Accelerator`",
        "did": [*did, "the launch counts optimiser steps, not micro-batches", "stopped and resumed: the same adapter"],
    }


INSIDE: dict[str, Callable[[], dict[str, Any]]] = {
    "axolotl": in_axolotl,
    "ms-swift": in_ms_swift,
    "llamafactory": in_llamafactory,
    "trl": in_trl,
    "unsloth": in_unsloth,
    "lightning": in_lightning,
    "accelerate": in_accelerate,
}
"""Host → what is tried in its environment."""

if __name__ == "__main__":
    sys.exit(main())
