"""SGLang's own HTTP API: generate and encode, and what it tells of the model and the server.

Fields are checked by `sglang_call.py`, answers shaped by `sglang_shape.py`. Errors have OpenAI's shape, as SGLang's do.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import septet
from septet.errors import EngineDead
from septet.request import SamplingParams
from septet.serve.body import body_of
from septet.serve.defaults import with_defaults
from septet.serve.dialect import Claim, Dialect
from septet.serve.errors import HttpError
from septet.serve.fields import PROMPT, Fields, schema_of
from septet.serve.generation import generate as generated
from septet.serve.generation import vectors
from septet.serve.models import default_card
from septet.serve.sglang_call import (
    ENCODE,
    GENERATE_SCHEMA,
    SAMPLING_NAMES,
    parse_generate,
    prompts_of,
    within_sampling,
)
from septet.serve.sglang_shape import Output
from septet.serve.sse import until_gone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.sglang_call import GenerateCall
    from septet.serve.sse import Reply
    from septet.session.session import Prompt, Session

__all__ = ["SGLANG"]

HEALTH_S = 20.0  # for the token of /health_generate, as SGLang's


# -- generation -------------------------------------------------------------------------------------------------------
async def generate(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    body = await body_of(service, scope, receive)
    call = with_defaults(service, body, SAMPLING_NAMES, parse_generate, within_sampling)
    await until_gone(receive, _answer(service, call, reply))


async def _answer(service: Service, call: GenerateCall, reply: Reply) -> None:
    async with service.models.use(call.model) as session:
        prompts = await _prompts(session, call.prompts)
        ids, ends, n = (
            call.ids or [secrets.token_hex(16) for _ in prompts],
            session.tokenizer.eos_token_ids,
            call.params.n,
        )
        outputs = [Output(call, i * n + k, ids[i], prompt, ends) for i, prompt in enumerate(prompts) for k in range(n)]
        how: dict[str, Any] = {"priority": call.priority, "cache_salt": call.cache_salt}
        async with aclosing(generated(service, session, prompts, call.params, **how)) as events:
            async for number, event in events:
                output = outputs[number * n + event.index]
                output.feed(event)
                if call.stream and output.due(event):
                    await reply.event(output.answer())
    if call.stream:
        await reply.done()
        return
    told = [output.answer() for output in outputs]
    await reply.json(told if call.in_array else told[0])


async def _prompts(session: Session, given: Sequence[str | list[int]]) -> list[Prompt]:
    prompts = []
    for one in given:
        prompts.append(await session.prompt(one))
        await asyncio.sleep(0)  # a batch of prompts must not hold up everybody's tokens
    return prompts


async def encode(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, scope, receive), ENCODE)
    given, several = prompts_of(fields)
    await until_gone(receive, _vectors(service, fields.optional_string("model"), given, several, reply))


async def _vectors(
    service: Service, model: str | None, given: Sequence[str | list[int]], several: bool, reply: Reply
) -> None:
    async with service.models.use(model) as session:
        prompts = await _prompts(session, given)
        made = await vectors(service, session, prompts)
    told = [
        {"embedding": vector.tolist(), "meta_info": {"id": secrets.token_hex(16), "prompt_tokens": len(prompt.tokens)}}
        for prompt, vector in zip(prompts, made, strict=True)
    ]
    await reply.json(told if several else told[0])


# -- the server -------------------------------------------------------------------------------------------------------
async def model_info(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    name = default_card(service.models).name
    told: dict[str, Any] = {"model_path": name, "tokenizer_path": name, "is_generation": True}
    told |= {"preferred_sampling_params": None, "weight_version": "default"}
    await reply.json(told | {"has_image_understanding": False, "has_audio_understanding": False})


async def server_info(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Of the default model; its engine's settings once it is loaded."""
    loaded, name = service.models.loaded(), default_card(service.models).name
    told: dict[str, Any] = {"model_path": name, "served_model_name": name}
    told |= {"version": septet.__version__, "internal_states": []}
    if loaded:
        info = loaded[0].client.info
        told |= {"context_length": info.max_model_len, "max_total_num_tokens": info.num_kv_slots}
        told |= {"max_running_requests": info.max_num_seqs, "device": info.device, "dtype": info.dtype}
    await reply.json(told)


async def health_generate(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Makes one token: it costs a step, and waits its turn. /health and /progressing cost nothing."""
    await until_gone(receive, _one_token(service))
    await reply.raw(b"", "text/plain")


async def _one_token(service: Service) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0)
    try:
        async with asyncio.timeout(HEALTH_S), service.models.use(None) as session:
            prompt = await session.prompt([0])
            async with aclosing(generated(service, session, [prompt], params)) as events:
                async for _ in events:
                    pass
    except TimeoutError:
        raise EngineDead(f"no token was made within {HEALTH_S:g} s") from None


async def flush_cache(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    raise HttpError(501, "flush_cache is not supported: the prefix cache gives way to requests by itself")


async def abort_request(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    raise HttpError(501, "abort_request is not supported: close the request's connection to end it")


_SCHEMA = schema_of(ENCODE, text=PROMPT, input_ids=PROMPT)
SGLANG = Dialect(
    "sglang",
    (
        ("POST", "/generate", generate),
        ("PUT", "/generate", generate),
        ("POST", "/encode", encode),
        ("GET", "/get_model_info", model_info),
        ("GET", "/model_info", model_info),
        ("GET", "/get_server_info", server_info),
        ("GET", "/server_info", server_info),
        ("GET", "/health_generate", health_generate),
        ("GET", "/flush_cache", flush_cache),
        ("POST", "/flush_cache", flush_cache),
        ("POST", "/abort_request", abort_request),
    ),
    claims={"/generate": Claim("SGLang", fields=("text", "input_ids", "input_embeds", "sampling_params"))},
    schemas={"/generate": GENERATE_SCHEMA, "/encode": _SCHEMA},
)
