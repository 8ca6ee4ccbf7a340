"""What travels between a client and the engine process: msgpack of these dataclasses, never pickle.

One frame = one message, tagged by its class. The client makes request ids unique per engine. Every submitted request
ends with exactly one `Update` whose `finish_reason` is set, whatever happens, unless the engine dies (the client then
raises EngineDead for each).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec import Struct

from septet.grammar.vocabulary import Vocabulary
from septet.request import FinishReason, Request
from septet.step import Logprobs

__all__ = [
    "STEP_TOKENS",
    "Abort",
    "EngineInfo",
    "EngineStats",
    "Fatal",
    "ScopeBranch",
    "ScopePool",
    "ScopeRow",
    "ScopeView",
    "Shutdown",
    "StatsReply",
    "StatsRequest",
    "Submit",
    "Teach",
    "Update",
]


# -- client to engine -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Submit:
    requests: tuple[Request, ...]
    sent_at: float = 0.0  # monotonic, of the machine; 0 = when it is heard


@dataclass(frozen=True, slots=True)
class Teach:
    """The bytes of every token, once, before the first request with a grammar: the engine knows no text otherwise."""

    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class Abort:
    """End these requests now, wherever they are; unknown or finished ids are ignored."""

    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StatsRequest:
    ticket: int
    scope: bool = False  # with a `ScopeView`: somebody watches


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Abort everything, answer every request, exit with code 0."""


# -- engine to client -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class EngineInfo:
    """First message of an engine that is ready. `choices` are (setting, value, reason) lines for the user."""

    model: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    num_kv_slots: int
    kv_bytes_per_token: int
    weight_bytes: int
    device: str
    dtype: str
    kernels: str
    pid: int
    load_s: float
    choices: tuple[tuple[str, str, str], ...] = ()


class Update(Struct, frozen=True, omit_defaults=True):
    """New output of one request. `finish_reason` set = the last one. `stop_token`: the id that ended it, if one did.

    A msgspec Struct, because one is made, encoded and decoded per row and step: a tenth of a frozen dataclass's cost.
    """

    request: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()  # one per token, when asked for
    prompt_logprobs: tuple[Logprobs, ...] = ()  # positions 1 .. of the prompt, in order, possibly in parts
    finish_reason: FinishReason | None = None
    stop_token: int | None = None  # an eos or stop id; it is included in `tokens`
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache (on the first update)
    pinned: tuple[int, ...] = ()  # with the first token: tokens held by each of the request's pins, 0 = it holds none
    waited_s: float = 0.0  # with the first token: from `sent_at` to the request's first step
    prefill_s: float = 0.0  # with the first token: from that to the token
    pooled: bytes = b""  # with the last update of a request with `pooling`: (D,) float32, little-endian
    error: str | None = None  # with finish_reason ERROR
    error_kind: str = "internal_error"
    error_param: str | None = None  # the field that is wrong, where one is


STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start and gauges of now. Durations in seconds."""

    running: int = 0
    waiting: int = 0
    slots_total: int = 0  # KV slots, the padding slot not counted
    slots_free: int = 0
    slots_cached: int = 0  # held by the prefix tree alone: evictable
    slots_leased: int = 0  # held for running requests (shared prefixes counted once)
    slots_pinned: int = 0  # of the cached and leased ones, held by pins: evicted last
    slots_used: int = 0  # leased slots whose KV is computed (or being computed in the step in flight)
    kv_waste: float = 0.0  # (leased - used) / leased, time-averaged over steps
    kv_waste_max: float = 0.0  # worst step
    steps: int = 0
    prompt_tokens: int = 0  # of admitted requests, cached ones included
    cached_tokens: int = 0  # of those, served by the prefix cache
    computed_tokens: int = 0  # tokens that went through the model
    generated_tokens: int = 0
    preemptions: int = 0
    finished: dict[str, int] = field(default_factory=dict)  # by finish reason
    last_step_rows: int = 0
    last_step_tokens: int = 0
    last_step_prefill_tokens: int = 0
    step_tokens: tuple[int, ...] = ()  # steps of up to each of STEP_TOKENS tokens, and of more; each counted once
    prefill_steps: int = 0  # steps with prefill rows
    mixed_steps: int = 0  # steps with prefill and decode rows together
    step_s: float = 0.0  # total wall time in steps
    host_s: float = 0.0  # of that, scheduling and commit on the host
    progress_at: float = 0.0  # monotonic time of the last finished step
    failed_steps: int = 0  # steps that raised; their requests ended with an error
    audit_failures: int = 0  # audits that found KV slots or rows lost: an error of ours, never to be seen

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class ScopeRow(Struct, frozen=True):
    """One request of the batch, or one that waits. All counts in tokens."""

    state: str  # "prefill" | "decode" | "waiting"
    row: int  # of the executor; -1 while it waits
    prompt: int
    cached: int  # of the prompt, found in the prefix cache
    computed: int  # whose KV is there
    length: int  # that exist, prompt and output
    limit: int  # at which it ends
    priority: int


class ScopePool(Struct, frozen=True):
    """The KV pool in cells of `cell_slots` slots: about how many of each are free, leased, leased more than once."""

    cell_slots: int
    free: list[int]
    leased: list[int]
    shared: list[int]


class ScopeBranch(Struct, frozen=True):
    """One edge near the top of the radix tree. `parent`: an index into the list, -1 below a root."""

    parent: int
    tokens: int
    locks: int  # running requests that hold it
    hits: int  # requests that found it computed
    children: int
    head: tuple[int, ...]  # first token ids; the engine knows no text


class ScopeView(Struct, frozen=True):
    """What runs, as of one moment between two steps. Bounded whatever the engine holds; see `engine/scope.py`."""

    rows: list[ScopeRow]
    more_rows: int  # requests beyond those told
    pool: ScopePool
    tree: list[ScopeBranch]
    took_s: float  # to make this


@dataclass(frozen=True, slots=True)
class StatsReply:
    ticket: int
    stats: EngineStats
    scope: ScopeView | None = None


@dataclass(frozen=True, slots=True)
class Fatal:
    """The engine can't go on (or could not start); it exits non-zero after this."""

    error: str
    error_kind: str = "internal_error"
