"""Anthropic's HTTP API: messages, their count of tokens, models (for clients that send its headers).

Fields are checked by `anthropic_call.py`, answers shaped by `anthropic_shape.py`. Every answer has a `request-id`.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from septet.errors import InvalidRequest
from septet.serve.anthropic_cache import pins_of
from septet.serve.anthropic_call import COUNT_SCHEMA, MESSAGES_SCHEMA, parse_count, parse_messages
from septet.serve.anthropic_shape import Answer
from septet.serve.body import body_of
from septet.serve.context import current
from septet.serve.defaults import with_defaults
from septet.serve.dialect import Claim, Dialect, ErrorStyle
from septet.serve.errors import error_body, headers_of, status_of
from septet.serve.generation import generate
from septet.serve.models import not_found
from septet.serve.sse import Reply, until_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from starlette.types import Receive, Scope

    from septet.serve.anthropic_call import Conversation, MessagesCall
    from septet.serve.anthropic_shape import StreamEvent
    from septet.serve.app import Service
    from septet.serve.defaults import Names
    from septet.serve.generation import Numbered
    from septet.serve.models import ModelCard
    from septet.session.session import Prompt, Session

__all__ = ["ANTHROPIC"]

PING_S = 5.0
"""A stream that is silent for so long gets a ping; one that has not begun by then begins, whatever comes of it."""
_OURS = "temperature top_p top_k max_tokens"
_NAMES: Names = {**{name: (name,) for name in _OURS.split()}, "stop": ("stop_sequences",)}
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
}


# -- errors -----------------------------------------------------------------------------------------------------------
def _number() -> str:
    """Of the request being answered: ours, never a client's, the one of the access log."""
    context = current()
    return f"req_{context.id if context is not None else secrets.token_hex(12)}"


def _body_of(error: BaseException) -> dict[str, Any]:
    status = status_of(error)
    kind = _KINDS.get(status) or ("invalid_request_error" if status < 500 else "api_error")
    if status == 503 and "retry-after" in headers_of(error):
        kind = "overloaded_error"
    told = {"type": kind, "message": error_body(error)["error"]["message"]}
    return {"type": "error", "error": told, "request_id": _number()}


async def _in_stream(reply: Reply, told: Any) -> None:
    await reply.event(told, "error")
    await reply.end()


def _headers_of(error: BaseException) -> dict[str, str]:
    return headers_of(error) | {"request-id": _number()}


ANTHROPIC_ERRORS = ErrorStyle(_body_of, _in_stream, status_of, _headers_of)


async def _json(reply: Reply, body: Any) -> None:
    await reply.json(body, headers={"request-id": _number()})


# -- messages ---------------------------------------------------------------------------------------------------------
async def messages(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = with_defaults(service, await body_of(service, scope, receive), _NAMES, parse_messages)
    await until_gone(receive, _answer(service, call, reply))


async def count_tokens(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_count(await body_of(service, scope, receive))
    async with service.models.use(call.model) as session:
        prompt = await _prompt(session, call)
    await _json(reply, {"input_tokens": len(prompt.tokens)})


async def _prompt(session: Session, call: Conversation) -> Prompt:
    tools, options = call.for_template(session)
    prompt = await session.chat_prompt(call.messages, tools=tools, **options)
    if call.edits is not None:
        call.edits.check(len(prompt.tokens))
    return prompt


async def _answer(service: Service, call: MessagesCall, reply: Reply) -> None:
    async with service.models.use(call.model) as session:
        prompt = await _prompt(session, call)
        pins = await pins_of(session, call, prompt)
        answer = Answer(call, secrets.token_hex(12), prompt, session.limits.max_model_len, pins)
        how: dict[str, Any] = {"reading": call.reading, "pins": pins}
        async with aclosing(generate(service, session, [prompt], call.params, **how)) as events:
            try:
                await (_stream if call.stream else _whole)(events, answer, reply)
            except InvalidRequest as error:
                raise error.renamed({"thinking_token_budget": "thinking.budget_tokens"}) from None


async def _whole(events: AsyncGenerator[Numbered, None], answer: Answer, reply: Reply) -> None:
    async for _, event in events:
        for _ in answer.feed(event):
            pass
    await _json(reply, answer.whole())


async def _stream(events: AsyncGenerator[Numbered, None], answer: Answer, reply: Reply) -> None:
    reply.stream_headers["request-id"] = _number()
    teller = _Teller(answer, reply)
    pings = asyncio.create_task(teller.ping())
    try:
        async for _, event in events:
            await teller.tell(answer.feed(event))
    finally:
        pings.cancel()
        await asyncio.gather(pings, return_exceptions=True)
    await reply.end()


class _Teller:
    """The two who write one stream: the answer, and the pings of its silences."""

    def __init__(self, answer: Answer, reply: Reply) -> None:
        self._answer = answer
        self._reply = reply
        self._writing = asyncio.Lock()
        self._quiet = True  # since the last look

    async def tell(self, parts: Iterable[StreamEvent]) -> None:
        self._quiet = False
        async with self._writing:
            if not self._reply.streaming:
                await self._reply.event(self._answer.start(), "message_start")
                await self._reply.event({"type": "ping"}, "ping")
            for part in parts:
                await self._reply.event(part, part["type"])

    async def ping(self) -> None:
        while True:
            await asyncio.sleep(PING_S)
            if self._quiet:
                await self.tell([{"type": "ping"}] if self._reply.streaming else [])
            self._quiet = True


# -- models -----------------------------------------------------------------------------------------------------------
async def models(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    cards = [_card(card) for card in service.models.cards()]
    query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
    limit = query.get("limit", ["20"])[-1]
    if not (limit.isascii() and limit.isdigit() and len(limit) < 5 and 1 <= int(limit) <= 1000):
        raise InvalidRequest("limit must be 1 to 1000", param="limit")
    names = [card["id"] for card in cards]
    after, before = query.get("after_id", [""])[-1], query.get("before_id", [""])[-1]
    first = names.index(after) + 1 if after in names else 0
    last = names.index(before) if before in names else len(names)
    if before:
        page, more = cards[max(first, last - int(limit)) : last], last - int(limit) > first
    else:
        page, more = cards[first : min(last, first + int(limit))], first + int(limit) < last
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    await _json(reply, {"data": page, "has_more": more, **ends})


async def model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    name = scope["path_params"]["model"]
    card = next((card for card in service.models.cards() if card.name == name), None)
    if card is None:
        raise not_found(name, service.names)
    await _json(reply, _card(card))


def _card(card: ModelCard) -> dict[str, Any]:
    created = datetime.fromtimestamp(card.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    shown = {"type": "model", "id": card.name, "display_name": card.name, "created_at": created}
    return shown | {"lifecycle": "active", "max_input_tokens": card.max_model_len, "max_tokens": card.max_model_len}


_CLIENT = Claim("Anthropic", headers=("anthropic-version", "x-api-key"))
ANTHROPIC = Dialect(
    "anthropic",
    (
        ("POST", "/v1/messages", messages),
        ("POST", "/v1/messages/count_tokens", count_tokens),
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{model:path}", model),
    ),
    ANTHROPIC_ERRORS,
    claims={"/v1/models": _CLIENT, "/v1/models/{model:path}": _CLIENT},
    schemas={"/v1/messages": MESSAGES_SCHEMA, "/v1/messages/count_tokens": COUNT_SCHEMA},
)
