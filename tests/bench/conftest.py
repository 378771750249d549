"""One quick measurement, shared by the tests that read its record."""

import pytest

from weftlora.bench import StepBench, step


@pytest.fixture(scope="session")
def quick() -> StepBench:
    return step(quick=True, dtypes=["fp32"], dropouts=[0.0])
