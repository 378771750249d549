"""Packages of terms, written into a folder as an installer leaves them: a module and its metadata."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

IMPORTED = "was-imported"
"""The file that a planted package writes beside itself when it is imported."""

NOTES_ITS_IMPORT = f"""\
from pathlib import Path

Path(__file__).with_name({IMPORTED!r}).write_text(__name__)
"""

STRUCTURE = """\
from dataclasses import dataclass

from weftlora.terms.structure.plain import Plain


@dataclass(frozen=True)
class Pair(Plain):
    \"\"\"Plain LoRA with fields.\"\"\"

    size: int = 2
    mode: str = "soft"
"""


def offer(folder: Path, package: str, source: str, version: str = "1.0", **terms: str) -> Path:
    """Write the package, its module named like it, with an entry point for each of `terms` (name: class)."""
    module = package.replace("-", "_")
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(dedent(source), encoding="utf-8")
    info = folder / f"{module}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8")
    lines = [f"{name} = {module}:{cls}" for name, cls in terms.items()]
    (info / "entry_points.txt").write_text("\n".join(["[weftlora.terms]", *lines, ""]), encoding="utf-8")
    return folder
