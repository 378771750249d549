"""A package outside of the repository brings three terms; it is installed beside weftlora, in which nothing is edited for it."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_bases as tiny

import weftlora
from weftlora.testing import check_processes, check_term

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
READS = ["recipes", "doctor", "report of runs", "report"]
COMMANDS = ["eval", "generate", "inspect", "inspect alone", "directions", "export", "merge", "adapter folder"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the package is installed in, as pip does it."""
    top = tmp_path_factory.mktemp("stranger")
    shutil.copytree(HERE / "stranger", top / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(top / "packages"), str(top / "source")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return top / "packages"


@pytest.fixture(scope="module")
def importable(installed: Path) -> Iterator[None]:
    """The package on this process' path."""
    sys.path.insert(0, str(installed))
    yield
    sys.path.remove(str(installed))


@pytest.fixture(scope="module")
def life(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """What every command did with runs of these terms, in a process of its own; see stranger_life.py."""
    top = tmp_path_factory.mktemp("life")
    packages = shutil.copytree(installed, top / "packages")
    planted = f"from pathlib import Path\nPath({str(top / 'imported')!r}).write_text('imported')\n"
    with (packages / "stranger_terms" / "__init__.py").open("a", encoding="utf-8") as file:
        file.write(planted)
    tiny.llama(top / "base")
    rows = tiny.answers()
    for name, some in {"rows": rows[:32], "validation": rows[32:44], "test": rows[44:]}.items():
        tiny.write_rows(top / f"{name}.jsonl", some)
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(packages)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    env.pop("WEFT_TRUST_TERMS", None)
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "stranger_life.py"), str(top)],
        env=env, cwd=top, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return top, json.loads((top / "told.json").read_text())


# ---------------------------------------------------------------------- the contract


def test_its_structure_keeps_the_contract(importable: None) -> None:
    from stranger_terms.top2 import Top2

    found = check_term(Top2(after=3), processes=False)
    assert "every token picks two rank slots of its own" in found.notes["export"]
    assert "every token picks two rank slots of its own" in found.notes["merge"]
    assert found.notes["events"] == "top2_harden"
    assert "Top2 is outside the equation" in found.notes["reference"]


def test_its_ranks_keep_the_contract(importable: None) -> None:
    from stranger_terms.trim import Trim

    found = check_term(Trim(at=3, slots=2, rows=8), processes=False)
    assert "export" not in found.notes
    assert found.notes["events"] == "trim"


def test_its_search_of_layers_keeps_the_contract(importable: None) -> None:
    from stranger_terms.sieve import Sieve

    found = check_term(Sieve(steps=3), processes=False)
    assert found.notes["training"] == "a search comes first"
    assert "search" in found.held


def test_what_does_not_go_with_them_is_refused_with_their_reasons(importable: None) -> None:
    from stranger_terms.top2 import Top2
    from stranger_terms.trim import Trim

    for others in ({"boost": weftlora.Dash()}, {"ranks": Trim()}, {"ranks": weftlora.Reallocate()}):
        with pytest.raises(weftlora.CombinationError, match=r"Top2 with .*: it has a forward of its own, and"):
            weftlora.WeftConfig(structure=Top2(), **others)
    assert weftlora.WeftConfig(structure=Top2(), layers=[0]).structure == Top2()


def test_all_train_in_two_processes(importable: None) -> None:
    from stranger_terms.sieve import Sieve
    from stranger_terms.top2 import Top2
    from stranger_terms.trim import Trim

    check_processes([Top2(after=3), Trim(at=3, slots=2, rows=8), Sieve(steps=3)])


# ---------------------------------------------------------------------- every command


def test_a_recipe_that_names_it_trains(life) -> None:
    top, told = life
    for name, event in (("top2", "top2_harden"), ("trim", "trim")):
        assert told[f"train {name}"]["code"] == 0, told[f"train {name}"]["err"]
        events = [json.loads(line) for line in (top / name / "events.jsonl").read_text().splitlines()]
        assert [e["step"] for e in events if e["event"] == event] == [4]
    [trimmed] = [e for e in events if e["event"] == "trim"]
    assert len(trimmed["pruned"]) == 3


def test_a_recipe_with_its_search_searches_and_trains_what_it_chose(life) -> None:
    top, told = life
    assert told["train sieve"]["code"] == 0, told["train sieve"]["err"]
    selection = json.loads((top / "sieve" / "selection.json").read_text())
    assert selection["search"] | {"kind": "sieve", "package": "stranger-terms", "version": "0.3"} == selection["search"]
    gates = [2 / (1 + math.exp(-each["alpha"])) for each in selection["candidates"]]
    assert [each["alpha_hat"] for each in selection["candidates"]] == pytest.approx(gates)
    best = max(selection["candidates"], key=lambda each: each["alpha"])
    assert [each["name"] for each in selection["candidates"] if each["selected"]] == [best["name"]]
    assert min(abs(each["alpha"]) for each in selection["candidates"]) > 0
    adapter = json.loads((top / "sieve" / "adapter" / "adapter_config.json").read_text())
    assert adapter["layers"] == {"kind": "only", "blocks": [best["block"]], "gated": False}
    assert len((top / "sieve" / "search.jsonl").read_text().splitlines()) == 3


def test_its_search_alone_and_what_comes_of_it(life) -> None:
    top, told = life
    assert told["search"]["code"] == 0, told["search"]["err"]
    assert len(json.loads(told["search"]["out"])["layers"]) == 1
    assert weftlora.Selection.load(top / "selection.json").search["kind"] == "sieve"  # without importing it
    for command in ("eval sieve", "export sieve"):  # what was trained has no term of the package's any more
        assert told[command]["code"] == 0, told[command]["err"]
        assert not told[command]["imported"]


def test_so_does_an_override(life) -> None:
    top, told = life
    assert told["override"]["code"] == 0, told["override"]["err"]
    assert json.loads((top / "plain" / "run.json").read_text())["adapter"]["structure"]["kind"] == "top2"


def test_the_run_says_which_package_its_terms_are_of(life) -> None:
    top, _ = life
    for name, axis in (("top2", "structure"), ("trim", "ranks")):
        for saved in (
            json.loads((top / name / "run.json").read_text())["adapter"],
            json.loads((top / name / "adapter" / "adapter_config.json").read_text()),
        ):
            assert saved[axis] | {"kind": name, "package": "stranger-terms", "version": "0.3"} == saved[axis]


def test_its_adapter_says_how_it_is_loaded(life, installed: Path) -> None:
    top, _ = life
    readme = (top / "top2" / "adapter" / "README.md").read_text()
    load, trust = (part.split("```")[0] for part in readme.split("```python\n")[1:])
    assert "weftlora.trust_terms('stranger-terms')" in trust
    code = f"import weftlora\n{trust}\n{load}".replace("path/to/this/folder", str(top / "top2" / "adapter"))
    base = f"base_model = A.from_pretrained({str(top / 'base')!r})"
    script = f"from transformers import AutoModelForCausalLM as A\n{base}\n{code}"
    path = os.pathsep.join([str(Path(weftlora.__file__).parents[1]), str(installed)])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["top2", "trim", "sieve"])
@pytest.mark.parametrize(("how", "said"), [("recipe", "by its recipe"), ("folder", "trusted")])
def test_a_killed_run_ends_in_the_unkilled_adapter(life, name: str, how: str, said: str) -> None:
    top, told = life
    assert told[f"resume {name} {said}"]["code"] == 0, told[f"resume {name} {said}"]["err"]
    whole, killed = (top / run / "adapter" / "adapter_model.safetensors" for run in (name, f"{name}-killed-{how}"))
    assert killed.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["top2", "trim", "sieve"])
def test_a_run_folder_alone_is_not_resumed_without_trust(life, name: str) -> None:
    refused_for_want_of_trust(life[1][f"resume {name} untrusted"], name)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_imports_what_a_folder_names_without_trust(life, command: str) -> None:
    refused_for_want_of_trust(life[1][f"{command} untrusted"], "top2")


def refused_for_want_of_trust(told: dict[str, Any], name: str) -> None:
    assert told["code"] == 1, told
    assert told["err"].count("\n") == 1
    for part in (f"{name!r}", "stranger-terms 0.3", "trust_terms", "--trust-terms stranger-terms", "WEFT_TRUST_TERMS"):
        assert part in told["err"]
    assert not told["imported"]


@pytest.mark.parametrize("command", ["eval", "generate", "inspect", "inspect alone", "adapter folder"])
def test_every_command_works_with_trust(life, command: str) -> None:
    told = life[1][f"{command} trusted"]
    assert told["code"] == 0, told["err"]
    assert told["imported"]


def test_the_variable_is_trust_too(life) -> None:
    assert life[1]["eval by variable"]["code"] == 0, life[1]["eval by variable"]["err"]


@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_has_no_closed_form_is_not_exported(life, command: str) -> None:
    told = life[1][f"{command} trusted"]
    assert told["code"] == 1
    assert "every token picks two rank slots of its own" in told["err"]
    assert told["err"].count("\n") == 1


def test_what_has_one_is_exported_and_proved(life) -> None:
    top, told = life
    assert told["export trim"]["code"] == 0, told["export trim"]["err"]
    assert json.loads((top / "trim" / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_inspect_shows_it(life) -> None:
    found = json.loads(life[1]["inspect trusted"]["out"])
    assert "Top2" in json.dumps(found)
    assert len(found["sites"]) == 4


@pytest.mark.parametrize("command", READS)
def test_what_only_reads_imports_nothing(life, command: str) -> None:
    told = life[1][command]
    assert told["code"] == 0, told["err"]
    assert not told["imported"]


def test_a_comparison_trains_them_beside_a_built_in_method(life) -> None:
    told = life[1]["compare"]
    assert told["code"] == 0, told["err"]
    outcomes = json.loads(told["out"])["outcomes"]
    assert {(each["method"], each["status"]) for each in outcomes} == {
        (name, "complete") for name in ("lora", "top2", "trim", "sieve")
    }


def test_nothing_in_weftlora_names_it() -> None:
    source = Path(weftlora.__file__).parent
    assert not [path for path in source.rglob("*.py") if "stranger-terms" in path.read_text(encoding="utf-8")]
