"""llama.cpp's completion request as a typed call: every field checked, nothing run yet.

Called by `llamacpp.py` with a decoded body. Raises `InvalidRequest` naming the field. Defaults are llama.cpp's. A
sampler that Septet does not have may be named as long as it is off.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

from septet.errors import InvalidRequest
from septet.request import MAX_LOGIT_BIAS, SamplingParams
from septet.serve.defaults import OPENAI_NAMES
from septet.serve.fields import Fields, only, schema_of, table
from septet.structured import Structured

__all__ = ["COMPLETION_SCHEMA", "DEFAULTED", "DEFAULTS", "CompletionCall", "Piece", "parse_completion"]

Piece = str | int  # of a prompt: text, or a token
MAX_PROMPTS = 128
MAX_CHOICES = 1024  # prompts of one request times n_cmpl
DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}
DEFAULTED = {**OPENAI_NAMES, "repetition_penalty": ("repeat_penalty",), "max_tokens": ("n_predict", "max_tokens")}
_NAMES = {
    "n_cmpl": "n",
    "n_predict": "max_tokens",
    "n_probs": "logprobs",
    "repeat_penalty": "repetition_penalty",
    "grammar": "structured",
}
_THEIR_NAMES = {ours: theirs for theirs, ours in _NAMES.items()}
_SAMPLERS = {"top_k", "top_p", "min_p", "temperature", "penalties"}
_OFF = {"dry", "typ_p", "typical_p", "xtc", "top_n_sigma", "infill", "adaptive_p"}  # never on, so they may be listed
COMPLETION = table(
    {
        "string": "model grammar",
        "boolean": "stream ignore_eos cache_prompt return_tokens timings_per_token",
        "integer": "n_predict max_tokens n_cmpl n top_k seed n_probs repeat_last_n",
        "number": "temperature top_p min_p repeat_penalty presence_penalty frequency_penalty",
        "array": "stop samplers response_fields",
        "": "prompt logit_bias json_schema",
    },
    """id_slot n_keep n_discard n_cache_reuse dynatemp_exponent dry_base dry_allowed_length dry_penalty_last_n
    dry_sequence_breakers xtc_threshold mirostat_tau mirostat_eta sse_ping_interval penalize_nl""",
    {
        "dynatemp_range": only(0, 0.0, why="dynamic temperature is not supported"),
        "dry_multiplier": only(0, 0.0, why="the DRY sampler is not supported"),
        "xtc_probability": only(0, 0.0, why="the XTC sampler is not supported"),
        "mirostat": only(0, why="mirostat is not supported"),
        "typical_p": only(1, 1.0, why="typical sampling is not supported"),
        "top_n_sigma": only(-1, -1.0, 0, 0.0, why="the top-n-sigma sampler is not supported"),
        "min_keep": only(0, 1, why="not supported"),
        "n_indent": only(0, why="not supported"),
        "t_max_predict_ms": only(0, -1, why="not supported; give `timeout` in seconds"),
        "return_progress": only(False),
        "post_sampling_probs": only(False, why="not supported; log-probabilities are those before sampling"),
        "lora": only([], why="adapters are not supported"),
    },
)
COMPLETION_SCHEMA = schema_of(COMPLETION, "prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionCall:
    model: str | None
    prompts: list[list[Piece]]
    in_array: bool  # several prompts: so are the answers
    params: SamplingParams
    bias: list[tuple[Piece, float]]  # texts stand for their tokens
    stream: bool
    only_prompt: bool  # n_predict 0: compute the prompt, so that the next request finds it in the cache
    return_tokens: bool
    timings: bool  # with every part of a stream
    response_fields: list[str]
    cache_salt: str  # of its own where the cache is not wanted
    settings: dict[str, Any]  # as told in the answer


def parse_completion(body: dict[str, Any]) -> CompletionCall:
    fields = Fields(body, COMPLETION)
    prompts, in_array = _prompts(fields.raw("prompt"))
    n_predict = fields.integer("n_predict", fields.integer("max_tokens", -1))
    if n_predict < -2:
        raise InvalidRequest("n_predict must be -1 (no limit), 0 (only the prompt) or more", param="n_predict")
    params = _params(fields, n_predict)
    if len(prompts) * params.n > MAX_CHOICES:
        raise InvalidRequest(f"{len(prompts)} prompts times n_cmpl = {params.n} is too much", param="n_cmpl")
    stream = fields.boolean("stream", False)
    if any(not isinstance(name, str) for name in fields.array("response_fields")):
        raise InvalidRequest("response_fields must be an array of names", param="response_fields")
    cached = fields.boolean("cache_prompt", True)
    return CompletionCall(
        model=fields.optional_string("model"),
        prompts=prompts,
        in_array=in_array or params.n > 1,
        params=params,
        bias=_bias(fields.raw("logit_bias", [])),
        stream=stream,
        only_prompt=n_predict == 0,
        return_tokens=fields.boolean("return_tokens", False),
        timings=fields.boolean("timings_per_token", False),
        response_fields=fields.array("response_fields"),
        cache_salt="" if cached else secrets.token_hex(16),
        settings=_settings(params, n_predict, stream),
    )


def _params(fields: Fields, n_predict: int) -> SamplingParams:
    values: dict[str, Any] = DEFAULTS | {
        name: fields.raw(name)
        for name in ("temperature", "top_k", "top_p", "min_p", "repeat_penalty", "presence_penalty")
        if fields.given(name)
    }
    values["frequency_penalty"] = fields.raw("frequency_penalty", 0.0)
    values |= _switched_off(fields)
    if isinstance(values["temperature"], int | float) and values["temperature"] < 0:  # the likeliest
        values["temperature"] = 0.0
    seed = fields.integer("seed", -1)
    values |= {
        "n_cmpl": fields.integer("n_cmpl", fields.integer("n", 1)),
        "n_predict": max(n_predict, 1) if n_predict >= 0 else None,
        "seed": None if seed in (-1, 2**32 - 1) else seed,
        "stop": tuple(text for text in fields.array("stop") if text != ""),
        "ignore_eos": fields.boolean("ignore_eos", False),
        "n_probs": fields.integer("n_probs", 0) or None,
        "grammar": _structured(fields),
    }
    try:
        return SamplingParams(**{_NAMES.get(name, name): value for name, value in values.items()})
    except InvalidRequest as error:
        raise error.renamed(_THEIR_NAMES) from None


def _switched_off(fields: Fields) -> dict[str, Any]:
    """What `samplers` leaves out, and what `repeat_last_n` 0 says. The order is Septet's own."""
    off: dict[str, Any] = {}
    neutral = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
    penalties = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    if fields.given("samplers"):
        listed = set(map(str, fields.array("samplers")))
        if unknown := sorted(listed - _SAMPLERS - _OFF):
            raise InvalidRequest(f"samplers has the unknown name {unknown[0][:40]!r}", param="samplers")
        off |= {name: value for name, value in neutral.items() if name not in listed}
    return off | (penalties if fields.integer("repeat_last_n", 64) == 0 else {})


def _structured(fields: Fields) -> Structured | None:
    grammar, schema = fields.string("grammar", ""), fields.raw("json_schema")
    if grammar and schema is not None:
        raise InvalidRequest("grammar and json_schema can't both bind the answer; give one", param="json_schema")
    if schema is not None:
        if not isinstance(schema, dict | bool):
            raise InvalidRequest("json_schema must be a JSON schema", param="json_schema")
        return Structured.json_schema(schema)
    return Structured.grammar(grammar) if grammar else None


def _bias(value: Any) -> list[tuple[Piece, float]]:
    """Pairs of a token (or a text) and what is added to its logit; false forbids it."""
    pairs = [[_key(k), v] for k, v in value.items()] if isinstance(value, dict) else value
    if not isinstance(pairs, list) or len(pairs) > MAX_LOGIT_BIAS:
        raise InvalidRequest(f"logit_bias must be an array of at most {MAX_LOGIT_BIAS} pairs", param="logit_bias")
    found: list[tuple[Piece, float]] = []
    for pair in pairs:
        token, bias = pair if isinstance(pair, list) and len(pair) == 2 else (None, None)
        bias = -100.0 if bias is False else bias
        if type(token) not in (int, str) or type(bias) not in (int, float):
            raise InvalidRequest("logit_bias must hold pairs of a token or a text and a number", param="logit_bias")
        found.append((token, bias))  # type: ignore[arg-type]
    return found


def _key(key: str) -> Piece:
    return int(key) if key.isascii() and key.isdigit() and len(key) < 12 else key


# -- prompts ----------------------------------------------------------------------------------------------------------
def _prompts(value: Any) -> tuple[list[list[Piece]], bool]:
    """(each prompt in pieces, whether there were several)."""
    if not isinstance(value, list) or (value and all(type(part) in (int, str) for part in value) and _mixed(value)):
        return [_pieces(value)], False
    if not 0 < len(value) <= MAX_PROMPTS:
        raise InvalidRequest(f"prompt must hold 1 to {MAX_PROMPTS} prompts", param="prompt")
    return [_pieces(one) for one in value], True


def _mixed(value: list[Any]) -> bool:
    return any(type(part) is int for part in value)


def _pieces(value: Any) -> list[Piece]:
    if isinstance(value, dict):
        if value.get("multimodal_data"):
            raise InvalidRequest("prompt.multimodal_data: this model takes text only", param="prompt")
        value = value.get("prompt_string")
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or any(type(part) not in (int, str) for part in value):
        raise InvalidRequest("prompt must be a string, an array of tokens and strings, or several of these")
    return value


def _settings(params: SamplingParams, n_predict: int, stream: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "n_predict": n_predict,
        "max_tokens": n_predict,
        "seed": -1 if params.seed is None else params.seed,
    }
    told |= {name: getattr(params, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    told |= {"repeat_penalty": params.repetition_penalty, "repeat_last_n": -1, "typical_p": 1.0, "mirostat": 0}
    told |= {name: getattr(params, name) for name in ("presence_penalty", "frequency_penalty", "ignore_eos")}
    bound = params.structured.spec if params.structured is not None else ""
    told |= {"stop": list(params.stop), "stream": stream, "n_probs": params.logprobs or 0, "grammar": bound}
    return told | {"samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"]}
