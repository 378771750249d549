"""Try the patch of docs/upstream on a copy of the installed peft: its tests, and an adapter of weftlora without `import weftlora`.

    python scripts/upstream.py

Nothing of the environment is changed: copy, tests and adapter are in a temporary folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PATCH = ROOT / "docs" / "upstream" / "peft-external-methods.patch"

SAVE = """
import weftlora
from peft import get_peft_model
from transformers import AutoModelForCausalLM
from weftlora.data.demo import demo_model_path
base = AutoModelForCausalLM.from_pretrained(demo_model_path())
get_peft_model(base, weftlora.HydraLoraConfig(r=2, heads=2, target_modules=["q_proj"])).save_pretrained("adapter")
print(demo_model_path())
"""
LOAD = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
assert "weftlora" not in sys.modules
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), "adapter")
assert type(model.base_model).__module__.startswith("weftlora.")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        shutil.copytree(
            Path(str((find_spec("peft") or sys.exit("peft is not installed.")).origin)).parent, top / "src/peft"
        )
        (top / "tests").mkdir()
        subprocess.run(["git", "apply", "--directory", "", str(PATCH)], cwd=top, check=True)
        offer = top / "src" / "weftlora_offer-1.dist-info"
        offer.mkdir()
        (offer / "METADATA").write_text("Metadata-Version: 2.1\nName: weftlora-offer\nVersion: 1\n")
        (offer / "entry_points.txt").write_text("[peft.methods]\nweft = weftlora\n")
        stock = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
        patched = {**stock, "PYTHONPATH": os.pathsep.join([str(top / "src"), str(ROOT / "src")])}
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_external_methods.py"]
        subprocess.run(tests, cwd=top, env=patched, check=True)
        told = subprocess.run(
            [sys.executable, "-c", SAVE], cwd=top, env=stock, check=True, capture_output=True, text=True
        )
        load = [sys.executable, "-c", LOAD, told.stdout.split()[-1]]
        without = subprocess.run(load, cwd=top, env=stock, capture_output=True, text=True, check=False)
        if without.returncode == 0 or "KeyError: 'WEFT'" not in without.stderr:
            sys.exit(f"peft as it is did not fail as described:\n{without.stderr}")
        subprocess.run(load, cwd=top, env=patched, check=True)
        print("An adapter of weftlora: KeyError in peft as it is, loaded by the patched one without an import.")


if __name__ == "__main__":
    main()
