"""A search from its recipe to its export on a tiny model: what it leaves, that a stop changes nothing, that the clock ends it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from comparing import recipe

import weftlora
from weftlora.auto import Found, plan, running
from weftlora.auto.plan import Size
from weftlora.auto.running import Standing, read_found
from weftlora.auto.storing import Kept
from weftlora.compare import at_once
from weftlora.compare.leases import Files
from weftlora.disk.files import read_json, write_json
from weftlora.errors import ConfigError, RunError
from weftlora.runs.recipe import Recipe

pytestmark = pytest.mark.sharded

TIME = ("spent", "stages", "budget", "folder", "at_once", "peak_bytes")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(plan, "SIZES", (Size(3, 9, 1, 2, 2),))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("auto")


def asked(top: Path, out: str, **more: Any) -> dict[str, Any]:
    made = recipe(top)
    return {
        "model": made["model"],
        "data": made["data"],
        "methods": ["lora", "tied_lora", {"recipe": "hydralora", "heads": 2}],
        "train": {"steps": 12, "batch_size": 4, "logging_every": 5},
        "budget": "20m",
        "serve": "vllm",
        "r": 4,
        "out": str(top / out),
    } | more


def decided(found: Found) -> str:
    """Everything but times and places."""
    kept = {key: value for key, value in found.record().items() if key not in TIME}
    kept["outcomes"] = [{k: v for k, v in each.items() if k != "figures"} for each in kept["outcomes"]]
    kept["rows"] = [{k: v for k, v in each.items() if k != "step_ratio"} for each in kept["rows"]]
    return json.dumps(kept, sort_keys=True)


@pytest.fixture(scope="module")
def whole(place: Path) -> Iterator[Found]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(plan, "SIZES", (Size(3, 9, 1, 2, 2),))
        patched.setattr(at_once, "machine", lambda device: at_once.Machine(1, 2**40))
        yield weftlora.auto(asked(place, "whole"), jobs="auto")


def test_it_ends_with_an_adapter_its_recipe_a_proved_export_and_a_page(place: Path, whole: Found):
    folder = place / "whole"
    assert whole.ended == "complete"
    assert [left.method for left in whole.left_out] == ["hydralora"]
    assert "vLLM runs stock LoRA" in whole.left_out[0].why
    assert {each.method for each in whole.tried} == {"lora", "tied_lora"}
    assert len([each for each in whole.tried if each.stage == "rates"]) == 3
    assert (folder / whole.run / "adapter" / "adapter_model.safetensors").is_file()
    config = json.loads((folder / whole.export / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["peft_type"], config["r"]) == ("LORA", 8)  # what vLLM reserves room for
    assert whole.export_error is not None
    assert whole.export_error < 1e-5
    again = Recipe.read(folder / whole.recipe)
    assert (again.adapter["recipe"], again.train.lr, again.train.steps) == (whole.adapter["recipe"], whole.lr, 12)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(text in page for text in (whole.method, "hydralora", "What it cost", "plain LoRA"))
    assert (folder / "finalists.html").is_file()
    assert whole.method == "lora" or "better" in whole.why  # two seeds and no interval without 0: plain LoRA stays
    assert decided(read_found(folder)) == decided(whole)
    assert whole.at_once.startswith("1 run at once: 1 core at 1 a run, and 1024.0 GiB of memory free")
    assert "as measured" in whole.at_once  # by the runs that were timed
    assert whole.peak_bytes is not None
    assert 2**27 < whole.peak_bytes < 2**33


def test_one_that_has_ended_is_not_run_again(place: Path, whole: Found):
    said: list[Standing] = []
    assert decided(weftlora.auto(asked(place, "whole"), jobs=0, watch=said.append)) == decided(whole)
    assert not said


class StopError(Exception):
    pass


def stopped_after(count: int) -> Any:
    """Whoever watches, and raises once so many runs of a stage's last report have ended."""
    seen: list[str] = []

    def watch(standing: Standing) -> None:
        at = f"{standing.stage} {standing.done}"
        if standing.total and not standing.running and at not in seen:
            seen.append(at)
            if len(seen) == count:
                raise StopError

    return watch


@pytest.mark.kills
def test_a_stop_anywhere_changes_nothing(place: Path, whole: Found):
    made = asked(place, "stopped")
    for count in (3, 2, 2):  # while a method is timed, in the rates, later
        with pytest.raises(StopError):
            weftlora.auto(made, jobs=0, watch=stopped_after(count))
    assert decided(weftlora.auto(made, jobs=0)) == decided(whole)


@pytest.mark.kills
def test_a_search_that_was_stopped_goes_on_from_its_store_on_another_machine(place: Path, whole: Found, tmp_path: Path):
    store = f"memory://{tmp_path.name}"
    with pytest.raises(StopError):
        weftlora.auto(asked(place, "one"), jobs=0, watch=stopped_after(6), store=store)  # in the rates
    begun = {file.parent.relative_to(place / "one") for file in (place / "one" / "search").rglob("run.json")}
    assert begun
    assert decided(weftlora.auto(asked(place, "two"), jobs=0, store=store)) == decided(whole)
    for run in begun:  # was not trained again
        said = json.loads((place / "two" / run / "run.json").read_text(encoding="utf-8"))
        assert Path(said["folder"]) == place / "one" / run
    told: list[Standing] = []
    assert decided(weftlora.auto(asked(place, "three"), jobs=0, watch=told.append, store=store)) == decided(whole)
    assert not told
    exported = [place / name / "export" / "adapter_model.safetensors" for name in ("two", "three")]
    assert exported[0].read_bytes() == exported[1].read_bytes()
    assert (place / "three" / whole.run / "adapter" / "adapter_model.safetensors").is_file()
    with pytest.raises(RunError, match="holds another search than memory://"):
        weftlora.auto(asked(place, "two") | {"out": str(place / "whole")}, jobs=0, store=_another(store))
    with pytest.raises(ConfigError, match="choose another --store"):
        weftlora.auto(asked(place, "two"), jobs=0, store=store, overwrite=True)


def _another(store: str) -> str:
    """A store whose search has another length."""
    files = Files(f"{store}-another")
    files.write("auto.json", json.dumps(json.loads(Files(store).read("auto.json") or "") | {"steps": 13}))
    return files.place


def test_one_machine_at_a_time_is_at_work_on_a_search_in_a_store(tmp_path: Path):
    place = f"memory://{tmp_path.name}"
    first, second = Kept(place, tmp_path, 0.6), Kept(place, tmp_path, 0.6)
    lease = first.claim()
    beating = Thread(target=first.renew, args=(lease,))
    beating.start()
    with pytest.raises(RunError, match="another machine is at work on the search at memory://"):
        second.claim()
    first.over.set()  # it is killed
    beating.join()
    taken = second.claim()
    assert (taken.job, taken.n) == ("search-0", 1)
    first.lost = not first.claims.renew(lease)
    with pytest.raises(RunError, match="another machine has taken over the search"):
        first.put(lease)
    second.claims.end(taken)
    assert first.claim().job == "search-1"  # at once, after one that was stopped


@pytest.mark.kills
def test_the_clock_ends_it_with_what_there_is_and_a_longer_budget_goes_on(
    place: Path, whole: Found, monkeypatch: pytest.MonkeyPatch
):
    begun = [0]

    def has(clock: running.Clock, seconds: float) -> bool:
        begun[0] += seconds > 0  # timing asks for none
        return begun[0] <= 4

    made = asked(place, "late")
    with monkeypatch.context() as patched:
        patched.setattr(running.Clock, "has", has)
        found = weftlora.auto(made, jobs=0)
    assert found.ended == "time"
    assert "No verdict: the budget ended before the methods were trained on paired seeds" in found.why
    assert (place / "late" / found.run / "adapter" / "adapter_model.safetensors").is_file()
    assert found.rows == []
    assert weftlora.auto(made, jobs=0).ended == "time"  # the same budget is still spent
    more = weftlora.auto(made | {"budget": "30m"}, jobs=0)
    assert decided(more) == decided(whole)


def test_a_budget_that_is_too_small_is_said_before_and_leaves_nothing(place: Path):
    made = asked(place, "small", budget="6s", methods=["lora"])
    with pytest.raises(ConfigError, match="too small for a verdict"):
        weftlora.auto(made, jobs=0)
    assert [path.name for path in (place / "small").iterdir()] in ([], ["workers.lock"])


def test_a_search_of_before_a_key_existed_goes_on(place: Path, whole: Found, tmp_path: Path):
    shutil.copytree(place / "whole", tmp_path / "older")
    path = tmp_path / "older" / "auto.json"
    plan = read_json(path)
    for section, key in (("model", "load_in_4bit"), ("data", "max_length")):
        del plan["recipe"][section][key]
    write_json(path, plan)
    assert decided(weftlora.auto(asked(place, "whole") | {"out": str(tmp_path / "older")}, jobs=0)) == decided(whole)


def test_another_recipe_or_other_files_in_the_folder_are_refused(place: Path, whole: Found, tmp_path: Path):
    with pytest.raises(ConfigError, match="holds a search with serve='vllm', not 'any'"):
        weftlora.auto(asked(place, "whole", serve="any"), jobs=0)
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match=r"holds other files, such as thesis\.tex"):
        weftlora.auto(asked(place, "") | {"out": str(tmp_path)}, jobs=0)
    with pytest.raises(ConfigError, match="the method peft:lora is a control"):
        weftlora.auto(asked(place, "control", methods=["peft:lora"]), jobs=0)


def test_overwrite_deletes_the_search_and_nothing_else(place: Path, whole: Found):
    folder = place / whole.folder
    (folder / "search" / "mine.txt").write_text("mine", encoding="utf-8")
    running._clear(folder)
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "search/mine.txt",
        "workers.lock",
    ]
