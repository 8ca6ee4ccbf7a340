"""vLLM's /tokenize and /detokenize: text or a conversation as token ids, and back.

Listed by `openai.py`. No engine work; a long text is tokenised in a thread by the session.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.body import body_of
from septet.serve.calls import messages_of, template_options
from septet.serve.fields import MESSAGES, Fields, only, schema_of, table
from septet.serve.tools import tool_choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.types import Receive, Scope

    from septet.serve.app import Service
    from septet.serve.sse import Reply
    from septet.session.session import Session

__all__ = ["ROUTES", "SCHEMAS"]

MAX_LISTED = 2**17  # tokens whose texts one answer tells
TOKENIZE = table(
    {
        "string": "model prompt reasoning_effort",
        "boolean": "add_special_tokens return_token_strs add_generation_prompt continue_final_message",
        "array": "messages tools",
        "object": "chat_template_kwargs",
    },
    "mm_processor_kwargs",
    {"chat_template": only(why="templates in requests are not accepted; the model's own is used")},
)
DETOKENIZE = table({"string": "model", "array": "tokens"})


async def tokenize(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Text or a conversation as token ids."""
    fields = Fields(await body_of(service, scope, receive), TOKENIZE)
    if fields.given("prompt") == fields.given("messages"):
        raise InvalidRequest("give either prompt or messages", param="prompt")
    as_strings = fields.boolean("return_token_strs", False)
    async with service.models.use(fields.optional_string("model")) as session:
        if fields.given("prompt"):
            special = fields.boolean("add_special_tokens", True)
            ids = await session.token_ids(fields.string("prompt", ""), add_special_tokens=special)
        else:
            ids = await _chat_ids(session, fields)
        strings = await asyncio.to_thread(_strings, session, ids) if as_strings else None
        length = session.limits.max_model_len
        await reply.json({"count": len(ids), "max_model_len": length, "tokens": ids, "token_strs": strings})


def _strings(session: Session, ids: Sequence[int]) -> list[str]:
    if len(ids) > MAX_LISTED:
        raise InvalidRequest(
            f"the text has {len(ids)} tokens; return_token_strs tells {MAX_LISTED} at most", param="return_token_strs"
        )
    return [session.tokenizer.token_text(token) for token in ids]


async def _chat_ids(session: Session, fields: Fields) -> Sequence[int]:
    messages, options = messages_of(fields), template_options(fields)
    if fields.boolean("add_special_tokens", False):
        raise InvalidRequest(
            "add_special_tokens is not supported for messages: the template writes them", param="add_special_tokens"
        )
    tools = tool_choice(fields).tools
    return (await session.chat_prompt(messages, tools=tools, **options)).tokens


async def detokenize(service: Service, scope: Scope, receive: Receive, reply: Reply) -> None:
    """Token ids as text, special tokens included."""
    fields = Fields(await body_of(service, scope, receive), DETOKENIZE)
    if not fields.given("tokens"):
        raise InvalidRequest("tokens is missing: give an array of token ids", param="tokens")
    ids = fields.array("tokens")
    async with service.models.use(fields.optional_string("model")) as session:
        text = await asyncio.to_thread(_text, session, ids)
        await reply.json({"prompt": text, "content": text, "text": text})  # as vLLM, llama.cpp and SGLang name it


def _text(session: Session, ids: Sequence[Any]) -> str:
    _check_ids(ids, session.tokenizer.vocab_size)
    return session.tokenizer.decode(ids, skip_special_tokens=False)


def _check_ids(ids: Sequence[Any], vocab_size: int) -> None:
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidRequest(
                f"tokens holds {repr(token)[:40]}, which is no token id of this model (0 .. {vocab_size - 1})",
                param="tokens",
            )


ROUTES = (("POST", "/tokenize", tokenize), ("POST", "/detokenize", detokenize))
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "/tokenize": schema_of(TOKENIZE, messages=MESSAGES),
    "/detokenize": schema_of(DETOKENIZE, "tokens", tokens=_IDS),
}
