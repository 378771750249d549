"""A model folder or an adapter folder that carries code: whatever the command, and whatever waits on stdin, none of it runs."""

from __future__ import annotations

import ast
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import weftlora as package
from weftlora.train import train

Weft = Callable[..., Any]
SOURCE = Path(package.__file__).parent

CODE = """
from pathlib import Path

Path({ran!r}).touch()

from transformers import LlamaConfig, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer


class Config(LlamaConfig):  # its own: transformers marks the class of trusted code for the rest of the process
    pass


def generate(model, *given, **more):
    Path({ran!r}).touch()
"""


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the hostile code would make."""
    return tmp_path / "ran"


def edit(path: Path, **more: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


def plant(folder: Path, ran: Path) -> Path:
    """Code in every place of a model folder from which transformers would take some, if it were trusted."""
    (folder / "evil.py").write_text(CODE.format(ran=str(ran)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(ran=str(ran)))
    named = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit(folder / "config.json", auto_map=named)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.Tokenizer"]})
    return folder


@pytest.fixture
def hostile(base: Path, tmp_path: Path, ran: Path) -> Path:
    return plant(shutil.copytree(base, tmp_path / "hostile"), ran)


@pytest.fixture(autouse=True)
def _yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody, or `yes |`, who agrees to every question."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(f"a question was asked: {asked}"))


@pytest.fixture
def trained(base: Path, recipe_file: Path, tmp_path: Path) -> Path:
    """A run folder whose base is hostile."""
    kind = plant(shutil.copytree(base, tmp_path / "kind"), tmp_path / "ran")
    run = train(str(recipe_file), f"model={kind}", "adapter={recipe: lora, r: 2}", "train.save_every=1")
    return run.folder


def test_train_and_doctor_and_search_and_directions_run_nothing(
    weftlora: Weft, recipe_file: Path, hostile: Path, ran: Path, tmp_path: Path
) -> None:
    said = weftlora("train", recipe_file, f"model={hostile}")
    assert said.code == 0, said.err  # transformers has this architecture itself, so the folder's code is not needed
    weftlora("doctor", "--json")
    weftlora("directions", tmp_path / "runs" / "first", "--json")
    weftlora("search", recipe_file, f"model={hostile}", "adapter={recipe: lora, r: 2}", "--json")
    assert not ran.exists()


def test_what_reads_a_run_or_an_adapter_runs_nothing_of_its_base(
    weftlora: Weft, trained: Path, ran: Path, tmp_path: Path
) -> None:
    adapter = trained / "adapter"
    for given in (
        ("eval", trained),
        ("generate", trained, "a ->"),
        ("generate", adapter, "a ->"),
        ("inspect", trained),
        ("inspect", adapter),
        ("inspect", adapter, "--base", tmp_path / "kind"),
        ("export", trained, "--out", tmp_path / "lora"),
        ("export", adapter, "--out", tmp_path / "merged", "--to", "merged"),
        ("train", trained, "--resume"),
    ):
        said = weftlora(*given)
        assert said.code == 0, (given, said.err)
        assert not ran.exists(), given


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_a_folder_that_is_nothing_without_its_code_is_refused(
    weftlora: Weft, recipe_file: Path, hostile: Path, ran: Path, tmp_path: Path, where: str
) -> None:
    if where == "config.json":
        edit(hostile / where, model_type="evil")
    else:
        edit(hostile / where, tokenizer_class="EvilTokenizer")
    said = weftlora("train", recipe_file, f"model={hostile}")
    assert not ran.exists()
    if where == "config.json":
        assert said.code == 1
        assert str(hostile) in said.err
        assert said.err.count("\n") == 1
        assert not (tmp_path / "runs").exists()


def test_a_kernel_of_the_hub_named_by_a_config_is_refused(weftlora: Weft, recipe_file: Path, hostile: Path) -> None:
    edit(hostile / "config.json", attn_implementation="somebody/kernel")
    said = weftlora("train", recipe_file, f"model={hostile}")
    assert said.code == 1
    assert "'somebody/kernel', which is code" in said.err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "names a Python module"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "PROMPT_TUNING, which weftlora does not read"),
    ],
)
def test_an_adapter_that_has_peft_import_something_is_refused(
    weftlora: Weft, base: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]} | change))
    answer = weftlora("generate", folder, "a ->")
    assert answer.code == 1
    assert said in answer.err


# ---------------------------------------------------------------------- the source


def calls() -> Iterator[tuple[str, ast.Call]]:
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(SOURCE)}:{node.lineno}", node


def keyword(node: ast.Call, name: str) -> Any:
    return next((k.value.value for k in node.keywords if k.arg == name and isinstance(k.value, ast.Constant)), None)


OF_PEFT = {"PeftModel", "PeftConfig"}
"""They read a config and tensors, and have no such setting."""


def test_every_loading_call_of_the_package_says_that_it_trusts_no_code() -> None:
    seen = 0
    for place, node in calls():
        function = node.func
        if not isinstance(function, ast.Attribute) or function.attr not in ("from_pretrained", "from_config"):
            continue
        if isinstance(function.value, ast.Name) and function.value.id in OF_PEFT:
            continue
        seen += 1
        assert keyword(node, "trust_remote_code") is False, f"{place} does not pass trust_remote_code=False"
    assert seen >= 5


def test_no_file_is_unpickled_and_no_text_is_run() -> None:
    seen = 0
    for place, node in calls():
        text = ast.unparse(node.func)
        if text == "pickle.loads" and place.startswith("testing.py:"):
            continue  # what its own parent process has just put into a temporary folder, for tests of a term
        assert text not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "pipeline"), place
        if text == "torch.load":
            seen += 1
            assert keyword(node, "weights_only") is True, f"{place} unpickles whatever the file says"
    assert seen >= 1


def test_the_walk_would_notice(tmp_path: Path) -> None:
    node = ast.parse("AutoConfig.from_pretrained(x)", mode="eval").body
    assert isinstance(node, ast.Call)
    assert keyword(node, "trust_remote_code") is None


def test_the_hostile_folder_is_hostile(hostile: Path, ran: Path) -> None:
    """Trusted, its code runs: what the tests above plant would be seen."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert ran.exists()
