"""llama.cpp's own server API: completion, props, slots, tokenize, apply-template, embedding.

Fields are checked by `llamacpp_call.py`, answers shaped by `llamacpp_shape.py`. A slot here is a place in the batch:
the requests share one cache, so none belongs to a conversation and none can be saved.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import septet
from septet.errors import EngineDead, InvalidRequest
from septet.serve.body import body_of
from septet.serve.calls import parse_chat
from septet.serve.defaults import with_defaults
from septet.serve.dialect import Claim, Dialect, ErrorStyle
from septet.serve.errors import HttpError, error_body, headers_of, status_of
from septet.serve.fields import CHAT, MESSAGES, Fields, schema_of, table
from septet.serve.generation import generate, vectors
from septet.serve.llamacpp_call import COMPLETION_SCHEMA, DEFAULTED, DEFAULTS, parse_completion
from septet.serve.llamacpp_shape import Completion, chosen_fields
from septet.serve.models import FixedModels, default_card
from septet.serve.operations import ready
from septet.serve.sse import until_gone

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.llamacpp_call import CompletionCall, Piece
    from septet.serve.sse import Reply
    from septet.session.session import Prompt, Session

__all__ = ["LLAMACPP"]

MAX_LISTED = 2**17  # tokens of one /tokenize with pieces: each becomes an object
MAX_INPUTS = 2048  # of one request for embeddings
_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "unavailable_error",
    501: "not_supported_error",
    503: "unavailable_error",
}


# -- errors -----------------------------------------------------------------------------------------------------------
def _body(error: BaseException) -> dict[str, Any]:
    status, told = status_of(error), error_body(error)["error"]
    kind = _KINDS.get(status) or ("invalid_request_error" if status < 500 else "server_error")
    if told["code"] == "context_length_exceeded":
        kind = "exceed_context_size_error"
    return {"error": {"code": status, "message": told["message"], "type": kind}}


async def _in_stream(reply: Reply, told: Any) -> None:
    await reply.event(told)
    await reply.end()


LLAMACPP_ERRORS = ErrorStyle(_body, _in_stream, status_of, headers_of)


def _no(what: str) -> HttpError:
    return HttpError(501, f"{what} is not supported by this server")


# -- completion -------------------------------------------------------------------------------------------------------
async def completion(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = with_defaults(service, await body_of(service, scope, receive), DEFAULTED, parse_completion)
    await until_gone(receive, _answer(service, call, reply))


async def _answer(service: Service, call: CompletionCall, reply: Reply) -> None:
    async with service.models.use(call.model) as session:
        prompts = [await _prompt(session, pieces) for pieces in call.prompts]
        texts = [session.tokenizer.decode(prompt.tokens, skip_special_tokens=False) for prompt in prompts]
        params = replace(call.params, logit_bias=await _bias(session, call.bias))
        model, n, limit = call.model or default_card(service.models).name, params.n, session.limits.max_model_len
        made = [
            Completion(call, i * n + k, prompt, text, model, limit)
            for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            for k in range(n)
        ]
        async with aclosing(generate(service, session, prompts, params, cache_salt=call.cache_salt)) as events:
            async for number, event in events:
                one = made[number * n + event.index]
                one.feed(event)
                if call.stream and (part := one.part(event)) is not None:
                    await reply.event(part)
    if call.stream:
        await reply.end()
        return
    whole = [chosen_fields(one.whole(), call.response_fields) for one in made]
    await reply.json(whole if call.in_array else whole[0])


async def _prompt(session: Session, pieces: Sequence[Piece]) -> Prompt:
    """Text and tokens joined; the tokens that begin a text are put before it only where it begins the prompt."""
    if len(pieces) == 1 and isinstance(pieces[0], str):
        return await session.prompt(pieces[0])
    tokens: list[int] = []
    for i, piece in enumerate(pieces):
        if isinstance(piece, str):
            tokens += await session.token_ids(piece, add_special_tokens=i == 0)
        else:
            tokens.append(piece)
    return await session.prompt(tokens)


async def _bias(session: Session, given: Sequence[tuple[Piece, float]]) -> dict[int, float]:
    found: dict[int, float] = {}
    for token, bias in given:
        ids = [token] if isinstance(token, int) else await session.token_ids(token, add_special_tokens=False)
        found |= dict.fromkeys(ids, bias)
    return found


# -- the server -------------------------------------------------------------------------------------------------------
async def props(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Of a loaded model; of one that is not, what is known without it: nothing is loaded to be shown."""
    wanted = _asked(scope, "model") or default_card(service.models).name
    name = service.models.find(wanted).name
    session = next((run.session for run in service.models.running() if run.name == name), None)
    if isinstance(service.models, FixedModels):  # under any of its names
        session = service.models.session
    known = next((card.max_model_len for card in service.models.cards() if card.name == name), None)
    limit = session.limits.max_model_len if session is not None else known or 0
    special = getattr(session.tokenizer, "special_texts", {}) if session is not None else {}
    await reply.json(
        {
            "default_generation_settings": _slot(0, limit, processing=False) | {"params": _default_params()},
            "total_slots": session.client.info.max_num_seqs if session is not None else 0,
            "model_alias": session.model_name if session is not None else name,
            "model_path": session.model_name if session is not None else name,  # where files lie is nobody's business
            "chat_template": getattr(session.template, "source", "") if session is not None else "",
            "bos_token": special.get("bos_token", ""),
            "eos_token": special.get("eos_token", ""),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"septet {septet.__version__}",
            "is_sleeping": False,
        }
    )


async def set_props(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    raise _no("changing the server's properties")


async def slots(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """The places of a loaded model's batch, those of running requests first; nothing is loaded to tell them."""
    wanted = _asked(scope, "model")
    session = next((s for s in service.models.loaded() if wanted in (None, service.label(s))), None)
    if session is None:
        await reply.json([])
        return
    n, limit = session.client.info.max_num_seqs, session.limits.max_model_len
    try:
        stats = await asyncio.wait_for(session.client.stats(), service.settings.stats_timeout_s)
    except TimeoutError:
        raise EngineDead("the engine does not answer") from None
    if _asked(scope, "fail_on_no_slot") and stats.running >= n:
        raise HttpError(503, "no slot is free")
    await reply.json([_slot(i, limit, processing=i < stats.running) for i in range(n)])


def _slot(number: int, n_ctx: int, *, processing: bool) -> dict[str, Any]:
    return {"id": number, "id_task": -1, "n_ctx": n_ctx, "speculative": False, "is_processing": processing}


def _default_params() -> dict[str, Any]:
    return {"n_predict": -1, "seed": -1, **DEFAULTS, "presence_penalty": 0.0, "frequency_penalty": 0.0}


async def change_slot(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    raise _no("saving, restoring or erasing a slot")


async def adapters(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    await reply.json([])


def _asked(scope: Scope, name: str) -> str | None:
    """A value of the query."""
    return parse_qs(scope.get("query_string", b"").decode("latin-1")).get(name, [None])[-1]


# -- tokens -----------------------------------------------------------------------------------------------------------
TOKENIZE = table({"string": "content model", "boolean": "add_special parse_special with_pieces"})


async def tokenize(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, scope, receive), TOKENIZE)
    text, special = fields.string("content", ""), fields.boolean("add_special", False)
    parsed, pieces = fields.boolean("parse_special", True), fields.boolean("with_pieces", False)
    async with service.models.use(fields.optional_string("model")) as session:
        if parsed:
            ids = await session.token_ids(text, add_special_tokens=special)
        else:
            ids = await asyncio.to_thread(session.tokenizer.encode, text, special, False)
        if pieces:
            await reply.json({"tokens": await asyncio.to_thread(_pieces, session, ids)})
        else:
            await reply.json({"tokens": ids})


def _pieces(session: Session, ids: Sequence[int]) -> list[dict[str, Any]]:
    if len(ids) > MAX_LISTED:
        raise InvalidRequest(f"content has {len(ids)} tokens; pieces are told of {MAX_LISTED} at most", param="content")
    return [{"id": i, "piece": _piece(session.tokenizer.token_bytes(i))} for i in ids]


def _piece(raw: bytes) -> str | list[int]:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return list(raw)


async def apply_template(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    call = parse_chat(await body_of(service, scope, receive))
    async with service.models.use(call.model) as session:
        tools = call.reading.tools.tools if call.reading.tools.mode != "none" else ()
        prompt = await session.chat_prompt(call.messages, tools=tools, **call.template_options)
    await reply.json({"prompt": prompt.text})


# -- embeddings -------------------------------------------------------------------------------------------------------
EMBEDDING = table({"string": "model", "integer": "embd_normalize", "": "content input"})


async def embedding(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    fields = Fields(await body_of(service, scope, receive), EMBEDDING)
    given = fields.raw("content", fields.raw("input"))
    one = isinstance(given, str) or (isinstance(given, list) and any(type(part) is int for part in given))
    inputs = [given] if one else given
    if not isinstance(inputs, list) or not 0 < len(inputs) <= MAX_INPUTS:
        raise InvalidRequest(f"content must be a text, or an array of at most {MAX_INPUTS} texts", param="content")
    normalize = fields.integer("embd_normalize", 2)
    if normalize not in (-1, 2):
        raise InvalidRequest("embd_normalize must be 2 (Euclidean) or -1 (none)", param="embd_normalize")
    await until_gone(receive, _vectors(service, fields.optional_string("model"), inputs, normalize == 2, reply))


async def _vectors(service: Service, model: str | None, inputs: list[Any], normalize: bool, reply: Reply) -> None:
    async with service.models.use(model) as session:
        prompts = [await session.prompt(one) for one in inputs]
        made = await vectors(service, session, prompts, normalize=normalize)
    await reply.json([{"index": i, "embedding": [vector.tolist()]} for i, vector in enumerate(made)])


LLAMACPP = Dialect(
    "llamacpp",
    (
        ("POST", "/completion", completion),
        ("POST", "/completions", completion),
        ("GET", "/props", props),
        ("POST", "/props", set_props),
        ("GET", "/slots", slots),
        ("POST", "/slots/{slot}", change_slot),
        ("GET", "/lora-adapters", adapters),
        ("GET", "/v1/health", ready),
        ("POST", "/tokenize", tokenize),
        ("POST", "/apply-template", apply_template),
        ("POST", "/embedding", embedding),
        ("POST", "/embeddings", embedding),
    ),
    LLAMACPP_ERRORS,
    claims={"/tokenize": Claim("llama.cpp", fields=("content",))},
    schemas={
        "/completion": COMPLETION_SCHEMA,
        "/completions": COMPLETION_SCHEMA,
        "/tokenize": schema_of(TOKENIZE, "content"),
        "/apply-template": schema_of(CHAT, "messages", messages=MESSAGES),
        "/embedding": schema_of(EMBEDDING),
        "/embeddings": schema_of(EMBEDDING),
    },
    public=frozenset(("/v1/health",)),
)
