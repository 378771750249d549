"""The Triton kernels on a GPU: whether they are right, and what a step costs with them, in six minutes.

    python scripts/gpu.py                                  on the first CUDA device, into bench/gpu.json
    python scripts/gpu.py --device cpu                     everything at a tiny size in Triton's interpreter; writes no record
    python scripts/gpu.py --pack FOLDER --model SMOLLM2    what a machine without a network needs, in files of 20 MB
    python scripts/gpu.py --carried FOLDER                 on that machine
    python scripts/gpu.py --compile 90                     every kernel to machine code for a compute capability; no GPU is needed

Parts, in this order; the record is written after each of them, so that an interruption loses one at most:

    correctness    the node in bf16 and fp16 against the equation in fp32, outputs and gradients, every way of its products
    steps          forward and backward, with and without AdamW, as ratios to the frozen base's in the same round; peak memory
    training       GradScaler, fused AdamW and a schedule, with and without the kernels; on SmolLM2's weights where they are
    four bits      a base in NF4, where bitsandbytes is installed
    ddp            DistributedDataParallel on one device

A part that cannot be run says why. What the time did not suffice for is listed by name. On a CPU times mean nothing and are printed
as such. Where every part that ran is right and steps are not slower than without the kernels, the architecture is added to
src/weftlora/assets/gpu.json, and the kernels are on there by default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "bench" / "gpu.json"
SHIPPED = ROOT / "src" / "weftlora" / "assets" / "gpu.json"
CARRIED = ("peft", "accelerate")
"""Packages that a GPU image may lack: pure Python, as wheels."""
PART = 20 * 2**20
"""Bytes of a file that is carried."""


def carried(folder: Path) -> Path | None:
    """Put what is carried in `folder` in front of the path, and the model's parts together; where the model is, if one is carried."""
    wheels = sorted(folder.glob("*.whl"))
    lacking = [str(wheel) for wheel in wheels if find_spec(wheel.name.split("-")[0]) is None]
    if lacking:
        target = tempfile.mkdtemp(prefix="weft-gpu-")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", target]
        subprocess.run([*pip, *lacking], check=True)
        sys.path.insert(0, target)
    model = folder / "model"
    if not model.is_dir():
        return None
    for first in model.glob("*.part000"):
        whole = first.with_suffix("")
        with whole.open("wb") as out:
            for part in sorted(model.glob(f"{whole.name}.part*")):
                out.write(part.read_bytes())
    return model


def pack(folder: Path, model: Path | None) -> None:
    """Write wheels, and a model's files in parts, into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    subprocess.run([*pip, *(f"{name}=={pins[name]}" for name in CARRIED)], check=True)
    if model is None:
        return
    (folder / "model").mkdir(exist_ok=True)
    for file in sorted(model.glob("*.json")) + sorted(model.glob("*.safetensors")):
        if file.stat().st_size <= PART:
            shutil.copy(file, folder / "model")
            continue
        with file.open("rb") as whole:
            for number, part in enumerate(iter(lambda: whole.read(PART), b"")):
                (folder / "model" / f"{file.name}.part{number:03}").write_bytes(part)


MODEL: Path | None = None
"""A folder with SmolLM2, where it was carried; without, weights are random."""
if __name__ == "__main__" and "--carried" in sys.argv[:-1]:  # before anything that may be carried is imported
    MODEL = carried(Path(sys.argv[sys.argv.index("--carried") + 1]))
if str(ROOT / "src") not in sys.path:
    sys.path.insert(0, str(ROOT / "src"))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weftlora.kernel import Factors, Slots, Work, linears, reference, switched
from weftlora.kernel.switches import INTERPRETED, architecture

# ---------------------------------------------------------------------- the record


@dataclass
class Session:
    """One run: where it computes, how large, until when, and what was found so far."""

    device: torch.device
    minutes: float
    out: Path | None
    began: float = field(default_factory=time.monotonic)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    def left(self, until: float = 1.0) -> float:
        """Seconds until that share of the time is over."""
        return self.began + 60 * self.minutes * until - time.monotonic()

    def keep(self) -> None:
        """Write the record; of a CPU only where it was asked for, and never in the place of a GPU's."""
        if self.out is not None:
            self.out.write_text(json.dumps(self.record, indent=1) + "\n", encoding="utf-8")

    def part(self, name: str, run: Callable[[Session], dict[str, Any]]) -> None:
        """Run a part; an error is its result, and no other part's."""
        began = time.monotonic()
        try:
            found = run(self)
        except Exception as error:  # whatever it is: the next parts are to be measured all the same
            found = {"right": False, "error": f"{type(error).__name__}: {error}"}
        found["seconds"] = round(time.monotonic() - began, 1)
        self.record["parts"][name] = found
        self.keep()
        print(f"--- {name}: {said(found)} ({found['seconds']} s)", flush=True)


def said(found: dict[str, Any]) -> str:
    """One line about a part."""
    if "error" in found:
        return found["error"]
    return found["not run"] if "not run" in found else "right" if found["right"] else "WRONG"


def synchronised(device: torch.device) -> float:
    """Seconds, after everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# ---------------------------------------------------------------------- correctness

LIMIT = {torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Relative error in norm, of every output and gradient."""


@dataclass(frozen=True)
class Node:
    """A linear with an adapter, of which the kernels compute all."""

    tokens: int
    fan_in: int
    out: int
    r: int
    router: str | None = None
    heads: int = 3
    extra: int = 0
    top: int | None = None
    p: float = 0.0


NODES = (
    Node(4096, 2048, 2048, 16),
    Node(4096, 2048, 5632, 16, p=0.05),
    Node(1000, 576, 1536, 8, "x", p=0.05),
    Node(1000, 576, 192, 8, "Ax", heads=5, extra=8),
    Node(1000, 576, 192, 8, "x", heads=4, top=2, p=0.3),
    Node(333, 200, 72, 1, p=0.5),
    Node(777, 1031, 517, 37, "x", extra=4, p=0.1),  # no width that a block divides
    Node(2048, 1024, 1024, 128, p=0.05),
    Node(512, 1024, 1024, 512, "x", heads=2),
    Node(1, 64, 64, 4),
)
TINY_NODES = (Node(40, 36, 50, 5, "x", extra=2, p=0.3), Node(7, 20, 12, 3, "x", top=2), Node(33, 40, 24, 70, "Ax"))


def correctness(session: Session) -> dict[str, Any]:
    """Every node in both dtypes, twice: right, and the same bits again."""
    found = []
    for node in NODES if session.gpu else TINY_NODES:
        for dtype in LIMIT:
            given = numbers(node, dtype, session.device)
            got, again = of_node(node, *given), of_node(node, *given)
            want = of_equation(node, *given)
            errors = [
                ((a.float() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(got, want, strict=True)
            ]
            same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
            found.append({"node": vars(node), "dtype": str(dtype), "error": max(errors), "same again": same})
            found[-1]["right"] = same and max(errors) <= LIMIT[dtype]
            del given, got, again, want
    found += each_way(session)
    return {
        "right": all(case["right"] for case in found),
        "limit": {str(d): v for d, v in LIMIT.items()},
        "cases": found,
    }


def numbers(node: Node, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Factors, Tensor]:
    """x, W and the upstream gradient in `dtype`; factors in fp32, as masters are."""
    torch.manual_seed(0)

    def normal(*shape: int, at: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).to(at)

    f = Factors(
        A=normal(node.r, node.fan_in),
        B=normal(node.out, node.r * (node.heads if node.router else 1)),
        scale=2.0,
        router=None if node.router is None else normal(node.heads, node.fan_in if node.router == "x" else node.r),
        router_input="Ax" if node.router == "Ax" else "x",
        extra=(
            Slots(normal(node.extra, node.fan_in), normal(node.out, node.extra), torch.ones(node.extra, device=device)),
        )
        if node.extra
        else (),
        top=node.top,
    )
    x = torch.randn(node.tokens, node.fan_in, device=device).to(dtype)
    if node.router and node.top:
        f = replace(f, router=far_apart(f, x))
    g = torch.randn(node.tokens, node.out, device=device).to(dtype)
    return x, normal(node.out, node.fan_in, at=dtype), f, g


def far_apart(f: Factors, x: Tensor) -> Tensor:
    """A router of x whose heads are in one order for all tokens, so that rounding does not decide which are the largest."""
    assert f.router is not None
    x[:, 0] = 1.0
    router = f.router * 0.01
    router[:, 0] = torch.arange(f.heads, device=x.device)
    return router


def leaves(f: Factors) -> list[Tensor]:
    return [t for t in (f.A, f.B, f.router, *(t for s in f.extra for t in s[:3])) if t is not None]


def of_node(node: Node, x: Tensor, weight: Tensor, f: Factors, g: Tensor) -> list[Tensor]:
    """The output and all gradients with the kernels."""
    with switched(triton=True):
        return gradients(lambda x, work: linears(x, [(weight, None, work)])[0], node, x, f, g)


def of_equation(node: Node, x: Tensor, weight: Tensor, f: Factors, g: Tensor) -> list[Tensor]:
    """The same of the equation in fp32, from the same rounded numbers under the same mask."""
    return gradients(lambda x, work: F.linear(x, weight.float()) + reference(x, work), node, x.float(), f, g.float())


def gradients(run: Callable[[Tensor, Work], Tensor], node: Node, x: Tensor, f: Factors, g: Tensor) -> list[Tensor]:
    wanted = [x.detach().requires_grad_(), *(t.requires_grad_() for t in leaves(f))]
    y = run(wanted[0], Work(f, node.p, mask=torch.tensor([77]) if node.p else None))
    return [y.detach(), *torch.autograd.grad(y, wanted, g)]


def each_way(session: Session) -> list[dict[str, Any]]:
    """`linear` in every size of blocks, whichever is taken: the others are measured too before one is."""
    from weftlora.kernel.triton import launches

    node = replace(NODES[6] if session.gpu else TINY_NODES[0], p=0.0, router=None, extra=0)
    found = []
    for dtype in LIMIT:
        x, weight, f, _ = numbers(node, dtype, session.device)
        h = launches.read(x, f.A)
        want = F.linear(x.float(), weight.float()) + 2 * h.float() @ f.B.T
        for blocks in launches.FUSED:
            error = ((launches.linear(x, weight, None, h, f.B, 2.0, blocks) - want).norm() / want.norm()).item()
            found.append({"linear": blocks, "dtype": str(dtype), "error": error, "right": error <= LIMIT[dtype]})
    return found


# ---------------------------------------------------------------------- steps


@dataclass(frozen=True)
class Cell:
    """One size of model and batch. `every`: all structures, and stock peft compiled too."""

    width: int
    tokens: int
    every: bool = False
    layers: int = 1


CELLS = (
    Cell(2048, 8192, every=True),
    Cell(4096, 4096),
    Cell(576, 2048, layers=4),
    Cell(8192, 2048),
    Cell(2048, 2048),
    Cell(4096, 16384),
    Cell(576, 16384, layers=4),
    Cell(2048, 16384),
    Cell(8192, 16384),
)
"""In the order of what is to be known first."""
TINY_CELLS = (Cell(64, 16, every=True),)


def steps(session: Session) -> dict[str, Any]:
    """Every cell without dropout and with, until three quarters of the time are over."""
    found, missed = [], []
    for cell in CELLS if session.gpu else TINY_CELLS:
        for p in (0.0, 0.05):
            if session.left(0.75) <= 0 and session.gpu:
                missed.append({**vars(cell), "p": p})
                continue
            found.append({**vars(cell), "p": p, **of_cell(session, cell, p)})
            session.record["parts"]["steps"] = {"right": None, "cells": found}
            session.keep()
    right = all(case["error"] is None or case["error"] <= 4e-2 for cell in found for case in cell["cases"])
    return {"right": right, "cells": found, "not reached": missed, "ways": ways()}


def ways() -> dict[str, str]:
    """Which way of each product was measured to be the fastest."""
    from weftlora.kernel.triton import products

    return {" ".join(map(str, key)): way for key, way in products.ways_taken.items()}


def of_cell(session: Session, cell: Cell, p: float) -> dict[str, Any]:
    """All cases of a cell, interleaved."""
    import random

    from weftlora.bench.cases import BENCHED, Batch, Case, Shape, agreement, build, frozen_base

    seq = min(2048, cell.tokens)
    shape = Shape(cell.width, cell.layers, 2048 if session.gpu else 64, cell.tokens // seq, seq)
    torch.manual_seed(0)
    with torch.device(session.device):
        base = frozen_base(shape, "bf16")
    drawn = Batch.draw(shape, "bf16")
    batch = Batch(drawn.embeddings.detach().to(session.device).requires_grad_(), drawn.labels.to(session.device))
    kinds = [kind for kind in BENCHED if not kind.startswith("peft:")] if cell.every else ["lora", "hydralora"]
    todo: list[tuple[Case, bool]] = [(Case("floor"), False)]
    todo += [(Case(kind, BENCHED[kind].ranks[-1], p), on) for kind in kinds for on in (True, False)]
    todo += [(Case("peft:lora", 16, p, "bf16"), False), (Case("peft:lora", 16, p), False)]
    if cell.every and session.gpu:
        todo.append((Case("peft:lora", 16, p, "bf16", compiled=True), False))
    jobs = []
    for case, on in todo:
        torch.manual_seed(1)
        job = Job(case, on, build(case, base, {}).to(session.device), batch)
        with switched(triton=on):
            agreed = agreement(job.model, batch, 0) if on else None
        job.error = None if agreed is None else agreed.error
        job.step(session.device)  # compiles and measures its ways
        job.step(session.device)
        job.seconds.clear()
        job.with_adamw.clear()
        job.peak = peak(session.device, lambda job=job: job.step(session.device, count=False))
        jobs.append(job)
    shuffle, began = random.Random(0), time.monotonic()
    for turn in range(9 if session.gpu else 1):
        if turn >= 3 and time.monotonic() - began > 12:
            break
        for job in shuffle.sample(jobs, len(jobs)):
            job.step(session.device)
    return {"cases": [job.result(jobs[0], cell.tokens, session.gpu) for job in jobs]}


@dataclass
class Job:
    """A case being stepped."""

    case: Any
    on: bool
    model: nn.Module
    batch: Any
    error: float | None = None
    peak: int | None = None
    seconds: list[float] = field(default_factory=list)
    with_adamw: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True) if trained else None

    def step(self, device: torch.device, count: bool = True) -> None:
        """Forward and backward, then AdamW with a rate of 0."""
        with switched(triton=self.on):
            began = synchronised(device)
            self.batch.loss(self.model).backward()
            done = synchronised(device)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        after = synchronised(device)
        self.batch.embeddings.grad = None
        if count:
            self.seconds.append(done - began)
            self.with_adamw.append(after - began)

    def result(self, floor: Job, tokens: int, timed: bool) -> dict[str, Any]:
        """Its figures; on a CPU none that is a time."""
        ratios = [a / b for a, b in zip(self.seconds, floor.seconds, strict=True)]
        adamw = [a / b for a, b in zip(self.with_adamw, floor.seconds, strict=True)]
        named = {"case": str(self.case), "triton": self.on, "error": self.error}
        if not timed:
            return named
        return named | {
            "ratio": [round(q, 4) for q in quartiles(ratios)],
            "ratio with AdamW": round(statistics.median(adamw), 4),
            "tokens a second": round(tokens / statistics.median(self.seconds)),
            "peak MiB": None if self.peak is None else round(self.peak / 2**20, 1),
            "peak / floor": None if self.peak is None or not floor.peak else round(self.peak / floor.peak, 4),
            "seconds": [round(s, 6) for s in self.seconds],
        }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, middle, high


def peak(device: torch.device, run: Callable[[], None]) -> int | None:
    """The most bytes that `run` held at once beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        run()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---------------------------------------------------------------------- training


def training(session: Session) -> dict[str, Any]:
    """Twelve steps with a GradScaler, fused AdamW and the launch of LoRA-Dash in between: losses as without the kernels."""
    losses = {on: trained(session, on) for on in (True, False)}
    error = max(abs(a - b) / b for a, b in zip(losses[True], losses[False], strict=True))
    falls = losses[True][-1] < losses[True][0]
    return {
        "right": falls and error < 2e-2,
        "model": "random" if MODEL is None else "SmolLM2",
        "largest relative difference of a loss": error,
        "losses": losses[True],
        "losses without the kernels": losses[False],
    }


def trained(session: Session, on: bool) -> list[float]:
    from peft import get_peft_model

    import weftlora
    from weftlora.bench.cases import Shape, frozen_base

    torch.manual_seed(0)
    if MODEL is not None:
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    else:
        base = frozen_base(Shape(256 if session.gpu else 64, 2, 512, 2, 64), "fp32")
    config = weftlora.LoraDashConfig(r=8, directions=4, after=5, lora_dropout=0.05, target_modules="all-linear")
    model = get_peft_model(base.to(session.device), config).train()
    weftlora.attach(model, total_steps=12)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, fused=True)
    scaler = torch.amp.GradScaler(session.device.type, init_scale=2.0**10)
    generator = torch.Generator().manual_seed(0)
    size = (4, 256) if session.gpu else (2, 8)
    tokens = torch.randint(base.config.vocab_size, size, generator=generator).to(session.device)
    losses = []
    with switched(triton=on):
        for _ in range(12):
            with torch.autocast(session.device.type, torch.float16):
                loss = model(input_ids=tokens, labels=tokens).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 5))
    return losses


# ---------------------------------------------------------------------- a base in four bits, and DDP


def four_bits(session: Session) -> dict[str, Any]:
    """One step on a base in NF4: gradients as without the kernels, and peak memory of both."""
    if find_spec("bitsandbytes") is None:
        return {"not run": "bitsandbytes is not installed"}
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import weftlora
    from weftlora.bench.cases import Shape, frozen_base

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        size = Shape(512, 2, 512, 1, 64) if session.gpu else Shape(64, 1, 64, 1, 16)
        source = MODEL or folder
        if MODEL is None:
            frozen_base(size, "bf16").save_pretrained(folder)
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
        base = AutoModelForCausalLM.from_pretrained(
            source, quantization_config=bits, device_map={"": session.device}, dtype=torch.bfloat16
        )
    model = get_peft_model(base, weftlora.PlainLoraConfig(r=8, target_modules="all-linear")).train()
    spread(model)
    tokens = torch.randint(64, (2, 32 if session.gpu else 8), device=session.device)
    return compared(session, model, tokens, 4e-2)


def spread(model: nn.Module) -> None:
    """Away from the start, where gradients vanish."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn_like(p))


def compared(session: Session, model: nn.Module, tokens: Tensor, limit: float) -> dict[str, Any]:
    """One step of a model with the kernels and without: the largest relative difference of a gradient, and the peaks."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    found: dict[bool, list[Tensor]] = {}
    peaks: dict[bool, int | None] = {}

    def step(on: bool) -> None:
        with switched(triton=on):
            model(input_ids=tokens, labels=tokens).loss.backward()
        found[on] = [p.grad.clone() for p in wanted if p.grad is not None]
        model.zero_grad()

    for on in (True, False):
        step(on)  # compiles
        peaks[on] = peak(session.device, lambda on=on: step(on))
    pairs = zip(found[True], found[False], strict=True)
    error = max(((a - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in pairs)
    mib = {on: None if p is None else round(p / 2**20, 1) for on, p in peaks.items()}
    result = {"right": error <= limit, "error": error}
    return result if not session.gpu else result | {"peak MiB": mib[True], "peak MiB without the kernels": mib[False]}


def ddp(session: Session) -> dict[str, Any]:
    """A step of HydraLoRA in DistributedDataParallel with one process: the gradients of the model by itself."""
    from peft import get_peft_model
    from torch.nn.parallel import DistributedDataParallel

    import weftlora
    from weftlora.bench.cases import Shape, frozen_base

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if session.gpu else "gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1
        )
        try:
            base = frozen_base(Shape(256 if session.gpu else 64, 1, 64, 1, 64), "fp32").to(session.device)
            model = get_peft_model(base, weftlora.HydraLoraConfig(r=4, heads=3, target_modules="all-linear")).train()
            spread(model)
            tokens = torch.randint(64, (2, 16), device=session.device)
            single = grads(model, model, tokens)
            shared = grads(DistributedDataParallel(model), model, tokens)
        finally:
            torch.distributed.destroy_process_group()
    return {"right": len(single) > 0 and all(torch.equal(single[n], shared[n]) for n in single), "tensors": len(single)}


def grads(run: nn.Module, model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    with switched(triton=True):
        run(input_ids=tokens, labels=tokens).loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# ---------------------------------------------------------------------- without a GPU: machine code


def compiled(capability: int) -> list[tuple[str, int]]:
    """Every kernel, and how many instructions of tensor cores its code for this compute capability has.

    The launches are made as for a GPU, on tensors that are nowhere near one, and Triton is asked to compile instead of to launch.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from weftlora.kernel.triton import launches

    names = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}
    found = []

    def compile_instead(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        options = {k: constants.pop(k) for k in ("num_warps", "num_stages") if k in constants}
        types, attributes = {}, {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, given, strict=False)):
            varies = kernel.params[place].do_not_specialize
            if isinstance(value, Tensor):
                types[name] = names[value.dtype]
            elif value == 1 and isinstance(value, int) and not varies:
                types[name], constants[name] = "constexpr", 1
            else:
                types[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0 and not varies):
                attributes[(place,)] = [["tt.divisibility", 16]]
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
        code = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert code.asm["cubin"]
        found.append((kernel.fn.__name__, sum("mma" in line for line in code.asm["ptx"].splitlines())))

    launches._launch = compile_instead
    drop = launches.Drop(2**62 + 5, 0.05)
    x, g = (torch.empty(512, n, dtype=torch.bfloat16) for n in (576, 1536))
    weight, rows, up = torch.empty(1536, 576, dtype=torch.bfloat16), torch.empty(16, 576), torch.empty(1536, 16)
    h, omega = torch.empty(512, 16, dtype=torch.bfloat16), torch.empty(512, 3)
    launches.masked_by_count(x, *drop)
    launches.read(x, rows, drop)
    launches.write(g, h, up, 2.0, drop)
    launches.linear(x, weight, weight[:, 0], h, up, 2.0, "128x128")
    launches.write_backward(g, h, up, 2.0)
    launches.rows_backward(h, x, torch.float32, drop)
    launches.mix(h, omega, 12, 2)
    launches.mix_backward(torch.empty(512, 40, dtype=torch.bfloat16), omega, h, omega, 12, 2)
    table = launches.table_of(torch.zeros(512, dtype=torch.int64), 2)
    launches.read(x, rows.expand(2, 16, 576), None, table)
    launches.write_backward(g, h, up.expand(2, 1536, 16), 2.0, table)
    return found


# ---------------------------------------------------------------------- main


@contextmanager
def quiet_matmuls() -> Iterator[None]:
    """The equation in fp32 is fp32: no TF32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def verdict(record: dict[str, Any]) -> bool:
    """Whether the kernels may be on by default here: nothing wrong, and LoRA and HydraLoRA not slower with them, over all cells."""
    parts = record["parts"]
    if not all(part.get("right", True) for part in parts.values()) or not parts["steps"]["cells"]:
        return False
    gains = []
    for cell in parts["steps"]["cells"]:
        by_case: dict[str, dict[bool, float]] = {}
        for case in cell["cases"]:
            if case["case"].startswith(("lora ", "hydralora ")):
                by_case.setdefault(case["case"], {})[case["triton"]] = case["ratio"][1]
        gains += [on_off[True] / on_off[False] for on_off in by_case.values()]
    return statistics.geometric_mean(gains) <= 1.0


PARTS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "correctness": correctness,
    "steps": steps,
    "training": training,
    "four bits": four_bits,
    "ddp": ddp,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for everything at a tiny size")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, help="only these; then no architecture is turned on or off"
    )
    parser.add_argument("--out", type=Path, help="the record; bench/gpu.json on a GPU, none on a CPU")
    parser.add_argument("--carried", type=Path, help="a folder that --pack has written")
    parser.add_argument("--pack", type=Path, help="write wheels and a model's parts there, and do nothing else")
    parser.add_argument("--model", type=Path, help="the model to pack: a folder of SmolLM2")
    parser.add_argument("--compile", type=int, metavar="CAPABILITY", help="compile the kernels, and do nothing else")
    args = parser.parse_args()
    if args.pack:
        pack(args.pack, args.model)
        return 0
    if args.compile:
        for name, products in compiled(args.compile):
            print(name, products)
        return 0
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: --device cpu runs everything at a tiny size")
    if device.type == "cuda" and INTERPRETED:
        parser.error("TRITON_INTERPRET=1 would run the kernels in Python: unset it to measure a GPU")
    if device.type == "cpu" and not INTERPRETED:
        parser.error(
            "on a CPU the kernels run in Triton's interpreter only: set TRITON_INTERPRET=1, as `make gpu DEVICE=cpu` does"
        )
    if device.type == "cpu" and args.out is not None and args.out.resolve() == RECORD:
        parser.error("bench/gpu.json is for what was measured on a GPU: name another file")
    session = Session(device, args.minutes, args.out or (RECORD if device.type == "cuda" else None))
    session.record = {
        "device": torch.cuda.get_device_name() if session.gpu else "cpu, Triton's interpreter: no times",
        "architecture": architecture() if session.gpu else None,
        "command": " ".join(["python", "scripts/gpu.py", *sys.argv[1:]]),
        "versions": versions(),
        "parts": {},
    }
    with quiet_matmuls():
        for name in args.parts or PARTS:
            session.part(name, PARTS[name])
    right = all(part.get("right", True) for part in session.record["parts"].values())
    if session.gpu and session.out == RECORD and not args.parts:
        session.record["on"] = verdict(session.record)
        session.keep()
        on = set(json.loads(SHIPPED.read_text())["on"]) if SHIPPED.exists() else set()
        on = on | {architecture()} if session.record["on"] else on - {architecture()}
        SHIPPED.write_text(json.dumps({"on": sorted(on)}) + "\n", encoding="utf-8")
    print(f"--- {'all right' if right else 'NOT right'}, {(time.monotonic() - session.began) / 60:.1f} minutes")
    return int(not right)


def versions() -> dict[str, str]:
    """What was measured, and on what."""
    from importlib.metadata import version

    from weftlora.version import __version__

    found = {name: version(name) for name in ("torch", "peft", "transformers")}
    import triton

    return {"weftlora": __version__, "triton": triton.__version__, **found, "python": platform.python_version()}


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, once for every model
    sys.exit(main())
