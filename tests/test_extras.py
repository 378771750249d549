"""The core: what works where torch, peft, transformers and safetensors are installed and no extra is, and what the rest says there."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import quantisers
from packaging.requirements import Requirement
from packaging.version import Version

import weftlora
from weftlora.extras import EXTRAS, PURPOSES

pytestmark = pytest.mark.slow

APART = {"quant", "ray"}
"""Extras that are not in `all`."""
BLOCKED = sorted(
    {name for names in EXTRAS.values() for name in names} - {"yaml", "jinja2"}
)  # which torch and peft bring
BLOCK = f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None  # as if it were not installed\n"

WORK = """
import torch, warnings, weftlora
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from weftlora.data.demo import demo_model_path

def base():
    return AutoModelForCausalLM.from_pretrained(demo_model_path())

tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
ids = tokenizer(["mill turn kqzv -> vzqk", "loom turn kqzv -> zvkq"], return_tensors="pt")["input_ids"]
rows = [{"input_ids": row, "labels": row} for row in ids] * 4
held = [{"input_ids": row.flip(0), "labels": row.flip(0)} for row in ids]

torch.manual_seed(0)
model = get_peft_model(base(), weftlora.LoraDashConfig(r=4, after=0.5))
weftlora.attach(model, total_steps=4)
optimizer = torch.optim.AdamW(weftlora.param_groups(model, lr=1e-2, weight_decay=0.1))
for _ in range(4):
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
[event] = weftlora.state_dict(model)["default"]["events"]
assert event["event"] == "dash_launch"
model.eval().save_pretrained("adapter")
torch.save(model(input_ids=ids).logits, "logits.pt")
weftlora.export_lora(model, "lora")  # proved by stock peft, or it would raise
weftlora.merge(model, "merged")
assert weftlora.inspect("adapter").record()
model = get_peft_model(base(), weftlora.PlainLoraConfig(r=2))
arguments = TrainingArguments("trainer", max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
Trainer(model, arguments, train_dataset=rows, callbacks=[weftlora.Callback()]).train()
selection = weftlora.search_layers(
    base(), rows, held, config=weftlora.FlexoraConfig(r=2, steps=1, outer_batches=1), accumulation=1
)
selection.save("selection.json")
assert selection.blocks
loaded = [name for name in sys.modules if name.partition(".")[0] in BLOCKED and sys.modules[name] is not None]
assert not loaded, loaded
"""
AGAIN = """
import torch, weftlora
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from weftlora.data.demo import demo_model_path

tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
ids = tokenizer(["mill turn kqzv -> vzqk", "loom turn kqzv -> zvkq"], return_tensors="pt")["input_ids"]
wanted = torch.load("logits.pt")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_model_path()), "adapter").eval()
assert torch.equal(model(input_ids=ids).logits, wanted)
merged = AutoModelForCausalLM.from_pretrained("merged").eval()
assert (merged(input_ids=ids).logits - wanted).abs().max() < 1e-3
weftlora.export_lora("adapter", "lora-of-the-folder", verify=False)
stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_model_path()), "lora-of-the-folder").eval()
assert stock.peft_config["default"].peft_type == "LORA"
assert (stock(input_ids=ids).logits - wanted).abs().max() < 1e-3
"""


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = BLOCK + f"BLOCKED = {BLOCKED!r}\n" + code
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd)


def test_adapt_train_save_load_export_and_merge_with_the_core_alone(tmp_path: Path) -> None:
    for code in (WORK, AGAIN):
        done = python(code, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "lora" / "README.md").is_file()


TRAIN = """
import weftlora
given = ("train.steps=2", "data.limit=8", "data.validation_limit=2", "data.test_limit=2", "train.batch_size=4")
run = weftlora.train("hydralora", *given, "out=run")
assert run.status == "complete"
assert weftlora.evaluate(run, limit=2, max_new_tokens=2).scores.loss
assert weftlora.generate(run, "mill turn kqzv ->", max_new_tokens=2)
assert weftlora.suggest_heads(["mill turn", "loom turn", "wheel grain"] * 20).record()
"""
COMPARE = """
import weftlora
given = {"model": "demo", "data": {"train": "demo", "limit": 12, "test_limit": 2, "max_length": 64}, "methods": ["lora", "hydralora"]}
given |= {"budget": {"equal": "parameters", "r": 2}, "seeds": 1, "rates": {"values": [1e-3]}, "out": "runs"}
assert weftlora.compare({**given, "train": {"steps": 2, "batch_size": 4}}, jobs=1).methods
"""
REPORT = """
import sys
import weftlora
assert weftlora.report(sys.argv[1], out="page.html").path
assert open("page.html").read(15)
"""


def alone(extra: str, code: str, *arguments: str, cwd: Path) -> None:
    """Run code where nothing is installed but the core and one extra."""
    brought = {"scipy"} if "sklearn" in EXTRAS[extra] else set()  # scikit-learn needs it
    others = sorted({*BLOCKED} - EXTRAS[extra].keys() - brought)
    block = f"import sys\nfor name in {others!r}: sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", block + code, *arguments], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr


def test_an_extra_alone_is_enough_for_what_it_is_for(tmp_path: Path) -> None:
    alone("train", TRAIN, cwd=tmp_path)
    alone("compare", COMPARE, cwd=tmp_path)
    alone("report", REPORT, "runs", cwd=tmp_path)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ("weftlora.train('hydralora')", 'weftlora.train needs pydantic, which is not installed: pip install "weftlora[train]"'),
        (
            "from weftlora.data import DataConfig",
            'weftlora.data.DataConfig needs pydantic, which is not installed: pip install "weftlora[train]"',
        ),
        ("weftlora.compare({})", 'weftlora.compare needs pydantic, which is not installed: pip install "weftlora[compare]"'),
        ("weftlora.report('.')", 'weftlora.report needs scipy, which is not installed: pip install "weftlora[report]"'),
        (
            "weftlora.suggest_heads(['a b', 'b c', 'c d'] * 20)",
            'weftlora.suggest_heads needs scikit-learn, which is not installed: pip install "weftlora[train]"',
        ),
    ],
)  # fmt: skip
def test_a_call_that_needs_an_extra_says_which(call: str, sentence: str, tmp_path: Path) -> None:
    code = f"import weftlora\ntry:\n    {call}\nexcept weftlora.MissingExtraError as error:\n    print(error)"
    done = python(code, cwd=tmp_path)
    assert done.stdout == sentence + "\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_says_which_extra_it_needs(tmp_path: Path) -> None:
    done = python("from weftlora.cli import main\nmain(['train', 'hydralora'])", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        'weftlora: the command weftlora needs typer, which is not installed: pip install "weftlora[cli,train]"\n'
    )
    for command, extras in (
        ("compare", "cli,compare"),
        ("report", "cli,report"),
        ("inspect", "cli"),
        ("--help", "cli"),
    ):
        assert python(f"from weftlora.cli import main\nmain(['{command}'])", cwd=tmp_path).stderr.endswith(
            f'pip install "weftlora[{extras}]"\n'
        )
    code = (
        "for name in ('rich', 'typer', 'pydantic'): del sys.modules[name]  # typer imports pydantic\n"
        "from weftlora.cli import main\nmain(sys.argv[1:])"
    )
    done = python(code, "train", "hydralora", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip().endswith('pip install "weftlora[train]"')
    assert python(code, "recipes", "hydralora", cwd=tmp_path).returncode == 0


def test_the_missing_package_of_somebody_else_stays_its_own_error() -> None:
    from weftlora.extras import needs

    with pytest.raises(ModuleNotFoundError, match="no_such_package") as caught, needs("train", "a call"):
        import no_such_package  # noqa: F401
    assert not isinstance(caught.value, weftlora.WeftError)


def test_the_extras_are_those_of_the_project_file() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = project["optional-dependencies"]

    def names(lines: list[str]) -> set[str]:
        found: set[str] = set()
        for need in map(Requirement, lines):
            if need.name == "weftlora":
                found |= {name for extra in need.extras for name in names(groups[extra])}
            else:
                found.add(need.name)
        return found

    core = names(project["dependencies"])
    assert core == {"torch", "peft", "transformers", "safetensors", "filelock"}
    for extra, packages in EXTRAS.items():
        assert set(packages.values()) == names(groups[extra]) - {"accelerate"}, extra  # which peft brings
    assert names(groups["all"]) == set().union(*(names(groups[extra]) for extra in EXTRAS if extra not in APART))
    assert names(groups["all"]) <= names(groups["dev"])
    assert PURPOSES.keys() == EXTRAS.keys()


def test_the_quantisers_of_the_extra_are_those_that_the_table_was_executed_with() -> None:
    """Its lower bounds are the versions of scripts/quantisers.py; they are in no row of the matrix."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tried = {need.name: next(iter(need.specifier)).version for need in map(Requirement, quantisers.PACKAGES)}
    for need in map(Requirement, project["optional-dependencies"]["quant"]):
        (bound,) = need.specifier
        assert bound.operator == ">="
        assert (
            Version(bound.version).release == Version(tried[need.name]).release[: len(Version(bound.version).release)]
        )


def test_the_windows_of_the_project_file_are_those_of_the_matrix() -> None:
    """Lower bounds are the least version of any host's row, and no row stands outside them; peft alone has an upper one."""
    root = Path(__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = tomllib.loads((root / "matrix.toml").read_text(encoding="utf-8"))["row"]
    tried = [row["versions"] for row in rows if "reason" not in row]
    needs = {
        str(need): need
        for lines in (
            project["dependencies"],
            *(project["optional-dependencies"][extra] for extra in EXTRAS if extra != "quant"),
        )
        for need in map(Requirement, lines)
        if need.name != "weftlora"
    }
    for need in needs.values():
        bounds = {one.operator: Version(one.version) for one in need.specifier}
        least = min(Version(versions[need.name]) for versions in tried if need.name in versions)
        assert least in need.specifier, f"{need}: a row has {least}"
        assert bounds[">="].release == least.release[: len(bounds[">="].release)], f"{need}: the oldest row has {least}"
        assert bounds.keys() == ({">=", "<"} if need.name == "peft" else {">="}), need
        assert all(versions[need.name] in need.specifier for versions in tried if need.name in versions), need
