"""One server of the default model for all end-to-end tests that do not break it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.e2e.serving import Server, start

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def server(smollm2_path: Path) -> Iterator[Server]:
    running = start("smollm2", "--max-model-len", "1024")
    yield running
    assert running.stop() == 0
