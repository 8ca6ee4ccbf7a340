"""Logs: one line per record on stderr, safe to read in a terminal.

Owned by the base room; every process calls `configure` once at its start, everything else uses `logging.getLogger`.
Untrusted text (model names, prompts, headers, exception messages) may reach a record: control characters and ANSI
escapes are escaped, long values are cut, and what looks like a key is masked, for every record, whoever wrote it.
A traceback's lines are indented, so that no text in it can pass for a record.
"""

from __future__ import annotations

import logging
import logging.handlers
import queue
import re
import sys
import threading
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LineFormatter", "beside", "clean", "configure"]

MAX_MESSAGE = 2000  # characters of one record
MAX_TRACEBACK_LINES = 60
CLOSE_WAIT_S = 1.0
MAX_QUEUED = 10_000  # records; what comes beyond them is dropped

# C0 and C1 controls, DEL, line and paragraph separators, bidirectional overrides, lone surrogates
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_SECRETS = (
    (re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}"), r"\1 ***"),
    (re.compile(r"(?i)\b(api[-_]?key|token|password|secret)(['\"]?\s*[=:]\s*['\"]?)[^\s'\",;&]{6,}"), r"\1\2***"),
    (re.compile(r"\b(hf_|sk-)[A-Za-z0-9_-]{8,}"), r"\1***"),
    (re.compile(r"(?i)(://)[^/\s@:]+:[^/\s@]+@"), r"\1***@"),
)


def clean(value: object, limit: int = 200) -> str:
    """Any value as one printable line of about `limit` characters at most, secrets masked; says how much was cut."""
    text = value if isinstance(value, str) else str(value)
    dropped = len(text) - limit
    if dropped > 0:
        text = text[:limit]  # cut first: the cost is bounded whatever arrives
    text = _UNSAFE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return f"{text}... ({dropped} more characters)" if dropped > 0 else text


class LineFormatter(logging.Formatter):
    """`2026-01-31 12:00:00.123 INFO engine.loop: message` in UTC, then an indented traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        try:
            message = record.getMessage()
        except Exception as error:  # a record with wrong arguments must not cost the record
            message = f"{record.msg!r} (could not be formatted: {error})"
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(record.created))
        head = f"{stamp}.{int(record.msecs):03d} {record.levelname} {clean(record.name.removeprefix('septet.'))}"
        lines = [f"{head}: {clean(message, MAX_MESSAGE)}"]
        if record.exc_info and record.exc_info[0] is not None:
            lines += [f"    | {clean(line, MAX_MESSAGE)}" for line in self._traceback(record)]
        return "\n".join(lines)

    def _traceback(self, record: logging.LogRecord) -> list[str]:
        """The traceback's lines; of a very long one the beginning and the end."""
        assert record.exc_info is not None
        lines = self.formatException(record.exc_info).splitlines()
        if len(lines) <= MAX_TRACEBACK_LINES:
            return lines
        half = MAX_TRACEBACK_LINES // 2
        return [*lines[:half], f"... {len(lines) - 2 * half} lines ...", *lines[-half:]]


def configure(level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send the records of `septet` at `level` and above to `stream` (stderr). Calling it again replaces the handler."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(LineFormatter())
    logger = logging.getLogger("septet")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False


class _Dropping(logging.handlers.QueueHandler):
    def enqueue(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self.queue.put_nowait(record)


@contextmanager
def beside(level: str = "INFO", stream: TextIO | None = None) -> Iterator[None]:
    """As `configure` while the block runs, but written by a thread: a stream that is stuck holds nobody up."""
    configure(level, stream)
    logger = logging.getLogger("septet")
    (before,) = logger.handlers
    before.setFormatter(None)  # records are lines when they reach it
    records: queue.Queue[logging.LogRecord | None] = queue.Queue(MAX_QUEUED)
    handler = _Dropping(records)
    handler.setFormatter(LineFormatter())
    logger.handlers[:] = [handler]
    writer = threading.Thread(target=_write, args=(records, before), name="log", daemon=True)
    writer.start()
    try:
        yield
    finally:
        configure(level, stream)
        with suppress(queue.Full):
            records.put(None, timeout=CLOSE_WAIT_S)
        writer.join(CLOSE_WAIT_S)


def _write(records: queue.Queue[logging.LogRecord | None], handler: logging.Handler) -> None:
    while (record := records.get()) is not None:
        handler.handle(record)
