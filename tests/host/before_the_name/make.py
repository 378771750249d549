"""Makes the adapters of this folder: one of every recipe on the bundled model, and the last logits of each.

They were made by commit 5cec6ea, the last one before the package was renamed (under its old name, which is the only difference to this
script): tests load them with today's code. Run: python make.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.data.demo import demo_model_path
from weftlora.recipes import RECIPES

IDS = torch.arange(3, 19).reshape(2, 8)
FIELDS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "hydralora": {"r": 2, "heads": 2},
    "tied_lora": {"r": 2},
    "lora_dash": {"r": 2, "directions": 2, "after": 2},
    "lora_init": {"r": 2, "after": 2},
    "lora_tsd": {"r": 2, "directions": 2, "after": 2},
    "alora": {"r": 2, "first": 2, "every": 2, "max_rounds": 2, "rows": 2, "move": 2},
    "flexora": {"r": 2, "layers": weftlora.Only([1])},
}


def make(out: Path) -> None:
    """Train every recipe for six steps and save it, without the path of the base; `logits.safetensors` has those of the last token."""
    logits = {}
    for name, fields in FIELDS.items():
        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_pretrained(demo_model_path())
        recipe = weftlora.WeftConfig if name == "flexora" else RECIPES[name]
        model = get_peft_model(base, recipe(**fields, target_modules=["q_proj", "v_proj"]))
        rows = [{"input_ids": IDS, "labels": IDS, "attention_mask": torch.ones_like(IDS)}]
        weftlora.attach(model, validation=rows if name == "alora" else None, total_steps=6)
        optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2, weight_decay=0.0))
        for _ in range(6):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits[name] = model(input_ids=IDS).logits[:, -1].contiguous()
        model.save_pretrained(out / name)
        (out / name / "README.md").unlink()
        config = json.loads((out / name / "adapter_config.json").read_text())
        config["base_model_name_or_path"] = None
        (out / name / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    save_file(logits, out / "logits.safetensors")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
