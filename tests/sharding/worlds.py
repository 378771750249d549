"""One adapter over several processes, by engine and method: `worlds.py WORLD FOLDER ENGINE [METHOD ...]`, over gloo on the loopback.

Every process trains the same tiny Llama on its rows of one global batch, with the method's event at step 3 of 7, and writes what it
came to: the decisions, the adapter as it is saved, and the largest tensor of an event. `trained(name, dtype)` is the one process that
all are compared with.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import subprocess
import sys
import traceback
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import weftlora
from families import FAMILIES
from weftlora.errors import ConfigError
from weftlora.host.attach import schedules

EVENT, END, ROWS = 3, 7, 8
IDS = torch.randint(3, 64, (ROWS * END + 16, 7), generator=torch.Generator().manual_seed(5))
HELD_OUT = [{"input_ids": row, "labels": row} for row in IDS[ROWS * END :]]

FLEXORA = weftlora.Search(outer_batches=3, val_size=8, steps=4, alpha_lr=0.05)


def flexora(run: nn.Module, model: PeftModel) -> dict[str, Any]:
    """What a search of the model comes to; every process calls it with the same rows."""
    rows = [{"input_ids": row, "labels": row} for row in IDS[:40]]
    found = weftlora.search_layers(model, rows, batch_size=2, accumulation=3, lr=1e-2, seed=1)
    alpha = torch.tensor([each.alpha for each in found.candidates], dtype=torch.float64)
    return {**of(run, model), "events": [{"selected": list(found.blocks)}], "alpha": alpha}


METHODS: dict[str, Callable[[], weftlora.WeftConfig]] = {
    "lora": lambda: weftlora.PlainLoraConfig(r=4, target_modules="all-linear"),
    "hydralora": lambda: weftlora.HydraLoraConfig(r=2, heads=3, balance=0.01, target_modules="all-linear"),
    "tied_lora": lambda: weftlora.TiedLoraConfig(r=4),
    "lora_dash": lambda: weftlora.LoraDashConfig(r=2, directions=3, after=EVENT, target_modules="all-linear"),
    "lora_init": lambda: weftlora.LoraInitConfig(r=2, after=EVENT, target_modules="all-linear"),
    "lora_tsd": lambda: weftlora.LoraTsdConfig(r=2, directions=3, after=EVENT, target_modules="all-linear"),
    "alora": lambda: weftlora.AllocLoraConfig(
        r=2, first=EVENT, every=2, max_rounds=2, rows=4, score="exact", target_modules="all-linear"
    ),
    "flexora": lambda: weftlora.WeftConfig(r=2, layers=FLEXORA, target_modules="all-linear"),
}
DTYPES = {"fp32": (torch.float32, 1e-5), "fp64": (torch.float64, 1e-9)}


def model_of(name: str, dtype: torch.dtype) -> PeftModel:
    base = FAMILIES["llama"].build()
    torch.manual_seed(0)
    model = get_peft_model(base, METHODS[name]()).to(dtype).train()
    if name == "alora":
        weftlora.attach(model, validation=HELD_OUT)
    return model


class Keeper(Protocol):
    """Checkpoints of a loop."""

    def begin(self, optimizer: torch.optim.Optimizer) -> int:
        """Take over the newest, if there is one; how many steps it has taken."""
        ...

    def keep(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Write one."""
        ...


def steps(
    run: nn.Module,
    model: PeftModel,
    rank: int,
    world: int,
    parts: int = 1,
    around: Callable[[], AbstractContextManager[object]] = nullcontext,
    keeper: Keeper | None = None,
) -> None:
    """The global batch of every step, this process's rows of it, in so many micro-batches; the optimiser steps inside `around`.

    With a `keeper` it begins where that says, and each step is kept. One process alone takes the rows of all processes of `world`,
    where it accumulates: a micro-batch of its is theirs together.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    if isinstance(run, Zero):
        run.begin(optimizer, ROWS // world)
    mine = range(world) if rank < 0 else [rank]
    for step in range(keeper.begin(optimizer) if keeper else 0, END):
        shares = IDS[ROWS * step : ROWS * (step + 1)].chunk(world)
        for part in range(parts):
            ids = torch.cat([shares[each].chunk(parts)[part] for each in mine])
            if isinstance(run, FSDPModule):
                run.set_requires_gradient_sync(part == parts - 1)
            with weftlora.routing(model) as routers:
                loss = run(input_ids=ids, labels=ids).loss
            if any(site.routed for site in _sites(model)):
                loss = loss + routers.balance_loss()
            run.backward(loss) if isinstance(run, Zero) else (loss / parts).backward()
        with around():
            run.step() if isinstance(run, Zero) else optimizer.step()
        optimizer.zero_grad()
        if keeper:
            keeper.keep(optimizer, step + 1)


def _sites(model: nn.Module) -> list[Any]:
    from weftlora.adapter.site import Site

    return [m for m in model.modules() if isinstance(m, Site)]


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def of(run: nn.Module, model: PeftModel) -> dict[str, Any]:
    """`outcome`, also where a wrapper must be asked for the whole."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if isinstance(run, Zero):
        with run.whole():
            return outcome(model)
    if isinstance(run, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(run, writeback=False):
            return outcome(model)
    return outcome(model)


def outcome(model: PeftModel) -> dict[str, Any]:
    told = [e for s in schedules(model).values() for e in s.events]
    tensors = {n: whole(t) for n, t in model.state_dict().items() if ".weft_site." in n}
    return {"tensors": tensors, "events": [{k: v for k, v in e.items() if k != "seconds"} for e in told]}


def trained(name: str, dtype: torch.dtype, world: int = 1, parts: int = 1) -> dict[str, Any]:
    model = model_of(name, dtype)
    if name == "flexora":
        return flexora(model, model)
    steps(model, model, -1, world, parts)
    return outcome(model)


# ---------------------------------------------------------------------- engines


def ddp(model: PeftModel) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model)


def fsdp2(model: PeftModel, **how: Any) -> nn.Module:
    for block in model.base_model.model.model.layers:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def checkpointed(model: PeftModel, reentrant: bool) -> PeftModel:
    """Activations of a block are recomputed in the backward, as transformers does it."""
    if reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def wrapped(model: PeftModel) -> PeftModel:
    """The same by a wrapper around each block, as accelerate's FSDP does it."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    blocks = list(model.base_model.model.model.layers)
    apply_activation_checkpointing(model, check_fn=lambda module: any(module is block for block in blocks))
    return model


def mixed(model: PeftModel) -> nn.Module:
    """Forward and backward in half as many bits as the parameters have, gradients summed in all of them."""
    whole_type = next(p.dtype for p in model.parameters() if p.requires_grad)
    half = {torch.float64: torch.float32, torch.float32: torch.bfloat16}[whole_type]
    return fsdp2(model, mp_policy=MixedPrecisionPolicy(param_dtype=half, reduce_dtype=whole_type))


def fsdp1(model: PeftModel) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    blocks = {type(block) for block in model.base_model.model.model.layers}
    cpu = torch.device("cpu")
    return FullyShardedDataParallel(
        model, use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy(blocks), device_id=cpu
    )


def tp(model: PeftModel) -> nn.Module:
    """Every process has the whole batch and a half of each base's weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
    plan = {f"{name}.base_layer": ColwiseParallel() for name in columns}
    plan |= {f"{name}.base_layer": RowwiseParallel() for name in ("self_attn.o_proj", "mlp.down_proj")}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.base_model.model.model.layers:
        present = {name for name, _ in block.named_modules()}
        parallelize_module(
            block,
            mesh,
            {name if name in present else name.removesuffix(".base_layer"): how for name, how in plan.items()},
        )
    return model


class Zero(nn.Module):
    """A model under DeepSpeed's engine, which is not part of the environment: it steps for the optimiser that it is given."""

    def __init__(self, model: PeftModel, stage: int):
        super().__init__()
        self.model, self.stage = model, stage
        self.engine: Any = None

    def begin(self, optimizer: torch.optim.Optimizer, rows: int) -> None:
        os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=os.environ["RANK"], LOCAL_SIZE=os.environ["WORLD_SIZE"])
        deepspeed = importlib.import_module("deepspeed")
        # its sum of tensors in shared memory is a C++ extension, compiled at the first start; without it gloo sums them
        vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None
        config = {
            "train_micro_batch_size_per_gpu": rows,
            "zero_optimization": {"stage": self.stage, "overlap_comm": False, "contiguous_gradients": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
        self.engine = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)[0]

    def forward(self, **batch: Tensor) -> Any:
        return self.engine(**batch)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self) -> None:
        self.engine.step()

    def whole(self) -> AbstractContextManager[object]:
        if self.stage < 3:
            return nullcontext()
        gathered = importlib.import_module("deepspeed").zero.GatheredParameters
        return gathered(list(self.model.parameters()))  # type: ignore[no-any-return]


ENGINES: Mapping[str, Callable[[PeftModel], nn.Module]] = {
    "ddp": ddp,
    "fsdp1": fsdp1,
    "fsdp2": fsdp2,
    "tp": tp,
    "fsdp2-accumulation": fsdp2,
    "fsdp2-checkpointing": lambda model: fsdp2(checkpointed(model, reentrant=False)),
    "fsdp2-reentrant": lambda model: fsdp2(checkpointed(model, reentrant=True)),
    "fsdp2-wrapper": lambda model: fsdp2(wrapped(model)),
    "fsdp2-mixed": mixed,
    "zero2": lambda model: Zero(model, 2),
    "zero3": lambda model: Zero(model, 3),
    "fsdp2-offload": lambda model: fsdp2(model, offload_policy=CPUOffloadPolicy(pin_memory=False)),
}
PARTS = {"fsdp2-accumulation": 2}
"""Micro-batches of a step, where there are several."""


def watched() -> dict[str, Any]:
    """What is gathered from now on: of each W, whether it was sent to this process, and the largest tensor that all had whole.

    Beside it the number of rows of each scoring of rank slots.
    """
    from weftlora.adapted import layer
    from weftlora.scoring import brackets

    seen: dict[str, Any] = {"sent": [], "gathered": 0, "scored": []}
    real, its = REAL.setdefault("full", DTensor.full_tensor), REAL.setdefault("one", layer.on_one)
    score = REAL.setdefault("score", brackets.exact_brackets)

    def exact_brackets(*given: Any, **more: Any) -> Tensor:
        seen["scored"].append(len(given[4]["labels"]))
        return score(*given, **more)

    def full_tensor(self: DTensor, **given: Any) -> Tensor:
        seen["gathered"] = max(seen["gathered"], self.numel())
        return real(self, **given)

    def on_one(t: Tensor, process: int) -> Tensor | None:
        found = its(t, process)
        seen["sent"].append(int(found is not None))
        return found

    DTensor.full_tensor, layer.on_one = full_tensor, on_one  # type: ignore[method-assign]
    brackets.exact_brackets = exact_brackets  # type: ignore[assignment]
    return seen


REAL: dict[str, Any] = {}


NO_MESSAGES = ("wait_tensor", "_wrap_tensor_autograd")
"""What torch.distributed names among its operations and nothing is sent by."""


class Memory(TorchDispatchMode):
    """Bytes on this process: of an adapter's parameters and their moments, and of what optimisers' steps and their events make.

    Counted are storages, as long as they live, in what happens inside `with memory():`; what was there before is not. Each such
    block is a step, of which the messages between processes are counted, by what they are, and the largest tensor made.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.live: dict[int, int] = {}
        self.peak = 0
        self.steps: list[dict[str, Any]] = []

    def __call__(self) -> Memory:
        self.live.clear()
        self.steps.append({"messages": Counter[str](), "largest": 0})
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, step = func(*args, **(kwargs or {})), self.steps[-1]
        if func.namespace in ("c10d", "_c10d_functional") and func._opname not in NO_MESSAGES:
            step["messages"][func._opname.strip("_")] += 1
        before = {id(storage) for storage in self._storages((args, kwargs))}
        for storage in self._storages(made):
            if id(storage) in before or id(storage) in self.live:
                continue
            size = storage.nbytes()
            self.live[id(storage)] = size
            weakref.finalize(storage, self.live.pop, id(storage), None)
            step["largest"] = max(step["largest"], size)
        self.peak = max(self.peak, sum(self.live.values()))
        return made

    def _storages(self, tree: Any) -> list[Any]:
        plain = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
        local = [t.to_local() if isinstance(t, DTensor) else t for t in plain]
        return [t.untyped_storage() for t in local]

    def record(self) -> dict[str, Any]:
        """Of this process; an adapter has, in AdamW, its gradient and two moments beside each parameter."""
        own = [p for p in self.model.parameters() if p.requires_grad]
        sizes = [(p.to_local() if isinstance(p, DTensor) else p).nbytes for p in own]
        return {
            "adapter_bytes": sum(sizes),
            "event_largest": max(step["largest"] for step in self.steps),
            "event_peak": self.peak,
            "steps": [{**step, "messages": dict(step["messages"])} for step in self.steps],
        }


def work(
    rank: int, world: int, engine: str, names: Sequence[str], kinds: Sequence[str], file: str, weigh: bool = False
) -> None:
    """Write what each method comes to on this process, as far as they come; `weigh`: its bytes too, which takes time."""
    found: dict[Any, Any] = {}
    for name in names:
        for kind in kinds:
            seen = watched()
            model = model_of(name, DTYPES[kind][0])
            run = ENGINES[engine](model)
            try:
                if name == "flexora":
                    found[name, kind] = {**flexora(run, model), **seen}
                else:
                    memory = Memory(model)
                    whose = (0, 1) if engine == "tp" else (rank, world)
                    steps(run, model, *whose, PARTS.get(engine, 1), memory if weigh else nullcontext)
                    gathered = seen["gathered"]
                    found[name, kind] = {
                        **seen,
                        **(memory.record() if weigh else {}),
                        **of(run, model),
                        "gathered": gathered,
                    }
            except ConfigError as error:  # on every process, before any of them waits for another
                found[name, kind] = {"refused": str(error)}
            torch.save(found, file)


def largest_difference(one: dict[str, Any], got: dict[str, Any]) -> float:
    """Of any saved value, directions being pairs of which both signs are the same."""
    worst, signs = 0.0, {}
    for key, value in one["tensors"].items():
        owner, _, part = key.rpartition(".")
        if part == "down":
            signs[owner] = (value * got["tensors"][key]).sum(1).sign()
    for key, value in one["tensors"].items():
        mine, (owner, _, part) = got["tensors"][key].to(value), key.rpartition(".")
        twin = owner.removesuffix("structure") + "start"
        sign = signs.get(owner if part in ("down", "up") else twin if part in ("A", "B") else "")
        if sign is not None and part in ("down", "A"):
            mine = mine * torch.where(sign == 0, 1.0, sign)[:, None]
        elif sign is not None and part in ("up", "B"):
            mine = mine * torch.where(sign == 0, 1.0, sign)
        if value.numel():
            worst = max(worst, float((mine.double() - value.double()).abs().max()))
    return worst


def decisions(found: dict[str, Any]) -> list[Any]:
    """What was decided, without the numbers that it was decided by."""
    told: list[Any] = []
    for event in found["events"]:
        sites = {name: site["index"] for name, site in event.get("sites", {}).items()}
        moved = [[each[:2] for each in event.get(what, ())] for what in ("pruned", "added")]
        told.append([event.get("event"), event.get("step"), sites, moved, event.get("selected"), event.get("ranks")])
    return told


def run_script(script: str, *given: str) -> None:
    """A script beside this file, to its end."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(here), str(here.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / script), *given]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def alone(names: Sequence[str], kinds: Sequence[str], world: int = 1, parts: int = 1) -> dict[Any, Any]:
    """Each method in one process, which accumulates as the processes of a world do."""
    return {(name, kind): trained(name, DTYPES[kind][0], world, parts) for name in names for kind in kinds}


def forked(world: int, work: Callable[[int], None], failed: Callable[[int, BaseException], object]) -> list[int]:
    """Start the processes of a world from this one, after its imports; `failed` is told of one what it raised."""
    children = []
    for rank in range(world):
        if child := os.fork():
            children.append(child)
            continue
        try:
            work(rank)
        except BaseException as error:
            failed(rank, error)
            os._exit(1)
        os._exit(0)
    return children


def main(world: int, folder: str, engine: str, names: Sequence[str], kinds: Sequence[str], weigh: bool = False) -> None:
    """Be all processes of a world, each forked after the imports, and meanwhile the one that they are compared with."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    children = forked(
        world,
        lambda rank: be(rank, world, folder, engine, names, kinds, weigh),
        lambda rank, error: traceback.print_exception(error),
    )
    torch.save(alone(names, kinds), f"{folder}/alone.pt")
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(int(any(codes)))


def be(
    rank: int, world: int, folder: str, engine: str, names: Sequence[str], kinds: Sequence[str], weigh: bool = False
) -> None:
    """Be one of the processes."""
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE=str(world))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patience = datetime.timedelta(seconds=240)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=patience)
    work(rank, world, engine, names, kinds, f"{folder}/{rank}.pt", weigh)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = argparse.ArgumentParser()
    given.add_argument("world", type=int)
    given.add_argument("folder")
    given.add_argument("engine", choices=ENGINES)
    given.add_argument("methods", nargs="*")
    given.add_argument("--kinds", nargs="+", default=list(DTYPES))
    given.add_argument("--weigh", action="store_true")
    asked = given.parse_args()
    main(asked.world, asked.folder, asked.engine, asked.methods or list(METHODS), asked.kinds, asked.weigh)
