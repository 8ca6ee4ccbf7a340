"""OpenAI's /v1/embeddings: pooled, normalised hidden states of the served model.

Listed by `openai.py`. Beside OpenAI's fields: `pooling` ("mean" or "last"), `normalize`, `add_special_tokens` and
`priority`. Knows nothing of how the vectors are made.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from septet.errors import InvalidRequest
from septet.serve.body import body_of
from septet.serve.fields import PROMPT, Fields, only, schema_of, table
from septet.serve.generation import vectors
from septet.serve.sse import until_gone
from septet.session.embed import POOLINGS

if TYPE_CHECKING:
    from array import array

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.sse import Reply
    from septet.session.session import Prompt, Session

__all__ = ["ROUTES", "SCHEMAS", "EmbeddingCall", "embeddings_answer", "parse_embeddings"]

MAX_INPUTS = 2048  # OpenAI's
EMBEDDINGS = table(
    {
        "string": "model encoding_format pooling",
        "boolean": "normalize add_special_tokens",
        "integer": "dimensions priority",
        "": "input",
    },
    "user request_id",
    {
        "truncate_prompt_tokens": only(why="inputs are never cut silently; shorten them"),
        "messages": only(why="not supported yet; give input"),
    },
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCall:
    model: str | None
    inputs: list[str | list[int]]
    base64: bool = False
    dimensions: int | None = None
    pooling: str = "mean"
    normalize: bool = True
    add_special_tokens: bool = True
    priority: int = 0


def parse_embeddings(body: dict[str, Any]) -> EmbeddingCall:
    fields = Fields(body, EMBEDDINGS)
    format = fields.string("encoding_format", "float")
    if format not in ("float", "base64"):
        raise InvalidRequest("encoding_format must be float or base64", param="encoding_format")
    pooling = fields.string("pooling", "mean")
    if pooling not in POOLINGS:
        raise InvalidRequest(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
    dimensions = fields.integer("dimensions", 0) if fields.given("dimensions") else None
    if dimensions is not None and dimensions < 1:
        raise InvalidRequest("dimensions must be at least 1", param="dimensions")
    return EmbeddingCall(
        model=fields.optional_string("model"),
        inputs=_inputs(fields.raw("input")),
        base64=format == "base64",
        dimensions=dimensions,
        pooling=pooling,
        normalize=fields.boolean("normalize", True),
        add_special_tokens=fields.boolean("add_special_tokens", True),
        priority=fields.integer("priority", 0),
    )


def _inputs(value: Any) -> list[str | list[int]]:
    """A string, token ids, or a list of either; ids themselves are checked by the session."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise InvalidRequest("input must be a string, an array of token ids, or an array of either", param="input")
    if isinstance(value[0], int):
        return [value]
    if len(value) > MAX_INPUTS:
        raise InvalidRequest(f"input holds {len(value)} inputs, at most {MAX_INPUTS} are taken", param="input")
    if not all(isinstance(one, str | list) for one in value):
        raise InvalidRequest("input must hold only strings, or only arrays of token ids", param="input")
    return value


async def embeddings(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Vectors of texts."""
    call = parse_embeddings(await body_of(service, scope, receive))
    await reply.json(await until_gone(receive, embeddings_answer(service, call)))


async def embeddings_answer(service: Service, call: EmbeddingCall) -> dict[str, Any]:
    async with service.models.use(call.model) as session:
        prompts = await _prompts(session, call)
        made = await vectors(
            service,
            session,
            prompts,
            pooling=call.pooling,
            dimensions=call.dimensions,
            normalize=call.normalize,
            priority=call.priority,
        )
    n_tokens = sum(len(prompt.tokens) for prompt in prompts)
    data = []
    for i, vector in enumerate(made):
        told = _base64(vector) if call.base64 else msgspec.Raw(msgspec.json.encode(vector.tolist()))
        data.append({"object": "embedding", "index": i, "embedding": told})
        await asyncio.sleep(0)  # a thousand long vectors as JSON take most of a second
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": call.model or service.names[0], "usage": usage}


async def _prompts(session: Session, call: EmbeddingCall) -> list[Prompt]:
    prompts = []
    for number, given in enumerate(call.inputs):
        try:
            prompts.append(await session.prompt(given, add_special_tokens=call.add_special_tokens))
        except InvalidRequest as error:
            message = error.message.replace("prompt", f"input[{number}]", 1)
            raise InvalidRequest(message, param="input") from None
        await asyncio.sleep(0)  # a batch must not hold up everybody's tokens
    return prompts


def _base64(vector: array[float]) -> str:
    """Of float32, little-endian, as OpenAI's."""
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return base64.b64encode(vector.tobytes()).decode()


ROUTES = (("POST", "/v1/embeddings", embeddings),)
SCHEMAS: dict[str, dict[str, Any]] = {"/v1/embeddings": schema_of(EMBEDDINGS, "input", input=PROMPT)}
