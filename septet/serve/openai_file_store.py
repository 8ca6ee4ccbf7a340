"""Files of /v1/files on disk: uploads, and what batches put out. Survives restarts; bounded in number and bytes.

Used by `openai_files.py` and `openai_batch_run.py`. Layout under SEPTET_HOME: `files/ID.json` (facts) beside
`files/ID.jsonl` (content). The facts are written last and atomically: a content without facts is a leftover, which the
next start removes. Names on disk are made here, never taken from a client. Knows no HTTP.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from septet.errors import Overloaded
from septet.hub.store import home_directory
from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

__all__ = ["FileFacts", "FileStore", "disk_errors", "new_id", "write_json"]

MAX_UPLOADS = 4  # at a time
MAX_FILES = 2048
MAX_FILE_BYTES = 128 * 2**20
MAX_TOTAL_BYTES = 4 * 2**30
LEFTOVER_S = 3600.0  # a content without facts may be an upload of another server, for so long
_ID = re.compile(r"file-[0-9a-f]{24}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    id: str
    owner: str  # name of an API key; "" without keys
    bytes: int
    created_at: int
    filename: str
    purpose: str

    def shown(self) -> dict[str, Any]:
        """OpenAI's file object."""
        facts = {name: value for name, value in asdict(self).items() if name != "owner"}
        return {**facts, "object": "file", "status": "processed", "status_details": None, "expires_at": None}


class FileStore:
    def __init__(self, home: Path | None = None) -> None:
        self.directory = home_directory(home) / "files"
        self._facts: dict[str, FileFacts] = {}
        self._uploads = 0
        self._read()

    def content(self, number: str) -> Path:
        return self.directory / f"{number}.jsonl"

    def all(self, owner: str) -> list[FileFacts]:
        """Oldest first."""
        mine = [facts for facts in self._facts.values() if facts.owner == owner]
        return sorted(mine, key=lambda facts: facts.id)

    def get(self, owner: str, number: str) -> FileFacts:
        """HttpError 404 for a file that is not there, or another key's."""
        facts = self._facts.get(number) or self._load(number)
        if facts is None or facts.owner != owner:
            shown = number if len(number) <= 80 else number[:77] + "..."
            raise HttpError(404, f"no file {shown!r} here", code="file_not_found", param="file_id")
        return facts

    def new_id(self) -> str:
        return new_id("file-")

    @contextlib.asynccontextmanager
    async def uploading(self) -> AsyncGenerator[None, None]:
        """One of MAX_UPLOADS places, so that what is on its way is bounded too. Overloaded if all are taken."""
        if self._uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} files are being uploaded already", retry_after_s=5.0)
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    def check_room(self, more: int) -> None:
        """HttpError where a file of so many bytes would be too much."""
        if len(self._facts) >= MAX_FILES:
            raise HttpError(413, f"{MAX_FILES} files are kept already; delete some", code="too_many_files")
        if sum(facts.bytes for facts in self._facts.values()) + more > MAX_TOTAL_BYTES:
            raise HttpError(
                413, f"files of {MAX_TOTAL_BYTES} bytes are kept already; delete some", code="too_many_files"
            )

    def place(self, number: str, source: Path, *, owner: str, filename: str, purpose: str) -> FileFacts:
        """Take over a written file (same file system). Blocks; may be called again for the same one."""
        with disk_errors():
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            if source.exists():
                with source.open("rb") as stream:
                    os.fsync(stream.fileno())
                os.replace(source, self.content(number))
            size = self.content(number).stat().st_size
            facts = FileFacts(
                id=number, owner=owner, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose
            )
            write_json(self.directory / f"{number}.json", asdict(facts))
        self._facts[number] = facts
        return facts

    def delete(self, owner: str, number: str) -> None:
        self.get(owner, number)
        del self._facts[number]
        with disk_errors():
            (self.directory / f"{number}.json").unlink(missing_ok=True)
            self.content(number).unlink(missing_ok=True)

    def _read(self) -> None:
        """What is there; anything that is not sound is left out (B39), leftovers of a crash are removed."""
        if not self.directory.is_dir():
            return
        for path in sorted(self.directory.glob("file-*.json")):
            self._load(path.stem)
        for path in (*self.directory.glob("*.part"), *self.directory.glob("file-*.jsonl")):
            with contextlib.suppress(OSError):
                old = time.time() - path.stat().st_mtime > LEFTOVER_S
                if old and (path.suffix == ".part" or not path.with_suffix(".json").exists()):
                    path.unlink()

    def _load(self, number: str) -> FileFacts | None:
        """The facts of one file, which may be another server's on the same disk."""
        if not _ID.fullmatch(number):
            return None
        try:
            facts = msgspec.json.decode((self.directory / f"{number}.json").read_bytes(), type=FileFacts)
        except (OSError, msgspec.MsgspecError):
            return None
        if facts.id != number or not self.content(number).is_file():
            return None
        self._facts[number] = facts
        return facts


def new_id(prefix: str) -> str:
    """24 hexadecimal digits in the order of time, the rest by chance: sorted by id is sorted by age."""
    return f"{prefix}{time.time_ns() // 1000:013x}{secrets.token_hex(6)[:11]}"


def write_json(path: Path, value: Any) -> None:
    """Atomically: the old or the new, never half of one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with fresh.open("wb") as stream:
            stream.write(msgspec.json.encode(value))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """What the disk refuses, in words: full (507) or not writable (500)."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise HttpError(507, "the disk is full; delete files and try again", code="disk_full") from None
        raise HttpError(500, f"can't use SEPTET_HOME: {error.strerror}", code="disk_error") from None
