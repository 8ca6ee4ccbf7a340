"""How long each part of a start took. Made by `build.py`, told among the settings."""

from __future__ import annotations

import time

__all__ = ["Phases"]


class Phases:
    def __init__(self) -> None:
        self._began = self._last = time.perf_counter()
        self._parts: list[tuple[str, float]] = []

    def done(self, what: str) -> float:
        """What was done since the last call; -> its seconds."""
        now = time.perf_counter()
        self._parts.append((what, now - self._last))
        self._last = now
        return self._parts[-1][1]

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._began

    @property
    def words(self) -> str:
        return ", ".join(f"{what} {seconds:.2f} s" for what, seconds in self._parts)
