"""Adapters of every recipe on the embedded demo model, trained for a few steps in a bare loop.

model = train_a_little(CONFIGS["hydralora"]())
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import weftlora
from weftlora.data.demo import demo_model_path, demo_rows

STEPS = 6

CONFIGS: dict[str, Callable[[], weftlora.WeftConfig]] = {
    "lora": lambda: weftlora.PlainLoraConfig(r=2),
    "hydralora": lambda: weftlora.HydraLoraConfig(r=2, heads=3),
    "tied_lora": lambda: weftlora.TiedLoraConfig(r=2),
    "lora_dash": lambda: weftlora.LoraDashConfig(r=2, directions=3, after=2),
    "lora_init": lambda: weftlora.LoraInitConfig(r=2, after=2),
    "lora_tsd": lambda: weftlora.LoraTsdConfig(r=2, directions=3, after=2),
    "alora": lambda: weftlora.AllocLoraConfig(r=2, first=2, every=2, max_rounds=2, score="random"),
    "flexora": lambda: weftlora.PlainLoraConfig(r=2, layers=weftlora.Only([0, 2])),
}


def demo_batch(rows: int = 4) -> dict[str, torch.Tensor]:
    """Some demo rows as a padded batch."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    texts = [f"{row['prompt']}{row['completion']}" for row in demo_rows("validation")[:rows]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def train_a_little(config: weftlora.WeftConfig, steps: int = STEPS, seed: int = 0) -> PeftModel:
    """`config` on the demo model, trained in a bare loop."""
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(demo_model_path()), config)
    weftlora.attach(model, total_steps=steps)
    optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=3e-3))
    batch = demo_batch()
    model.train()
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()
