"""OpenAI's HTTP API: models, completions, chat completions.

Fields are checked by `calls.py`, answers shaped by `shapes.py`. An error before the first
event has its own HTTP status; after it, it is the stream's last event.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from septet.serve import openai_batches, openai_embeddings, openai_files, openai_tokens
from septet.serve.body import body_of
from septet.serve.calls import ChatCall, CompletionCall, parse_chat, parse_completion
from septet.serve.defaults import OPENAI_NAMES, with_defaults
from septet.serve.dialect import Dialect
from septet.serve.fields import CHAT, COMPLETION, MESSAGES, PROMPT, schema_of
from septet.serve.generation import generate
from septet.serve.models import not_found
from septet.serve.openai_responses import responses_answer
from septet.serve.shapes import ChatShape, CompletionShape, Shape
from septet.serve.sse import Reply, until_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.generation import Numbered
    from septet.serve.models import ModelCard
    from septet.session.session import Session

    Make = Callable[[Session, Any, str], Awaitable[Shape]]

__all__ = ["OPENAI", "WHOLE_ANSWERS", "chat", "completions", "model", "models"]


# -- models -----------------------------------------------------------------------------------------------------------
async def models(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json({"object": "list", "data": [_card(card) for card in service.models.cards()]})


async def model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    name = scope["path_params"]["model"]
    card = next((card for card in service.models.cards() if card.name == name), None)
    if card is None:
        raise not_found(name, service.names)
    await reply.json(_card(card))


def _card(card: ModelCard) -> dict[str, Any]:
    shown = {"id": card.name, "object": "model", "created": card.created, "owned_by": "septet"}
    return shown | {"root": card.root, "parent": None, "max_model_len": card.max_model_len}


# -- generation -------------------------------------------------------------------------------------------------------
async def chat(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = with_defaults(service, await body_of(service, scope, receive), OPENAI_NAMES, parse_chat)
    await _tell(service, call, _chat_shape, receive, reply)


async def completions(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = with_defaults(service, await body_of(service, scope, receive), OPENAI_NAMES, parse_completion)
    await _tell(service, call, _completion_shape, receive, reply)


async def _tell(service: Service, call: Any, make: Make, receive: Receive, reply: Reply) -> None:
    answer = await until_gone(receive, _answer(service, call, make, reply))
    if answer:
        await reply.json(answer)


async def _chat_shape(session: Session, call: ChatCall, name: str) -> ChatShape:
    tools = call.reading.tools.tools if call.reading.tools.mode != "none" else ()
    prompt = await session.chat_prompt(call.messages, tools=tools, **call.template_options)
    last = call.messages[-1]
    echoed = last["content"] if call.echo and last["role"] == "assistant" else ""
    return ChatShape(call, name, [prompt], _number(), int(time.time()), echoed=echoed)


async def _completion_shape(session: Session, call: CompletionCall, name: str) -> CompletionShape:
    prompts = []
    for given in call.prompts:
        prompts.append(await session.prompt(given, add_special_tokens=call.add_special_tokens))
        await asyncio.sleep(0)  # a batch of prompts must not hold up everybody's tokens
    echoed = [p.text if p.text is not None else session.tokenizer.decode(p.tokens) for p in prompts]
    return CompletionShape(
        call,
        name,
        prompts,
        _number(),
        int(time.time()),
        echoed=echoed if call.echo else [],
        first_texts=[session.tokenizer.token_text(p.tokens[0]) for p in prompts],
    )


def _number() -> str:
    """Of a response; made here, never taken from a client."""
    return secrets.token_hex(12)


async def _answer(service: Service, call: Any, make: Make, reply: Reply | None) -> dict[str, Any]:
    """The whole answer; of a stream nothing, once it is told."""
    how: dict[str, Any] = {"priority": call.priority, "cache_salt": call.cache_salt}
    if isinstance(call, ChatCall):
        how["reading"] = call.reading
    async with service.models.use(call.model) as session:
        shape = await make(session, call, call.model or service.names[0])
        async with aclosing(generate(service, session, shape.prompts, call.params, **how)) as events:
            if call.stream and reply is not None:
                await _stream(events, shape, reply)
                return {}
            async for number, event in events:
                shape.add(number, event)
            return shape.whole()


async def _stream(events: AsyncGenerator[Numbered, None], shape: Shape, reply: Reply) -> None:
    async for number, event in events:
        if not reply.streaming:
            for chunk in shape.opening():
                await reply.event(chunk)
        told = shape.chunk(number, event)
        if told is not None:
            await reply.event(told)
    if shape.call.include_usage:
        await reply.event(shape.usage_chunk())
    await reply.done()


# -- for batches ------------------------------------------------------------------------------------------------------
async def _whole_chat(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    return await _answer(service, with_defaults(service, body, OPENAI_NAMES, parse_chat), _chat_shape, None)


async def _whole_completion(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    call = with_defaults(service, body, OPENAI_NAMES, parse_completion)
    return await _answer(service, call, _completion_shape, None)


async def _whole_embeddings(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    return await openai_embeddings.embeddings_answer(service, openai_embeddings.parse_embeddings(body))


WHOLE_ANSWERS = {
    "/v1/chat/completions": _whole_chat,
    "/v1/completions": _whole_completion,
    "/v1/embeddings": _whole_embeddings,
    "/v1/responses": responses_answer,
}
OPENAI = Dialect(
    "openai",
    (
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{model:path}", model),
        ("POST", "/v1/completions", completions),
        ("POST", "/v1/chat/completions", chat),
        *openai_batches.ROUTES,
        *openai_embeddings.ROUTES,
        *openai_files.ROUTES,
        *openai_tokens.ROUTES,
    ),
    schemas={
        **openai_batches.SCHEMAS,
        **openai_embeddings.SCHEMAS,
        **openai_tokens.SCHEMAS,
        "/v1/completions": schema_of(COMPLETION, "prompt", prompt=PROMPT),
        "/v1/chat/completions": schema_of(CHAT, "messages", messages=MESSAGES),
    },
)
