"""TGI's generate request as a typed call: every parameter checked, nothing run yet.

Called by `tgi.py` with a decoded body. Raises `InvalidRequest` naming the parameter. Where TGI ignores what it does not
know, this refuses it by name.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.request import MAX_LOGPROBS, SamplingParams
from septet.serve.defaults import filled
from septet.serve.fields import Fields, only, schema_of, table
from septet.structured import Structured

if TYPE_CHECKING:
    from septet.serve.defaults import Names

__all__ = ["DEFAULTED", "GENERATE_SCHEMA", "MAX_BEST_OF", "GenerateCall", "parse_generate", "within_parameters"]

MAX_BEST_OF = 8
PARAMETERS = table(
    {
        "integer": "best_of max_new_tokens seed top_k top_n_tokens truncate",
        "number": "frequency_penalty repetition_penalty temperature top_p",
        "boolean": "decoder_input_details details do_sample return_full_text",
        "array": "stop",
        "object": "grammar",
    },
    "",
    {
        "typical_p": only(1, 1.0, why="typical decoding is not supported; use top_p or min_p by another API"),
        "watermark": only(False, why="watermarks are not supported"),
        "adapter_id": only("", why="adapters are not supported"),
    },
)
BODY = table({"string": "inputs model", "boolean": "stream", "object": "parameters"}, "options")
GENERATE_SCHEMA = schema_of(BODY, "inputs", parameters=schema_of(PARAMETERS))


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateCall:
    model: str | None
    inputs: str
    stream: bool
    params: SamplingParams
    sampled: bool  # else the likeliest tokens are taken, and there is no seed to tell
    details: bool
    prefill: bool  # log-probabilities of the prompt
    top: bool  # the likeliest tokens beside each
    full_text: bool
    truncate: int | None

    @property
    def seed(self) -> int | None:
        return self.params.seed if self.sampled else None


def parse_generate(body: dict[str, Any], *, stream: bool | None) -> GenerateCall:
    """stream: by the route; None = as the body says."""
    fields = Fields(body, BODY)
    given = fields.object("parameters")
    parameters = Fields(given, PARAMETERS)
    if not (inputs := fields.string("inputs", "")):
        raise InvalidRequest("`inputs` cannot be empty", param="inputs")
    stream = fields.boolean("stream", False) if stream is None else stream
    prefill, top = parameters.boolean("decoder_input_details", False), parameters.integer("top_n_tokens", 0)
    if not 0 <= top <= MAX_LOGPROBS:
        raise InvalidRequest(f"`top_n_tokens` must be >= 0 and <= {MAX_LOGPROBS}", param="top_n_tokens")
    if stream and prefill:
        raise InvalidRequest(
            "`decoder_input_details` == true is not supported when streaming tokens", param="decoder_input_details"
        )
    details = parameters.boolean("details", False) or prefill
    sampled = not fields.given("parameters") or _sampled(parameters)
    best_of = _best_of(parameters, stream, sampled)
    wants_logprobs = details or stream or best_of > 1
    return GenerateCall(
        model=fields.string("model", "") or None,
        inputs=inputs,
        stream=stream,
        params=_params(parameters, sampled, best_of, top if wants_logprobs else None, prefill),
        sampled=sampled,
        details=details,
        prefill=prefill,
        top=top > 0,
        full_text=parameters.boolean("return_full_text", False),
        truncate=_truncate(parameters),
    )


_FIELDS = ("temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty", "stop")
DEFAULTED: Names = {**{name: (name,) for name in _FIELDS}, "max_tokens": ("max_new_tokens",)}


def within_parameters(
    body: dict[str, Any], values: dict[str, Any], names: Names
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `defaults.filled`, in `parameters`. A temperature of 0 is TGI's greedy, which has no number for it.

    A seed is no default here: every answer tells the one that it drew, and `best_of` goes with none.
    """
    given = body.get("parameters")
    if given is not None and not isinstance(given, dict):
        return body, {}
    likeliest = values.get("temperature") == 0
    off = {"seed"} | ({"temperature", "top_k", "top_p"} if likeliest else set())
    off |= {"top_k"} if values.get("top_k", 1) < 1 else set()
    kept = {name: value for name, value in values.items() if name not in off}
    drawn = {"do_sample": True} if given is None and not likeliest else {}
    added, rest = filled({**drawn, **(given or {})}, kept, names)
    return {**body, "parameters": added}, rest


def _sampled(parameters: Fields) -> bool:
    """As TGI has it: asked for, or any setting that only sampling makes use of."""
    asked = parameters.boolean("do_sample", False)
    return asked or parameters.raw("temperature", 1) != 1 or parameters.given("top_k") or parameters.given("top_p")


def _best_of(parameters: Fields, stream: bool, sampled: bool) -> int:
    best_of = parameters.integer("best_of", 1)
    if not 1 <= best_of <= MAX_BEST_OF:
        raise InvalidRequest(f"`best_of` must be > 0 and <= {MAX_BEST_OF}. Given: {str(best_of)[:20]}", param="best_of")
    if best_of > 1:
        for wrong, words in (
            (stream, "`best_of` != 1 is not supported when streaming tokens"),
            (not sampled, "you must use sampling when `best_of` is > 1"),
            (parameters.given("seed"), "`seed` must not be set when `best_of` > 1"),
        ):
            if wrong:
                raise InvalidRequest(words, param="best_of")
    return best_of


def _truncate(parameters: Fields) -> int | None:
    if not parameters.given("truncate"):
        return None
    if not 0 < (value := parameters.integer("truncate", 0)) < 2**31:
        raise InvalidRequest("`truncate` must be strictly positive", param="truncate")
    return value


_THEIR_NAMES = {"max_tokens": "max_new_tokens", "structured": "grammar", "logprobs": "top_n_tokens"}


def _params(parameters: Fields, sampled: bool, best_of: int, logprobs: int | None, prefill: bool) -> SamplingParams:
    if parameters.raw("temperature", 1) in (0, 0.0):
        raise InvalidRequest("`temperature` must be strictly positive", param="temperature")
    if parameters.raw("top_k", 1) in (0, -1):
        raise InvalidRequest("`top_k` must be strictly positive", param="top_k")
    names = ("temperature", "top_k", "top_p", "repetition_penalty", "frequency_penalty")
    values = {name: parameters.raw(name) for name in names if parameters.given(name)}
    if not sampled:
        values["temperature"] = 0.0
    try:
        return SamplingParams(
            **values,
            n=best_of,
            seed=_seed(parameters),
            max_tokens=parameters.raw("max_new_tokens"),
            stop=tuple(parameters.array("stop")),
            include_stop_str_in_output=True,  # TGI's texts end with it
            logprobs=logprobs,
            prompt_logprobs=0 if prefill else None,
            structured=_grammar(parameters),
        )
    except InvalidRequest as error:
        raise error.renamed(_THEIR_NAMES) from None


def _seed(parameters: Fields) -> int:
    """TGI's are unsigned; ours are the same bits with a sign. One is drawn here, because the answer tells it."""
    if not parameters.given("seed"):
        return secrets.randbits(63)
    seed = parameters.integer("seed", 0)
    if not 0 <= seed < 2**64:
        raise InvalidRequest("`seed` must be an unsigned integer of 64 bits", param="seed")
    return seed - 2**64 if seed >= 2**63 else seed


def _grammar(parameters: Fields) -> Structured | None:
    if not parameters.given("grammar"):
        return None
    grammar = parameters.object("grammar")
    kind, value = grammar.get("type"), grammar.get("value")
    if kind == "regex" and isinstance(value, str):
        return Structured.regex(value)
    if kind in ("json", "json_object") and isinstance(value, dict | str):
        return Structured.json_schema(value)
    if kind == "json_schema" and isinstance(value, dict) and isinstance(value.get("schema"), dict):
        return Structured.json_schema(value["schema"])
    raise InvalidRequest('grammar must be {"type": "json", "regex" or "json_schema", "value": ...}', param="grammar")
