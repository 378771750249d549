from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import recipe

from weftlora.compare import Comparison, compare


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tiny bases and rows lie."""
    return tmp_path_factory.mktemp("comparisons")


@pytest.fixture(scope="session")
def tried(bases: Path) -> tuple[dict[str, Any], Comparison]:
    """A whole comparison with rates to choose from, a method that cannot be resumed and the frozen base; and its recipe."""
    methods = ["lora", "peft:adalora", "none"]
    gc.freeze()  # collecting what imports have left takes most of a short run
    made = recipe(
        bases,
        methods=methods,
        train={"lr": None},
        rates={"values": [1e-3, 1e-2, 3e-2], "seeds": 2},
        out=str(bases / "tried"),
    )
    return made, compare(made, jobs=0)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """A bucket on a server that speaks S3, on loopback."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with pytest.MonkeyPatch.context() as patched:
        started = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        started.start()
        host, port = started.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patched.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
        started.stop()
