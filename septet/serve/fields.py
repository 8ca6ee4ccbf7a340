"""What happens to each request field: taken, ignored because harmless, or refused by name.

Owned by the serve room, used by each dialect. A field that would change the answer and is not implemented is an error
that names it; so is a field nobody knows. `null` always means "not given".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CHAT", "COMPLETION", "MESSAGES", "PROMPT", "Fields", "Rule", "Table", "only", "schema_of", "table"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """`take`: read by the dialect. Otherwise ignored if `harmless` is None, or if the value is one of them."""

    take: bool = False
    harmless: tuple[Any, ...] | None = None
    why: str = ""
    kind: str = ""  # JSON type of a field that is taken; "" = several


Table = dict[str, Rule]


def only(*harmless: Any, why: str = "not supported yet") -> Rule:
    """A field of which only these values (and null) are accepted, because they change nothing."""
    return Rule(harmless=harmless, why=why)


def table(take: Mapping[str, str], ignore: str = "", refuse: Mapping[str, Rule] | None = None) -> Table:
    """take: names by JSON type, {"boolean": "stream echo", "": "fields of several types"}."""
    taken = {name: Rule(take=True, kind=kind) for kind, names in take.items() for name in names.split()}
    return {**taken, **dict.fromkeys(ignore.split(), Rule()), **(refuse or {})}


def schema_of(rules: Mapping[str, Rule], required: str = "", **own: Any) -> dict[str, Any]:
    """The JSON schema of a body held to `rules`. own: schemas of fields of which the table does not say enough."""
    properties = {name: own.get(name) or _field_schema(rule) for name, rule in rules.items()}
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _field_schema(rule: Rule) -> dict[str, Any]:
    if rule.take:
        return {"type": [rule.kind, "null"]} if rule.kind else {}
    if rule.harmless is None:
        return {"description": "ignored"}
    return {"enum": [None, *rule.harmless], "description": rule.why}


_TAKEN = {
    "string": "model cache_salt",
    "boolean": """stream ignore_eos include_stop_str_in_output skip_special_tokens echo add_special_tokens
        return_token_ids""",
    "integer": "n top_k seed min_tokens prompt_logprobs priority",
    "number": "temperature top_p min_p presence_penalty frequency_penalty repetition_penalty",
    "array": "stop_token_ids",
    "object": "stream_options logit_bias response_format structured_outputs",
    "": "stop logprobs guided_json guided_regex guided_choice guided_grammar",
}
_HARMLESS = """
    user metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention request_id
    guided_decoding_backend
"""
_REFUSED = {
    "use_beam_search": only(False, why="beam search is not supported"),
    "length_penalty": only(1, 1.0, why="beam search is not supported"),
    "spaces_between_special_tokens": only(True, why="only true is supported"),
    "truncate_prompt_tokens": only(why="prompts are never cut silently; shorten the prompt"),
    "allowed_token_ids": only(why="not supported yet; use logit_bias"),
    "bad_words": only([], why="not supported yet; use logit_bias"),
    "logits_processors": only([], why="code in requests is never run"),
    "return_tokens_as_token_ids": only(False, why="not supported yet; use return_token_ids"),
    "prompt_embeds": only(why="tensors in requests are not accepted"),
    "kv_transfer_params": only(),
    "vllm_xargs": only({}),
    "guided_whitespace_pattern": only(why="not supported; white space between JSON's tokens is bounded"),
}


def _with(more: Mapping[str, str]) -> dict[str, str]:
    return {kind: f"{_TAKEN.get(kind, '')} {more.get(kind, '')}" for kind in _TAKEN}


COMPLETION = table(
    _with({"integer": "max_tokens best_of", "": "prompt"}),
    _HARMLESS,
    {**_REFUSED, "suffix": only("", why="fill-in-the-middle is not supported")},
)

CHAT = table(
    _with(
        {
            "string": "reasoning_effort",
            "boolean": "add_generation_prompt continue_final_message parallel_tool_calls include_reasoning",
            "integer": "max_tokens max_completion_tokens top_logprobs thinking_token_budget",
            "array": "messages tools",
            "object": "chat_template_kwargs",
            "": "tool_choice",
        }
    ),
    f"{_HARMLESS} prediction",
    {
        **_REFUSED,
        "functions": only([], why="superseded by tools"),
        "function_call": only("none", "auto", why="superseded by tool_choice"),
        "store": only(False, why="answers are never stored"),
        "modalities": only(["text"], why="only ['text'] is supported"),
        "audio": only(why="audio is not supported"),
        "web_search_options": only(why="web search is not supported"),
        "reasoning": only(why="not supported by this model"),
        "verbosity": only("medium", why="not supported by this model"),
        "best_of": only(1, why="best_of is not supported for chat; use n"),
        "chat_template": only(why="templates in requests are not accepted; the model's own is used"),
        "documents": only([], why="not supported yet"),
        "mm_processor_kwargs": only({}, why="images, audio and video are not supported yet"),
    },
)

_IDS = {"type": "array", "items": {"type": "integer"}}
PROMPT: dict[str, Any] = {
    "anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}}, _IDS]
}
MESSAGES: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
            "content": {"type": ["string", "array", "null"]},
        },
        "required": ["role", "content"],
    },
}


class Fields:
    """A request body held to a table; typed access with errors that name the field."""

    def __init__(self, body: Mapping[str, Any], table: Mapping[str, Rule]) -> None:
        self._values = {}
        for name, value in body.items():
            rule = table.get(name)
            if rule is None:
                shown = name if len(name) <= 80 else name[:77] + "..."
                raise InvalidRequest(f"unknown field {shown!r}", param=shown)
            if value is None:
                continue
            if rule.take:
                self._values[name] = value
            elif rule.harmless is not None and not _is_one_of(value, rule.harmless):
                raise InvalidRequest(f"{name}: {rule.why}", param=name)

    def given(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str, default: Any = None) -> Any:
        """The value unchecked: for fields that `SamplingParams` checks itself."""
        return self._values.get(name, default)

    def boolean(self, name: str, default: bool) -> bool:
        return self._typed(name, bool, default, "true or false")

    def string(self, name: str, default: str) -> str:
        return self._typed(name, str, default, "a string")

    def optional_string(self, name: str) -> str | None:
        return self.string(name, "") if self.given(name) else None

    def object(self, name: str) -> dict[str, Any]:
        return self._typed(name, dict, {}, "an object")

    def array(self, name: str) -> list[Any]:
        return self._typed(name, list, [], "an array")

    def integer(self, name: str, default: int) -> int:
        value = self._typed(name, int, default, "an integer")
        if isinstance(value, bool):
            raise InvalidRequest(f"{name} must be an integer, not {value!r}", param=name)
        return value

    def _typed(self, name: str, kind: type[T], default: T, words: str) -> T:
        value = self._values.get(name, default)
        if not isinstance(value, kind):
            raise InvalidRequest(f"{name} must be {words}", param=name)
        return value


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(one) and value == one for one in allowed)
