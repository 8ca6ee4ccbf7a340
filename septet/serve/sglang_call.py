"""SGLang's generate request as a typed call: every field checked, nothing run yet.

Called by `sglang.py` with a decoded body. Raises `InvalidRequest` naming the field. A client's request id is told back
and used for nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.request import SamplingParams
from septet.serve.defaults import OPENAI_NAMES, filled
from septet.serve.fields import PROMPT, Fields, only, schema_of, table
from septet.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.serve.defaults import Names

__all__ = [
    "ENCODE",
    "GENERATE_SCHEMA",
    "SAMPLING_NAMES",
    "GenerateCall",
    "parse_generate",
    "prompts_of",
    "within_sampling",
]

MAX_PROMPTS = 1024
MAX_CHOICES = 1024  # prompts of one request times n
MAX_ID = 256
_NO_TENSORS = only(why="tensors in requests are not accepted")
_TEXT_ONLY = only([], why="this model takes text only")
BODY = table(
    {
        "string": "model extra_key",
        "boolean": "stream return_logprob return_text_in_logprobs",
        "integer": "logprob_start_len top_logprobs_num priority",
        "": "text input_ids sampling_params rid",
    },
    "log_metrics modalities routing_key",
    {
        "input_embeds": _NO_TENSORS,
        "image_data": _TEXT_ONLY,
        "audio_data": _TEXT_ONLY,
        "video_data": _TEXT_ONLY,
        "token_ids_logprob": only([], why="log-probabilities of chosen tokens are not supported"),
        "lora_path": only("", why="adapters are not supported"),
        "custom_logit_processor": only(why="code in requests is never run"),
        "return_hidden_states": only(False, why="hidden states are not told"),
        "session_params": only({}, why="sessions are not supported"),
        "background": only(False, why="not supported"),
    },
)
SAMPLING = table(
    {
        "integer": "max_new_tokens min_new_tokens n top_k sampling_seed seed",
        "number": "temperature top_p min_p frequency_penalty presence_penalty repetition_penalty",
        "boolean": "ignore_eos skip_special_tokens no_stop_trim",
        "array": "stop_token_ids",
        "string": "regex ebnf",
        "object": "logit_bias",
        "": "stop json_schema structural_tag",
    },
    "stream_interval",
    {
        "spaces_between_special_tokens": only(True, why="only true is supported"),
        "stop_regex": only([], why="stops are plain texts"),
        "custom_params": only({}, why="code in requests is never run"),
    },
)
ENCODE = table({"string": "model", "": "text input_ids rid"})
GENERATE_SCHEMA = schema_of(BODY, text=PROMPT, input_ids=PROMPT, sampling_params=schema_of(SAMPLING))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    model: str | None
    prompts: list[str | list[int]]
    in_array: bool  # several prompts or choices: so are the answers
    ids: list[str]  # the client's names of its prompts, or none
    params: SamplingParams
    only_prompt: bool  # max_new_tokens 0: score the prompt, drop the one token that is made
    stream: bool
    logprobs: bool
    input_from: int | None  # position from which the prompt's log-probabilities are told
    texts: bool  # beside the ids of log-probabilities
    priority: int
    cache_salt: str


def parse_generate(body: dict[str, Any]) -> GenerateCall:
    fields = Fields(body, BODY)
    prompts, several = prompts_of(fields)
    logprobs, start = fields.boolean("return_logprob", False), fields.integer("logprob_start_len", -1)
    top = fields.integer("top_logprobs_num", 0)
    if start < -1:
        raise InvalidRequest(
            "logprob_start_len must be -1 (none of the prompt) or a position", param="logprob_start_len"
        )
    with_input = logprobs and start >= 0
    params, only_prompt = _params(_sampling(fields), top if logprobs else None, top if with_input else None)
    if len(prompts) * params.n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts times n = {params.n} is too much", param="n")
    return GenerateCall(
        model=fields.optional_string("model"),
        prompts=prompts,
        in_array=several or params.n > 1,
        ids=_ids(fields, len(prompts)),
        params=params,
        only_prompt=only_prompt,
        stream=fields.boolean("stream", False),
        logprobs=logprobs,
        input_from=start if with_input else None,
        texts=fields.boolean("return_text_in_logprobs", False),
        priority=fields.integer("priority", 0),
        cache_salt=fields.string("extra_key", ""),
    )


SAMPLING_NAMES: Names = {**OPENAI_NAMES, "max_tokens": ("max_new_tokens",), "seed": ("sampling_seed", "seed")}


def within_sampling(
    body: dict[str, Any], values: dict[str, Any], names: Names
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `defaults.filled`, in `sampling_params`: one, or one for each prompt. What is odd is left to the parser."""
    given = body.get("sampling_params") or {}
    several = given if isinstance(given, list) else [given]
    if not all(isinstance(one, dict) for one in several):
        return body, {}
    settings = [filled(one, values, names)[0] for one in several]
    return {**body, "sampling_params": settings if isinstance(given, list) else settings[0]}, {}


def prompts_of(fields: Fields) -> tuple[list[str | list[int]], bool]:
    """(the prompts, whether they came in an array). Ids themselves are checked by the session."""
    text, ids = fields.raw("text"), fields.raw("input_ids")
    if (text is None) == (ids is None):
        raise InvalidRequest("give either text or input_ids", param="text")
    if isinstance(text, str):
        return [text], False
    if isinstance(ids, list) and ids and not isinstance(ids[0], list):
        return [ids], False
    name, given, kind = ("text", text, str) if ids is None else ("input_ids", ids, list)
    if not isinstance(given, list) or not 0 < len(given) <= MAX_PROMPTS:
        raise InvalidRequest(f"{name} must be one prompt or an array of at most {MAX_PROMPTS}", param=name)
    if not all(isinstance(one, kind) for one in given):
        raise InvalidRequest(f"{name} must hold only prompts of one kind", param=name)
    return given, True


def _sampling(fields: Fields) -> Fields:
    given = fields.raw("sampling_params", {})
    if isinstance(given, list) and given and all(one == given[0] for one in given):
        given = given[0]
    if not isinstance(given, dict):
        raise InvalidRequest("sampling_params must be an object, the same for every prompt", param="sampling_params")
    return Fields(given, SAMPLING)


def _ids(fields: Fields, n: int) -> list[str]:
    given = fields.raw("rid", [])
    ids = [given] if isinstance(given, str) else given
    if not isinstance(ids, list) or (ids and len(ids) != n):
        raise InvalidRequest("rid must be one string for each prompt", param="rid")
    if not all(isinstance(one, str) and 0 < len(one) <= MAX_ID for one in ids):
        raise InvalidRequest(f"rid must be 1 to {MAX_ID} characters", param="rid")
    return ids


_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "sampling_seed": "seed"}
_THEIR_NAMES = {ours: theirs for theirs, ours in _NAMES.items()} | {
    "logprobs": "top_logprobs_num",
    "prompt_logprobs": "top_logprobs_num",
}
_PLAIN = """max_new_tokens min_new_tokens n top_k seed sampling_seed temperature top_p min_p frequency_penalty
    presence_penalty repetition_penalty"""


def _params(fields: Fields, logprobs: int | None, prompt_logprobs: int | None) -> tuple[SamplingParams, bool]:
    values = {_NAMES.get(name, name): fields.raw(name) for name in _PLAIN.split() if fields.given(name)}
    values.setdefault("max_tokens", 128)
    only_prompt = type(values["max_tokens"]) is int and values["max_tokens"] == 0
    stop = fields.raw("stop", [])
    if not isinstance(stop, str | list):
        raise InvalidRequest("stop must be a string or an array of strings", param="stop")
    bias = fields.object("logit_bias")
    if any(not (key.isascii() and key.isdigit() and len(key) < 12) for key in bias):
        raise InvalidRequest("logit_bias must have token ids for its keys", param="logit_bias")
    try:
        params = SamplingParams(
            **(values | ({"max_tokens": 1} if only_prompt else {})),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(fields.array("stop_token_ids")),
            ignore_eos=fields.boolean("ignore_eos", False),
            skip_special_tokens=fields.boolean("skip_special_tokens", True),
            include_stop_str_in_output=fields.boolean("no_stop_trim", False),
            logit_bias={int(key): value for key, value in bias.items()},
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            structured=_structured(fields),
        )
    except InvalidRequest as error:
        raise error.renamed(_THEIR_NAMES) from None
    return params, only_prompt


def _structured(fields: Fields) -> Structured | None:
    found = [name for name in _GRAMMARS if fields.given(name)]
    if len(found) > 1:
        raise InvalidRequest(f"{' and '.join(found)} can't both bind the answer; give one", param=found[1])
    if not found:
        return None
    try:
        return _GRAMMARS[found[0]](fields.raw(found[0]))
    except InvalidRequest as error:
        raise InvalidRequest(f"{found[0]}: {error.message.removeprefix('structured: ')}", param=found[0]) from None


def _schema(value: Any) -> Structured:
    if not isinstance(value, str | dict):
        raise InvalidRequest("must be a JSON schema, as text or as an object")
    return Structured.json_schema(value)


def _tag(value: Any) -> Structured:
    try:
        tag = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        tag = None
    if not isinstance(tag, dict):
        raise InvalidRequest("must be an object, or one as JSON text")
    return Structured.structural_tag({name: part for name, part in tag.items() if name != "type"})


_GRAMMARS: dict[str, Callable[[Any], Structured]] = {
    "regex": Structured.regex,
    "json_schema": _schema,
    "ebnf": Structured.grammar,
    "structural_tag": _tag,
}
