"""Runs that die by SIGKILL where a recipe's table says, and their next life: `killing.py HOST FOLDER`.

One process imports everything and forks a child for each life; what to import, the unkilled run of a recipe tells. HOST
is "weftlora" (weftlora.train) or "trainer" (a Trainer of the user's own with weftlora.Callback). FOLDER has a tiny base in `base`
and, for "weftlora", rows in `rows.jsonl`. Each run lies in FOLDER/RECIPE/NAME, and FOLDER/lives.json tells, for every kill,
the newest complete checkpoint that it left behind.

A new recipe is a row of RECIPES; what happens in it over time is an `Event` of that row.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

END, EVERY = 9, 2
"""Steps of a run, and between its checkpoints; the last step has one, too. An epoch has six."""


@dataclass(frozen=True)
class Event:
    """What a schedule does after optimiser step `step`, in places of the code: "module:Class.method" or "module:function"."""

    step: int
    places: tuple[
        str, ...
    ] = ()  # a kill inside one is at its second call, so of a thing that happens again only the first has one


@dataclass(frozen=True)
class Killed:
    """A recipe, and what happens in it over time; `search`: steps of a search of layers before its training."""

    adapter: dict[str, Any]
    events: tuple[Event, ...] = ()
    search: int = 0


LAUNCH = Event(4, ("weftlora.terms.boost.dash:DashTerm.launch",))
SWITCH = Event(4, ("weftlora.terms.start.directions:DirectionsTerm.switch",))
SCORING = "weftlora.scoring.brackets:_each"  # one chunk of slots has been scored
DECIDING = "weftlora.schedule.reallocate:ReallocateController._room"  # all have
MOVING = "weftlora.schedule.rank_slots:move"  # one site has lost or got slots, another has not: no site does both
ROUNDS = (Event(4, (SCORING, DECIDING, MOVING)), Event(6))
RECIPES = {
    "lora": Killed({"r": 4}),
    "hydralora": Killed({"r": 2, "heads": 2}),
    "tied_lora": Killed({"r": 4}),
    "lora_dash": Killed({"r": 2, "directions": 3, "after": LAUNCH.step}, (LAUNCH,)),
    "lora_init": Killed({"r": 2, "after": SWITCH.step}, (SWITCH,)),
    "lora_tsd": Killed({"r": 2, "directions": 3, "after": SWITCH.step}, (SWITCH, LAUNCH)),
    "alora": Killed({"r": 2, "first": 4, "every": 2, "max_rounds": 2, "rows": 4, "move": 3, "score": "exact"}, ROUNDS),
    "flexora": Killed({"r": 2, "steps": 5, "val_size": 8, "outer_batches": 2}, search=5),
}
SHARED = {"lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}


def recipes(host: str) -> dict[str, Killed]:
    """The rows that a host can run: a Trainer of one's own does not search."""
    return {name: row for name, row in RECIPES.items() if host == "weftlora" or not row.search}


@dataclass(frozen=True)
class Kill:
    """`when`: the place in the code, see `arm`; `step`: the optimiser step at which it is deadly."""

    when: str
    step: int
    place: str = ""

    def newest(self) -> int:
        """The step of the newest complete checkpoint it leaves; 0 for none."""
        if self.when.startswith("search"):
            return 0
        return END if self.when in ("adapter", "end") else (self.step - 1) // EVERY * EVERY


def kills(name: str, host: str) -> dict[str, Kill]:
    """Every boundary of every phase of a recipe, and steps drawn with its name: three through weftlora, one through Trainer."""
    found = {}
    for event in RECIPES[name].events:
        found |= {
            f"the step before {event.step}": Kill("step", event.step - 1),
            f"right after optimiser step {event.step}": Kill("optimizer", event.step),
            f"the step after {event.step}": Kill("step", event.step + 1),
        }
        for place in event.places:
            what = re.split("[.:]", place)[-1]
            found[f"inside {what} at {event.step}"] = Kill("inside", event.step, place)
    for step in range(1, RECIPES[name].search + 1):
        found[f"after search step {step}"] = Kill("search", step)
    if last := RECIPES[name].search:
        found |= {f"while the search is saved at {step}": Kill("search saved", step) for step in (EVERY, last)}
        found["between search and training"] = Kill("searched", last)
    for step in {event.step for event in RECIPES[name].events} or {LAUNCH.step}:
        found[f"while checkpoint {step} is written"] = Kill("half", step)
        found[f"before checkpoint {step} is marked"] = Kill("unmarked", step)
    found["while the adapter is written"] = Kill("adapter", END)
    if host == "weftlora":
        found["while run.json is written"] = Kill("end", END)
    drawn = random.Random(f"{name} {host}").sample(range(1, END + 1), 3 if host == "weftlora" else 1)
    for number, step in enumerate(drawn):
        found[f"random step {step}"] = Kill(("optimizer", "step")[number % 2], step)
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def patch(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


def arm(kill: Kill) -> list[Any]:
    """Make one place deadly; the callbacks that do it, if any."""
    import transformers
    from peft.config import PeftConfigMixin

    from weftlora.runs.run import Run
    from weftlora.search.driver import LayerSearch
    from weftlora.train import checkpoint
    from weftlora.train.layer_search import Stage

    class Deadly(transformers.TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if kill.when == "optimizer" and state.global_step + 1 == kill.step:
                die()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if kill.when == "step" and state.global_step == kill.step:
                die()

    def half(original: Any) -> Any:
        return lambda self, folder: die() if self.state.global_step == kill.step else original(self, folder)

    def unmarked(original: Any) -> Any:
        return lambda folder, step: die() if step == kill.step else original(folder, step)

    def adapter(original: Any) -> Any:
        return lambda self, to, **more: original(self, to, **more) if "checkpoint-" in str(to) else die()

    def end(original: Any) -> Any:
        def save(self: Run) -> None:
            if self.status == "complete":
                (self.folder / ".run.json.weft-0123456789abcdef").write_text('{"format": 1, "fol')
                die()
            original(self)

        return save

    def second(original: Any) -> Any:
        calls = []

        def apply(*given: Any, **more: Any) -> Any:
            calls.append(given)
            if len(calls) == 2:
                die()
            return original(*given, **more)

        return apply

    def search(original: Any) -> Any:
        def step(self: LayerSearch) -> Any:
            row = original(self)
            return die() if self.done == kill.step else row

        return step

    def saved(original: Any) -> Any:
        def save(self: LayerSearch, path: Path) -> None:
            original(self, path)
            if self.done == kill.step:
                path.write_bytes(path.read_bytes()[:100])
                die()

        return save

    if kill.when == "inside":
        module, _, path = kill.place.partition(":")
        cls, _, name = path.rpartition(".")
        owner = importlib.import_module(module)
        patch(getattr(owner, cls) if cls else owner, name, second)
    places = {
        "half": (transformers.Trainer, "_save_rng_state", half),
        "unmarked": (checkpoint, "mark", unmarked),
        "adapter": (PeftConfigMixin, "save_pretrained", adapter),
        "end": (Run, "save", end),
        "search": (LayerSearch, "step", search),
        "search saved": (LayerSearch, "save", saved),
        "searched": (Stage, "_second", lambda original: lambda self, selection: die()),
    }
    if kill.when in places:
        patch(*places[kill.when])
    return [Deadly()]


def through_weft(top: Path, name: str, out: Path, deadly: list[Any]) -> None:
    import weftlora

    recipe = {
        "model": str(top / "base"),
        "data": {"train": str(top / "rows.jsonl")},
        "adapter": {"recipe": name, **RECIPES[name].adapter, **SHARED},
        "train": {
            "steps": END,
            "batch_size": 8,
            "lr": 1e-2,
            "save_every": EVERY,
            "num_threads": 1,
            "weight_decay": 0.1,
            "schedule": "constant",  # at a rate of 0 a step too many would not show
        },
        "out": str(out),
    }
    weftlora.train(recipe, resume=(out / "run.json").is_file(), callbacks=deadly)


def through_trainer(top: Path, name: str, out: Path, deadly: list[Any]) -> None:
    """A script that knows nothing of having been killed."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    import weftlora
    from weftlora.recipes import RECIPES as CONFIGS

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(top / "base")
    model = get_peft_model(base, CONFIGS[name](**RECIPES[name].adapter, **SHARED))
    ids = torch.randint(4, base.config.vocab_size, (24, 6), generator=torch.Generator().manual_seed(1))
    args = TrainingArguments(
        str(out),
        max_steps=END,
        save_steps=EVERY,
        save_total_limit=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        weight_decay=0.1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    if name == "alora":
        weftlora.attach(model, validation=[{"input_ids": row, "labels": row} for row in ids.flip(1)])
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[weftlora.Callback(), *deadly])
    trainer.train(resume_from_checkpoint=weftlora.train.newest_checkpoint(out))
    trainer.save_model(str(out / "adapter"))


HOSTS = {"weftlora": through_weft, "trainer": through_trainer}


def live(run: Callable[..., None], top: Path, name: str, out: Path, kill: Kill | None) -> None:
    """One life of a run in a child, which must end as it should."""
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == (-signal.SIGKILL if kill else 0), (name, out.name, code)
        return
    try:
        run(top, name, out, arm(kill) if kill else [])
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def telling(run: Callable[..., None]) -> Callable[..., None]:
    """`run`, which then writes FOLDER/imported.json: the modules it ended with."""

    def told(top: Path, name: str, out: Path, deadly: list[Any]) -> None:
        run(top, name, out, deadly)
        (top / "imported.json").write_text(json.dumps(list(sys.modules)))

    return told


def import_for_all(top: Path) -> None:
    """Import what the life before has imported as it went: that takes longer than the life, and would in every one."""
    for name in json.loads((top / "imported.json").read_text()):
        if name not in sys.modules:
            with contextlib.suppress(ImportError):  # a name that only its own package can make
                importlib.import_module(name)
    gc.collect()
    gc.freeze()


def shorten_lives() -> None:
    """Leave out what takes most of a short life and no kill can tell: the disk's word, model cards."""
    from peft import PeftModel

    from weftlora.disk import files

    files.sync = lambda descriptor: None
    PeftModel.create_or_update_model_card = lambda self, folder: None


def main(host: str, top: Path) -> None:
    import torch

    from weftlora.train import newest_checkpoint
    from weftlora.train.checkpoint import step_of

    torch.set_num_threads(1)
    shorten_lives()
    left: dict[str, dict[str, int]] = {}
    for name in recipes(host):
        (top / name).mkdir()
        live(telling(HOSTS[host]), top, name, top / name / "whole", None)
        import_for_all(top)
        left[name] = {}
        for where, kill in kills(name, host).items():
            out = top / name / where
            live(HOSTS[host], top, name, out, kill)
            newest = newest_checkpoint(out / "checkpoints" if host == "weftlora" else out)
            left[name][where] = step_of(newest) if newest else 0
            live(HOSTS[host], top, name, out, None)
    (top / "lives.json").write_text(json.dumps(left))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
