"""A request of /v1/responses as a chat call: its items become messages, its fields those of chat.

Called by `openai_responses.py`. Raises `InvalidRequest` in the words of this API. The rules of sampling, tools and
formats are `calls.parse_chat`'s; here are only the names, the items and what has no counterpart in chat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.calls import ChatCall, parse_chat
from septet.serve.fields import Fields, only, schema_of, table
from septet.serve.openai_batches import checked_metadata

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["RESPONSES_SCHEMA", "ResponsesCall", "parse_responses"]

MAX_ITEMS = 4096
_EXTRAS = """top_k min_p seed stop stop_token_ids repetition_penalty presence_penalty frequency_penalty logit_bias
    min_tokens ignore_eos skip_special_tokens priority cache_salt chat_template_kwargs thinking_token_budget"""
RESPONSES = table(
    {
        "string": "model instructions previous_response_id truncation cache_salt",
        "boolean": "stream store parallel_tool_calls ignore_eos skip_special_tokens",
        "integer": "max_output_tokens top_logprobs top_k seed min_tokens priority thinking_token_budget",
        "number": "temperature top_p min_p repetition_penalty presence_penalty frequency_penalty",
        "object": "text reasoning metadata stream_options logit_bias chat_template_kwargs",
        "array": "tools include stop_token_ids",
        "": "input tool_choice stop",
    },
    "user safety_identifier prompt_cache_key prompt_cache_retention service_tier request_id",
    {
        "background": only(False, why="not supported; stream the answer instead"),
        "conversation": only(why="not supported; use previous_response_id"),
        "prompt": only(why="stored prompts are not supported; give input"),
        "max_tool_calls": only(why="there are no built-in tools"),
        "context_management": only([], why="not supported; input is never changed silently"),
        "moderation": only(why="not supported"),
    },
)
_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_ROLES = ("system", "developer", "user", "assistant")
_INCLUDABLE = ("message.output_text.logprobs", "reasoning.encrypted_content", "file_search_call.results")
_INPUT = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}, "minItems": 1}]}
RESPONSES_SCHEMA = schema_of(RESPONSES, "input", input=_INPUT)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponsesCall:
    chat: ChatCall
    items: list[dict[str, Any]]  # what this request put in, as items
    previous: str | None
    store: bool
    shown: dict[str, Any]  # fields of the request that the response object repeats


def parse_responses(
    body: dict[str, Any], earlier: Callable[[str], Sequence[dict[str, Any]]] = lambda number: ()
) -> ResponsesCall:
    """earlier: the messages of a stored conversation up to and with a response; raises where there is none."""
    fields = Fields(body, RESPONSES)
    _check_simple(fields)
    items = _items(fields)
    previous = fields.optional_string("previous_response_id")
    messages = _messages(items)
    chat: dict[str, Any] = {name: fields.raw(name) for name in _EXTRAS.split()}
    for name in ("model", "stream", "temperature", "top_p", "parallel_tool_calls"):
        chat[name] = fields.raw(name)
    chat |= {
        "max_completion_tokens": fields.raw("max_output_tokens"),
        "tools": [_tool(f"tools[{i}]", tool) for i, tool in enumerate(fields.array("tools"))] or None,
        "tool_choice": _tool_choice(fields),
        "response_format": _format(fields),
        "reasoning_effort": _effort(fields),
        **_logprobs(fields),
    }
    instructions = fields.optional_string("instructions")
    head = [{"role": "system", "content": instructions}] if instructions else []
    try:
        parsed = parse_chat({**chat, "messages": [*head, *(earlier(previous) if previous else ()), *messages]})
    except InvalidRequest as error:
        raise error.renamed(_NAMES) from None
    store = fields.boolean("store", True)
    return ResponsesCall(
        chat=parsed, items=items, previous=previous, store=store, shown=_shown(fields, instructions, store)
    )


def _check_simple(fields: Fields) -> None:
    if fields.string("truncation", "disabled") != "disabled":
        raise InvalidRequest("truncation must be disabled: prompts are never cut silently", param="truncation")
    for name in fields.array("include"):
        if name not in _INCLUDABLE:
            raise InvalidRequest(f"include: {str(name)[:80]!r} is not supported", param="include")
    for name in fields.object("stream_options"):
        if name != "include_obfuscation":
            raise InvalidRequest(f"unknown field 'stream_options.{name[:80]}'", param="stream_options")
    checked_metadata(fields.object("metadata"))


def _shown(fields: Fields, instructions: str | None, store: bool) -> dict[str, Any]:
    text = fields.object("text")
    return {
        "background": False,
        "instructions": instructions,
        "max_output_tokens": fields.raw("max_output_tokens"),
        "max_tool_calls": None,
        "metadata": fields.object("metadata"),
        "parallel_tool_calls": fields.boolean("parallel_tool_calls", True),
        "previous_response_id": fields.optional_string("previous_response_id"),
        "reasoning": {"effort": fields.object("reasoning").get("effort"), "summary": None},
        "service_tier": "default",
        "store": store,
        "temperature": fields.raw("temperature", 1.0),
        "text": {"format": {"type": "text"}, **{k: v for k, v in text.items() if v is not None}},
        "tool_choice": fields.raw("tool_choice", "auto"),
        "tools": fields.array("tools"),
        "top_logprobs": fields.integer("top_logprobs", 0),
        "top_p": fields.raw("top_p", 1.0),
        "truncation": "disabled",
    }


# -- fields with another shape ----------------------------------------------------------------------------------------
def _tool(where: str, tool: Any) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise InvalidRequest(f"{where} is of type {str(kind)[:40]!r}; only functions are supported", param=where)
    return {"type": "function", "function": {name: part for name, part in tool.items() if name != "type"}}


def _tool_choice(fields: Fields) -> Any:
    choice = fields.raw("tool_choice")
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
        raise InvalidRequest(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "name": ...}', param="tool_choice"
        )
    return {"type": "function", "function": {"name": choice["name"]}}


def _format(fields: Fields) -> Any:
    text = fields.object("text")
    for name, value in text.items():
        if name not in ("format", "verbosity") or (name == "verbosity" and value not in (None, "medium")):
            raise InvalidRequest(f"text.{name[:80]}: not supported by this model", param=f"text.{name[:80]}")
    given = text.get("format")
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    schema = {name: part for name, part in given.items() if name != "type" and part is not None}
    return {"type": "json_schema", "json_schema": schema}


def _effort(fields: Fields) -> Any:
    reasoning = fields.object("reasoning")
    for name, value in reasoning.items():
        if name not in ("effort", "summary", "generate_summary"):
            raise InvalidRequest(f"unknown field 'reasoning.{name[:80]}'", param="reasoning")
        if name != "effort" and value not in (None, "auto"):
            raise InvalidRequest(f"reasoning.{name}: thoughts are told whole, not summed up", param=f"reasoning.{name}")
    return reasoning.get("effort")


def _logprobs(fields: Fields) -> dict[str, Any]:
    wanted = "message.output_text.logprobs" in fields.array("include") or fields.integer("top_logprobs", 0) > 0
    return {"logprobs": True, "top_logprobs": fields.integer("top_logprobs", 0)} if wanted else {}


# -- items ------------------------------------------------------------------------------------------------------------
def _items(fields: Fields) -> list[dict[str, Any]]:
    given = fields.raw("input")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not 0 < len(given) <= MAX_ITEMS:
        raise InvalidRequest(f"input must be a string or an array of 1 to {MAX_ITEMS} items", param="input")
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise InvalidRequest(f"input[{i}] must be an object", param=f"input[{i}]")
    return given


def _messages(items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items of one turn of the model (thoughts, text, calls) become one message, as chat templates want it."""
    messages: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # the assistant's message that is open
    for i, item in enumerate(items):
        where = f"input[{i}]"
        kind = item.get("type", "message")
        if kind == "function_call_output":
            messages.append(_result(where, item))
            turn = None
        elif kind == "message" and item.get("role") != "assistant":
            messages.append(_message(where, item))
            turn = None
        else:
            if turn is None or (kind == "message" and (turn["content"] or "tool_calls" in turn)):
                turn = {"role": "assistant", "content": ""}
                messages.append(turn)
            _add_to_turn(where, kind, item, turn)
    return messages


def _message(where: str, item: dict[str, Any]) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(_ROLES)}", param=f"{where}.role")
    return {"role": role, "content": _text(f"{where}.content", item.get("content"))}


def _add_to_turn(where: str, kind: Any, item: dict[str, Any], turn: dict[str, Any]) -> None:
    if kind == "message":
        turn["content"] = _text(f"{where}.content", item.get("content"))
    elif kind == "reasoning":
        thoughts = _text(f"{where}.content", item.get("content") or [])
        turn["reasoning"] = "\n".join(part for part in (turn.get("reasoning"), thoughts) if part) or None
    elif kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        calls = turn.setdefault("tool_calls", [])
        calls.append({"id": item.get("call_id"), "type": "function", "function": function})
    else:
        raise InvalidRequest(f"{where} is of type {str(kind)[:40]!r}, which is not supported", param=where)


def _result(where: str, item: dict[str, Any]) -> dict[str, Any]:
    return {
        "role": "tool",
        "tool_call_id": item.get("call_id"),
        "content": _text(f"{where}.output", item.get("output")),
    }


def _text(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or an array of parts", param=where)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        known = kind in ("input_text", "output_text", "text", "reasoning_text", "refusal")
        value = part.get("refusal" if kind == "refusal" else "text") if known else None
        if not isinstance(value, str):
            raise InvalidRequest(
                f"{where}[{i}] is of type {str(kind)[:40]!r}; only text is supported", param=f"{where}[{i}]"
            )
        texts.append(value)
    return "\n".join(texts)
