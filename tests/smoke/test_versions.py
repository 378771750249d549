"""The row is what was imported: a folder in front of the path that is shadowed, or a package left out by mistake, fails here."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import pytest

ROW = json.loads(os.environ.get("WEFT_MATRIX_ROW", "null")) or {}


@pytest.mark.skipif(not ROW, reason="no row of matrix.toml: run by make matrix")
@pytest.mark.parametrize("package", sorted(ROW.get("versions", ())))
def test_the_version_that_is_imported_is_the_rows(package: str, version_of: Callable[[str], str]) -> None:
    wanted = ROW["versions"][package]
    assert version(package).partition("+")[0] == wanted
    assert version_of(package) == wanted


@pytest.mark.skipif(not ROW, reason="no row of matrix.toml: run by make matrix")
@pytest.mark.parametrize("package", sorted(ROW.get("without", ())))
def test_what_the_row_leaves_out_cannot_be_imported(package: str) -> None:
    with pytest.raises((ImportError, PackageNotFoundError)):
        importlib.import_module(package)
