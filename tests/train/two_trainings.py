"""A run of `recipe: flexora` in two processes, see `pairing`: one uninterrupted, one interrupted inside its search and resumed.

FOLDER/recipe.json is the recipe; `out` names come on top of it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from pairing import run_pair

import weftlora
from weftlora.search.driver import LayerSearch

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()


def worker(rank: int) -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(rank), "MASTER_PORT": "0"}
    recipe = json.loads((FOLDER / "recipe.json").read_text())
    whole = weftlora.train({**recipe, "out": str(FOLDER / "whole")})
    given, step = {**recipe, "out": str(FOLDER / "cut")}, LayerSearch.step

    def stopping(self: LayerSearch) -> dict[str, Any]:
        if self.done == 3:
            raise KeyboardInterrupt
        return step(self)

    LayerSearch.step = stopping  # type: ignore[method-assign]
    try:
        weftlora.train(given)
    except KeyboardInterrupt:
        LayerSearch.step = step  # type: ignore[method-assign]
    resumed = weftlora.train(given, resume=True)
    return {"layers": [whole.adapter["layers"]["blocks"], resumed.adapter["layers"]["blocks"]], "steps": whole.steps}


if __name__ == "__main__":
    run_pair(worker)
