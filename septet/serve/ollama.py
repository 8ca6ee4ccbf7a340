"""Ollama's HTTP API, the part that answers: generate, chat, embeddings; and its way of telling errors.

Requests are checked by `ollama_call.py`, answers shaped by `ollama_shape.py`; what concerns the models themselves is
`ollama_models.py`. Streams are lines of JSON; an error within one is a line of its own.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest, Overloaded
from septet.serve.body import body_of
from septet.serve.context import may_manage
from septet.serve.dialect import Dialect, ErrorStyle
from septet.serve.errors import error_body, status_of
from septet.serve.generation import generate, vectors
from septet.serve.ollama_call import (
    CHAT_SCHEMA,
    EMBED_SCHEMA,
    EMBEDDINGS_SCHEMA,
    GENERATE_SCHEMA,
    GenerateCall,
    parse_chat,
    parse_embed,
    parse_generate,
)
from septet.serve.ollama_models import MODEL_ROUTES, MODEL_SCHEMAS, check_key, typed
from septet.serve.ollama_shape import Answer, Clock
from septet.serve.sse import until_gone
from septet.session.session import Prompt

if TYPE_CHECKING:
    from starlette.types import Receive, Scope

    from septet.serve.ollama_call import ChatCall, EmbedCall, TextCall
    from septet.serve.service import Service
    from septet.serve.sse import Reply
    from septet.session.session import Session

__all__ = ["OLLAMA"]


# -- errors -----------------------------------------------------------------------------------------------------------
def _body(error: BaseException) -> dict[str, Any]:
    return {"error": error_body(error)["error"]["message"]}


async def _in_stream(reply: Reply, told: Any) -> None:
    await reply.line(told)
    await reply.end()


def _status(error: BaseException) -> int:
    """A full queue is 503, as there; a key's own limit stays 429."""
    return 503 if type(error) is Overloaded else status_of(error)


OLLAMA_ERRORS = ErrorStyle(_body, _in_stream, _status)


# -- text -------------------------------------------------------------------------------------------------------------
async def generate_text(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    clock = Clock()
    call = parse_generate(await body_of(service, typed(scope), receive))
    await until_gone(receive, _answer(service, call, reply, clock))


async def chat(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    clock = Clock()
    call = parse_chat(await body_of(service, typed(scope), receive))
    await until_gone(receive, _answer(service, call, reply, clock))


def _keep_alive(call: TextCall | EmbedCall) -> float | None:
    """What stays loaded is everybody's business: of a key that may not manage models it is the server's setting."""
    return call.keep_alive_s if may_manage() else None


async def _answer(service: Service, call: GenerateCall | ChatCall, reply: Reply, clock: Clock) -> None:
    is_chat = not isinstance(call, GenerateCall)
    model = service.models.find(call.model)
    if call.empty and call.keep_alive_s == 0:
        check_key()
        await service.models.unload(call.model)
        await reply.json(Answer(call.model, chat=is_chat, clock=clock).bare("unload"))
        return
    params = call.params(model.recipe)
    async with service.models.use(call.model, keep_alive_s=_keep_alive(call)) as session:
        if call.empty:
            await reply.json(Answer(call.model, chat=is_chat, clock=clock).bare("load"))
            return
        clock.mark_loaded()
        _check_thinking(session, call)
        if isinstance(call, GenerateCall):
            prompt = await _generate_prompt(session, call)
        else:
            prompt = await _chat_prompt(session, call)
        answer = Answer(
            call.model, chat=is_chat, clock=clock, prompt=prompt.tokens, show_thoughts=call.think is not False
        )
        async with aclosing(generate(service, session, [prompt], params, reading=call.reading)) as events:
            async for _, event in events:
                answer.take(event)
                if call.stream and (line := answer.line()) is not None:
                    await reply.line(line)
        if call.stream:
            await reply.line(answer.last())
            await reply.end()
        else:
            await reply.json(answer.last())


def _check_thinking(session: Session, call: TextCall) -> None:
    if call.think and (session.reply_format is None or session.reply_format.thoughts is None):
        raise InvalidRequest(f"{call.model[:120]} does not support thinking", param="think")


def _template_options(session: Session, call: TextCall) -> dict[str, Any]:
    """How the template is told whether and how hard to think, where it asks."""
    if call.think is None:
        return {}
    known: frozenset[str] = getattr(session.template, "variables", frozenset())
    options: dict[str, Any] = {name: bool(call.think) for name in ("enable_thinking", "thinking") if name in known}
    if isinstance(call.think, str) and "reasoning_effort" in known:
        options["reasoning_effort"] = call.think
    return options


async def _chat_prompt(session: Session, call: ChatCall) -> Prompt:
    tools = call.reading.tools.tools
    return await session.chat_prompt(call.messages, tools=tools, **_template_options(session, call))


async def _generate_prompt(session: Session, call: GenerateCall) -> Prompt:
    """The prompt as a turn of a conversation, after the tokens of the turns before it; as it is if `raw`."""
    if call.raw:
        return await session.prompt(call.prompt)
    messages = [{"role": "system", "content": call.system}] if call.system else []
    messages.append({"role": "user", "content": call.prompt})
    if session.template is None:
        text = "\n\n".join(message["content"] for message in messages)
        turn = await session.prompt(text, add_special_tokens=not call.context)
    else:
        turn = await session.chat_prompt(messages, **_template_options(session, call))
    if not call.context:
        return turn
    before = await session.prompt(list(call.context))
    tokens = (
        turn.tokens[1:] if turn.tokens[0] == before.tokens[0] and _is_special(session, turn.tokens[0]) else turn.tokens
    )
    return Prompt((await session.prompt([*before.tokens, *tokens])).tokens, turn.text)


def _is_special(session: Session, token: int) -> bool:
    return token in session.tokenizer.special_ids


# -- vectors ----------------------------------------------------------------------------------------------------------
async def embed_texts(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_embed(await body_of(service, typed(scope), receive))
    await until_gone(receive, _embed(service, call, reply))


async def embed_one(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_embed(await body_of(service, typed(scope), receive), single=True)
    await until_gone(receive, _embed(service, call, reply))


async def _embed(service: Service, call: EmbedCall, reply: Reply) -> None:
    clock = Clock()
    async with service.models.use(call.model, keep_alive_s=_keep_alive(call)) as session:
        clock.mark_loaded()
        prompts = [await session.prompt(text) for text in call.inputs]
        made = [list(vector) for vector in await vectors(service, session, prompts, dimensions=call.dimensions)]
    if call.single:
        await reply.json({"embedding": made[0] if made else []})
        return
    times = clock.durations()
    await reply.json(
        {
            "model": call.model,
            "embeddings": made,
            "total_duration": times["total_duration"],
            "load_duration": times["load_duration"],
            "prompt_eval_count": sum(len(prompt.tokens) for prompt in prompts),
        }
    )


OLLAMA = Dialect(
    "ollama",
    (
        ("POST", "/api/generate", generate_text),
        ("POST", "/api/chat", chat),
        ("POST", "/api/embed", embed_texts),
        ("POST", "/api/embeddings", embed_one),
        *MODEL_ROUTES,
    ),
    errors=OLLAMA_ERRORS,
    schemas={
        "/api/generate": GENERATE_SCHEMA,
        "/api/chat": CHAT_SCHEMA,
        "/api/embed": EMBED_SCHEMA,
        "/api/embeddings": EMBEDDINGS_SCHEMA,
        **MODEL_SCHEMAS,
    },
)
