"""OpenAI's /v1/batches: create, list, read, cancel.

Listed by `openai.py`; `openai_batch_run.py` does the work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.body import body_of
from septet.serve.fields import Fields, only, schema_of, table
from septet.serve.openai_owner import owner_of
from septet.serve.openai_pages import page, query_of

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from septet.serve.service import Service
    from septet.serve.sse import Reply

__all__ = ["ROUTES", "SCHEMAS", "checked_metadata"]

BATCH = table(
    {"string": "input_file_id endpoint completion_window", "object": "metadata"},
    "",
    {"output_expires_after": only(why="files are kept until they are deleted")},
)


async def create(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Run the requests of a file behind everybody else's."""
    fields = Fields(await body_of(service, scope, receive), BATCH)
    for name in ("input_file_id", "endpoint"):
        if not fields.given(name):
            raise InvalidRequest(f"{name} is missing", param=name)
    if fields.string("completion_window", "24h") != "24h":
        raise InvalidRequest("completion_window must be 24h", param="completion_window")
    metadata = checked_metadata(fields.object("metadata")) if fields.given("metadata") else None
    file, endpoint = fields.string("input_file_id", ""), fields.string("endpoint", "")
    batch = await service.batches.create(owner_of(), file, endpoint, metadata)
    await reply.json(batch.shown())


def checked_metadata(given: dict[str, Any]) -> dict[str, str]:
    short = all(len(key) <= 64 and isinstance(value, str) and len(value) <= 512 for key, value in given.items())
    if len(given) > 16 or not short:
        raise InvalidRequest(
            "metadata must hold at most 16 strings, of 512 characters, under keys of 64", param="metadata"
        )
    return given


async def listed(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Batches, newest first, in pages."""
    query = query_of(scope, "after limit")
    shown = [batch.shown() for batch in service.batches.all(owner_of())]
    await reply.json(page(shown, query, most=100, usual=20))


async def retrieve(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """How far a batch is."""
    await reply.json(service.batches.get(owner_of(), scope["path_params"]["batch"]).shown())


async def cancel(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """End a batch; what it has answered is kept."""
    batch = await service.batches.cancel(owner_of(), scope["path_params"]["batch"])
    await reply.json(batch.shown())


ROUTES = (
    ("POST", "/v1/batches", create),
    ("GET", "/v1/batches", listed),
    ("GET", "/v1/batches/{batch}", retrieve),
    ("POST", "/v1/batches/{batch}/cancel", cancel),
)
SCHEMAS: dict[str, dict[str, Any]] = {"/v1/batches": schema_of(BATCH, "input_file_id endpoint")}
