"""Train recipes, each in a child process that dies by SIGKILL: `killed_run.py JOBS.json`, a list of (recipe, when, step).

step: right after an optimiser step. half: while the checkpoint of that step is being written.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import transformers

import weftlora
import weftlora.train.loop

write = transformers.Trainer._save_rng_state


class Killer(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(recipe: dict[str, Any], when: str, step: int) -> None:
    def write_or_die(self: Any, folder: str) -> None:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        write(self, folder)

    if when == "half":
        transformers.Trainer._save_rng_state = write_or_die
    weftlora.train(recipe, callbacks=[Killer(step)] if when == "step" else [])


for job in json.loads(Path(sys.argv[1]).read_text()):
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    else:
        train(*job)
        os._exit(0)
