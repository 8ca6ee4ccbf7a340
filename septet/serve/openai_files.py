"""OpenAI's /v1/files: upload JSONL for batches, list, read, delete.

Listed by `openai.py`. The multipart body is read under a cap and a clock, its file goes to disk as it comes. Knows
nothing of what is in a file.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.errors import ClientGone, HttpError
from septet.serve.openai_file_store import MAX_FILE_BYTES, disk_errors
from septet.serve.openai_owner import owner_of
from septet.serve.openai_pages import page, query_of

if TYPE_CHECKING:
    from pathlib import Path

    from starlette.datastructures import FormData, UploadFile
    from starlette.types import Message, Receive, Scope

    from septet.serve.app import Service
    from septet.serve.openai_file_store import FileStore
    from septet.serve.sse import Reply

__all__ = ["ROUTES"]

PURPOSES = ("batch",)
UPLOAD_S = 600.0
OVERHEAD = 64 * 1024  # of the multipart form around the file
_FIELDS = ("purpose", "file")
CHUNK = 256 * 1024


# -- upload -----------------------------------------------------------------------------------------------------------
async def upload(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Take a JSONL file for a batch (multipart/form-data: purpose, file)."""
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException
    from starlette.requests import Request

    headers = {name.lower(): value for name, value in scope["headers"]}
    if headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"multipart/form-data":
        raise HttpError(415, "Content-Type must be multipart/form-data")
    store = service.batches.files
    store.check_room(0)
    try:
        async with store.uploading(), asyncio.timeout(UPLOAD_S):
            request = Request(scope, _capped(receive, MAX_FILE_BYTES + OVERHEAD))
            async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
                await reply.json(await _keep(store, form))
    except TimeoutError:
        raise HttpError(408, f"the file did not arrive within {UPLOAD_S:g} s") from None
    except (HTTPException, MultiPartException, UnicodeDecodeError) as error:
        detail = getattr(error, "detail", None) or getattr(error, "message", "") or "not UTF-8"
        raise HttpError(400, f"the multipart form can't be read: {str(detail)[:200]}") from None


def _capped(receive: Receive, max_bytes: int) -> Receive:
    n_bytes = 0

    async def counted() -> Message:
        nonlocal n_bytes
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        n_bytes += len(message.get("body", b""))
        if n_bytes > max_bytes:
            raise HttpError(413, f"a file may have at most {MAX_FILE_BYTES} bytes", code="request_too_large")
        return message

    return counted


async def _keep(store: FileStore, form: FormData) -> dict[str, Any]:
    for name in form:
        if name.startswith("expires_after"):
            raise InvalidRequest(
                "expires_after is not supported: a file stays until it is deleted", param="expires_after"
            )
        if name not in _FIELDS:
            raise InvalidRequest(f"unknown field {name[:80]!r}", param=name[:80])
    purpose, file = form.get("purpose"), form.get("file")
    if purpose not in PURPOSES:
        raise InvalidRequest(f"purpose must be one of {', '.join(PURPOSES)}", param="purpose")
    if file is None or isinstance(file, str):
        raise InvalidRequest("file is missing: send it as a part with a file name", param="file")
    size = file.size or 0
    if not 0 < size <= MAX_FILE_BYTES:
        raise InvalidRequest(f"file must have 1 to {MAX_FILE_BYTES} bytes", param="file")
    store.check_room(size)
    number = store.new_id()
    part = store.directory / f"{number}.part"
    try:
        await _copy(file, part)
        name = os.path.basename((file.filename or "upload.jsonl").replace("\\", "/"))[:256] or "upload.jsonl"
        place: dict[str, str] = {"owner": owner_of(), "filename": name, "purpose": purpose}
        return (await asyncio.to_thread(store.place, number, part, **place)).shown()
    finally:
        part.unlink(missing_ok=True)


async def _copy(file: UploadFile, target: Path) -> None:
    def copy() -> None:
        with disk_errors():
            target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with target.open("wb") as stream:
                shutil.copyfileobj(file.file, stream, CHUNK)

    await asyncio.to_thread(copy)


# -- stored ones ------------------------------------------------------------------------------------------------------
async def listed(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Files, newest first, in pages."""
    query = query_of(scope, "after limit order purpose")
    files = [facts.shown() for facts in service.batches.files.all(owner_of())]
    if purpose := query.get("purpose"):
        files = [file for file in files if file["purpose"] == purpose]
    await reply.json(page(files, query, most=10_000, usual=10_000))


async def retrieve(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Facts of a file."""
    await reply.json(service.batches.files.get(owner_of(), scope["path_params"]["file"]).shown())


async def content(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """What is in a file."""
    store = service.batches.files
    facts = store.get(owner_of(), scope["path_params"]["file"])
    with disk_errors():
        stream = await asyncio.to_thread(store.content(facts.id).open, "rb")
    with stream:
        parts = iter(lambda: stream.read(CHUNK), b"")
        await reply.download(parts, "application/jsonl", facts.bytes)


async def delete(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Delete a file that no running batch reads."""
    number, batches = scope["path_params"]["file"], service.batches
    batches.files.get(owner_of(), number)
    if batches.reads(number):
        raise HttpError(409, f"{number} is read by a batch that still runs; cancel it first", code="file_in_use")
    batches.files.delete(owner_of(), number)
    await reply.json({"id": number, "object": "file", "deleted": True})


ROUTES = (
    ("POST", "/v1/files", upload),
    ("GET", "/v1/files", listed),
    ("GET", "/v1/files/{file}", retrieve),
    ("GET", "/v1/files/{file}/content", content),
    ("DELETE", "/v1/files/{file}", delete),
)
