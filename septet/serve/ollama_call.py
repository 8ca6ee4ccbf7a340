"""Ollama's requests for text and vectors as typed calls: every field checked, nothing run yet.

Called by `ollama.py` with a decoded body. Raises `InvalidRequest` naming the field. Knows field names and their rules,
not how an answer is made.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.durations import seconds_of
from septet.errors import InvalidRequest
from septet.hub.parameters import DEFAULTS, KNOWN, checked, sampling
from septet.request import MAX_LOGPROBS, SamplingParams
from septet.serve.fields import Fields, only, schema_of, table
from septet.serve.tools import MAX_CALLS, checked_calls, checked_id, tool_choice
from septet.session.reading import Reading
from septet.structured import Structured
from septet.text.parsers.tools import ToolChoice

if TYPE_CHECKING:
    from collections.abc import Mapping

    from septet.hub.modelfile import Recipe

__all__ = ["ChatCall", "EmbedCall", "GenerateCall", "TextCall", "parse_chat", "parse_embed", "parse_generate"]

MAX_MESSAGES = 4096
MAX_INPUTS = 2048
MAX_OPTIONS = 256
ROLES = ("system", "user", "assistant", "tool")
THINK_LEVELS = ("low", "medium", "high", "max")
MAX_DEPTH = 64
_AS_THEY_ARE = ("allOf", "const", "enum", "default", "examples", "required")  # allOf: parts of one object
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # names to schemas
_OPENS = ("additionalProperties", "patternProperties", "unevaluatedProperties", "allOf")
_TEMPLATE = only("", why="templates in requests are not accepted; make a model with one (/api/create)")
_IMAGE = only(why="this model takes text only")
_PICTURES = dict.fromkeys(("width", "height", "steps"), only(0, why="image generation is not supported"))

GENERATE = table(
    {
        "string": "model prompt system",
        "boolean": "stream raw logprobs",
        "integer": "top_logprobs",
        "array": "context images",
        "object": "options",
        "": "format keep_alive think",
    },
    "truncate shift",  # nothing is ever cut silently: a prompt that is too long is refused
    {"suffix": only("", why="fill-in-the-middle is not supported"), "template": _TEMPLATE, **_PICTURES},
)
CHAT = table(
    {
        "string": "model",
        "boolean": "stream logprobs",
        "integer": "top_logprobs",
        "array": "messages tools",
        "object": "options",
        "": "format keep_alive think",
    },
    "truncate shift",
    {"template": _TEMPLATE},
)
EMBED = table({"string": "model", "integer": "dimensions", "object": "options", "": "input keep_alive"}, "truncate")
EMBEDDINGS = table({"string": "model prompt", "object": "options", "": "keep_alive"})
GENERATE_SCHEMA = schema_of(GENERATE, "model")
CHAT_SCHEMA = schema_of(CHAT, "model")
EMBED_SCHEMA = schema_of(EMBED, "model")
EMBEDDINGS_SCHEMA = schema_of(EMBEDDINGS, "model")

log = logging.getLogger(__name__)


# -- calls ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, kw_only=True)
class TextCall:
    """What generate and chat share."""

    model: str
    stream: bool = True
    keep_alive_s: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    structured: Structured | None = None
    logprobs: int | None = None
    think: bool | str | None = None  # None: as the model does
    reading: Reading

    @property
    def empty(self) -> bool:
        """Nothing to answer: the model is to be loaded, or with a keep_alive of 0 to be unloaded."""
        raise NotImplementedError

    def params(self, recipe: Recipe | None) -> SamplingParams:
        """Of the request, else of the model, else Ollama's defaults."""
        own = recipe.parameters if recipe is not None else {}
        return _params({**DEFAULTS, **own, **self.options}, self.structured, self.logprobs)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall(TextCall):
    prompt: str = ""
    system: str | None = None
    raw: bool = False
    context: tuple[int, ...] = ()

    @property
    def empty(self) -> bool:
        return not self.prompt and not self.context


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall(TextCall):
    messages: list[dict[str, Any]]

    @property
    def empty(self) -> bool:
        return not self.messages


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedCall:
    model: str
    inputs: list[str]
    dimensions: int | None = None
    keep_alive_s: float | None = None
    single: bool = False  # /api/embeddings: one vector under its old name


def parse_generate(body: dict[str, Any]) -> GenerateCall:
    fields = Fields(body, GENERATE)
    _no_images("images", fields.array("images"))
    call = GenerateCall(
        **_shared(fields, ToolChoice()),
        prompt=fields.string("prompt", ""),
        system=fields.string("system", "") if fields.given("system") else None,
        raw=fields.boolean("raw", False),
        context=tuple(fields.array("context")),
    )
    if call.raw and (call.system or call.context):
        raise InvalidRequest("raw takes the prompt as it is: it goes with neither system nor context", param="raw")
    return call


def parse_chat(body: dict[str, Any]) -> ChatCall:
    fields = Fields(_with_tool_types(body), CHAT)
    messages = fields.array("messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(messages)}, at most {MAX_MESSAGES} are taken", param="messages")
    return ChatCall(**_shared(fields, tool_choice(fields)), messages=_messages(messages))


def parse_embed(body: dict[str, Any], *, single: bool = False) -> EmbedCall:
    fields = Fields(body, EMBEDDINGS if single else EMBED)
    given = fields.raw("prompt" if single else "input", [])
    inputs = [given] if isinstance(given, str) else given
    if not isinstance(inputs, list) or not all(isinstance(text, str) for text in inputs):
        raise InvalidRequest("input must be a string or an array of strings", param="input")
    if len(inputs) > MAX_INPUTS:
        raise InvalidRequest(f"input holds {len(inputs)} texts, at most {MAX_INPUTS} are taken", param="input")
    _options(fields)
    return EmbedCall(
        model=_model(fields),
        inputs=[text for text in inputs if text or not single],
        dimensions=fields.integer("dimensions", 0) or None if not single else None,
        keep_alive_s=_keep_alive(fields),
        single=single,
    )


# -- fields that several have -----------------------------------------------------------------------------------------
def _shared(fields: Fields, tools: ToolChoice) -> dict[str, Any]:
    shared: dict[str, Any] = {
        "model": _model(fields),
        "stream": fields.boolean("stream", True),
        "keep_alive_s": _keep_alive(fields),
        "options": _options(fields),
        "structured": _structured(fields.raw("format")),
        "logprobs": _logprobs(fields),
        "think": _think(fields.raw("think")),
        "reading": Reading(tools=tools, reasoning=True),
    }
    _params(
        {**DEFAULTS, **shared["options"]}, shared["structured"], shared["logprobs"]
    )  # told before anything is loaded
    return shared


def _model(fields: Fields) -> str:
    name = fields.string("model", "")
    if not name:
        raise InvalidRequest("model is required", param="model")
    return name


def _keep_alive(fields: Fields) -> float | None:
    return seconds_of(fields.raw("keep_alive"), "keep_alive") if fields.given("keep_alive") else None


def _options(fields: Fields) -> dict[str, Any]:
    """Those that are known; the others are told in the log, as Ollama does."""
    given = fields.object("options")
    if len(given) > MAX_OPTIONS:
        raise InvalidRequest(f"options holds {len(given)}, at most {MAX_OPTIONS} are taken", param="options")
    unknown = [name for name in given if name not in KNOWN]
    if unknown:
        log.warning("ignored options that are not known: %s", ", ".join(repr(name[:40]) for name in unknown[:8]))
    return {name: checked(name, value) for name, value in given.items() if name in KNOWN and value is not None}


def _params(values: Mapping[str, Any], structured: Structured | None, logprobs: int | None) -> SamplingParams:
    return SamplingParams(**sampling(values), structured=structured, logprobs=logprobs)


def _structured(value: Any) -> Structured | None:
    if value is None or value == "":
        return None
    if value == "json":
        return Structured.json_object()
    if isinstance(value, dict):
        try:
            return Structured.json_schema(_closed(value))
        except InvalidRequest as error:
            raise InvalidRequest(f"format: {error.message}", param="format") from None
    raise InvalidRequest('format must be "json" or a JSON schema', param="format")


def _closed(schema: Any, depth: int = 0) -> Any:
    """Objects without a word on other properties have none, as in Ollama's own grammars: its clients count on that."""
    if depth > MAX_DEPTH:
        return schema
    if isinstance(schema, list):
        return [_closed(one, depth + 1) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            closed[key] = {name: _closed(one, depth + 1) for name, one in value.items()}
        else:
            closed[key] = value if key in _AS_THEY_ARE else _closed(value, depth + 1)
    if isinstance(schema.get("properties"), dict) and not any(key in schema for key in _OPENS):
        closed["additionalProperties"] = False
    return closed


def _logprobs(fields: Fields) -> int | None:
    top = fields.integer("top_logprobs", 0)
    if not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequest(f"top_logprobs must be 0 to {MAX_LOGPROBS}", param="top_logprobs")
    return top if fields.boolean("logprobs", False) else None


def _think(value: Any) -> bool | str | None:
    if value is None or isinstance(value, bool) or value in THINK_LEVELS:
        return value
    raise InvalidRequest(f"think must be true, false or one of {', '.join(THINK_LEVELS)}", param="think")


# -- messages ---------------------------------------------------------------------------------------------------------
def _with_tool_types(body: dict[str, Any]) -> dict[str, Any]:
    """Ollama's clients may leave a tool's type out."""
    tools = body.get("tools")
    if not isinstance(tools, list):
        return body
    return {**body, "tools": [{"type": "function", **tool} if isinstance(tool, dict) else tool for tool in tools]}


def _messages(given: list[Any]) -> list[dict[str, Any]]:
    """With ids for calls, which Ollama may leave out: results answer them in their order."""
    messages, n_calls, open_ids = [], 0, []
    for i, message in enumerate(given):
        where = f"messages[{i}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} must be an object with role and content", param=where)
        made = _message(where, message)
        if calls := message.get("tool_calls"):
            made["tool_calls"] = _calls(f"{where}.tool_calls", calls, n_calls)
            n_calls += len(made["tool_calls"])
            open_ids += [call["id"] for call in made["tool_calls"]]
        if made["role"] == "tool":
            own = message.get("tool_call_id")
            made["tool_call_id"] = checked_id(f"{where}.tool_call_id", own or (open_ids[0] if open_ids else "call_0"))
            open_ids = [one for one in open_ids if one != made["tool_call_id"]]
        messages.append(made)
    return messages


_MESSAGE_FIELDS = ("role", "content", "thinking", "images", "tool_calls", "tool_name", "tool_call_id", "name")


def _message(where: str, message: dict[str, Any]) -> dict[str, Any]:
    role, content, thinking = message.get("role"), message.get("content"), message.get("thinking")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}", param=where)
    for name, value in message.items():
        if name not in _MESSAGE_FIELDS and value not in (None, [], ""):
            raise InvalidRequest(f"{where}: unknown field {name[:80]!r}", param=where)
    _no_images(f"{where}.images", message.get("images"))
    if content is not None and not isinstance(content, str):
        raise InvalidRequest(f"{where}.content must be a string", param=f"{where}.content")
    made: dict[str, Any] = {"role": role, "content": content or ""}
    if thinking is not None and not isinstance(thinking, str):
        raise InvalidRequest(f"{where}.thinking must be a string", param=f"{where}.thinking")
    if thinking:
        made["reasoning_content"] = thinking
    if (function := message.get("tool_name") or message.get("name")) is not None:
        made["name"] = checked_id(f"{where}.tool_name", function)
    return made


def _no_images(where: str, images: Any) -> None:
    if images:
        raise InvalidRequest(f"{where}: {_IMAGE.why}", param=where)


def _calls(where: str, calls: Any, n_before: int) -> list[dict[str, Any]]:
    """Ollama's calls hold their arguments as an object; here they travel as OpenAI's, as text."""
    if not isinstance(calls, list) or len(calls) > MAX_CALLS:
        raise InvalidRequest(f"{where} must be an array of at most {MAX_CALLS} calls", param=where)
    made = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments", {}), dict | None):
            raise InvalidRequest(f'{where}[{i}] must be {{"function": {{"name", "arguments": {{}}}}}}', param=where)
        arguments = json.dumps(function.get("arguments") or {}, ensure_ascii=False)
        made.append(
            {
                "id": call.get("id") or f"call_{n_before + i}",
                "type": "function",
                "function": {"name": function.get("name"), "arguments": arguments},
            }
        )
    return checked_calls(where, made)
