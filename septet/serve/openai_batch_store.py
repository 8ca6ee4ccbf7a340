"""Batches on disk: one JSON record each, and what a running one has put out so far.

Used by `openai_batch_run.py`. Layout under SEPTET_HOME: `batches/ID.json` (the record, replaced atomically),
`ID.out.part` and `ID.err.part` (answered lines, appended; a torn last line is cut off at the next start) and `ID.lock`
(held by the server that runs it). Knows no HTTP and no requests.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import time
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from septet.hub.store import home_directory
from septet.serve.openai_file_store import disk_errors, new_id, write_json

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FINISHED", "Batch", "BatchStore"]

MAX_BATCHES = 1024  # records; the oldest finished ones go first
FINISHED = ("completed", "failed", "expired", "cancelled")
_TIMES = ("in_progress", "expires", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
_ID = re.compile(r"batch_[0-9a-f]{24}")


@dataclass(slots=True, kw_only=True)
class Batch:
    """status, as OpenAI's: validating, in_progress, finalizing, cancelling, or one of FINISHED."""

    id: str = field(default_factory=lambda: new_id("batch_"))
    owner: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    model: str = ""  # of the first request: a server without it does not resume this batch
    status: str = "validating"
    ending: str = "completed"  # what it will be once its files are placed
    at: dict[str, int] = field(default_factory=dict)  # seconds since the epoch, by name less "_at"
    created_at: int = field(default_factory=lambda: int(time.time()))
    errors: list[dict[str, Any]] = field(default_factory=list)
    total: int = 0
    completed: int = 0
    failed: int = 0
    output_file_id: str | None = None
    error_file_id: str | None = None
    output_number: str = field(default_factory=lambda: new_id("file-"))  # chosen before it is needed
    error_number: str = field(default_factory=lambda: new_id("file-"))

    def turn(self, status: str) -> None:
        self.status = status
        self.at[status] = int(time.time())

    def shown(self) -> dict[str, Any]:
        """OpenAI's batch object."""
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "model": self.model or None,
            "errors": {"object": "list", "data": self.errors} if self.errors else None,
            "input_file_id": self.input_file_id,
            "completion_window": self.completion_window,
            "status": self.status,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created_at,
            **{f"{name}_at": self.at.get(name) for name in _TIMES},
            "request_counts": {"total": self.total, "completed": self.completed, "failed": self.failed},
            "metadata": self.metadata,
        }


class BatchStore:
    def __init__(self, home: Path | None = None) -> None:
        self.directory = home_directory(home) / "batches"
        self.batches: dict[str, Batch] = {}
        self._read()

    def part(self, batch: Batch, kind: str) -> Path:
        """kind: "out" or "err"."""
        return self.directory / f"{batch.id}.{kind}.part"

    def save(self, batch: Batch) -> None:
        """Blocks until it is on the disk."""
        with disk_errors():
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_json(self.directory / f"{batch.id}.json", asdict(batch))

    def add(self, batch: Batch) -> None:
        self.batches[batch.id] = batch
        finished = [old for old in self.batches.values() if old.status in FINISHED]
        for old in finished[: max(0, len(self.batches) - MAX_BATCHES)]:
            del self.batches[old.id]
            with disk_errors():
                (self.directory / f"{old.id}.json").unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self, batch: Batch) -> Iterator[bool]:
        """Whether this batch is ours to run: False while another server runs it."""
        path = self.directory / f"{batch.id}.lock"
        with path.open("wb") as stream:
            try:
                fcntl.flock(stream.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            try:
                yield True
            finally:
                if batch.status in FINISHED:
                    path.unlink(missing_ok=True)

    def done(self, batch: Batch) -> set[str]:
        """custom_ids of the lines that were answered before a restart; a torn last line is cut off. Blocks."""
        found: set[str] = set()
        counts = {"out": 0, "err": 0}
        for kind in counts:
            path = self.part(batch, kind)
            if not path.exists():
                continue
            with path.open("r+b") as stream:
                whole = 0
                for line in stream:
                    try:
                        found.add(msgspec.json.decode(line)["custom_id"])
                    except (msgspec.MsgspecError, KeyError, TypeError):
                        break
                    whole += len(line)
                    counts[kind] += 1
                stream.truncate(whole)
        batch.completed, batch.failed = counts["out"], counts["err"]
        return found

    def append(self, batch: Batch, kind: str, record: dict[str, Any]) -> None:
        """One line. Nothing of it stays where the disk is full."""
        with disk_errors():
            descriptor = os.open(self.part(batch, kind), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                size = os.fstat(descriptor).st_size
                line = msgspec.json.encode(record) + b"\n"
                if os.write(descriptor, line) != len(line):
                    os.ftruncate(descriptor, size)
                    raise OSError(errno.ENOSPC, "no space left")
            finally:
                os.close(descriptor)

    def reload(self, number: str) -> None:
        """What another server that runs it has written since."""
        if (batch := _record(self.directory / f"{number}.json")) is not None:
            self.batches[number] = batch

    def _read(self) -> None:
        """Records that are not sound are left out."""
        if not self.directory.is_dir():
            return
        found = [batch for path in self.directory.glob("batch_*.json") if (batch := _record(path)) is not None]
        for batch in sorted(found, key=lambda one: one.id):
            self.batches[batch.id] = batch


def _record(path: Path) -> Batch | None:
    try:
        batch = msgspec.json.decode(path.read_bytes(), type=Batch)
    except (OSError, msgspec.MsgspecError):
        return None
    return batch if _ID.fullmatch(batch.id) and batch.id == path.stem else None
