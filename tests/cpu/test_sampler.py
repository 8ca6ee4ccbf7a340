"""The sampler against plain Python, one row at a time, on random logits and random parameters."""

from __future__ import annotations

import math
import random

import pytest
import torch

from septet.engine.rows import RowInfo, Rows
from septet.engine.sampler import Pick, sample, top_logprobs
from septet.engine.staging import Staging
from septet.kernels.reference import ReferenceOps, gumbel_noise
from septet.request import SamplingParams
from septet.step import Join

VOCAB, LENGTH = 97, 24
CPU = torch.device("cpu")


def joined(params: list[SamplingParams], tokens: list[list[int]], n_prompt: int, end_ids: tuple[int, ...]) -> Rows:
    rows = Rows(len(params), 64, CPU)
    joins = [
        Join(str(i), i, tuple(t), n_prompt, (), p, end_ids) for i, (p, t) in enumerate(zip(params, tokens, strict=True))
    ]
    rows.join(joins, Staging(CPU))
    return rows


def draw(rows: Rows, logits: torch.Tensor, which: list[int]):
    picks = [Pick(r, LENGTH, info) for r in which if (info := rows.info[r]) is not None]
    row = torch.tensor(which)
    return sample(ReferenceOps(), logits[which], picks, rows, row, torch.full((len(which),), LENGTH))


def expected(logits: list[float], p: SamplingParams, tokens: list[int], n_prompt: int, ends: tuple[int, ...]) -> int:
    """The definition, spelled out in float64."""
    x, output = list(logits), tokens[n_prompt:]
    for v in set(tokens):
        x[v] = x[v] / p.repetition_penalty if x[v] > 0 else x[v] * p.repetition_penalty
    for v in set(output):
        x[v] -= p.frequency_penalty * output.count(v) + p.presence_penalty
    for v, bias in p.logit_bias.items():
        x[v] += bias
    if len(output) < p.min_tokens:
        for v in ends:
            x[v] = -math.inf
    if p.temperature == 0:
        return max(range(VOCAB), key=lambda v: (x[v], -v))
    scaled = [v / p.temperature for v in x]
    order = sorted(range(VOCAB), key=lambda v: -scaled[v])
    if p.top_k > 0:
        order = order[: p.top_k]
    top = max(scaled)
    weight = {v: math.exp(scaled[v] - top) for v in order}
    total, kept, mass = sum(weight.values()), [], 0.0
    for v in order:
        if mass < p.top_p and weight[v] / total >= p.min_p * weight[order[0]] / total:
            kept.append(v)
        mass += weight[v] / total
    noise = gumbel_noise(torch.tensor([p.seed or 0]), torch.tensor([LENGTH]), VOCAB)[0].tolist()
    return max(kept, key=lambda v: scaled[v] + noise[v])


def random_params(rng: random.Random) -> SamplingParams:
    coin = lambda value, other: value if rng.random() < 0.5 else other  # noqa: E731
    return SamplingParams(
        temperature=rng.choice([0.0, 0.5, 1.0, 1.7]),
        top_k=rng.choice([0, 1, 5, 40]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=coin(1.0, 1.3),
        presence_penalty=coin(0.0, 0.7),
        frequency_penalty=coin(0.0, -0.4),
        logit_bias=coin({}, {3: 5.0, 7: -100.0}),
        min_tokens=rng.choice([0, 12, 30]),
        max_tokens=40,
        seed=rng.getrandbits(62),
        logprobs=coin(None, 3),
    )


@pytest.mark.parametrize("seed", range(8))
def test_each_row_is_chosen_as_defined_in_any_batch(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, n_prompt, ends = 24, 10, (0, 1, 50)
    params = [random_params(rng) for _ in range(n)]
    tokens = [[rng.randrange(VOCAB) for _ in range(LENGTH)] for _ in range(n)]
    rows = joined(params, tokens, n_prompt, ends)
    logits = torch.randn(n, VOCAB) * 3
    want = [expected(logits[i].tolist(), params[i], tokens[i], n_prompt, ends) for i in range(n)]
    assert draw(rows, logits, list(range(n))).tokens.tolist() == want
    some = rng.sample(range(n), 5)
    assert draw(rows, logits, some).tokens.tolist() == [want[i] for i in some]
    assert [draw(rows, logits, [i]).tokens.item() for i in some] == [want[i] for i in some]


def test_the_draw_follows_the_distribution() -> None:
    n, probs = 4000, torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = torch.full((n, VOCAB), -math.inf)
    logits[:, :4] = probs.log()
    noise = ReferenceOps().gumbel_argmax(logits, torch.ones(n), torch.arange(n) * 7919, torch.full((n,), 5))
    counts = torch.bincount(noise, minlength=4)[:4].float()
    chi2 = ((counts - n * probs) ** 2 / (n * probs)).sum().item()
    assert chi2 < 16.3  # 3 degrees of freedom, p = 0.001


def test_logprobs_are_of_the_raw_logits() -> None:
    params = [SamplingParams(temperature=0.0, logprobs=4, logit_bias={5: 100.0}, seed=1, max_tokens=4)]
    rows = joined(params, [[1] * LENGTH], 10, ())
    logits = torch.randn(1, VOCAB)
    out = draw(rows, logits, [0])
    assert out.tokens.tolist() == [5]
    logp = torch.log_softmax(logits[0].double(), -1)
    assert out.logprobs is not None
    assert out.logprobs.chosen.item() == pytest.approx(logp[5].item(), abs=1e-5)
    assert out.logprobs.rank.item() == int((logp > logp[5]).sum()) + 1
    assert out.logprobs.ids[0].tolist() == logp.topk(4).indices.tolist()


def test_a_nan_row_is_marked_and_the_others_stand() -> None:
    params = [SamplingParams(temperature=t, seed=3, max_tokens=4) for t in (0.0, 0.0, 1.0)]
    rows = joined(params, [[1] * LENGTH] * 3, 10, ())
    logits = torch.randn(3, VOCAB)
    quiet = draw(rows, logits, [0, 1, 2]).tokens.tolist()
    logits[1, 30] = math.nan
    assert draw(rows, logits, [0, 1, 2]).tokens.tolist() == [quiet[0], -1, quiet[2]]


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-38, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_tiny_temperature_is_greedy_and_not_an_overflow(temperature: float, top_p: float) -> None:
    params = [SamplingParams(temperature=temperature, top_p=top_p, seed=3, max_tokens=4)]
    logits = torch.randn(1, VOCAB) * 5 + 50
    assert draw(joined(params, [[1] * LENGTH], 10, ()), logits, [0]).tokens.tolist() == logits.argmax(-1).tolist()


def test_rank_counts_from_one() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    top = top_logprobs(logits, torch.tensor([2]), 2)
    assert (top.rank.item(), top.ids.tolist()) == (2, [[1, 2]])


def test_info_sees_what_a_row_needs() -> None:
    plain = RowInfo(SamplingParams(temperature=0.7, max_tokens=3), 1, ())
    greedy_with_top_p = RowInfo(SamplingParams(temperature=0.0, top_p=0.5, max_tokens=3), 1, ())
    assert plain.plain
    assert not plain.filters
    assert greedy_with_top_p.plain, "top-p changes nothing at temperature 0"
    assert not RowInfo(SamplingParams(top_k=3, max_tokens=3), 1, ()).plain
