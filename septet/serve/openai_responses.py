"""OpenAI's /v1/responses: create (streamed or not), read, delete, list input items, count input tokens.

A dialect of its own beside `openai.py`, because its streams end otherwise. Fields are read by
`openai_responses_call.py`, answers shaped by `openai_responses_shape.py`, and kept in `openai_responses_store.py`.
"""

from __future__ import annotations

import secrets
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.body import body_of
from septet.serve.defaults import OPENAI_NAMES, defaults_of, filled
from septet.serve.dialect import Dialect, ErrorStyle
from septet.serve.errors import ClientGone, HttpError, error_body
from septet.serve.generation import generate
from septet.serve.openai_owner import owner_of
from septet.serve.openai_responses_call import RESPONSES_SCHEMA, parse_responses
from septet.serve.openai_responses_shape import Answer
from septet.serve.sse import Reply, until_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.generation import Numbered
    from septet.serve.openai_responses_call import ResponsesCall
    from septet.session.session import Prompt, Session

__all__ = ["RESPONSES_DIALECT", "responses_answer"]


# -- create -----------------------------------------------------------------------------------------------------------
async def create(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """A response to text or items."""
    call = _parsed(service, await body_of(service, scope, receive))
    await until_gone(receive, _answer(service, call, reply))


async def responses_answer(service: Service, body: dict[str, Any]) -> dict[str, Any]:
    """The whole response of a body, for a batch; it is not stored."""
    call = _parsed(service, body | {"store": False, "stream": False})
    async with service.models.use(call.chat.model) as session:
        answer = _begun(service, call)
        async with aclosing(await _events(service, session, call)) as events:
            async for _, event in events:
                for _ in answer.feed(event):
                    pass
    return answer.body


RESPONSES_NAMES = {**OPENAI_NAMES, "max_tokens": ("max_output_tokens",)}


async def count_input(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """How many tokens a request's input has."""
    call = _parsed(service, await body_of(service, scope, receive))
    async with service.models.use(call.chat.model) as session:
        prompt = await _prompt(session, call)
    await reply.json({"object": "response.input_tokens", "input_tokens": len(prompt.tokens)})


def _parsed(service: Service, body: dict[str, Any]) -> ResponsesCall:
    def earlier(number: str) -> Sequence[dict[str, Any]]:
        try:
            return service.responses.get(owner_of(), number).messages
        except HttpError as error:
            raise HttpError(
                404, error.message, code="previous_response_not_found", param="previous_response_id"
            ) from None

    body, _ = filled(body, defaults_of(service, body.get("model")), RESPONSES_NAMES)
    return parse_responses(body, earlier)


def _begun(service: Service, call: ResponsesCall) -> Answer:
    model = call.chat.model or service.names[0]
    return Answer(call, secrets.token_hex(24), model, int(time.time()))


async def _prompt(session: Session, call: ResponsesCall) -> Prompt:
    chat = call.chat
    tools = chat.reading.tools.tools if chat.reading.tools.mode != "none" else ()
    try:
        return await session.chat_prompt(chat.messages, tools=tools, **chat.template_options)
    except InvalidRequest as error:
        param = "input" if error.param in ("prompt", "messages") else error.param
        raise InvalidRequest(error.message, param=param) from None


async def _events(service: Service, session: Session, call: ResponsesCall) -> AsyncGenerator[Numbered, None]:
    chat = call.chat
    how: dict[str, Any] = {"priority": chat.priority, "cache_salt": chat.cache_salt, "reading": chat.reading}
    return generate(service, session, [await _prompt(session, call)], chat.params, **how)


async def _answer(service: Service, call: ResponsesCall, reply: Reply) -> None:
    async with service.models.use(call.chat.model) as session:
        answer = _begun(service, call)
        async with aclosing(await _events(service, session, call)) as events:
            if not call.chat.stream:
                async for _, event in events:
                    for _ in answer.feed(event):
                        pass
                _keep(service, answer)
                await reply.json(answer.body)
                return
            try:
                await _stream(service, events, answer, reply)
            except ClientGone:
                raise
            except Exception as error:
                if not reply.streaming:
                    raise
                await reply.event(told := answer.fail(error_body(error)["error"]), told["type"])
            await reply.end()


async def _stream(service: Service, events: AsyncGenerator[Numbered, None], answer: Answer, reply: Reply) -> None:
    async for _, event in events:
        if not reply.streaming:
            for told in answer.opening():
                await reply.event(told, told["type"])
        for told in answer.feed(event):
            if told["type"] in ("response.completed", "response.incomplete"):
                _keep(service, answer)  # first: the client may go on with it at once
            await reply.event(told, told["type"])


def _keep(service: Service, answer: Answer) -> None:
    call = answer.call
    if not call.store:
        return
    messages = [m for i, m in enumerate(call.chat.messages) if i or not call.shown["instructions"]]
    service.responses.add(owner_of(), answer.body, call.items, [*messages, _as_message(answer.body["output"])])


def _as_message(output: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the model said, as the next turn's conversation holds it; thoughts are left out, as templates do."""
    texts = [item["content"][0]["text"] for item in output if item["type"] == "message"]
    calls = [
        {
            "id": item["call_id"],
            "type": "function",
            "function": {"name": item["name"], "arguments": item["arguments"] or "{}"},
        }
        for item in output
        if item["type"] == "function_call" and item["status"] == "completed"
    ]
    return {"role": "assistant", "content": "".join(texts)} | ({"tool_calls": calls} if calls else {})


# -- stored ones ------------------------------------------------------------------------------------------------------
async def retrieve(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """A stored response."""
    if b"stream=true" in scope.get("query_string", b"").lower():
        raise InvalidRequest("stream is not supported here: a stored response is told whole", param="stream")
    await reply.json(service.responses.get(owner_of(), scope["path_params"]["response"]).body)


async def delete(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Forget a stored response."""
    number = scope["path_params"]["response"]
    service.responses.delete(owner_of(), number)
    await reply.json({"id": number, "object": "response", "deleted": True})


async def cancel(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Refused: only background responses can be cancelled, and there are none."""
    service.responses.get(owner_of(), scope["path_params"]["response"])
    raise InvalidRequest("only background responses can be cancelled; close the stream to end one")


async def input_items(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """What a stored response was asked."""
    stored = service.responses.get(owner_of(), scope["path_params"]["response"])
    items = [_shown_item(stored.body["id"], i, item) for i, item in enumerate(stored.items)][::-1]
    ids = {"first_id": items[0]["id"], "last_id": items[-1]["id"], "has_more": False}
    await reply.json({"object": "list", "data": items, **ids})


def _shown_item(response: str, number: int, item: dict[str, Any]) -> dict[str, Any]:
    shown = {"id": f"item_{response.removeprefix('resp_')}_{number}", "type": "message", **item}
    if shown["type"] == "message" and isinstance(shown.get("content"), str):
        part = {"type": "output_text" if shown.get("role") == "assistant" else "input_text", "text": shown["content"]}
        shown["content"] = [part | ({"annotations": []} if part["type"] == "output_text" else {})]
    return shown


async def _error_event(reply: Reply, body: Any) -> None:
    error = body["error"]
    told = {"type": "error", "code": error["code"], "message": error["message"], "param": error["param"]}
    await reply.event(told | {"sequence_number": 0}, "error")
    await reply.end()


RESPONSES_DIALECT = Dialect(
    "openai_responses",
    (
        ("POST", "/v1/responses", create),
        ("POST", "/v1/responses/input_tokens", count_input),
        ("GET", "/v1/responses/{response}", retrieve),
        ("DELETE", "/v1/responses/{response}", delete),
        ("POST", "/v1/responses/{response}/cancel", cancel),
        ("GET", "/v1/responses/{response}/input_items", input_items),
    ),
    errors=ErrorStyle(body=error_body, in_stream=_error_event),
    schemas={"/v1/responses": RESPONSES_SCHEMA, "/v1/responses/input_tokens": RESPONSES_SCHEMA},
)
