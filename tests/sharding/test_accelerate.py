"""HydraLoRA with Dash under accelerate's FSDP2: killed on one process, resumed by another number of them, exported for stock peft."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import weftlora
from weftlora.data.demo import demo_model_path

pytestmark = pytest.mark.kills
HERE = Path(__file__).parent
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
RECIPE = """
model: demo
data: demo
adapter:
  structure: {kind: Hydra, heads: 2}
  boost: {kind: Dash, directions: 4, after: 4}
  r: 4
train: {steps: 8, batch_size: 2, save_every: 2, lr: 1e-2, max_grad_norm: 0}
"""


def launched(processes: int, *given: str, kill: str | None = None) -> subprocess.CompletedProcess[str]:
    """`weftlora` in so many processes, as torchrun starts them and `accelerate launch` tells them of FSDP2."""
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(HERE.parent)])
    env = {**os.environ, **FSDP2, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if kill is not None:
        env["WEFT_TEST_KILL"] = kill
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", str(processes)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", str(HERE / "on_cpu.py"), *given]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


def tensors(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_killed_on_one_process_resumed_by_another_number_and_exported(tmp_path: Path) -> None:
    recipe, whole, cut = tmp_path / "r.yaml", tmp_path / "whole", tmp_path / "cut"
    recipe.write_text(RECIPE)
    assert (done := launched(2, "train", str(recipe), f"out={whole}")).returncode == 0, done.stderr[-3000:]
    assert launched(2, "train", str(recipe), f"out={cut}", kill="1:6").returncode != 0
    assert json.loads((cut / "run.json").read_text())["status"] != "complete"
    weftlora.train(cut, resume=True)  # one process, which takes the rows of both
    expected, got = tensors(whole), tensors(cut)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4, msg=name)
        else:
            assert torch.equal(got[name], value), name
    files = {path.name for path in (whole / "checkpoints" / "checkpoint-8").iterdir()}
    assert {"adapter_model.safetensors", "optimizer.pt", "complete.json"} <= files
    assert not any(path.startswith("pytorch_model") for path in files), "the base is in no checkpoint"
    rows = [{"input_ids": torch.tensor([[5, 9, 12, 7, 3]]), "attention_mask": torch.ones(1, 5, dtype=torch.long)}]
    weftlora.export_lora(cut, tmp_path / "lora", approximate="mean-gate", data=rows)
    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    model = PeftModel.from_pretrained(base, str(tmp_path / "lora"))
    assert model.peft_config["default"].peft_type == "LORA"
