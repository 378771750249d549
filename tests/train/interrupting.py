"""Stopping a run at a step, and what a run ended with."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from weftlora.runs.run import Run


def weights(run: Run) -> bytes:
    return (run.adapter_folder / "adapter_model.safetensors").read_bytes()


class Interrupt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
