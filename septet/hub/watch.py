"""Progress of downloads done by somebody else (pip, huggingface_hub): bytes that appear below a directory.

Called by the fetchers of the hub. `Progress` is the callback that every pull accepts: (bytes done, bytes in all, what).
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Progress", "bytes_below", "watched"]

Progress = Callable[[int, int, str], None]
PERIOD_S = 0.2


def bytes_below(path: Path) -> int:
    """Sizes of all files below `path`; files that vanish meanwhile count as nothing."""
    total = 0
    for root, _, files in os.walk(path):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(root, file)).st_size
    return total


@contextlib.contextmanager
def watched(path: Path, report: Callable[[int], None] | None) -> Iterator[None]:
    """While inside, `report` gets the bytes below `path` several times a second, from a thread of its own."""
    if report is None:
        yield
        return
    done = threading.Event()

    def look() -> None:
        while not done.wait(PERIOD_S):
            report(bytes_below(path))

    thread = threading.Thread(target=look, name="download-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=5.0)


class Stall:
    """Whether a number has stood still for too long."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._value = -1
        self._since = time.monotonic()

    def stuck(self, value: int) -> bool:
        now = time.monotonic()
        if value != self._value:
            self._value, self._since = value, now
        return now - self._since > self.limit_s
