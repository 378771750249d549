"""What starting costs: which modules are not loaded. Times are measured by scripts/start_bench.py, not here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "peft", "transformers", "datasets", "trl", "accelerate", "scipy", "sklearn", "numpy", "tokenizers")
LOADED = """
import atexit, json, sys
heavy = json.loads(sys.argv.pop(1))
atexit.register(lambda: sys.__stderr__.write("\\nLOADED " + json.dumps([m for m in heavy if m in sys.modules]) + "\\n"))
"""
COMMAND = LOADED + "from weftlora.cli import main\nmain(sys.argv[1:])"


def python(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


def loaded(done: subprocess.CompletedProcess[str]) -> list[str]:
    [line] = [line for line in done.stderr.splitlines() if line.startswith("LOADED ")]
    return json.loads(line.removeprefix("LOADED "))


@pytest.mark.parametrize(
    "code",
    [
        "import weftlora",
        "import weftlora; dir(weftlora); weftlora.WeftError, weftlora.epochs(1)",
        "import weftlora.recipes; weftlora.recipes.own_fields('alora')",
        "import weftlora.train, weftlora.compare, weftlora.report, weftlora.data.demo",
        "import weftlora.runs.recipe as r; r.asked('hydralora', ['adapter.heads=4'])",
    ],
)
def test_what_loads_nothing_heavy(code: str) -> None:
    done = python(LOADED + code, json.dumps(HEAVY))
    assert done.returncode == 0, done.stderr
    assert loaded(done) == []


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("--help", 0, "Fine-tune with"),
        ("--version", 0, "weftlora 0."),
        ("train --help", 0, "Train an adapter"),
        ("bench --help", 0, "Measure speed"),
        ("export --help", 0, "Write an adapter that loads without `import weftlora`"),
        ("recipes", 0, "hydralora"),
        ("recipes hydralora", 0, "adapter:"),
        ("recipes hydralroa", 1, "did you mean 'hydralora'"),
        ("trian x", 2, "train"),
        ("train nowhere.yaml", 1, "nowhere.yaml"),
        ("train hydralroa", 1, "did you mean 'hydralora'"),
        ("train hydralora trian.steps=3", 1, "did you mean 'train'"),
        ("train hydralora train.step=3", 1, "did you mean 'steps'"),
        ("train hydralora train.lr=fast", 1, "'fast'"),
        ("train hydralora data.max_lenght=3", 1, "did you mean 'max_length'"),
        ("train hydralora adapter.heds=3", 1, "did you mean 'heads'"),
        ("train hydralora adapter.recipe=hydra", 1, "did you mean 'hydralora'"),
        ("train hydralora model=./nowhere", 1, "no model folder"),
        ("train hydralora data=nowhere.jsonl", 1, "nowhere.jsonl does not exist"),
        ("train wrong.yaml", 1, "did you mean 'train'"),
        ("eval nowhere", 1, "nowhere"),
        ("generate nowhere hello", 1, "nowhere"),
        ("generate nowhere", 1, "give one prompt"),
        ("chat nowhere", 1, "nowhere"),
        ("data nowhere.yaml", 1, "nowhere.yaml"),
        ("data hydralora data=nowhere.jsonl", 1, "nowhere.jsonl does not exist"),
        ("search nowhere.yaml", 1, "nowhere.yaml"),
        ("compare nowhere.yaml", 1, "nowhere.yaml"),
        ("compare nowhere.yaml --dry-run", 1, "nowhere.yaml"),
        ("export nowhere", 1, "no folder 'nowhere'"),
        ("inspect nowhere", 1, "no folder 'nowhere'"),
        ("directions nowhere", 1, "no folder 'nowhere'"),
        ("report nowhere", 1, "no folder 'nowhere'"),
        ("heads nowhere.jsonl", 1, "nowhere.jsonl does not exist"),
        ("doctor nowhere", 1, "no folder 'nowhere'"),
        ("train . --resume", 1, "is not a run folder"),
    ],
)
def test_a_command_that_has_nothing_to_compute_loads_nothing_heavy(
    arguments: str, code: int, says: str, tmp_path: Path
) -> None:
    (tmp_path / "wrong.yaml").write_text("model: demo\ndata: demo\nadapter: lora\ntrian: {steps: 3}\nout: runs/x\n")
    done = python(COMMAND, json.dumps(HEAVY), *arguments.split(), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    assert loaded(done) == []
    assert not (tmp_path / "runs").exists()


def test_a_recipe_knows_the_fields_of_the_config_without_loading_it() -> None:
    import dataclasses

    import weftlora
    from weftlora.recipes import CONFIG_KEYS

    filled_in = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"}
    fields = {field.name for field in dataclasses.fields(weftlora.WeftConfig)}
    assert fields - filled_in - {"inference_mode", "format_version"} == CONFIG_KEYS


# ---------------------------------------------------------------------- who tells peft, and when

LOAD = """
import sys, warnings
warnings.simplefilter("ignore")
{imports}
from transformers import AutoModelForCausalLM
from weftlora.data.demo import demo_model_path
model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_model_path()), sys.argv[1])
assert type(model.peft_config["default"]) is sys.modules["weftlora.adapter.spec"].WeftConfig
assert peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["WEFT"] is type(model.peft_config["default"])
assert list(peft.PeftType).count("WEFT") == 1
"""
IN_THE_MIDDLE = """
import builtins, sys
real = builtins.__import__
def during(name, *args, **kwargs):  # somebody imports weftlora while peft is half imported
    if name == "tuners_utils" and "weftlora" not in sys.modules:
        assert "peft" in sys.modules
        real("weftlora")
    return real(name, *args, **kwargs)
builtins.__import__ = during
import peft
builtins.__import__ = real
assert "weftlora" in sys.modules
"""
IN_THREADS = """
import importlib, threading
found = []
threads = [threading.Thread(target=lambda n=n: found.append(importlib.import_module(n))) for n in ("peft", "weftlora") * 3]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(found) == 6
import peft
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    import weftlora
    from weftlora.data.demo import demo_model_path

    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(demo_model_path()), weftlora.HydraLoraConfig(r=2)
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "imports",
    [
        "import weftlora, peft",
        "import peft, weftlora",
        "import peft.utils.peft_types, weftlora, peft",
        "import weftlora.adapter.spec, peft",
        "import weftlora.host.tuner, peft",
        "from weftlora.schedule.schedule import Schedule\nimport peft",
        "import weftlora, importlib, peft\nimportlib.reload(weftlora)\nimportlib.reload(peft)",
        IN_THE_MIDDLE,
        IN_THREADS,
    ],
    ids=["first", "last", "between", "a part", "the tuner", "the schedule", "again", "in the middle", "in threads"],
)
def test_an_adapter_loads_whoever_is_imported_first(imports: str, saved: Path) -> None:
    done = python(LOAD.format(imports=imports), str(saved))
    assert done.returncode == 0, done.stderr


def test_importing_peft_loads_nothing_of_weftlora_until_it_is_used() -> None:
    code = "import weftlora, peft, json, sys; print(json.dumps([m for m in sys.modules if m.startswith('weftlora.')]))"
    done = python(code)
    loaded = {name.removeprefix("weftlora.") for name in json.loads(done.stdout)}
    assert loaded <= {
        "errors",
        "settings",
        "version",
        "foreign_text",
        "redaction",
        "adapter",
        "host",
        "host.registration",
    }


def test_an_import_that_fails_looks_as_it_does_without_weftlora(tmp_path: Path) -> None:
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "__init__.py").write_text("import no_such_package\n")
    said = []
    for first in ("", "import weftlora\n"):
        code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{first}import peft"
        said.append([line for line in python(code).stderr.splitlines() if 'File "<string>"' not in line])
    assert said[0] == said[1]
    assert said[0][-1].startswith("ModuleNotFoundError: No module named 'no_such_package'")


TAKEN = """
import enum, sys, warnings
{first}
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
{second}
class Theirs: pass
PEFT_TYPE_TO_CONFIG_MAPPING["WEFT"] = Theirs
{third}
try:
    weftlora.WeftConfig()
except weftlora.WeftError as error:
    print(error)
try:
    weftlora.HydraLoraConfig()
except weftlora.WeftError as error:
    print(error)
"""


@pytest.mark.parametrize("place", ["first", "third"])
def test_a_name_that_is_taken_is_refused_where_a_config_is_made(place: str) -> None:
    parts = {"first": "", "second": "", "third": ""} | {place: "import weftlora"}
    if place == "third":  # theirs was there before: an enum member of the name, as a package would add it
        parts["second"] = (
            "m = str.__new__(PeftType, 'WEFT'); m._name_ = m._value_ = 'WEFT'; PeftType._member_map_['WEFT'] = m"
        )
    done = python(TAKEN.format(**parts))
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.splitlines()
        == ["another package has already registered a peft type named WEFT: uninstall it, or do not import both."] * 2
    )


AGAIN = """
import sys
import peft
import weftlora
{first}
for name in [name for name in sys.modules if name.partition(".")[0] == "weftlora"]:
    del sys.modules[name]
import weftlora
config = weftlora.WeftConfig(r=3)
print(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING["WEFT"] is type(config), type(peft.get_peft_config(config.to_dict())).__name__)
"""


@pytest.mark.parametrize("first", ["", "weftlora.WeftConfig(r=4)"])
def test_weftlora_imported_a_second_time_takes_its_own_place(first: str) -> None:
    done = python(AGAIN.format(first=first))  # as notebooks and servers do that reload code
    assert done.stdout.split() == ["True", "WeftConfig"], done.stderr


def test_a_config_made_in_another_process_is_known_to_peft(tmp_path: Path) -> None:
    import pickle

    import weftlora

    (tmp_path / "config.pkl").write_bytes(pickle.dumps(weftlora.TiedLoraConfig(r=4)))
    code = (
        "import pickle, sys; c = pickle.load(open(sys.argv[1], 'rb')); from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING as t; "
        "print(t[c.peft_type].__name__, c.r)"
    )
    done = python(code, str(tmp_path / "config.pkl"))
    assert done.stdout.split() == ["WeftTuner", "4"], done.stderr


def test_names_are_loaded_once_by_several_threads() -> None:
    code = """
import threading, weftlora
found = []
def look(): found.append((weftlora.WeftConfig, weftlora.HydraLoraConfig, weftlora.attach))
threads = [threading.Thread(target=look) for _ in range(8)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(set(found)) == 1 and len(found) == 8
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
