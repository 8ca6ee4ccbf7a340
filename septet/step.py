"""One engine step as plain integers: what the scheduler decides, what every executor receives, what comes back.

Owned by the base room, encoded by msgpack, loggable, replayable. Invariants:

* A plan row says "compute these `n` tokens of this row, starting at position `start`". Prefill, chunk, prefix hit,
  decode, draft verification and recomputation are values of `n`, not modes.
* Executors keep per-row state between steps: `tokens[row, position]`, `slot_of[row, position]` and the sampling values.
  `Join` sets it, `PlanRow.slots` extends it. A sampled token is written by the executor itself at
  `tokens[row, start + n]`, so the next plan may compute it before the host has seen it.
* Forced tokens (`RowResult.forced`) count as known from there on: the scheduler appends them and hands them back in
  `PlanRow.tokens`. Steps that were in flight meanwhile sample at their positions, and must sample the same.
* Plans are applied strictly in order. A row's slots may be reused as soon as a later plan hands them out.
* Rows with `pooling` compute their whole prompt, from position 0 on, in one or more steps.
* Slot 0 is never given to a request: padded rows of captured steps write there. Row numbers are 0 .. max_num_seqs - 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from septet.request import SamplingParams

__all__ = ["Join", "Logprobs", "PlanRow", "RowResult", "StepPlan", "StepResult"]


@dataclass(frozen=True, slots=True)
class Join:
    """A request takes a row (first admission, or resumption after preemption): replaces all state of that row."""

    request: str
    row: int
    tokens: tuple[int, ...]  # all tokens known to the host: prompt, then output so far (on resumption)
    n_prompt: int  # how many of them are the prompt (penalties and min_tokens need it)
    slots: tuple[int, ...]  # KV slots of the cached prefix: positions 0 .. len(slots) - 1
    params: SamplingParams
    eos_token_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class PlanRow:
    """Compute `n` tokens of `row` at positions start .. start + n - 1, writing their KV into `slots`.

    Read-only by convention: one is made per row and step, and a frozen dataclass costs six times as much to make.
    """

    request: str
    row: int
    start: int
    n: int
    slots: tuple[int, ...]  # (n,) KV slot of each computed position
    n_sample: int = 0  # sample after each of the last n_sample positions (0 = inside a prompt, 1 = next token)
    prompt_logprobs: bool = False  # also return the log-probabilities of positions start + 1 .. start + n
    tokens: tuple[int, ...] = ()  # (n,) tokens to be computed, if the executor can't know them all (forced ones)
    pooling: str = ""  # "mean" or "last": with the row that samples, return the prompt's pooled hidden states


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Joins first, then rows. Rows that sample come in the order of `StepResult.rows`."""

    step: int
    joins: tuple[Join, ...] = ()
    rows: tuple[PlanRow, ...] = ()

    @property
    def n_tokens(self) -> int:
        return sum(row.n for row in self.rows)


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural-log probabilities at one position: the chosen (or given) token, its rank (1 = best), the best few."""

    token: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(slots=True)
class RowResult:
    """What one plan row produced. `error` ends that request alone (a NaN row, say); its tokens are then empty.

    Read-only by convention, as `PlanRow`.
    """

    request: str
    tokens: tuple[int, ...] = ()  # (n_sample,) sampled ids
    logprobs: tuple[Logprobs, ...] = ()  # (n_sample,) when asked for
    prompt_logprobs: tuple[Logprobs, ...] = ()  # positions start + 1 .. start + n that lie in the prompt
    error: str | None = None
    error_kind: str = "internal_error"
    forced: tuple[int, ...] = ()  # after the last one: the request's grammar allows nothing but these
    ended: bool = False  # the last token, forced ones included, completes the grammar: nothing may follow
    pooled: bytes = b""  # (D,) float32, little-endian: the pooled final hidden states of the prompt


@dataclass(frozen=True, slots=True)
class StepResult:
    """One entry per plan row that samples, asks for prompt log-probabilities or failed."""

    step: int
    rows: tuple[RowResult, ...] = field(default_factory=tuple)
