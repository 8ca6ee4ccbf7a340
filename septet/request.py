"""What a caller asks for: sampling parameters and one engine request, in token ids.

Read by every room above; knows no text, no torch, no HTTP. A value that is out of range is refused here, once, with the
name of the field (`InvalidRequest.param`), so every surface gives the same answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from septet.errors import InvalidRequest
from septet.structured import Structured

__all__ = ["FinishReason", "Pin", "Request", "SamplingParams"]

MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP = 64
MAX_STOP_CHARS = 1024
MAX_LOGIT_BIAS = 1024
MAX_SEED = 2**63 - 1
MAX_PINS = 8  # of one request
MAX_TTL_S = 86_400.0
POOLINGS = ("", "mean", "last")
GREEDY_BELOW = 1e-5  # temperature, as vLLM's: dividing logits by less overflows float32 long before it changes a draw


class FinishReason(StrEnum):
    """Why a generation ended. `stop`, `length` as OpenAI names them; `abort`: the caller left; `error` otherwise."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


def _refuse(name: str, value: object, rule: str) -> InvalidRequest:
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the largest
        shown = f"one of {value.bit_length()} bits"
    else:
        shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return InvalidRequest(f"{name} must be {rule}, not {shown}", param=name)


def _number(name: str, value: object, low: float, high: float, *, low_open: bool = False) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool)
    if ok:  # NaN and the infinities fail these comparisons, which are exact for integers of any size
        ok = (value > low if low_open else value >= low) and value <= high  # type: ignore[operator]
    if not ok:
        raise _refuse(name, value, f"a number in {'(' if low_open else '['}{low:g}, {high:g}]")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise _refuse(name, value, f"an integer in [{low}, {high}]")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop; names and defaults as vLLM's, unless a line says otherwise.

    Raises `InvalidRequest` (with `param`) for any value out of range, NaN included.
    """

    n: int = 1  # completions per prompt
    temperature: float = 1.0  # 0 = greedy, and so is anything below GREEDY_BELOW
    top_k: int = 0  # 0 or -1 = off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output (CTRL, arXiv 1909.05858)
    presence_penalty: float = 0.0  # over output only, as OpenAI's
    frequency_penalty: float = 0.0  # over output only, as OpenAI's
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token id -> added to its logit
    seed: int | None = None  # None: the session draws one
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    ignore_eos: bool = False
    min_tokens: int = 0  # no end-of-sequence or stop id before this many output tokens
    max_tokens: int | None = None  # None: up to the context's end
    logprobs: int | None = None  # top alternatives per output token; 0 = the chosen one only
    prompt_logprobs: int | None = None
    structured: Structured | None = None  # a grammar that the output follows; a pydantic model or a schema's dict too

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        _number("temperature", self.temperature, 0.0, 100.0)
        _integer("top_k", self.top_k, -1, 2**31 - 1)
        _number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), MAX_SEED)
        for name in ("include_stop_str_in_output", "skip_special_tokens", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise _refuse(name, getattr(self, name), "true or false")
        self._check_stops()
        self._check_bias()
        _integer("min_tokens", self.min_tokens, 0, 2**31 - 1)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31 - 1)
            if self.min_tokens > self.max_tokens:
                raise _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _integer(name, value, 0, MAX_LOGPROBS)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, without a draw."""
        return self.temperature < GREEDY_BELOW

    def _check_stops(self) -> None:
        if not isinstance(self.stop, tuple | list):
            raise _refuse("stop", self.stop, "a tuple of strings (wrap a single string in one)")
        if not isinstance(self.stop_token_ids, tuple | list):
            raise _refuse("stop_token_ids", self.stop_token_ids, "a tuple of token ids")
        if len(self.stop) > MAX_STOP:
            raise _refuse("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP} strings")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise _refuse("stop", text, f"non-empty strings of at most {MAX_STOP_CHARS} characters")
        if len(self.stop_token_ids) > MAX_STOP:
            raise _refuse("stop_token_ids", f"{len(self.stop_token_ids)} ids", f"at most {MAX_STOP} ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0, 2**31 - 1)

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            raise _refuse("logit_bias", self.logit_bias, "a mapping of token ids to numbers")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise _refuse("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LOGIT_BIAS} entries")
        for token, bias in self.logit_bias.items():
            _integer("logit_bias", token, 0, 2**31 - 1)
            _number("logit_bias", bias, -100.0, 100.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pin:
    """Keep the first `length` tokens of the prompt in the prefix cache: what is not pinned is evicted before them."""

    length: int
    ttl_s: float  # from the first output on; asked for again, from then on
    owner: str = ""  # whose share of the pool it counts for: a key's name

    def __post_init__(self) -> None:
        _integer("length", self.length, 1, 2**31 - 1)
        _number("ttl_s", self.ttl_s, 0.0, MAX_TTL_S, low_open=True)
        if not isinstance(self.owner, str):
            raise _refuse("owner", self.owner, "a string")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence for the engine, in token ids. `id` is made by the server, never by a client (unique per engine).

    `params.max_tokens` is resolved (never None) and `params.seed` is set: the session does both. Stop strings, `n` and
    text are the session's business; the engine reads only the ids, the counts and the sampling values.
    """

    id: str
    tokens: tuple[int, ...]  # the prompt
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()
    priority: int = 0  # lower runs first, as vLLM's
    arrival: float = 0.0  # seconds, monotonic; ties in priority go to the earlier
    cache_salt: str = ""  # requests share cached prefixes only with the same salt
    pins: tuple[Pin, ...] = ()
    pooling: str = ""  # "mean" or "last": the prompt's pooled hidden states are wanted, and one token that nobody reads

    def __post_init__(self) -> None:
        """What the engine's decoder would not take must fail here: over there it looks like a broken connection."""
        if not isinstance(self.id, str) or not self.id:
            raise _refuse("id", self.id, "a non-empty string")
        _integer("priority", self.priority, -(2**31), 2**31 - 1)
        if not isinstance(self.cache_salt, str):
            raise _refuse("cache_salt", self.cache_salt, "a string")
        if not isinstance(self.pins, tuple | list) or len(self.pins) > MAX_PINS:
            raise _refuse("pins", f"{self.pins!r:.40}", f"at most {MAX_PINS} pins")
        if self.pooling not in POOLINGS:
            raise _refuse("pooling", self.pooling, '"mean" or "last"')
