"""Text Generation Inference's own HTTP API: generate, streamed or not, info, and what texts are as tokens.

A drop-in for its archived server. Parameters are checked by `tgi_call.py`, answers shaped by `tgi_shape.py`; health and
metrics are the server's own, the OpenAI routes are OpenAI's.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import septet
from septet.errors import EngineDead, InvalidRequest, ModelNotFound, Overloaded
from septet.request import MAX_STOP
from septet.serve.body import body_of
from septet.serve.calls import parse_chat
from septet.serve.defaults import with_defaults
from septet.serve.dialect import Claim, Dialect, ErrorStyle
from septet.serve.errors import HttpError, error_body, headers_of
from septet.serve.fields import CHAT, MESSAGES, schema_of
from septet.serve.generation import generate
from septet.serve.models import default_card
from septet.serve.sse import until_gone
from septet.serve.tgi_call import DEFAULTED, GENERATE_SCHEMA, MAX_BEST_OF, parse_generate, within_parameters
from septet.serve.tgi_shape import Answer, simple_tokens

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.generation import Numbered
    from septet.serve.sse import Reply
    from septet.serve.tgi_call import GenerateCall
    from septet.session.session import Prompt, Session

__all__ = ["TGI"]

MAX_LISTED = 2**17  # tokens of one /tokenize: each becomes an object


# -- errors -----------------------------------------------------------------------------------------------------------
_BY_STATUS = {429: "overloaded", 503: "healthcheck", 504: "incomplete_generation"}


def _told_as(error: BaseException) -> tuple[int, str]:
    """Status and error_type."""
    if isinstance(error, HttpError):
        return error.status, _BY_STATUS.get(error.status, "validation")
    if isinstance(error, InvalidRequest):
        return 422, "template_error" if "chat template" in error.message else "validation"
    if isinstance(error, ModelNotFound):
        return 404, "validation"
    if isinstance(error, Overloaded):
        return 429, "overloaded"
    if isinstance(error, EngineDead):
        return (500, "incomplete_generation") if error.retry_after_s is None else (503, "healthcheck")
    return 424, "generation"


def _body(error: BaseException) -> dict[str, Any]:
    return {"error": error_body(error)["error"]["message"], "error_type": _told_as(error)[1]}


async def _in_stream(reply: Reply, told: Any) -> None:
    await reply.event(told)
    await reply.end()


TGI_ERRORS = ErrorStyle(_body, _in_stream, lambda error: _told_as(error)[0], headers_of)


# -- generation -------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Clock:
    """When what began, for the headers. Monotonic seconds."""

    received: float = field(default_factory=time.monotonic)
    submitted: float = 0.0

    def headers(self, answer: Answer, device: str) -> dict[str, str]:
        now = time.monotonic()
        n_tokens = sum(sequence.n_tokens for sequence in answer.sequences)
        queued = max((s.finished.waited_s or 0.0 for s in answer.sequences if s.finished is not None), default=0.0)
        inference = max(0.0, now - self.submitted - queued)
        seconds = {
            "x-total-time": now - self.received,
            "x-validation-time": self.submitted - self.received,
            "x-queue-time": queued,
            "x-inference-time": inference,
            "x-time-per-token": inference / max(1, n_tokens),
        }
        return {
            "x-compute-type": device,
            "x-compute-time": f"{now - self.received:.6f}",
            "x-compute-characters": str(len(answer.call.inputs)),
            "x-prompt-tokens": str(answer.n_prompt),
            "x-generated-tokens": str(n_tokens),
            **{name: str(round(1000 * value)) for name, value in seconds.items()},
        }


async def generate_whole(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = await _generate_call(service, scope, receive, stream=False)
    await until_gone(receive, _answer(service, call, reply))


async def generate_stream(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = await _generate_call(service, scope, receive, stream=True)
    await until_gone(receive, _answer(service, call, reply))


async def compatible(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """POST /: one or the other by the body's `stream`; the whole answer in an array."""
    call = await _generate_call(service, scope, receive, stream=None)
    await until_gone(receive, _answer(service, call, reply, in_array=True))


async def _generate_call(service: Service, scope: Scope, receive: Receive, *, stream: bool | None) -> GenerateCall:
    body = await body_of(service, scope, receive)
    return with_defaults(service, body, DEFAULTED, partial(parse_generate, stream=stream), within_parameters)


async def _answer(service: Service, call: GenerateCall, reply: Reply, *, in_array: bool = False) -> None:
    clock = _Clock()
    async with service.models.use(call.model) as session:
        prompt = await _prompt(session, call)
        params = replace(call.params, max_tokens=_max_tokens(session, call, prompt))
        tokenizer = session.tokenizer
        answer = Answer(call, prompt, tokenizer.special_ids, tokenizer.token_text(prompt.tokens[0]))
        device = session.client.info.device
        clock.submitted = time.monotonic()
        async with aclosing(generate(service, session, [prompt], params)) as events:
            if call.stream:
                reply.stream_headers |= {"x-compute-type": device, "x-accel-buffering": "no"}
                reply.stream_headers["x-compute-characters"] = str(len(call.inputs))
                await _stream(events, answer, reply)
                return
            async for _, event in events:
                answer.sequences[event.index].feed(event)
        whole = answer.whole()
        await reply.json([whole] if in_array else whole, headers=clock.headers(answer, device))


async def _stream(events: AsyncGenerator[Numbered, None], answer: Answer, reply: Reply) -> None:
    """The end comes in the same moment as the last token: a token behind which the events pause is not the last."""
    writing, fed = asyncio.Lock(), asyncio.Event()
    teller = asyncio.create_task(_tell(answer, reply, writing, fed))
    try:
        async for _, event in events:
            async with writing:
                answer.sequences[0].feed(event)
            fed.set()
            if teller.done():  # nobody reads
                teller.result()
        async with writing:  # not in the middle of an event
            teller.cancel()
    finally:
        teller.cancel()
        await asyncio.gather(teller, return_exceptions=True)
    for told in (*answer.tokens(), answer.last()):
        await reply.event(told)
    await reply.end()


async def _tell(answer: Answer, reply: Reply, writing: asyncio.Lock, fed: asyncio.Event) -> None:
    """Runs when the events pause, and tells what has come."""
    while True:
        await fed.wait()
        fed.clear()
        async with writing:
            for told in answer.tokens():
                await reply.event(told)


async def _prompt(session: Session, call: GenerateCall) -> Prompt:
    """`truncate` keeps the last tokens, whatever the length of the text."""
    if call.truncate is None:
        return await session.prompt(call.inputs)
    tokens = await session.token_ids(call.inputs)
    return await session.prompt(list(tokens)[-call.truncate :])


def _max_tokens(session: Session, call: GenerateCall, prompt: Prompt) -> int | None:
    """TGI refuses what would not fit; it never cuts."""
    limit, n_prompt, wanted = session.limits.max_model_len, len(prompt.tokens), call.params.max_tokens
    if wanted is not None and n_prompt + wanted > limit:
        raise InvalidRequest(
            f"`inputs` tokens + `max_new_tokens` must be <= {limit}. Given: {n_prompt} `inputs` tokens and {wanted} "
            "`max_new_tokens`",
            param="max_new_tokens",
        )
    return wanted


# -- info and tokens --------------------------------------------------------------------------------------------------
async def info(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    card = default_card(service.models)
    length = card.max_model_len
    loaded = service.models.loaded()
    engine = loaded[0].client.info if loaded else None
    await reply.json(
        {
            "model_id": card.name,
            "model_sha": None,
            "model_dtype": engine and engine.dtype,
            "model_device_type": engine and engine.device,
            "model_pipeline_tag": "text-generation",
            "max_concurrent_requests": engine and engine.max_num_seqs,
            "max_best_of": MAX_BEST_OF,
            "max_stop_sequences": MAX_STOP,
            "max_input_tokens": length and length - 1,
            "max_total_tokens": length,
            "validation_workers": 1,
            "max_client_batch_size": 1,
            "router": "septet",
            "version": septet.__version__,
            "sha": None,
            "docker_label": None,
        }
    )


async def tokenize(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_generate(await body_of(service, scope, receive), stream=False)
    async with service.models.use(call.model) as session:
        ids = await session.token_ids(call.inputs)
        await reply.json(await asyncio.to_thread(_simple, session, call.inputs, ids))


async def chat_tokenize(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_chat(await body_of(service, scope, receive))
    async with service.models.use(call.model) as session:
        tools = call.reading.tools.tools if call.reading.tools.mode != "none" else ()
        prompt = await session.chat_prompt(call.messages, tools=tools, **call.template_options)
        text = prompt.text or ""
        tokens = await asyncio.to_thread(_simple, session, text, prompt.tokens)
        await reply.json({"tokenize_response": tokens, "templated_text": text})


def _simple(session: Session, text: str, ids: Sequence[int]) -> list[dict[str, Any]]:
    if len(ids) > MAX_LISTED:
        raise InvalidRequest(f"`inputs` has {len(ids)} tokens; at most {MAX_LISTED} are listed", param="inputs")
    return simple_tokens(text, [(token, session.tokenizer.token_bytes(token)) for token in ids])


_INPUTS = Claim("TGI", fields=("inputs",))
TGI = Dialect(
    "tgi",
    (
        ("POST", "/", compatible),
        ("POST", "/invocations", compatible),
        ("POST", "/generate", generate_whole),
        ("POST", "/generate_stream", generate_stream),
        ("GET", "/info", info),
        ("POST", "/tokenize", tokenize),
        ("POST", "/chat_tokenize", chat_tokenize),
    ),
    TGI_ERRORS,
    claims={"/generate": _INPUTS, "/tokenize": _INPUTS},
    schemas={
        "/": GENERATE_SCHEMA,
        "/invocations": GENERATE_SCHEMA,
        "/generate": GENERATE_SCHEMA,
        "/generate_stream": GENERATE_SCHEMA,
        "/tokenize": GENERATE_SCHEMA,
        "/chat_tokenize": schema_of(CHAT, "messages", messages=MESSAGES),
    },
)
