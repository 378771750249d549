"""Progress on stderr: a bar on a terminal, now and then a line elsewhere, nothing for what ends within two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from weftlora.cli.output import Screen
from weftlora.foreign import visible
from weftlora.train.progress import Tick, ignore

PATIENCE = 2.0
"""Seconds before anything is shown."""
LINE_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


@contextmanager
def watching(show: bool, clock: Callable[[], float] = time.monotonic) -> Iterator[Callable[[Tick], None]]:
    """What a library call may tell its progress to."""
    if not show:
        yield ignore
        return
    watcher = _Bar(clock) if sys.stderr.isatty() else _Lines(clock)
    try:
        yield watcher
    finally:
        watcher.close()


class _Bar:
    """A bar per phase with loss, tokens per second and time left."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.phase, self.began, self.task = clock, "", 0.0, TaskID(0)
        self.bar: Progress | None = None

    def __call__(self, tick: Tick) -> None:
        if tick.phase != self.phase:
            self.close()
            self.phase, self.began = tick.phase, self.clock()
        if self.bar is None:
            if self.clock() - self.began < PATIENCE:
                return
            self.bar = _progress()
            self.task = self.bar.add_task(tick.phase, total=tick.total, facts="")
            self.bar.start()
        self.bar.update(self.task, completed=tick.done, facts=_facts(tick))

    def close(self) -> None:
        """End the bar of the present phase."""
        if self.bar is not None:
            self.bar.stop()
        self.bar = None


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    return Progress(*columns, TimeRemainingColumn(compact=True), console=Screen(stderr=True), transient=True)


class _Lines:
    """A line every few seconds, for logs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.phase, self.began, self.shown, self.first = clock, "", 0.0, 0.0, 0

    def __call__(self, tick: Tick) -> None:
        now = self.clock()
        if tick.phase != self.phase:
            self.phase, self.began, self.shown, self.first = tick.phase, now, now + PATIENCE - LINE_EVERY, tick.done
        if now - self.shown < LINE_EVERY:
            return
        self.shown = now
        done = tick.done - self.first
        left = f"{(tick.total - tick.done) * (now - self.began) / done:.0f} s left" if done else ""
        line = "  ".join(filter(None, [f"{tick.phase} {tick.done}/{tick.total}", _facts(tick), left]))
        sys.stderr.write(visible(line) + "\n")

    def close(self) -> None:
        """Lines need no ending."""


def _facts(tick: Tick) -> str:
    loss = f"loss {tick.loss:.4f}" if tick.loss is not None else ""
    rate = f"{tick.tokens_per_s:,.0f} tokens/s" if tick.tokens_per_s is not None else ""
    return "  ".join(filter(None, (loss, rate)))
