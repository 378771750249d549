"""The first hour on a real stack: what people do with an adapter in Trainer, trl and on a hub before they read anything.

Nothing here needs a download, another file of the tests or a checkout: a tiny model, a tokenizer of a few words, and a hub that
listens on this machine only.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import weftlora

WORDS = ["<pad>", "<bos>", "<eos>", "user", "assistant", "mill", "turn", "flour", "stone", *"abcdefghi"]
TOKEN = "hf_stand_in_for_a_secret"


def base(words: int = len(WORDS), **overrides: Any) -> LlamaForCausalLM:
    """A decoder of two layers; the same values every time."""
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=words, max_position_embeddings=64, **size, **special, **overrides))


def rows(n: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, len(WORDS), (n, 8), generator=torch.Generator().manual_seed(n))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def config(method: str) -> weftlora.WeftConfig:
    """Every method with what happens in it after step 3."""
    shared: dict[str, Any] = {"r": 2, "task_type": "CAUSAL_LM", "lora_dropout": 0.1}
    return {
        "lora": lambda: weftlora.PlainLoraConfig(**shared),
        "hydralora": lambda: weftlora.HydraLoraConfig(heads=2, **shared),
        "lora_dash": lambda: weftlora.LoraDashConfig(directions=2, after=3, **shared),
        "alora": lambda: weftlora.AllocLoraConfig(first=3, every=2, max_rounds=1, rows=4, **shared),
    }[method]()


METHODS = ("lora", "hydralora", "lora_dash", "alora")


class Early(Trainer):
    """Measures how early a checkpoint is, so that which one is best does not hang on rounding."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        return {**super().evaluate(*args, **kwargs), "eval_early": -float(self.state.global_step)}


def trainer(method: str, out: Path, *callbacks: TrainerCallback, **arguments: Any) -> Trainer:
    torch.manual_seed(1)
    model = get_peft_model(base(), config(method))
    given = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "seed": 5}
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_steps": 100}
    validation = rows(6) if method == "alora" else None
    return Early(
        model=model,
        args=TrainingArguments(str(out), **{**given, **quiet, **arguments}),
        train_dataset=rows(8),
        eval_dataset=rows(4),
        callbacks=[weftlora.Callback(validation=validation), *callbacks],
    )


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([[3, 5, 7, 9, 4]])).logits
    return found


def reloaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(base(), str(folder))


def first_line(card: Path) -> str:
    """What a reader sees first: below the metadata that a hub reads."""
    text = card.read_text(encoding="utf-8")
    body = text.split("---\n", 2)[2] if text.startswith("---\n") else text
    return body.lstrip().splitlines()[0]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---------------------------------------------------------------------- Trainer


class Stop(TrainerCallback):
    """Ends a run in the middle, as a closed terminal does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", METHODS)
def test_the_best_model_is_the_one_that_is_left(method: str, tmp_path: Path) -> None:
    """The first checkpoint is best, which is from before anything has happened in the adapter."""
    best_of = {"load_best_model_at_end": True, "metric_for_best_model": "eval_early", "greater_is_better": True}
    run = trainer(method, tmp_path, eval_strategy="steps", eval_steps=2, **best_of)
    run.train()
    best = Path(str(run.state.best_model_checkpoint))
    assert best.name == "checkpoint-2"
    assert torch.equal(logits(run.model), logits(reloaded(best)))
    assert not torch.equal(logits(run.model), logits(reloaded(tmp_path / "checkpoint-6")))
    for folder in (best, tmp_path / "checkpoint-6"):
        assert "`import weftlora`" in first_line(folder / "README.md")


@pytest.mark.parametrize("method", METHODS)
def test_a_run_goes_on_from_its_last_checkpoint(method: str, tmp_path: Path) -> None:
    whole = trainer(method, tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(method, tmp_path / "cut", Stop()).train()
    again = trainer(method, tmp_path / "cut")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    saved = [tmp_path / name / "checkpoint-6" / "adapter_model.safetensors" for name in ("whole", "cut")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    assert torch.equal(logits(again.model), logits(reloaded(tmp_path / "cut" / "checkpoint-6")))


# ---------------------------------------------------------------------- a hub on this machine


class Hub(ThreadingHTTPServer):
    """As much of a hub as a push needs: it takes a repository and commits, and keeps the files."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, dict[str, bytes]] = {}
        self.unknown: list[str] = []
        self.authorised = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        self.server.authorised &= self.headers.get("authorization") == f"Bearer {TOKEN}"
        content = self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts == ["api", "repos", "create"]:
            asked = json.loads(content)
            repo = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.files.setdefault(repo, {})
            return self.say({"url": f"{self.server.url}/{repo}", "name": repo})
        if parts == ["api", "validate-yaml"]:
            return self.say({"errors": [], "warnings": []})
        repo, what = "/".join(parts[2:4]), parts[4] if len(parts) > 4 else ""
        if what == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(content)["files"]
            ]
            return self.say({"files": files})
        if what == "commit":
            for line in content.decode().splitlines():
                if (entry := json.loads(line))["key"] == "file":
                    self.server.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            oid = "0" * 40
            return self.say({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True})
        self.server.unknown.append(f"POST {self.path}")
        return self.say({"error": "not here"}, 404)

    def do_GET(self) -> None:
        self.server.unknown.append(f"GET {self.path}")
        self.say({"error": "not here"}, 404)

    def do_HEAD(self) -> None:
        self.do_GET()

    def say(self, answer: Any, status: int = 200) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing: requests carry a token."""


PUSH = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_first_hour as hour
if sys.argv[3] == "sft":
    run = hour.sft(hour.base(), Path(sys.argv[2]), hour.config("lora"))
    run.train()
    run.model.push_to_hub("somebody/sft")
for method in hour.METHODS if sys.argv[3] == "trainer" else ():
    run = hour.trainer(method, Path(sys.argv[2]) / method, hub_model_id=f"somebody/{method}")
    run.train()
    run.push_to_hub()
    run.model.push_to_hub(f"somebody/{method}-alone")
"""


def pushed(trainer: str, tmp_path: Path) -> Hub:
    """Push in a process of its own: where the hub is, is read when its client is imported."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    try:
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()} | {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        told = subprocess.run(
            [sys.executable, "-c", PUSH, str(Path(__file__).parent), str(tmp_path), trainer],
            env=environment, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
    finally:
        hub.shutdown()
        hub.server_close()
    assert told.returncode == 0, told.stderr[-2000:]
    assert TOKEN not in told.stdout + told.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert hub.authorised
    return hub


def pulled(hub: Hub, name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "pulled" / name
    folder.mkdir(parents=True)
    for file, content in hub.files[f"somebody/{name}"].items():
        (folder / file).write_bytes(content)
    return folder


def test_a_push_carries_an_adapter_that_loads_and_says_how(tmp_path: Path) -> None:
    """Of Trainer, and of the model by itself."""
    hub = pushed("trainer", tmp_path)
    for name in (*METHODS, *(f"{method}-alone" for method in METHODS)):
        folder = pulled(hub, name, tmp_path)
        assert "`import weftlora`" in first_line(folder / "README.md")
        kept = tmp_path / name.removesuffix("-alone") / "checkpoint-6"
        assert torch.equal(logits(reloaded(folder)), logits(reloaded(kept)))


# ---------------------------------------------------------------------- trl, and tokens that a chat template adds


TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    made.add_tokens(list(more), special_tokens=True)
    return made


@pytest.fixture(autouse=True)
def _trl(request: pytest.FixtureRequest, needs: Callable[..., None]) -> None:
    if "sft" in request.function.__code__.co_names:
        needs("trl", "datasets")


def sft(model: LlamaForCausalLM, out: Path, adapter: weftlora.WeftConfig) -> Any:
    """trl's trainer, told to take its chat template and tokens from another tokenizer."""
    import datasets
    import trl

    if "chat_template_path" not in trl.SFTConfig.__dataclass_fields__:
        pytest.skip("this trl does not clone chat templates in SFTTrainer")
    source = tokenizer("<|im_start|>", "<|im_end|>")
    source.chat_template = TEMPLATE
    source.save_pretrained(out / "template")
    talk = [{"role": "user", "content": "mill turn a b"}, {"role": "assistant", "content": "flour stone"}]
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(out / "run"),
            max_steps=4,
            learning_rate=1e-2,
            chat_template_path=str(out / "template"),
            report_to="none",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_steps=4,
            per_device_train_batch_size=2,
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": talk}] * 8),
        processing_class=tokenizer(),
        peft_config=adapter,
    )


@pytest.mark.parametrize("method", ["lora", "hydralora", "lora_dash"])
def test_tokens_that_a_chat_template_adds_are_trained_saved_and_loaded(method: str, tmp_path: Path) -> None:
    run = sft(base(), tmp_path, config(method))
    added = run.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert added[0] == len(WORDS)
    embedding = run.model.get_base_model().get_input_embeddings()
    before = embedding(torch.tensor(added[:2])).detach().clone()
    run.train()
    assert not torch.equal(embedding(torch.tensor(added[:2])), before)
    run.save_model(str(tmp_path / "saved"))
    ids = torch.tensor([[added[0], 3, 5, added[1]]])
    for folder in (tmp_path / "saved", tmp_path / "run" / "checkpoint-4"):
        again = base()
        again.resize_token_embeddings(run.model.get_base_model().vocab_size)
        loaded = PeftModel.from_pretrained(again, str(folder))
        with torch.no_grad():
            assert torch.equal(loaded.eval()(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)
        assert "`import weftlora`" in first_line(folder / "README.md")


def test_what_trl_has_trained_is_pushed_with_a_card_that_says_how_to_load_it(
    tmp_path: Path, needs: Callable[..., None]
) -> None:
    """By the model: the card of trl's own `push_to_hub` is trl's."""
    needs("trl", "datasets")
    folder = pulled(pushed("sft", tmp_path), "sft", tmp_path)
    assert "`import weftlora`" in first_line(folder / "README.md")
    saved = (tmp_path / "run" / "checkpoint-4" / "adapter_model.safetensors").read_bytes()
    assert (folder / "adapter_model.safetensors").read_bytes() == saved


def test_added_tokens_on_tied_embeddings_are_refused_in_a_sentence_that_helps(tmp_path: Path) -> None:
    """trl asks for the tokens of the one and for the whole of the other, and both are one tensor: peft fails in the first step."""
    with pytest.raises(weftlora.TargetError, match=r"ties its embeddings .* untie them first, with model\.config"):
        sft(base(tie_word_embeddings=True), tmp_path, config("lora"))
    untied = base(tie_word_embeddings=True)
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    run = sft(untied, tmp_path, config("lora"))
    run.train()
    assert run.state.global_step == 4


def test_tokens_alone_are_trained_on_tied_embeddings_too(tmp_path: Path) -> None:
    adapter = weftlora.PlainLoraConfig(r=2, trainable_token_indices=[3, 4])
    model = get_peft_model(base(tie_word_embeddings=True), adapter)
    before = logits(model)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2))
    for _ in range(2):
        model(**{key: value[None] for key, value in rows(1)[0].items()}).loss.backward()
        optimizer.step()
    assert not torch.equal(logits(model), before)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base(tie_word_embeddings=True), str(tmp_path))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"embed_tokns": [3]}, "did you mean 'embed_tokens'"),
        ([400], r"token 400, .* call model\.resize_token_embeddings"),
    ],
)
def test_tokens_that_the_model_does_not_have_are_refused(tokens: Any, says: str) -> None:
    model = base()
    with pytest.raises(weftlora.TargetError, match=says):
        get_peft_model(model, weftlora.PlainLoraConfig(r=2, trainable_token_indices=tokens))
    assert type(model.get_input_embeddings()) is torch.nn.Embedding
