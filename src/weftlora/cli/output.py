"""What commands put on the screen: results on stdout, all else on stderr.

Progress is a bar on a terminal, now and then a line elsewhere, and nothing for what ends within two seconds.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from weftlora.foreign_text import visible
from weftlora.progress import Progress, Tick, ignore
from weftlora.redaction import redacted

if TYPE_CHECKING:
    from weftlora.cli.doctor import Diagnosis
    from weftlora.disk.files import Output
    from weftlora.runs.run import Run
    from weftlora.search import Selection
    from weftlora.train.evaluation import Evaluation, Scores


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
        self.clock, self.phase, self.began, self.task, self.first = clock, "", 0.0, TaskID(0), 0
        self.bar: Bar | None = None

    def __call__(self, tick: Tick) -> None:
        if tick.phase != self.phase:
            self.close()
            self.phase, self.began, self.first = tick.phase, self.clock(), tick.done
        if self.bar is None:
            if self.clock() - self.began < PATIENCE:
                return
            self.bar = _progress()
            self.task = self.bar.add_task(tick.phase, total=tick.total, facts="", left="")
            self.bar.start()
        left = _left(tick, self.first, self.clock() - self.began)
        self.bar.update(self.task, completed=tick.done, facts=_facts(tick), left=left)

    def close(self) -> None:
        """End the bar of the present phase."""
        if self.bar is not None:
            self.bar.stop()
        self.bar = None


@contextmanager
def watching_many(
    show: bool,
    clock: Callable[[], float],
    shown: Callable[[Any], RenderableType],
    line: Callable[[Any], str],
    said: Callable[[Any], str] = lambda standing: "",
) -> Iterator[Callable[[Any], None]]:
    """Who to tell how far several runs are: `shown` on a terminal, a `line` now and then elsewhere; what is `said`, always."""
    if not show:
        yield lambda standing: None
    elif sys.stderr.isatty():
        with Live(console=Screen(stderr=True), transient=True, refresh_per_second=4) as live:

            def update(standing: Any) -> None:
                if kept := said(standing):
                    live.console.print(kept, markup=False, highlight=False)
                else:
                    live.update(shown(standing))

            yield update
    else:
        last = -LINE_EVERY

        def tell(standing: Any) -> None:
            nonlocal last
            now = clock()
            if kept := said(standing):
                sys.stderr.write(f"{kept}\n")
            elif now - last >= LINE_EVERY:
                last = now
                sys.stderr.write(f"{line(standing)}\n")

        yield tell


def _progress() -> Bar:
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    return Bar(*columns, TextColumn("{task.fields[left]}", markup=False), console=Screen(stderr=True), transient=True)


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
        left = _left(tick, self.first, now - self.began)
        line = "  ".join(filter(None, [f"{tick.phase} {tick.done}/{tick.total}", _facts(tick), left]))
        sys.stderr.write(visible(line) + "\n")

    def close(self) -> None:
        """Lines need no ending."""


def _left(tick: Tick, first: int, took: float) -> str:
    """The time left: as the call itself knows it, else from the units since `first`, which took so many seconds."""
    done, seconds = tick.done - first, tick.seconds_left
    if seconds is None:
        if not done:
            return ""
        seconds = (tick.total - tick.done) * took / done
    return f"{seconds / 60:.0f} min left" if seconds >= 600 else f"{seconds:.0f} s left"


def _facts(tick: Tick) -> str:
    loss = f"loss {tick.loss:.4f}" if tick.loss is not None else ""
    rate = f"{tick.tokens_per_s:,.0f} tokens/s" if tick.tokens_per_s is not None else ""
    return "  ".join(filter(None, (loss, rate)))


def show(record: Any, as_json: bool, human: Callable[[], RenderableType]) -> None:
    """The result of a command: its record as JSON, or `human` for a person; of several processes the first one speaks."""
    if not _first_process():
        return
    if as_json:
        sys.stdout.write(json.dumps(_finite(record), indent=2, default=str) + "\n")
        return
    shown = human()
    if isinstance(shown, str):
        sys.stdout.write(visible(redacted(shown), lines=True) + "\n")
    else:
        Screen().print(shown)


LOOKS: dict[str, dict[str, Any]] = {
    "boxed": {},
    "headed": {"box": SIMPLE_HEAD, "highlight": False},
    "bare": {"box": None, "pad_edge": False, "header_style": "dim"},
}
"""How a table is drawn: by itself in a box; several of one result under lines; many among sentences without lines."""


def table(
    *columns: str,
    words: Sequence[str] | None = None,
    look: Literal["boxed", "headed", "bare"] = "boxed",
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """A table to add rows to: numbers stand to the right, and the columns `words`, by default the first, to the left."""
    made = Table(title=title, caption=caption, **LOOKS[look])
    for column in columns:
        left = column in (columns[:1] if words is None else words)
        made.add_column(column, justify="left" if left else "right", overflow="fold")
    return made


def check_out(out: Path | None, what: str, keys: tuple[str, ...], overwrite: bool) -> Output | None:
    """The file of `--out`, for `keep`. It is refused before minutes of work where it holds something else than `what`, a JSON file
    with these keys.

    Raises:
        RunError: it is something else, and not to be overwritten.
    """
    if out is None:
        return None
    from weftlora.disk.files import Output

    place = Output(out, what, keys, overwrite)
    place.check()
    return place


def keep(record: Any, place: Output | None) -> None:
    """Write a result's record to `--out`, where it is given. Raises RunError, also where something else has come there meanwhile."""
    if place is not None:
        place.write_json(record)


class Screen(Console):
    """A console on which foreign text is text: nothing in a name is markup, and nothing in it reaches the terminal as a control."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None, width: int | None = None) -> None:
        super().__init__(stderr=stderr, file=file, width=width, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as rich lays it out: what is written out counts in the width."""
        return super().render_str(visible(text, lines=True), **options | {"markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """What goes to the terminal; `Text` does not pass through `render_str`."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, lines=True), style, control)


def say(text: str) -> None:
    """A text of the model's on stdout, at once."""
    sys.stdout.write(visible(redacted(text), lines=True) + "\n")
    sys.stdout.flush()


def next_line(asks: bool) -> str | None:
    """The next line of stdin, with a prompt on a terminal; None at its end."""
    if asks:
        sys.stderr.write("> ")
        sys.stderr.flush()
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def calling(as_json: bool, quiet: bool) -> Iterator[None]:
    """Around a library call: other libraries are silent, weftlora's warnings are lines on stderr, stdout stays clean."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log, handler = logging.getLogger("weftlora"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine("%(message)s"))
    before = log.level
    log.setLevel(logging.WARNING if as_json or quiet or not _first_process() else logging.INFO)
    log.addHandler(handler)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", module=r"weftlora(\.|$)")
            warnings.showwarning = _warn
            _hush_transformers()
            yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


@contextmanager
def working(as_json: bool, quiet: bool) -> Iterator[Progress]:
    """Around a library call that takes long: as `calling`, and what its progress may be told to."""
    with calling(as_json, quiet), watching(not (quiet or as_json)) as progress:
        yield progress


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(redacted(super().format(record)), lines=True)


def _hush_transformers() -> None:
    """No bars, and errors only; transformers itself is loaded by those commands that need it."""
    if "transformers" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        return
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        set_verbosity_error()


def _warn(message: Warning | str, *place: Any, **more: Any) -> None:
    sys.stderr.write(f"weftlora: warning: {visible(redacted(' '.join(str(message).split())))}\n")


def run_summary(run: Run) -> str:
    """Three lines after a training: what came out, where it is, what to do next."""
    seconds = run.time.get("train_seconds", 0.0)
    steps = {"tokens", "last_step", "best_step"}
    shown = [f"{key.replace('_', ' ')} {run.metrics[key]:.4g}" for key in sorted(run.metrics) if key not in steps]
    return "\n".join(
        [
            *_searched(run),
            f"{_steps(run)} in {seconds:.1f} s{_cost(run)}; {', '.join(shown) or 'nothing measured'}",
            f"adapter: {run.adapter_folder} ({run.parameters['trainable']:,} trainable parameters)",
            f"next:    weftlora eval {run.folder}"
            + ("" if run.task == "classification" else f' · weftlora generate {run.folder} "..."'),
        ]
    )


def _steps(run: Run) -> str:
    """How many steps were taken, and whose adapter is kept."""
    last, best = (run.metrics.get(key) for key in ("last_step", "best_step"))
    taken = f"{run.steps} steps" if last in (None, run.steps) else f"{last:g} of {run.steps} steps"
    return taken if best in (None, last) else f"{taken}, the adapter of step {best:g} kept,"


def _cost(run: Run) -> str:
    """What the steps cost, as far as it was measured."""
    kinds = (("tokens_per_s", "{:,.0f} tokens/s"), ("cpu_per_step", "{:.3g} CPU s a step"))
    parts = [text.format(run.figures[name]) for name, text in kinds if name in run.figures]
    parts += [f"peak {run.figures['peak_bytes'] / 2**20:,.0f} MiB"] if "peak_bytes" in run.figures else []
    return f" ({', '.join(parts)})" if parts else ""


def _searched(run: Run) -> list[str]:
    """What was selected, what that cost beside the training, and what it must be compared with; nothing without a search."""
    if not (run.folder / "selection.json").is_file():
        return []
    from weftlora.search import Selection

    selection, time = Selection.load(run.folder / "selection.json"), run.time
    steps, seconds = time.get("search_in_steps", 0.0), time.get("search_seconds", 0.0)
    more = seconds / max(time.get("train_seconds", 0.0), 1e-9)
    return [
        f"search:  layers {list(selection.blocks)} of {len(selection.candidates)}; cost {steps:g} training steps "
        f"(+{steps / run.steps:.0%}), {seconds:.1f} s (+{more:.0%})",
        f"         {controls(selection)}",
    ]


def controls(selection: Selection) -> str:
    """The selections without a search that a result must be held against."""
    named = ", ".join(f"{name} {list(only.blocks)}" for name, only in selection.controls().items())
    few = f" (other selections of this size: {selection.others})" if 0 < selection.others < 3 else ""
    return f"compare with adapter.layers: {named}{few}"


_SCORES = (
    ("rows", "rows", "{:,}"),
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("exact_match", "exact match", "{:.1%}"),
    ("bleu", "BLEU", "{:.1f}"),
    ("rouge_l", "ROUGE-L", "{:.1f}"),
    ("accuracy", "accuracy", "{:.1%}"),
    ("macro_f1", "macro F1", "{:.3f}"),
)


def evaluation_table(evaluation: Evaluation) -> Table:
    """One row of scores per domain and one for all."""
    shown = [column for column in _SCORES if getattr(evaluation.scores, column[0]) is not None]
    whose = evaluation.run or ("frozen base" if evaluation.adapter == "none" else "by itself")
    title = f"{whose} · adapter {evaluation.adapter} · {evaluation.split}"
    made = table("domain", *(name for _, name, _ in shown), title=title)

    def add(name: str, scores: Scores) -> None:
        values = ((getattr(scores, field), text) for field, _, text in shown)
        made.add_row(name, *("" if value is None else text.format(value) for value, text in values))

    for name, scores in evaluation.domains.items():
        add(name, scores)
    add("all", evaluation.scores)
    return made


def catalogue_table(entries: list[dict[str, Any]]) -> Table:
    """The built-in recipes."""
    columns = ("recipe", "what it is", "defaults", "paper")
    made = table(*columns, words=columns, title="weftlora train NAME")
    for entry in entries:
        defaults = " ".join(f"{key}={value}" for key, value in entry["defaults"].items())
        made.add_row(entry["name"], entry["about"], defaults, entry["paper"] or "")
    return made


def diagnosis_text(found: Diagnosis) -> str:
    """What was found, a line each, then what is wrong."""
    lines = [f"{name:<22} {value}" for name, value in found.facts()]
    lines += [f"problem: {problem}" for problem in found.problems] or ["no problem found"]
    return "\n".join(lines)
