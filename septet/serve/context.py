"""What is known of one HTTP request beside its fields: who asks, since when, until when, and what came of it.

Made by `front.py` for every request, read and filled in on the way (`app.Endpoint`, `body.py`, `generation.py`) through
one context variable, so that a dialect's handler need not pass it on; told to the access log and the trace at the end.
"""

from __future__ import annotations

import secrets
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from septet.serve.keys import Key

__all__ = ["MAX_TIMEOUT_S", "Context", "current", "entered", "may_manage"]

MAX_TIMEOUT_S = 24 * 3600.0

_CURRENT: ContextVar[Context | None] = ContextVar("septet_request", default=None)


@dataclass(slots=True)
class Context:
    """One request. Times are of the monotonic clock."""

    id: str = field(default_factory=lambda: secrets.token_hex(12))  # ours; a client's own is only logged
    began: float = field(default_factory=time.monotonic)
    deadline: float | None = None
    key: Key | None = None
    backfill: bool = False  # a request of a batch
    route: str = ""  # the pattern that matched
    model: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft_s: float | None = None
    finish: str = ""  # of the last choice
    ended: bool = False

    def limit(self, seconds: object, name: str) -> None:
        """The request must end within `seconds` of its arrival; the smallest of several limits counts."""
        try:
            value = float(seconds) if isinstance(seconds, int | float | str) and seconds is not True else -1.0
        except ValueError:
            value = -1.0
        if not 0 < value <= MAX_TIMEOUT_S:
            raise HttpError(400, f"{name} must be seconds, more than 0 and at most {MAX_TIMEOUT_S:g}", param=name)
        until = self.began + value
        self.deadline = until if self.deadline is None else min(self.deadline, until)


def current() -> Context | None:
    """The context of the HTTP request that is being answered; None in work that outlives its request."""
    context = _CURRENT.get()
    return None if context is None or context.ended else context


def entered(context: Context) -> None:
    """From here on, in this task and those it starts."""
    _CURRENT.set(context)


def may_manage() -> bool:
    """Whether the key of this request may change models and unload them; where no keys are asked for, anybody may."""
    context = current()
    return context is None or context.key is None or context.key.manages
