"""Ctrl-C, SIGTERM and SIGHUP while engines run: the first ends the measurement in order, another one at once.

Used by the command (`caught`), by `drive.py` (`cancelling`) and by `launch.py` (`shielded`, `hurried`), so that no
engine is left behind. A signal that this process was told to ignore (nohup, a shell's background job) stays ignored.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Caught", "cancelling", "caught", "hurried", "shielded"]

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Caught:
    """The signals that came; one of these while `caught` holds."""

    number: int = 0  # of the first; 0: none
    count: int = 0
    shields: int = 0
    waiting: bool = False  # the first came under a shield: raised at its end
    cancel: Callable[[], object] | None = None

    def take(self, number: int, _frame: Any = None) -> None:
        self.count += 1
        if self.count > 1:
            return  # engines being stopped look at `hurried`
        self.number = number
        if self.shields:
            self.waiting = True
        elif self.cancel is not None:
            self.cancel()
        else:
            raise KeyboardInterrupt


_now: list[Caught] = []


@contextlib.contextmanager
def caught() -> Iterator[Caught]:
    """Signals become one KeyboardInterrupt in the main thread."""
    state = Caught()
    before = {n: signal.getsignal(n) for n in SIGNALS}
    _now.append(state)
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:
                signal.signal(number, state.take)
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _now.remove(state)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """What is inside is not broken off; KeyboardInterrupt comes after it."""
    state = _now[-1] if _now else Caught()
    state.shields += 1
    try:
        yield
    finally:
        state.shields -= 1
    if state.waiting and not state.shields:
        state.waiting = False
        raise KeyboardInterrupt


@contextlib.contextmanager
def cancelling(cancel: Callable[[], object]) -> Iterator[None]:
    """Meanwhile a signal calls `cancel` (of an event loop's task) and raises nothing."""
    state = _now[-1] if _now else Caught()
    state.cancel = cancel
    try:
        yield
    finally:
        state.cancel = None


def hurried() -> bool:
    """Somebody has asked twice."""
    return bool(_now) and _now[-1].count > 1
