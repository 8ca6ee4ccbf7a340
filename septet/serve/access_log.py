"""One line for each request: who, what, how long, how many tokens; JSON or key=value.

Written by a thread of its own from a bounded queue: a terminal that is not read, a slow or a full disk costs lines
(counted in `septet:dropped_log_lines`), never a request. Untrusted text is cut and escaped; API keys are told by name.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
import time
from typing import IO, TYPE_CHECKING, Any

import msgspec

from septet.errors import InvalidRequest
from septet.log import clean

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Scope

    from septet.serve.context import Context

__all__ = ["AccessLog"]

MAX_QUEUED = 4096  # lines
CLOSE_WAIT_S = 2.0


class AccessLog:
    """`style`: "json" or "text". `path`: a file to append to; None = standard error."""

    def __init__(self, style: str, path: str | None = None) -> None:
        self.dropped = 0
        self._line: Callable[[dict[str, Any]], bytes] = _json if style == "json" else _text
        self._queue: queue.Queue[bytes | None] = queue.Queue(MAX_QUEUED)
        self._file = _open(path)
        self._owned = path is not None
        self._thread = threading.Thread(target=self._run, name="access log", daemon=True)
        self._thread.start()

    def write(self, context: Context, scope: Scope, status: int, n_bytes: int) -> None:
        try:
            self._queue.put_nowait(self._line(_fields(context, scope, status, n_bytes)))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, for a moment at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_WAIT_S)
        self._thread.join(CLOSE_WAIT_S)
        if self._owned and not self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._file.close()

    def _run(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._file.write(line)
                self._file.flush()
            except (OSError, ValueError):  # a full disk, a closed terminal
                self.dropped += 1


def _open(path: str | None) -> IO[bytes]:
    if path is None:
        return sys.stderr.buffer
    try:
        return open(path, "ab", buffering=0)
    except OSError as error:
        raise InvalidRequest(f"can't write the access log {path}: {error.strerror}", param="access_log_file") from None


def _fields(context: Context, scope: Scope, status: int, n_bytes: int) -> dict[str, Any]:
    now = time.time()
    told: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z",
        "id": context.id,
        "client": (scope.get("client") or ("-", 0))[0],
        "method": clean(scope["method"], 16),
        "path": clean(scope["path"]),
        "status": status,
        "seconds": round(time.monotonic() - context.began, 4),
        "bytes": n_bytes,
    }
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            told["client_id"] = clean(value.decode("latin-1"), 64)
    if context.key is not None:
        told["key"] = context.key.name
    if context.model:
        told |= {
            "model": clean(context.model),
            "prompt_tokens": context.prompt_tokens,
            "cached_tokens": context.cached_tokens,
            "output_tokens": context.output_tokens,
            "ttft": round(context.ttft_s, 4) if context.ttft_s is not None else None,
            "finish": context.finish or "none",
        }
    return told


def _json(fields: dict[str, Any]) -> bytes:
    return msgspec.json.encode(fields) + b"\n"


def _text(fields: dict[str, Any]) -> bytes:
    words = (f"{name}={_word(value)}" for name, value in fields.items() if name != "time")
    return f"{fields['time']} access {' '.join(words)}\n".encode("utf-8", "replace")


def _word(value: Any) -> str:
    text = str(value)
    return text if text and not set(text) & set(' "=') else msgspec.json.encode(text).decode()
