"""A bare loop, one child process per job, that dies by SIGKILL: `killed_loop.py JOBS.json`, a list of [folder, when, step].

step: right after that optimiser step, before anything of it is saved. half: while its checkpoint is being written.
inside: in the launch after that step, between the directions of one site and those of the next. end: never.
The checkpoint of a step is a folder that gets its name when it is complete.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from dashing import Net, batch, dash, loss_of
from peft import PeftModel

import weftlora
from weftlora.terms.boost.dash import DashTerm

END, LAUNCH = 9, 5
torch.set_num_threads(1)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_the_second(step: int) -> None:
    """Make the launch deadly after its first site."""
    launch, launched = DashTerm.launch, []

    def apply(term: DashTerm, found: Any) -> None:
        if launched:
            die()
        launched.append(step)
        launch(term, found)

    DashTerm.launch = apply


def adam(model: PeftModel) -> torch.optim.AdamW:
    return torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2, weight_decay=0.1), lr=1e-2)


def save(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, dying: bool) -> None:
    half = folder.with_suffix(".half")
    model.save_pretrained(half)
    if dying:
        die()
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, half / "rest.pt")
    (half / "schedule.json").write_text(json.dumps(weftlora.state_dict(model)))
    half.rename(folder)


def load(folder: Path) -> tuple[PeftModel, Any, int]:
    torch.manual_seed(0)
    model = PeftModel.from_pretrained(Net(), folder, is_trainable=True)
    optimizer = adam(model)
    rest = torch.load(folder / "rest.pt", weights_only=True)
    optimizer.load_state_dict(rest["optimizer"])
    torch.set_rng_state(rest["rng"])
    state = json.loads((folder / "schedule.json").read_text())
    weftlora.load_state_dict(model, state)
    return model, optimizer, state["default"]["steps"]


def run(folder: Path, when: str, at: int) -> None:
    """From the newest complete checkpoint, or from the start."""
    complete = sorted(int(path.name) for path in folder.glob("[0-9]*") if path.suffix != ".half")
    if complete:
        model, optimizer, start = load(folder / str(complete[-1]))
        assert start == complete[-1]
    else:
        model, start = dash(after=LAUNCH, structure=weftlora.Hydra(heads=2), lora_dropout=0.1), 0
        optimizer = adam(model)
    model.train()
    if when == "inside":
        die_in_the_second(at)
    for step in range(start, END):
        optimizer.zero_grad()
        loss_of(model, batch(step)).backward()
        optimizer.step()
        dying = step + 1 == at
        if dying and when == "step":
            die()
        save(folder / str(step + 1), model, optimizer, dying and when == "half")


for folder, when, step in json.loads(Path(sys.argv[1]).read_text()):
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (0 if when == "end" else -signal.SIGKILL), (folder, when, step, code)
    else:
        try:
            Path(folder).mkdir(exist_ok=True)
            run(Path(folder), when, step)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
