"""Every method under every engine, against one process: `evidence/scaling.json`, which docs/scaling.md shows.

    python scripts/scaling.py                       all columns
    python scripts/scaling.py --only fsdp2:4        one of them: what it came to replaces what is there

A column that fails is recorded with what it said. What was not run is not in the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "evidence" / "scaling.json"
sys.path[:0] = [str(ROOT / "tests" / "sharding"), str(ROOT / "tests"), str(ROOT / "src")]

BOTH, FINE = ("fp32", "fp64"), ("fp64",)
COLUMNS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("ddp:2", "ddp:4", "fsdp1:2", "fsdp2:2", "fsdp2:4", "tp:2"), BOTH),
    **dict.fromkeys(
        (f"fsdp2-{way}:2" for way in ("accumulation", "checkpointing", "reentrant", "wrapper", "offload")), FINE
    ),
    "fsdp2-mixed:2": BOTH,
    "zero2:2": ("fp32",),
    "zero3:2": ("fp32",),
}
"""Engine and number of processes → the types of the weights. Mixed precision computes in fp32 under fp64, and in bf16 under fp32;
ZeRO's columns are run where DeepSpeed is installed, which is not part of the environment."""


def begun(engine: str, world: int, folder: Path, methods: list[str], kinds: tuple[str, ...]) -> list[int]:
    """The processes of a world, forked from this one, at work in a folder."""
    from worlds import be, forked

    return forked(
        world,
        lambda rank: be(rank, world, str(folder), engine, methods, kinds, weigh=True),
        lambda rank, error: (folder / f"{rank}.failed").write_text("".join(traceback.format_exception(error))),
    )


def ended(children: list[int], folder: Path) -> None:
    """Wait for the processes of a world, and say what any of them failed with."""
    for child in children:
        os.waitpid(child, 0)
    for file in sorted(folder.glob("*.failed")):
        print(folder.name, file.name, file.read_text(), file=sys.stderr, flush=True)


def measured(
    folder: Path, world: int, one: dict[Any, Any], methods: list[str], kinds: tuple[str, ...]
) -> dict[str, Any]:
    """By method: the largest difference of any process to `one` per dtype, and whether all decided as it did; or what failed.

    Beside it the bytes of the process that had most of them: its part of the adapter, and what the steps with their events made.
    """
    from worlds import decisions, largest_difference

    files = [folder / f"{rank}.pt" for rank in range(world)]
    each = [torch.load(file, weights_only=True) if file.exists() else {} for file in files]
    said = [file.read_text().strip().splitlines()[-1] for file in sorted(folder.glob("*.failed"))]
    found: dict[str, Any] = {}
    for method in methods:
        if not all((method, kind) in got for got in each for kind in kinds):
            found[method] = {"failed": said[0][:300] if said else "it did not come to it"}
            break  # what follows was never begun
        if said_no := [
            got[method, kind]["refused"] for got in each for kind in kinds if "refused" in got[method, kind]
        ]:
            found[method] = {"refused": said_no[0]}
            continue
        found[method] = {
            kind: {
                "difference": max(largest_difference(one[method, kind], got[method, kind]) for got in each),
                "same_decisions": all(decisions(got[method, kind]) == decisions(one[method, kind]) for got in each),
                "processes_agree": all(_equal(each[0][method, kind], got[method, kind]) for got in each),
            }
            for kind in kinds
        }
        if "adapter_bytes" in each[0][method, kinds[-1]]:
            names = ("adapter_bytes", "event_largest", "event_peak")
            found[method]["bytes"] = {name: max(got[method, kinds[-1]][name] for got in each) for name in names}
    return found


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two processes came to the same, bit for bit."""
    from worlds import decisions

    same = all(torch.equal(value, other["tensors"][name]) for name, value in one["tensors"].items())
    return same and decisions(one) == decisions(other)


def compared_with(engine: str, world: int, top: Path, methods: list[str], kinds: tuple[str, ...]) -> dict[Any, Any]:
    """What one process comes to that does as this engine's processes do."""
    from worlds import PARTS, alone

    if engine != "fsdp2-mixed":
        return alone(methods, kinds, world, PARTS[engine]) if engine in PARTS else alone(methods, kinds)
    folder = (
        top / "alone"
    )  # what is computed in fewer bits is other numbers, which one process has under the same wrapper
    folder.mkdir()
    ended(begun(engine, 1, folder, methods, kinds), folder)
    return dict(torch.load(folder / "0.pt", weights_only=True))


RECIPE = """
model: demo
data: demo
adapter: {recipe: lora_dash, r: 4, directions: 4, after: 4}
train: {steps: 8, batch_size: 2, lr: 1e-2, max_grad_norm: 0}
"""


def launched() -> dict[str, Any]:
    """`accelerate launch` itself on the configs of examples/, in two processes: the adapter of each against that of one process."""
    from safetensors.torch import load_file

    import weftlora

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        (top / "r.yaml").write_text(RECIPE)
        weftlora.train(top / "r.yaml", "train.accumulation=2", f"out={top / 'one'}")
        one = load_file(top / "one" / "adapter" / "adapter_model.safetensors")
        for engine in ("ddp", "fsdp2"):
            config, out = ROOT / "examples" / f"accelerate-{engine}.yaml", top / engine
            # accelerate shards only where it sees accelerators: on_cpu.py has it see the CPUs as such
            program = ["-m", "weftlora"] if engine == "ddp" else [str(ROOT / "tests" / "sharding" / "on_cpu.py")]
            how = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]
            words = [*how, *program, "train", str(top / "r.yaml"), f"out={out}"]
            command = [sys.executable, "-m", "accelerate.commands.launch", *words]
            env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
            if done.returncode:
                found[engine] = {"failed": done.stderr.strip().splitlines()[-1][:300]}
                print(done.stderr[-4000:], file=sys.stderr, flush=True)
                continue
            got = load_file(out / "adapter" / "adapter_model.safetensors")
            assert got.keys() == one.keys()
            found[engine] = {
                "command": f"accelerate launch --config_file examples/{config.name} --num_processes 2 ... train RECIPE.yaml",
                "difference": max(_apart(one, got, key) for key in one),
            }
    return found


def _apart(one: dict[str, Any], got: dict[str, Any], key: str) -> float:
    """Directions come in pairs, of which both may have the other sign."""
    value, other = one[key].double(), got[key].double()
    if ".boost." in key and value.ndim == 2:
        return float((value.abs() - other.abs()).abs().max())
    return float((value - other).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*COLUMNS, "launch"], default=[*COLUMNS, "launch"])
    parser.add_argument("--methods", nargs="+", help="all of them by default; what others came to stays")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    from worlds import METHODS, PARTS

    methods = given.methods or list(METHODS)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = json.loads(given.out.read_text()) if given.out.exists() else {"command": "make scaling", "columns": {}}
    one: dict[tuple[str, ...], Any] = {}
    for name in given.only:
        if name.startswith("zero") and find_spec("deepspeed") is None:
            print(name, "not run: DeepSpeed is not installed", flush=True)
            continue
        if name == "launch":
            found["launched"] = launched()
            given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            print(found["launched"], flush=True)
            continue
        engine, world, kinds = name.split(":")[0], int(name.split(":")[1]), COLUMNS[name]
        own = engine if engine in PARTS or engine == "fsdp2-mixed" else ""
        with tempfile.TemporaryDirectory() as top:
            folder = Path(top) / name.replace(":", "-")
            folder.mkdir()
            children = begun(engine, world, folder, methods, kinds)
            if (own, *kinds) not in one:
                one[own, *kinds] = compared_with(engine, world, Path(top), methods, kinds)
            ended(children, folder)
            found["columns"].setdefault(name, {}).update(measured(folder, world, one[own, *kinds], methods, kinds))
        found.setdefault("versions", {})["torch"] = torch.__version__
        if engine.startswith("zero"):
            found["versions"]["deepspeed"] = version("deepspeed")
        given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(name, found["columns"][name], flush=True)


if __name__ == "__main__":
    main()
