"""Fixtures that several kinds of test share: the real models, through the store like any user's."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """What a shell runs in the background ignores SIGINT, and so do its children: tests of Ctrl-C need the default."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The default model's file, pulled once into SEPTET_HOME."""
    from septet.hub.pull import resolve

    return Path(resolve("smollm2").path)


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    from septet.hub.pull import resolve

    return Path(resolve("gemma3:270m").path)


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Two cores: OpenMP teams of two cost more than they give on tiny tensors. Children inherit what they need."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
