"""One server of the default model for all end-to-end tests that do not break it; one core for each parallel worker."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.e2e.serving import Server, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(autouse=True, scope="session")
def _own_core() -> None:
    """Under xdist: an engine takes as many threads as it may use cores, and two engines would wait for each other's."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if number and len(cores) >= int(os.environ["PYTEST_XDIST_WORKER_COUNT"]):
        os.sched_setaffinity(0, {cores[int(number)]})


@pytest.fixture(scope="session")
def server(smollm2_path: Path) -> Iterator[Server]:
    running = start("smollm2", "--max-model-len", "1024")
    yield running
    assert running.stop() == 0
