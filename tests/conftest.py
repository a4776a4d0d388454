"""Shared fixtures: every instruction set in turn, uninitialised memory filled with NaN, hypothesis profile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

from rankernel import backends

settings.register_profile(
    "fixed", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("fixed")


def pytest_report_header() -> list[str]:
    return [f"rankernel: ISAs {', '.join(backends.available_isas())}; threads {torch.get_num_threads()}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=backends.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once with every instruction set that this machine has."""
    with backends.use(isa=request.param):
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty and its like return NaN: an output that a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


os.environ.setdefault("HF_HUB_OFFLINE", "1")
