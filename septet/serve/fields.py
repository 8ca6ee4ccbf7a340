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

__all__ = ["CHAT", "COMPLETION", "Fields", "Rule"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """`take`: read by the dialect. Otherwise ignored if `harmless` is None, or if the value is one of them."""

    take: bool = False
    harmless: tuple[Any, ...] | None = None
    why: str = ""


_TAKE = Rule(take=True)
_IGNORE = Rule()


def _only(*harmless: Any, why: str = "not supported yet") -> Rule:
    return Rule(harmless=harmless, why=why)


def _table(take: str, ignore: str, refuse: dict[str, Rule]) -> dict[str, Rule]:
    return {**dict.fromkeys(take.split(), _TAKE), **dict.fromkeys(ignore.split(), _IGNORE), **refuse}


_TAKEN = """
    model stream stream_options n temperature top_p top_k min_p seed stop stop_token_ids presence_penalty
    frequency_penalty repetition_penalty logit_bias min_tokens ignore_eos include_stop_str_in_output
    skip_special_tokens prompt_logprobs priority cache_salt logprobs echo add_special_tokens return_token_ids
    response_format structured_outputs guided_json guided_regex guided_choice guided_grammar
"""
_HARMLESS = """
    user metadata service_tier safety_identifier prompt_cache_key prompt_cache_retention request_id
    guided_decoding_backend
"""
_REFUSED = {
    "use_beam_search": _only(False, why="beam search is not supported"),
    "length_penalty": _only(1, 1.0, why="beam search is not supported"),
    "spaces_between_special_tokens": _only(True, why="only true is supported"),
    "truncate_prompt_tokens": _only(why="prompts are never cut silently; shorten the prompt"),
    "allowed_token_ids": _only(why="not supported yet; use logit_bias"),
    "bad_words": _only([], why="not supported yet; use logit_bias"),
    "logits_processors": _only([], why="code in requests is never run"),
    "return_tokens_as_token_ids": _only(False, why="not supported yet; use return_token_ids"),
    "prompt_embeds": _only(why="tensors in requests are not accepted"),
    "kv_transfer_params": _only(),
    "vllm_xargs": _only({}),
    "guided_whitespace_pattern": _only(why="not supported; white space between JSON's tokens is bounded"),
}

COMPLETION = _table(
    f"{_TAKEN} prompt max_tokens best_of",
    _HARMLESS,
    {**_REFUSED, "suffix": _only("", why="fill-in-the-middle is not supported")},
)

CHAT = _table(
    f"""{_TAKEN} messages max_tokens max_completion_tokens top_logprobs add_generation_prompt continue_final_message
    chat_template_kwargs tools tool_choice parallel_tool_calls include_reasoning reasoning_effort
    thinking_token_budget""",
    f"{_HARMLESS} prediction",
    {
        **_REFUSED,
        "functions": _only([], why="superseded by tools"),
        "function_call": _only("none", "auto", why="superseded by tool_choice"),
        "store": _only(False, why="answers are never stored"),
        "modalities": _only(["text"], why="only ['text'] is supported"),
        "audio": _only(why="audio is not supported"),
        "web_search_options": _only(why="web search is not supported"),
        "reasoning": _only(why="not supported by this model"),
        "verbosity": _only("medium", why="not supported by this model"),
        "best_of": _only(1, why="best_of is not supported for chat; use n"),
        "chat_template": _only(why="templates in requests are not accepted; the model's own is used"),
        "documents": _only([], why="not supported yet"),
        "mm_processor_kwargs": _only({}, why="images, audio and video are not supported yet"),
    },
)


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
