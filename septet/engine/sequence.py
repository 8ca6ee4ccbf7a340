"""One request inside the engine: its tokens, how far they are planned and computed, what it holds.

Owned by the scheduler, which alone changes it. Knows no other request, no policy, no torch. A sequence is waiting (no
lease), running (a lease and a row) or ended; it is never in two of these.

    tokens   [ prompt .............. | output known to the host ][ sampled in flight, value on the device only ]
             0        computed ->        planned ->               length                              limit
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from array import array

    from septet.kv.cache import Lease
    from septet.request import Request

__all__ = ["MIN_SHARED", "NOTHING_OWED", "Sequence"]

NOTHING_OWED = 2**62
MIN_SHARED = 32  # tokens: a shorter common prefix is not worth waiting for


@dataclass(slots=True, eq=False)
class Sequence:
    """Invariant while running: computed <= planned <= length <= limit, and len(tokens) <= length."""

    request: Request
    tokens: array[int]  # prompt and output, as far as the host knows them
    n_prompt: int
    limit: int  # prompt and output tokens at which it ends with LENGTH
    order: tuple[int, float, int]  # (priority, arrival, number): lower runs first
    stops: frozenset[int]  # eos and stop ids that end it
    length: int  # tokens that exist: known ones, and one for each sampling row in flight
    planned: int = 0  # positions handed to the executor, cached ones included
    computed: int = 0  # positions whose KV is known to be computed
    owed: int = NOTHING_OWED  # the first position whose token the executor has not been given
    in_flight: int = 0  # plans that name it and are neither committed nor failed
    last_step: int = -1  # the newest plan that names it
    row: int = -1  # executor row, while running
    lease: Lease | None = None  # while running
    joined: bool = False  # the executor has been told of `row`
    private: bool = False  # this life computes every position itself, and shares them when it leaves
    n_known: int = 0  # len(tokens) when it was last admitted: positions below are prefill
    wants_prompt_logprobs: bool = False  # some are still to be delivered
    n_prompt_logprobs: int = 0  # delivered: positions 1 .. of the prompt
    cached_tokens: int | None = None  # prompt tokens found in the cache at first admission
    answered: bool = False  # the first update is out
    ended: bool = False
    probe: tuple[int, int, int] = (-1, 0, 0)  # (cache version, held, locked): the last answer of KVCache.probe
    id: str = field(init=False)  # the request's
    head: tuple[str, bytes] | None = field(init=False)  # salt and first tokens: who might share a prefix worth it

    def __post_init__(self) -> None:
        self.id = self.request.id
        salted = (self.request.cache_salt, self.tokens[:MIN_SHARED].tobytes())
        self.head = salted if self.n_prompt > MIN_SHARED else None

    @property
    def priority(self) -> int:
        return self.order[0]

    @property
    def whole_prompt(self) -> bool:
        """Every position of its prompt must go through the model: nothing of it may come from the cache."""
        return self.wants_prompt_logprobs or self.request.pooling != ""

    @property
    def wanted(self) -> int:
        """Tokens to compute next. 0 once the token that ends it by length is on its way."""
        return self.length - self.planned if self.length < self.limit else 0

    @property
    def ending(self) -> bool:
        """Its last token is in flight: it needs no further step, row or slot."""
        return self.length >= self.limit
