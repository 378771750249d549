"""What `make dist` makes: everything a user needs is in the wheel, everything a contributor needs in the source distribution.

Built without a network, from a copy of the checkout, so that nothing an earlier build left gets in and nothing is left behind.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import weftlora

ROOT = Path(__file__).parents[1]
ANYWHERE = shutil.ignore_patterns("__pycache__", "*.egg-info", ".*_cache")
AT_THE_TOP = {".git", ".venv", ".hypothesis", "build", "dist", "site", "runs", "out"}
NAME = f"weftlora-{weftlora.__version__}"
WHERE = """
import sys
from importlib.metadata import version
from importlib.util import find_spec
print(find_spec("weftlora").origin, version("weftlora"), *sys.path, sep="\\n")
"""

pytestmark = pytest.mark.slow


def not_copied(folder: str, names: list[str]) -> set[str]:
    """What a checkout has beside its files; below the top such names are the source's own, such as the room `runs`."""
    return {*ANYWHERE(folder, names), *(AT_THE_TOP & {*names} if Path(folder) == ROOT else ())}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel made of it."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "checkout", ignore=not_copied)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "checkout")]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    return dist / f"{NAME}-py3-none-any.whl"


@pytest.fixture(scope="module")
def sdist(dist: Path) -> set[str]:
    """The files of the source distribution, as they are named in the checkout."""
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        return {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; torch and the other packages are those of the checkout's environment."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, env=environment())
    # Before the others are seen: a weftlora among them would be "already installed".
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True, env=environment())
    [packages] = folder.glob("lib/python*/site-packages")
    # A folder named in a path file is searched, but path files in it are not read: what is installed there as editable stays out.
    (packages / "others.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return folder


def environment() -> dict[str, str]:
    """Ours, without what would put the checkout on the path or ask a network."""
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME", "WEFT_DATA"}}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def called(command: list[str | Path], folder: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_the_wheel_has_the_package_and_its_assets_and_no_tests(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = Parser().parsestr(archive.read(f"{NAME}.dist-info/METADATA").decode())
    source = ROOT / "src"
    expected = {
        str(path.relative_to(source))
        for path in source.rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and not any(part.endswith(".egg-info") for part in path.parts)
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"weftlora/py.typed", "weftlora/assets/demo_model/model.safetensors"} <= names
    assert f"{NAME}.dist-info/licenses/LICENSE" in names
    assert (metadata["Name"], metadata["Version"]) == ("weftlora", weftlora.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"


def test_the_source_distribution_is_the_whole_checkout(sdist: set[str]):
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is not a git checkout: nothing says which files belong to it")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.split("\0") if name and (ROOT / name).is_file()}
    made = {"PKG-INFO", "setup.cfg"}
    assert tracked - sdist == set(), "name these in MANIFEST.in"
    assert {name for name in sdist - tracked - made if ".egg-info/" not in name} <= untracked(), (
        "these belong to nobody"
    )


def untracked() -> set[str]:
    """Files of a change that is not committed yet."""
    command = ["git", "ls-files", "-z", "--others", "--exclude-standard"]
    return set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"))


def test_an_index_would_take_both(dist: Path, wheel: Path):
    said = called([sys.executable, "-m", "twine", "check", "--strict", wheel, dist / f"{NAME}.tar.gz"], dist)
    assert said.count("PASSED") == 2


def test_the_installed_command_trains_the_demo_and_exports_it(installed: Path, tmp_path: Path):
    python, command = installed / "bin" / "python", installed / "bin" / "weftlora"
    file, version, *path = called([python, "-c", WHERE], tmp_path).splitlines()
    assert Path(file).is_relative_to(installed)
    assert version == weftlora.__version__
    assert not [entry for entry in path if entry and Path(entry).resolve() == ROOT / "src"]

    setting = "adapter.after=1 train.steps=3 train.batch_size=4 data.limit=16 out=run"
    called([command, "train", "lora_dash", *setting.split()], tmp_path)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (run["status"], run["versions"]["weftlora"]) == ("complete", weftlora.__version__)

    proof = json.loads(called([command, "export", "run", "--out", "lora", "--json"], tmp_path))["proof"]
    assert proof["error"] < proof["tolerance"] < proof["adapter_effect"]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
