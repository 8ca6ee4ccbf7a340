"""OpenAI's HTTP API over a session: models, completions, chat completions.

Routes are made by `app.py`; fields are checked by `calls.py`, answers shaped by `shapes.py`. An error before the first
event has its own HTTP status; after it, it is the stream's last event.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from septet.errors import ModelNotFound
from septet.serve.body import read_object
from septet.serve.calls import Call, ChatCall, CompletionCall, parse_chat, parse_completion
from septet.serve.shapes import ChatShape, CompletionShape, Shape
from septet.serve.sse import Reply, until_gone
from septet.session.merge import merge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.metrics import Track
    from septet.session.events import Event
    from septet.session.session import Prompt

__all__ = ["chat", "completions", "model", "models"]

Numbered = tuple[int, "Event"]


# -- models -----------------------------------------------------------------------------------------------------------
async def models(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json({"object": "list", "data": [_card(service, name) for name in service.names]})


async def model(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    name = scope["path_params"]["model"]
    _check_model(service, name)
    await reply.json(_card(service, name))


def _card(service: Service, name: str) -> dict[str, Any]:
    limit = service.session.limits.max_model_len
    root = service.session.model_name
    card = {"id": name, "object": "model", "created": service.created, "owned_by": "septet"}
    return card | {"root": root, "parent": None, "max_model_len": limit}


def _check_model(service: Service, name: str | None) -> str:
    if name is None:
        return service.names[0]
    if name not in service.names:
        shown = name if len(name) <= 120 else name[:117] + "..."
        raise ModelNotFound(f"no model {shown!r} here; this server has {', '.join(service.names)}", param="model")
    return name


# -- generation -------------------------------------------------------------------------------------------------------
async def chat(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_chat(await _body(service, scope, receive))
    await until_gone(receive, _answer(service, call, reply, _chat_shape))


async def completions(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_completion(await _body(service, scope, receive))
    await until_gone(receive, _answer(service, call, reply, _completion_shape))


async def _body(service: Service, scope: Scope, receive: Receive) -> dict[str, Any]:
    settings = service.settings
    return await read_object(scope, receive, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s)


async def _chat_shape(service: Service, call: ChatCall, name: str) -> ChatShape:
    tools = call.reading.tools.tools if call.reading.tools.mode != "none" else ()
    prompt = await service.session.chat_prompt(call.messages, tools=tools, **call.template_options)
    last = call.messages[-1]
    echoed = last["content"] if call.echo and last["role"] == "assistant" else ""
    return ChatShape(call, name, [prompt], _number(), int(time.time()), echoed=echoed)


async def _completion_shape(service: Service, call: CompletionCall, name: str) -> CompletionShape:
    session, prompts = service.session, []
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


async def _answer(
    service: Service, call: Any, reply: Reply, make: Callable[[Service, Any, str], Awaitable[Shape]]
) -> None:
    shape = await make(service, call, _check_model(service, call.model))
    track = service.metrics.track(call.params, [len(p.tokens) for p in shape.prompts])
    sources = [_numbered(service, i, prompt, call) for i, prompt in enumerate(shape.prompts)]
    async with aclosing(merge(sources)) as events:
        try:
            await (_stream if call.stream else _whole)(events, shape, track, reply)
        except asyncio.CancelledError:
            track.aborted()
            raise
        except Exception:
            track.failed()
            raise


async def _numbered(service: Service, number: int, prompt: Prompt, call: Call) -> AsyncGenerator[Numbered, None]:
    how: dict[str, Any] = {"priority": call.priority, "cache_salt": call.cache_salt}
    if isinstance(call, ChatCall):
        how["reading"] = call.reading
    generation = service.session.generate(prompt, call.params, **how)
    async with aclosing(generation) as events:
        async for event in events:
            yield number, event


async def _whole(events: AsyncGenerator[Numbered, None], shape: Shape, track: Track, reply: Reply) -> None:
    async for number, event in events:
        track.saw(number, event)
        shape.add(number, event)
    await reply.json(shape.whole())


async def _stream(events: AsyncGenerator[Numbered, None], shape: Shape, track: Track, reply: Reply) -> None:
    async for number, event in events:
        if not reply.streaming:
            for chunk in shape.opening():
                await reply.event(chunk)
        track.saw(number, event)
        told = shape.chunk(number, event)
        if told is not None:
            await reply.event(told)
    if shape.call.include_usage:
        await reply.event(shape.usage_chunk())
    await reply.done()
