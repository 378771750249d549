"""What `weftlora auto` chooses against the defaults of `weftlora train`, on fresh seeds, into bench/auto.json.

    python scripts/auto_bench.py --folder FOLDER --out bench/auto.json [--budget 30m] [--steps 60] [--seeds 5]

Bundled model and tasks. A search with its budget of wall time first; then the chosen method at its rate, and plain LoRA at the rate
that `weftlora train` takes where none is named, at equal trainable parameters and steps, on seeds that the search has not seen. What
was searched and measured already in the folder is taken from there.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path

import weftlora
from weftlora.compare.record import Interval
from weftlora.data.demo import demo_model_path
from weftlora.disk.files import write_json
from weftlora.runs import rates

FIRST_SEED = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="30m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    given = parser.parse_args()
    search = {"model": "demo", "data": "demo", "budget": given.budget, "serve": "vllm", "train": {"steps": given.steps}}
    found = weftlora.auto(search | {"out": str(given.folder / "search")})
    plan = json.loads((given.folder / "search" / "auto.json").read_text(encoding="utf-8"))
    width = json.loads((demo_model_path() / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    default = rates.of_width(width)
    entry = plan["methods"][found.method]
    compared = weftlora.compare(
        {
            "model": "demo",
            "data": plan["recipe"]["data"],
            "train": {"steps": plan["steps"], "batch_size": plan["recipe"]["train"]["batch_size"]},
            "methods": [
                {"recipe": "lora", "name": "default", "lr": default},
                entry | {"name": "chosen", "lr": found.lr},
            ],
            "baseline": "default",
            "budget": {"equal": "parameters", "r": plan["r"]},
            "seeds": list(range(FIRST_SEED, FIRST_SEED + given.seeds)),
            "answers": False,
            "metric": "loss",
            "out": str(given.folder / "against-the-default"),
        }
    )

    def plain(interval: Interval | None) -> dict[str, float | int | None] | None:
        return None if interval is None else vars(interval)

    rows = {row.name: row for row in compared.rows}
    write_json(
        given.out,
        {
            "command": f"python scripts/auto_bench.py --folder FOLDER --out bench/auto.json --budget {given.budget} "
            f"--steps {given.steps} --seeds {given.seeds}",
            "machine": f"{platform.machine()}, shared with other work",
            "versions": compared.versions,
            "search": {
                key: getattr(found, key)
                for key in (
                    "method",
                    "lr",
                    "why",
                    "ended",
                    "budget",
                    "spent",
                    "stages",
                    "runs",
                    "seeds",
                    "export_error",
                )
            }
            | {"size": plan["size"], "estimate": plan["estimate"]},
            "tried": [vars(each) for each in found.tried],
            "default_lr": default,
            "chosen_loss": plain(rows["chosen"].score),
            "default_loss": plain(rows["default"].score),
            "difference": plain(rows["chosen"].gap),
            "verdict": rows["chosen"].verdict.sentence,
        },
    )


if __name__ == "__main__":
    main()
