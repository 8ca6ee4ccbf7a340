"""OpenAI's two generation requests as typed calls: every field checked, nothing run yet.

Called by `openai.py` with a decoded body. Raises `InvalidRequest` naming the field. Knows field names and their rules,
not how an answer is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from septet.errors import InvalidRequest
from septet.request import SamplingParams
from septet.serve.fields import CHAT, COMPLETION, Fields
from septet.serve.structured import structured_of
from septet.serve.tools import checked_calls, checked_id, tool_choice
from septet.session.reading import Reading

__all__ = ["Call", "ChatCall", "CompletionCall", "messages_of", "parse_chat", "parse_completion", "template_options"]

MAX_MESSAGES = 4096
MAX_PARTS = 256
MAX_CHOICES = 1024  # prompts of one request times n
ROLES = ("system", "developer", "user", "assistant", "tool")
_ROLE_FIELDS = {
    "assistant": ("tool_calls", "reasoning", "reasoning_content"),
    "tool": ("tool_call_id",),
}
RESERVED = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}
_SAMPLING = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "prompt_logprobs",
)
_SWITCHES = ("ignore_eos", "include_stop_str_in_output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What both dialect routes share."""

    model: str | None  # None: whichever is served
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    usage_in_chunks: bool = False  # in every chunk, as far as it is
    echo: bool = False
    return_token_ids: bool = False
    priority: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCall(Call):
    messages: list[dict[str, Any]]
    template_options: dict[str, Any] = field(default_factory=dict)
    reading: Reading
    include_reasoning: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall(Call):
    prompts: list[str | list[int]]
    add_special_tokens: bool = True
    only_prompt: bool = False  # max_tokens 0 with echo: score the prompt, drop the one token that is made


def parse_completion(body: dict[str, Any]) -> CompletionCall:
    fields = Fields(body, COMPLETION)
    prompts = _prompts(fields)
    echo = fields.boolean("echo", False)
    max_tokens = fields.integer("max_tokens", 16)
    only_prompt = max_tokens == 0 and echo
    logprobs = fields.raw("logprobs")
    own = {"max_tokens": 1 if only_prompt else max_tokens, "logprobs": logprobs}
    if echo and logprobs is not None:
        own["prompt_logprobs"] = fields.raw("prompt_logprobs", logprobs)
    params = _params(fields, own)
    if fields.integer("best_of", params.n) != params.n:
        raise InvalidRequest(f"best_of is supported only when it equals n ({params.n})", param="best_of")
    _check_choices(len(prompts), params.n)
    return CompletionCall(
        **_shared(fields, params),
        echo=echo,
        prompts=prompts,
        add_special_tokens=fields.boolean("add_special_tokens", True),
        only_prompt=only_prompt,
    )


def parse_chat(body: dict[str, Any]) -> ChatCall:
    fields = Fields(body, CHAT)
    messages = messages_of(fields)
    own = {"max_tokens": _chat_max_tokens(fields), "logprobs": _chat_logprobs(fields)}
    options = template_options(fields)
    if fields.boolean("add_special_tokens", False):
        raise InvalidRequest(
            "add_special_tokens is not supported for chat: the template writes them", param="add_special_tokens"
        )
    try:
        params = _params(fields, own)
    except InvalidRequest as error:
        raise _in_chats_words(error, fields) from None
    return ChatCall(
        **_shared(fields, params),
        echo=fields.boolean("echo", False),
        messages=messages,
        template_options=options,
        reading=_reading(fields),
        include_reasoning=fields.boolean("include_reasoning", True),
    )


def _reading(fields: Fields) -> Reading:
    budget = fields.integer("thinking_token_budget", 0)
    if not 0 <= budget < 2**31:
        raise InvalidRequest("thinking_token_budget must be 0 or more tokens", param="thinking_token_budget")
    return Reading(
        tools=tool_choice(fields),
        reasoning=True,
        thinking_budget=budget if fields.given("thinking_token_budget") else None,
        live=fields.boolean("stream", False),
    )


def _shared(fields: Fields, params: SamplingParams) -> dict[str, Any]:
    stream = fields.boolean("stream", False)
    if stream and fields.given("prompt_logprobs"):
        raise InvalidRequest("prompt_logprobs can't be streamed; set stream to false", param="prompt_logprobs")
    return {
        "model": fields.optional_string("model"),
        "params": params,
        "stream": stream,
        **_usage_options(fields, stream),
        "return_token_ids": fields.boolean("return_token_ids", False),
        "priority": fields.integer("priority", 0),
        "cache_salt": fields.string("cache_salt", ""),
    }


def _usage_options(fields: Fields, stream: bool) -> dict[str, bool]:
    options = fields.object("stream_options")
    if fields.given("stream_options") and not stream:
        raise InvalidRequest("stream_options is allowed only when stream is true", param="stream_options")
    for name, value in options.items():
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            raise InvalidRequest(f"unknown field 'stream_options.{name[:80]}'", param="stream_options")
        if value is not None and not isinstance(value, bool):
            raise InvalidRequest(f"stream_options.{name} must be true or false", param="stream_options")
    wanted = bool(options.get("include_usage"))
    return {"include_usage": wanted, "usage_in_chunks": wanted and bool(options.get("continuous_usage_stats"))}


def _params(fields: Fields, own: dict[str, Any]) -> SamplingParams:
    """`SamplingParams` checks types and ranges itself; here only JSON's shapes are turned into its own."""
    values = {name: fields.raw(name) for name in _SAMPLING if fields.given(name)}
    values |= {name: fields.boolean(name, False) for name in _SWITCHES}
    values["skip_special_tokens"] = fields.boolean("skip_special_tokens", True)
    stop = fields.raw("stop", [])
    if not isinstance(stop, str | list):
        raise InvalidRequest("stop must be a string or an array of strings", param="stop")
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(fields.array("stop_token_ids"))
    values["logit_bias"] = _logit_bias(fields.object("logit_bias"))
    values["structured"] = structured_of(fields)
    return SamplingParams(**(values | own))


def _logit_bias(bias: dict[str, Any]) -> dict[int, Any]:
    for key in bias:
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise InvalidRequest(f"logit_bias has the key {key[:40]!r}, which is no token id", param="logit_bias")
    return {int(key): value for key, value in bias.items()}


def template_options(fields: Fields) -> dict[str, Any]:
    """What `ChatTemplate.render` gets besides the messages; it holds the kwargs to the template's own variables."""
    options = dict(fields.object("chat_template_kwargs"))
    for name in RESERVED & set(options):
        raise InvalidRequest(f"chat_template_kwargs can't set {name}", param="chat_template_kwargs")
    goes_on = fields.boolean("continue_final_message", False)
    if goes_on and fields.boolean("add_generation_prompt", False):
        raise InvalidRequest(
            "continue_final_message needs add_generation_prompt to be false", param="continue_final_message"
        )
    if fields.given("reasoning_effort"):
        options["reasoning_effort"] = fields.string("reasoning_effort", "")
    options["continue_final_message"] = goes_on
    options["add_generation_prompt"] = fields.boolean("add_generation_prompt", True) and not goes_on
    return options


def _in_chats_words(error: InvalidRequest, fields: Fields) -> InvalidRequest:
    """Chat has other names for two sampling parameters: an error speaks of the field that was given."""
    names = {"max_tokens": "max_completion_tokens", "logprobs": "top_logprobs"}
    name = names.get(error.param or "")
    if name is None or error.param is None or not fields.given(name):
        return error
    return error.renamed({error.param: name})


def _chat_max_tokens(fields: Fields) -> int | None:
    new, old = fields.raw("max_completion_tokens"), fields.raw("max_tokens")
    if new is not None and old is not None and new != old:
        raise InvalidRequest("max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens")
    return new if new is not None else old


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs", False)
    if not fields.given("top_logprobs"):
        return 0 if wanted else None
    if not wanted:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    return fields.integer("top_logprobs", 0)


def _check_choices(n_prompts: int, n: int) -> None:
    if n_prompts * n > MAX_CHOICES:
        raise InvalidRequest(f"{n_prompts} prompts times n = {n} is more than {MAX_CHOICES} choices", param="prompt")


def _prompts(fields: Fields) -> list[str | list[int]]:
    """A string, token ids, or a list of either. Ids themselves are checked by the session."""
    prompt = fields.raw("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt must be a string, an array of token ids, or an array of either", param="prompt")
    if isinstance(prompt[0], int):
        return [prompt]
    if len(prompt) > MAX_CHOICES:
        raise InvalidRequest(f"prompt holds {len(prompt)} prompts, at most {MAX_CHOICES} are taken", param="prompt")
    for one in prompt:
        if not isinstance(one, str | list):
            raise InvalidRequest("prompt must hold only strings, or only arrays of token ids", param="prompt")
    return prompt


def messages_of(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.array("messages")
    if not messages:
        raise InvalidRequest("messages must be an array with at least one message", param="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages holds {len(messages)}, at most {MAX_MESSAGES} are taken", param="messages")
    return [_message(f"messages[{i}]", message) for i, message in enumerate(messages)]


def _message(where: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(f"{where} must be an object with role and content", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise InvalidRequest(f"{where}.role must be one of {', '.join(ROLES)}, not {str(role)[:40]!r}", param=where)
    own = _ROLE_FIELDS.get(role, ())
    for name, value in message.items():
        if name not in ("role", "content", "name", *own) and value not in (None, []):
            raise InvalidRequest(f"{where}.{name[:80]} is not supported yet", param=f"{where}.{name[:80]}")
    result: dict[str, Any] = {"role": "system" if role == "developer" else role}
    if role == "assistant" and message.get("tool_calls") not in (None, []):
        result["tool_calls"] = checked_calls(f"{where}.tool_calls", message["tool_calls"])
    content = message.get("content")
    result["content"] = "" if content is None and role == "assistant" else _content(where, content)  # thoughts or calls
    if role == "tool":
        result["tool_call_id"] = checked_id(f"{where}.tool_call_id", message.get("tool_call_id"))
    thoughts = (message.get("reasoning") or message.get("reasoning_content")) if role == "assistant" else None
    if thoughts is not None:
        if not isinstance(thoughts, str):
            raise InvalidRequest(f"{where}.reasoning must be a string", param=f"{where}.reasoning")
        result["reasoning_content"] = thoughts
    name = message.get("name")
    if name is not None:
        if not isinstance(name, str) or len(name) > 256:
            raise InvalidRequest(f"{where}.name must be a string of at most 256 characters", param=f"{where}.name")
        result["name"] = name
    return result


def _content(where: str, content: Any) -> str:
    """Text, or the text parts joined by line ends as vLLM does."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or len(content) > MAX_PARTS:
        raise InvalidRequest(f"{where}.content must be a string or at most {MAX_PARTS} parts", param=f"{where}.content")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(
                f"{where}.content[{i}] is of type {str(kind)[:40]!r}; only text parts are supported",
                param=f"{where}.content[{i}]",
            )
        texts.append(part["text"])
    return "\n".join(texts)
