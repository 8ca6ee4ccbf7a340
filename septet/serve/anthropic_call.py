"""Anthropic's messages request as a typed call: every field checked, nothing run yet.

Called by `anthropic.py` with a decoded body. Raises `InvalidRequest` naming the field. Knows field names and their
rules, not how an answer is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.request import SamplingParams
from septet.serve.anthropic_cache import checked_marks
from septet.serve.anthropic_edits import edits_of
from septet.serve.anthropic_messages import conversation, tool_choice, tool_marks
from septet.serve.fields import Fields, only, schema_of, table
from septet.session.reading import Reading
from septet.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.serve.anthropic_cache import Mark
    from septet.serve.anthropic_edits import Edits
    from septet.session.session import Session
    from septet.text.parsers.tools import Tool, ToolChoice

__all__ = ["COUNT_SCHEMA", "MESSAGES_SCHEMA", "Conversation", "MessagesCall", "parse_count", "parse_messages"]

_CONVERSATION = {
    "string": "model",
    "array": "messages tools",
    "object": "tool_choice thinking output_config output_format cache_control context_management",
    "": "system",
}
_REFUSED = {
    "speed": only("standard"),
    "container": only(why="code is not run here"),
    "mcp_servers": only([], why="servers of tools are not called from here"),
    "diagnostics": only(why="misses of the cache are not diagnosed"),
    "fallbacks": only([]),
}
_IGNORED = "metadata service_tier inference_geo user_profile_id workspace_id betas"
_SAMPLING = {
    "boolean": "stream",
    "integer": "max_tokens top_k",
    "number": "temperature top_p",
    "array": "stop_sequences",
}
COUNT = table(_CONVERSATION, _IGNORED, _REFUSED)
MESSAGES = table({**_CONVERSATION, **_SAMPLING, "array": "messages tools stop_sequences"}, _IGNORED, _REFUSED)
_MESSAGE = {
    "type": "object",
    "properties": {"role": {"enum": ["user", "assistant", "system"]}, "content": {"type": ["string", "array"]}},
    "required": ["role", "content"],
}
_LIST = {"type": "array", "minItems": 1, "items": _MESSAGE}
COUNT_SCHEMA = schema_of(COUNT, "model messages", messages=_LIST)
MESSAGES_SCHEMA = schema_of(MESSAGES, "model messages max_tokens", messages=_LIST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """What both routes share: the prompt before the template."""

    model: str
    messages: list[dict[str, Any]]
    tools: ToolChoice
    thinking: bool  # asked for
    effort: str | None = None
    marks: tuple[Mark, ...] = ()  # of cache_control
    edits: Edits | None = None  # of context_management

    @property
    def goes_on(self) -> bool:
        """The last message is the beginning of the answer."""
        last = self.messages[-1]
        return last["role"] == "assistant" and "tool_calls" not in last

    def for_template(self, session: Session) -> tuple[Sequence[Tool], dict[str, Any]]:
        """The tools and options that a session's template gets."""
        known = session.template.variables if session.template is not None else frozenset[str]()
        return self.tools.tools if self.tools.mode != "none" else (), self.template_options(known)

    def template_options(self, known: frozenset[str]) -> dict[str, Any]:
        """What the template gets besides the messages. known: the variables that it reads."""
        wanted: dict[str, Any] = {"enable_thinking": self.thinking, "thinking": self.thinking}
        wanted |= {"reasoning_effort": self.effort} if self.effort else {}
        options = {name: value for name, value in wanted.items() if name in known}
        return options | {"continue_final_message": self.goes_on, "add_generation_prompt": not self.goes_on}


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesCall(Conversation):
    params: SamplingParams
    reading: Reading
    stream: bool = False
    hidden: bool = False  # thoughts are not shown
    only_prompt: bool = False  # max_tokens 0: compute the prompt, so that the next request finds it in the cache


def parse_count(body: dict[str, Any]) -> Conversation:
    fields = Fields(body, MESSAGES if "max_tokens" in body else COUNT)
    return Conversation(**_conversation(fields, _thinking(fields)["type"] != "disabled"))


def parse_messages(body: dict[str, Any]) -> MessagesCall:
    fields = Fields(body, MESSAGES)
    if not fields.given("max_tokens"):
        raise InvalidRequest("max_tokens is required", param="max_tokens")
    thinking = _thinking(fields)
    shared = _conversation(fields, thinking["type"] != "disabled")
    max_tokens, stream = fields.integer("max_tokens", 0), fields.boolean("stream", False)
    params = _params(fields, max_tokens or 1)
    budget = thinking.get("budget_tokens")
    if budget is not None and budget >= max_tokens:
        raise InvalidRequest("thinking.budget_tokens must be less than max_tokens", param="thinking")
    return MessagesCall(
        **shared,
        params=params,
        reading=Reading(tools=shared["tools"], reasoning=True, thinking_budget=budget, live=stream),
        stream=stream,
        hidden=thinking.get("display") == "omitted",
        only_prompt=max_tokens == 0,
    )


def _conversation(fields: Fields, thinking: bool) -> dict[str, Any]:
    if not (model := fields.string("model", "")):
        raise InvalidRequest("model is required", param="model")
    effort = fields.object("output_config").get("effort")
    if effort not in (None, "low", "medium", "high", "xhigh", "max"):
        raise InvalidRequest("output_config.effort must be low, medium, high, xhigh or max", param="output_config")
    (messages, marks), tools = conversation(fields), tool_choice(fields)
    return {
        "model": model,
        "messages": messages,
        "tools": tools,
        "thinking": thinking,
        "effort": effort,
        "marks": checked_marks([*tool_marks(fields), *marks]),
        "edits": edits_of(fields, messages) if fields.given("context_management") else None,
    }


def _thinking(fields: Fields) -> dict[str, Any]:
    value = fields.object("thinking") if fields.given("thinking") else {"type": "disabled"}
    kind, budget = value.get("type"), value.get("budget_tokens")
    if kind not in ("enabled", "disabled", "adaptive"):
        raise InvalidRequest("thinking.type must be enabled, disabled or adaptive", param="thinking")
    if (kind == "enabled") != (budget is not None):
        raise InvalidRequest("thinking.budget_tokens goes with type enabled, and only with it", param="thinking")
    if budget is not None and (type(budget) is not int or not 0 < budget < 2**31):
        raise InvalidRequest("thinking.budget_tokens must be 1 or more tokens", param="thinking")
    if value.get("display") not in (None, "summarized", "omitted"):
        raise InvalidRequest("thinking.display must be summarized or omitted", param="thinking")
    for name in value:
        if name not in ("type", "budget_tokens", "display"):
            raise InvalidRequest(f"thinking has the unknown field {name[:80]!r}", param="thinking")
    return value


_OUR_NAMES = {"stop": "stop_sequences", "structured": "output_config.format"}


def _params(fields: Fields, max_tokens: int) -> SamplingParams:
    values = {name: fields.raw(name) for name in ("temperature", "top_p", "top_k") if fields.given(name)}
    try:
        return SamplingParams(
            **values, max_tokens=max_tokens, stop=tuple(fields.array("stop_sequences")), structured=_format(fields)
        )
    except InvalidRequest as error:
        raise error.renamed(_OUR_NAMES) from None


def _format(fields: Fields) -> Structured | None:
    config = fields.object("output_config")
    for name in config:
        if name not in ("effort", "format"):
            raise InvalidRequest(f"output_config has the unknown field {name[:80]!r}", param="output_config")
    value = config.get("format") or (fields.object("output_format") or None)
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("type") != "json_schema" or not isinstance(value.get("schema"), dict):
        raise InvalidRequest(
            'output_config.format must be {"type": "json_schema", "schema": {...}}', param="structured"
        )
    return Structured.json_schema(value["schema"])
