"""Every family against transformers: the same weights give the same logits and the same greedy text, however the work
is cut into steps."""

from __future__ import annotations

import random
from functools import cache

import pytest
import torch

from tests.families import FAMILIES, VOCAB, Pair, make

N_GREEDY = 64


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def pair(name: str) -> Pair:
    return make(name)


def prompt(n: int, seed: int = 0) -> list[int]:
    dice = random.Random(seed)
    return [dice.randrange(VOCAB) for _ in range(n)]


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.5, "the reference is too flat to show a difference"
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0.0)


families = pytest.mark.parametrize("name", FAMILIES)


@families
def test_logits_at_every_position(name: str) -> None:
    ids = prompt(100)
    check(pair(name).harness().step({0: ids})[0], pair(name).logits(ids))


@families
def test_greedy_text(name: str) -> None:
    ids = prompt(30, 1)
    want = pair(name).greedy(ids, N_GREEDY)
    assert len(set(want)) > 10, "the reference repeats itself: nothing is tested"
    assert pair(name).harness().greedy(3, ids, N_GREEDY) == want


@families
def test_greedy_text_of_one_token(name: str) -> None:
    assert pair(name).harness().greedy(0, [7], N_GREEDY) == pair(name).greedy([7], N_GREEDY)


@families
def test_random_chunks(name: str) -> None:
    dice = random.Random(name)
    ids, harness, parts, at = prompt(100, 3), pair(name).harness(seed=3), [], 0
    while at < len(ids):
        n = dice.choice([1, 1, 2, 5, 17])
        parts.append(harness.step({5: ids[at : at + n]})[5])
        at += n
    assert len(parts) > 10
    check(torch.cat(parts), pair(name).logits(ids))


@families
def test_mixed_rows(name: str) -> None:
    """Prefill, chunks and decode of sequences of many lengths in one step, order of rows changing."""
    dice = random.Random(name)
    todo = {line: prompt(n, line) for line, n in enumerate([90, 70, 40, 23, 61, 12])}
    want = {line: pair(name).logits(ids) for line, ids in todo.items()}
    got: dict[int, list[torch.Tensor]] = {line: [] for line in todo}
    harness = pair(name).harness(seed=4)
    at = dict.fromkeys(todo, 0)
    while at:
        lines = dice.sample(list(at), dice.randint(1, len(at)))
        rows = {line: todo[line][at[line] : at[line] + dice.choice([1, 1, 3, 30])] for line in lines}
        for line, logits in harness.step(rows).items():
            got[line].append(logits)
            at[line] += len(rows[line])
            if at[line] == len(todo[line]):
                del at[line]
    for line, parts in got.items():
        check(torch.cat(parts), want[line])


@families
def test_shared_prefix(name: str) -> None:
    """Two lines stand on the slots of a third: neither recomputes them nor disturbs the others."""
    base = prompt(50, 5)
    harness = pair(name).harness(seed=5)
    harness.step({0: base})
    suffixes = {1: prompt(20, 6), 2: prompt(31, 7)}
    harness.share(1, 0, 50)
    harness.share(2, 0, 33)
    got = harness.step({**suffixes, 0: prompt(9, 8)})
    check(got[1], pair(name).logits(base + suffixes[1])[50:])
    check(got[2], pair(name).logits(base[:33] + suffixes[2])[33:])
    check(got[0], pair(name).logits(base + prompt(9, 8))[50:])


@families
def test_greedy_batch(name: str) -> None:
    """Pure decode steps of rows with different contexts."""
    todo = {line: prompt(n, 20 + line) for line, n in enumerate([40, 3, 17])}
    want = {line: pair(name).greedy(ids, N_GREEDY) for line, ids in todo.items()}
    harness = pair(name).harness(seed=6)
    got: dict[int, list[int]] = {line: [] for line in todo}
    rows = dict(todo)
    for _ in range(N_GREEDY):
        for line, logits in harness.step(rows).items():
            got[line].append(int(logits[-1].argmax()))
        rows = {line: out[-1:] for line, out in got.items()}
    assert got == want


@families
def test_bfloat16(name: str) -> None:
    """Rounds no more than transformers does; chooses as float32 does wherever transformers' own error is no doubt."""
    ids = prompt(100, 9)
    exact = pair(name).logits(ids)
    half = make(name, torch.bfloat16)
    ours = half.harness(dtype=torch.bfloat16).step({0: ids})[0]
    assert ours.dtype == torch.bfloat16
    error = (ours.float() - exact).abs().amax(-1)
    theirs = (half.logits(ids).float() - exact).abs().amax(-1)
    assert error.median() < 1.2 * theirs.median()
    best = exact.topk(2).values
    sure = best[:, 0] - best[:, 1] > 2 * theirs.median()
    assert sure.sum() > 20
    assert torch.equal(ours[sure].argmax(-1), exact[sure].argmax(-1))
