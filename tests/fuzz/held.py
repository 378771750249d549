"""Runs one test after another, each with a source of its own: libraries are imported once, weftlora by every child.

{"test": NODE, "source": FOLDER}  →  {"code": of pytest, "said": its output}        a line each, in and out
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPTIONS = ["-q", "-x", "-rfE", "-p", "no:cacheprovider", "-m", ""]


def run(test: str, source: str) -> dict[str, object]:
    """Run a test in a child of this process."""
    import pytest

    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            code = 3
            try:
                os.setsid()
                os.dup2(said.fileno(), 1)
                os.dup2(said.fileno(), 2)
                os.environ |= {"PYTHONPATH": source, "COLUMNS": "400"}  # for what the test starts, and whole sentences
                sys.path.insert(0, source)
                code = int(pytest.main([*OPTIONS, str(ROOT / test)]))
                sys.stdout.flush()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        text = said.read().decode("utf-8", "replace")
    return {"code": os.waitstatus_to_exitcode(status), "said": text}


def main() -> None:
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers.models.llama  # noqa: F401
    import trl  # noqa: F401

    torch.set_num_threads(1)
    assert not [name for name in sys.modules if name.partition(".")[0] == "weftlora"], "each child imports its own"
    os.chdir(ROOT)
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run(**json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
