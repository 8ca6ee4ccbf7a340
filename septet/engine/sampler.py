"""From logits to tokens: penalties, bias, filters, noise, log-probabilities; in that order, each row by itself.

Called by the runner with the logits of one step. Order of operations as in vLLM: raw logits -> repetition, frequency
and presence penalties -> logit bias -> end ids forbidden before min_tokens -> grammar -> temperature -> top-k ->
top-p -> min-p -> one draw by the Gumbel-max trick, whose noise is a function of (seed, position, token) (see
`Ops.gumbel_argmax`), so that a row's answer does not depend on the batch. Log-probabilities are of the raw logits, as
vLLM's default. Nothing here waits for the device or reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from septet.engine.staging import on_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.engine.constraints import TokenMasks
    from septet.engine.rows import RowInfo, Rows
    from septet.kernels.ops import Ops

__all__ = ["Pick", "Sampled", "TopLogprobs", "sample", "top_logprobs"]

MAX_FAST_K = 1024


@dataclass(slots=True)
class Pick:
    """One token to be sampled: which row, and the position that the new token will have. Read-only by convention."""

    row: int
    position: int
    info: RowInfo


@dataclass(frozen=True, slots=True)
class TopLogprobs:
    """Log-probabilities at S positions, on the device until the step is read."""

    chosen: Tensor  # (S,) float32
    rank: Tensor  # (S,) int64, 1 = best
    values: Tensor  # (S, k) float32, best first
    ids: Tensor  # (S, k) int64


@dataclass(frozen=True, slots=True)
class Sampled:
    tokens: Tensor  # (S,) int64; -1 where the logits hold a NaN
    logprobs: TopLogprobs | None  # for all picks, if any wants them


def sample(
    ops: Ops,
    logits: Tensor,
    picks: Sequence[Pick],
    rows: Rows,
    row: Tensor,
    position: Tensor,
    masks: TokenMasks | None = None,
) -> Sampled:
    """logits (S, V); `row` and `position` (S,) int64 are the picks' on the device. Does not write to `rows`."""
    raw = logits.float()
    wants = [p.info.params.logprobs for p in picks if p.info.params.logprobs is not None]
    adjusted = raw.clone() if wants or any(_edits(p) for p in picks) else raw
    for i, pick in enumerate(picks):
        if _edits(pick):
            _adjust(adjusted[i], pick, rows)
    if masks is not None:
        on = masks.on(logits.device)
        adjusted = ops.apply_mask(adjusted, on.words, on.line)
    temperature = rows.temperature[row]
    if any(p.info.filters for p in picks):
        adjusted = _filter(ops, adjusted, picks, rows, row, temperature)
    tokens = ops.gumbel_argmax(adjusted, temperature, rows.seed[row], position)
    return Sampled(tokens, top_logprobs(raw, tokens.clamp(min=0), max(wants)) if wants else None)


def top_logprobs(logits: Tensor, chosen: Tensor, k: int) -> TopLogprobs:
    """logits (S, V) float32, chosen (S,) -> the chosen token's log-probability and rank, and the k best."""
    logp = torch.log_softmax(logits, dim=-1)
    mine = logp.gather(1, chosen[:, None])
    rank = (logp > mine).sum(-1) + 1
    values, ids = logp.topk(k, dim=-1)
    return TopLogprobs(mine[:, 0], rank, values, ids)


def _edits(pick: Pick) -> bool:
    p = pick.info.params
    return pick.info.penalises or bool(p.logit_bias) or _too_early(pick)


def _too_early(pick: Pick) -> bool:
    """Whether end ids are forbidden. Under a grammar the mask does that, which knows whether there is a choice."""
    params = pick.info.params
    early = pick.position - pick.info.n_prompt < params.min_tokens
    return early and bool(pick.info.end_ids) and params.structured is None


def _adjust(logits: Tensor, pick: Pick, rows: Rows) -> None:
    """Edit one row of logits (V,) in place."""
    p, n_prompt = pick.info.params, pick.info.n_prompt
    if pick.info.penalises:
        seen = rows.tokens[pick.row, : pick.position].long()
        if p.repetition_penalty != 1.0:
            known = torch.zeros_like(logits, dtype=torch.bool).index_fill_(0, seen, True)
            factor = torch.where(logits > 0, 1.0 / p.repetition_penalty, p.repetition_penalty)
            logits.copy_(torch.where(known, logits * factor, logits))
        output = seen[n_prompt:]
        counts = torch.zeros_like(logits).index_add_(0, output, torch.ones_like(output, dtype=logits.dtype))
        logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
    if p.logit_bias:
        ids = on_device(list(p.logit_bias), torch.int64, logits.device)
        bias = on_device(list(p.logit_bias.values()), logits.dtype, logits.device)
        logits.index_add_(0, ids, bias)
    if _too_early(pick):
        logits.index_fill_(0, on_device(pick.info.end_ids, torch.int64, logits.device), float("-inf"))


def _filter(ops: Ops, logits: Tensor, picks: Sequence[Pick], rows: Rows, row: Tensor, temperature: Tensor) -> Tensor:
    """Set to -inf what top-k, top-p and min-p exclude; rows without a filter stay as they are."""
    on = on_device([i for i, p in enumerate(picks) if p.info.filters], torch.int64, logits.device)
    ks = [p.info.params.top_k for p in picks if p.info.filters]
    vocab = logits.shape[1]
    width = max(ks) if all(0 < k <= MAX_FAST_K for k in ks) else vocab  # few candidates: no full sort
    row = row[on]
    kept = ops.filter_logits(logits[on], temperature[on], rows.top_k[row], rows.top_p[row], rows.min_p[row], width)
    return logits.index_copy(0, on, kept)
