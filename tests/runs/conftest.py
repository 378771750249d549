from __future__ import annotations

from pathlib import Path

import pytest
import tiny_bases as tiny


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each kind of tiny base."""
    top = tmp_path_factory.mktemp("bases")
    return {"llama": tiny.llama(top / "llama"), "bert": tiny.bert(top / "bert"), "t5": tiny.t5(top / "t5")}
