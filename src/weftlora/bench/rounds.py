"""Training steps of all cases, interleaved: their time as ratios to the frozen base's step, and the bytes they keep.

    ratio = median over rounds of  time(case, round) / time(floor, round)
    bytes = Σ over distinct storages that a forward keeps for its backward (saved-tensor hooks), weights left out

Each round steps every case once in a fresh random order, so that what slows the machine down for a while slows all cases
alike. The clock is process CPU time by default: another process's load stretches wall time, hardly CPU time.
"""

from __future__ import annotations

import platform
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from weftlora.adapted.fusion import nodes
from weftlora.bench.cases import (
    BENCHED,
    TOLERANCE,
    Agreement,
    Batch,
    Build,
    Case,
    Dtype,
    Shape,
    agreement,
    build,
    cases,
    cases_of_builders,
    frozen_base,
    own_builders,
    table_cases,
)
from weftlora.bench.record import CLOCKS, CaseResult, Clock, Setting, Spread, StepBench, targets
from weftlora.kernel import switched
from weftlora.progress import Progress, Tick, ignore
from weftlora.runs.precision import cpu_kind, has_amx
from weftlora.version import __version__

if TYPE_CHECKING:
    from collections.abc import Iterator


def saved_bytes(loss: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of all storages that `loss()` saves for backward, each once, without those of `weights`.

    A storage counts in full even if only a view of it is saved, as it is kept alive in full. `backward` cannot be run.
    """
    own = {t.untyped_storage().data_ptr() for t in weights}
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given to a second one

    def pack(t: Tensor) -> None:  # returning t itself would tie tensor and graph into a cycle that is never freed
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage

    with torch.autograd.graph.saved_tensors_hooks(pack, _no_backward):
        loss()
    return sum(storage.nbytes() for storage in seen.values())


def _no_backward(_: None) -> NoReturn:
    raise RuntimeError("a graph whose saved tensors were only counted has no backward")


QUICK = Shape(hidden=64, layers=1, vocab=64, batch=2, seq=16)


def step(
    shape: Shape | None = None,
    *,
    dtypes: Sequence[Dtype] = ("fp32", "bf16"),
    dropouts: Sequence[float] = (0.0, 0.05),
    kinds: Sequence[str] = tuple(BENCHED),
    table: bool = False,
    own_cases: Sequence[str] = (),
    rounds: int = 9,
    threads: int = 1,
    clock: Clock = "cpu",
    quick: bool = False,
    seed: int = 0,
    progress: Progress = ignore,
) -> StepBench:
    """Measure a training step of every case against the frozen-base floor and stock peft LoRA, speed, memory, exactness.

    Args:
        shape: the model and batch; default 4 layers of width 768, 4 × 256 tokens.
        dtypes: dtypes of the base, "fp32" and "bf16", measured one after the other.
        dropouts: values of `lora_dropout`.
        kinds: recipes to measure, of "peft:lora", "lora", "hydralora", "tied_lora", "lora_dash", "alora", "flexora"; the floor
            always is.
        table: measure instead what the project's figures are about, compiled blocks and one mask per input too, on 8 layers.
        own_cases: "name[@RANK]=module:function" of further ones; function(base, r, dropout) returns the model to step.
        rounds: interleaved rounds; at least 7 for figures to publish.
        threads: torch's intra-op threads while measuring.
        clock: "cpu", process CPU time, or "wall", for an otherwise idle machine only.
        quick: a tiny model and 3 rounds, to see that everything runs; its ratios mean nothing, so no target is judged.
        progress: called with a `Tick` after every case built and every case stepped.

    Raises:
        ConfigError: a setting that cannot work.
    """
    if quick:
        shape, rounds = QUICK, 3
    setting = Setting(
        shape or Shape(layers=8 if table else 4),
        tuple(dtypes),
        tuple(dropouts),
        tuple(kinds),
        table,
        tuple(own_cases),
        rounds,
        threads,
        clock,
        seed,
    )
    builders = own_builders(own_cases)
    results: list[CaseResult] = []
    order: dict[str, list[list[str]]] = {}
    many = torch._dynamo.config.patch(recompile_limit=256)  # all cases share the code of one block's forward
    with torch_threads(threads), torch.random.fork_rng(devices=[]), many:
        for dtype in setting.dtypes:
            todo = [
                *(table_cases(dtype) if table else cases(dtype, kinds, dropouts, setting.shape.experts > 0)),
                *cases_of_builders(builders, dropouts, dtype),
            ]
            jobs = _prepare(todo, setting, dtype, builders, progress)
            order[dtype] = _run(jobs, setting, dtype, progress)
            results += [_result(job, jobs[0], dtype) for job in jobs]
    return StepBench(setting, versions(), results, [] if quick or setting.shape.experts else targets(results), order)


@dataclass
class _Job:
    """A case ready to be stepped, and what was measured of it so far (seconds, one per round)."""

    case: Case
    model: nn.Module
    batch: Batch
    optimizer: torch.optim.Optimizer | None
    agreement: Agreement | None
    saved: int
    seconds: list[float] = field(default_factory=list)
    seconds_adamw: list[float] = field(default_factory=list)

    def step(self, clock: Clock) -> None:
        """Forward and backward, then AdamW; the learning rate is 0, so every round does the same."""
        now = CLOCKS[clock]
        start = now()
        self.batch.loss(self.model).backward()
        done = [now()]
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            done.append(now())
        self.seconds.append(done[0] - start)
        self.seconds_adamw.append(done[-1] - start)
        self.batch.embeddings.grad = None


def _prepare(todo: list[Case], setting: Setting, dtype: Dtype, own: dict[str, Build], progress: Progress) -> list[_Job]:
    """Build every case, check its gradients, count what it saves, and warm it up."""
    torch.manual_seed(setting.seed)
    base = frozen_base(setting.shape, dtype)
    batch = Batch.draw(setting.shape, dtype)
    jobs = []
    for case in todo:
        torch.manual_seed(setting.seed + 1)
        model = build(case, base, own)
        trained = [p for p in model.parameters() if p.requires_grad]
        weights = [*base.parameters(), *base.buffers(), *model.parameters(), *model.buffers()]
        reordered = case.compiled and case.p > 0  # a compiled graph draws the same masks in another order
        agreed = None if reordered else agreement(model, batch, setting.seed)
        saved = saved_bytes(lambda model=model: batch.loss(model), weights)  # type: ignore[misc]
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, fused=True) if trained else None
        job = _Job(case, model, batch, optimizer, agreed, saved)
        job.step("cpu")  # warms it up; not counted
        job.seconds.clear()
        job.seconds_adamw.clear()
        jobs.append(job)
        progress(Tick(f"preparing {dtype}", len(jobs), len(todo)))
    return jobs


def _run(jobs: list[_Job], setting: Setting, dtype: Dtype, progress: Progress) -> list[list[str]]:
    """Step every job once a round, in a fresh random order each; returns the orders."""
    shuffle = random.Random(f"{setting.seed} {dtype}")
    order, total = [], setting.rounds * len(jobs)
    for done in range(0, total, len(jobs)):
        turn = shuffle.sample(jobs, len(jobs))
        for place, job in enumerate(turn, 1):
            job.step(setting.clock)
            progress(Tick(f"stepping {dtype}", done + place, total))
        order.append([str(job.case) for job in turn])
    return order


def _result(job: _Job, floor: _Job, dtype: Dtype) -> CaseResult:
    agreed = job.agreement
    return CaseResult(
        dtype=dtype,
        case=job.case,
        trained=sum(p.numel() for p in job.model.parameters() if p.requires_grad),
        ratio=Spread.over([a / b for a, b in zip(job.seconds, floor.seconds, strict=True)]),
        ratio_adamw=Spread.over([a / b for a, b in zip(job.seconds_adamw, floor.seconds, strict=True)]),
        saved_bytes=job.saved,
        saved_ratio=job.saved / floor.saved,
        agreement=agreed,
        nodes=_nodes(job),
        exact=None if agreed is None else agreed.error <= TOLERANCE[dtype] and agreed.smallest_gradient > 0,
        seconds=job.seconds,
        seconds_adamw=job.seconds_adamw,
    )


def _nodes(job: _Job) -> dict[str, int]:
    """How many linears which node computes; in a compiled graph none spans two."""
    with switched(groups=False, mlp=False) if job.case.compiled else nullcontext():
        return dict(Counter(nodes(job.model).values()))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Within the block torch computes on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """What was measured, and on what: the CPU's name, what torch says that it can do, and whether it has bfloat16 in tiles (AMX)."""
    found = {name: version(name) for name in ("torch", "peft", "transformers")}
    return {
        "weftlora": __version__,
        **found,
        "python": platform.python_version(),
        "cpu": f"{cpu_kind()}, {'with' if has_amx() else 'without'} AMX",
    }
