"""The native ops that choose tokens, each path of this CPU, against the naive oracle and the torch reference.

What the tape computes (norms, rotation, attention, products) is held against the reference in tests/cpu/test_tape.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from naive import NaiveOps
from op_checks import Inputs, check_argmax, check_gumbel

from septet.kernels.native.library import PATHS, Pool
from septet.kernels.native.ops import NativeOps
from septet.kernels.reference import ReferenceOps
from tests.native import native_library

if TYPE_CHECKING:
    from septet.kernels.ops import Ops

CPU = torch.device("cpu")


@pytest.fixture(params=PATHS)
def ops(request: pytest.FixtureRequest) -> Ops:
    library = native_library()
    if not library.has_path(request.param):
        pytest.skip(f"this CPU lacks {request.param}")
    return NativeOps(library, Pool(library, 2), request.param)


@pytest.mark.parametrize(("n", "vocab"), [(1, 7), (1, 16), (2, 31), (5, 1000), (9, 333)])
def test_argmax(ops: Ops, seed: int, n: int, vocab: int) -> None:
    check_argmax(ops, NaiveOps(), Inputs(seed, CPU, torch.float32), n, vocab)


@pytest.mark.parametrize(("n", "vocab"), [(1, 7), (4, 16), (7, 1003)])
def test_gumbel_argmax(ops: Ops, seed: int, n: int, vocab: int) -> None:
    check_gumbel(ops, NaiveOps(), Inputs(seed, CPU, torch.float32), n, vocab)


def test_noise_over_a_whole_vocabulary(ops: Ops, seed: int) -> None:
    """Many draws of flat rows: every token's noise matters, whichever lane it falls in."""
    inputs = Inputs(seed, CPU, torch.float32)
    logits = inputs.normal(64, 5003) * 0.1
    temperature, positions = torch.full((64,), 0.7), inputs.integers(0, 1000, 64)
    seeds = inputs.integers(-(2**63), 2**63 - 1, 64)
    got = ops.gumbel_argmax(logits, temperature, seeds, positions)
    want = ReferenceOps().gumbel_argmax(logits, temperature, seeds, positions)
    assert (got == want).sum() >= 63  # two tokens within float32's error of each other may swap
    assert len(set(got.tolist())) > 32


def _settings(n: int, inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """temperature, top_k, top_p, min_p of n rows: each alone, all together, none."""
    which = torch.arange(n) % 6
    temperature = inputs.normal(n).abs() + 0.3
    top_k = torch.where((which == 0) | (which == 3), 20, 0)
    top_p = torch.where((which == 1) | (which == 3), 0.8, 1.0)
    min_p = torch.where((which == 2) | (which == 3), 0.05, 0.0)
    top_k[which == 5] = 10**6  # beyond the vocabulary: off
    return temperature, top_k, top_p, min_p


@pytest.mark.parametrize(("n", "vocab", "spread"), [(6, 50, 1.0), (12, 5000, 3.0), (12, 5000, 0.05), (12, 40000, 2.0)])
def test_filter_logits(ops: Ops, seed: int, n: int, vocab: int, spread: float) -> None:
    inputs = Inputs(seed, CPU, torch.float32)
    logits = inputs.normal(n, vocab) * spread
    logits[inputs.normal(n, vocab) > 1.5] = float("-inf")
    settings = _settings(n, inputs)
    got = ops.filter_logits(logits, *settings, vocab)
    want = ReferenceOps().filter_logits(logits.double(), *(t.double() for t in settings), vocab).float()
    differ = (got.isfinite() != want.isfinite()).sum(-1)
    assert (differ <= 1).all(), f"kept {got.isfinite().sum(-1).tolist()}, not {want.isfinite().sum(-1).tolist()}"
    assert differ.sum() <= 1  # the token at which top_p is reached, once in many runs
    assert torch.equal(got[got.isfinite()], logits[got.isfinite()])
    assert (got.argmax(-1) == logits.argmax(-1)).all()


def test_filter_with_nothing_left_to_choose(ops: Ops) -> None:
    """One token allowed, none allowed, an infinity, ties at the k-th: a row always keeps something."""
    low = float("-inf")
    logits = torch.tensor([[low, low, 3.0, low], [low] * 4, [0.0, float("inf"), 1.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    kept = ops.filter_logits(
        logits, torch.ones(4), torch.tensor([2, 2, 2, 2]), torch.full((4,), 0.9), torch.zeros(4), 4
    )
    assert kept[0].tolist() == [low, low, 3.0, low]
    assert kept[2].argmax() == 1
    assert kept[3].isfinite().sum() == 2
    nan = ops.filter_logits(
        torch.tensor([[0.0, float("nan")]]), torch.ones(1), torch.tensor([1]), torch.ones(1), torch.zeros(1), 2
    )
    assert ops.argmax(nan).tolist() in ([-1], [0])
