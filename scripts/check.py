"""The parts of `make check` one after the other, and at the end what each of them took beside what it may take.

    python scripts/check.py "lint types" 2 unit 9      targets of the Makefile, and minutes on the build server

A part that fails does not keep the others from running; the exit status is that of the first part that failed. A part over its budget
is marked and fails nothing, because machines differ: read the minutes where the budgets were set.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One part that ran: its targets, minutes allowed and taken, and make's exit status."""

    name: str
    budget: float
    minutes: float
    status: int

    def line(self, width: int) -> str:
        """Its row of the table."""
        over = "over" if self.minutes > self.budget else ""
        failed = f"FAILED with exit status {self.status}" if self.status else ""
        return _row(self.name, self.minutes, self.budget, width, ", ".join(filter(None, (over, failed))))


def run(name: str, budget: float) -> Part:
    """Have make build the targets of `name`; whatever they print goes where ours goes."""
    print(f"--- {name}", flush=True)
    began = time.monotonic()
    status = subprocess.run([os.environ.get("MAKE", "make"), "--no-print-directory", *name.split()]).returncode
    return Part(name, budget, (time.monotonic() - began) / 60, status)


def table(parts: list[Part]) -> str:
    """Minutes of each part and of all, with the budgets beside them."""
    width = max(len("together"), *(len(part.name) for part in parts))
    total = _row("together", sum(part.minutes for part in parts), sum(part.budget for part in parts), width, "")
    return "\n".join([f"{'':{width}}  minutes  budget", *(part.line(width) for part in parts), total])


def _row(name: str, minutes: float, budget: float, width: int, note: str) -> str:
    return f"{name:{width}}  {minutes:7.1f}  {budget:6g}  {note}".rstrip()


def main(given: list[str]) -> int:
    """Run what is given as names and budgets in turn."""
    if not given or len(given) % 2:
        sys.exit("name parts and their minutes in turn, as in: check.py 'lint types' 2 unit 9")
    parts = [run(name, float(budget)) for name, budget in zip(given[::2], given[1::2], strict=True)]
    print(f"--- make check\n{table(parts)}", flush=True)
    return next((part.status for part in parts if part.status), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
