"""`apply_mask` of every table of ops against the definition, bit by bit: sizes that end within a word, rows skipped."""

from __future__ import annotations

import pytest
import torch

from septet.kernels.reference import ReferenceOps
from septet.kernels.triton import TritonOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("make", [ReferenceOps, TritonOps])
@pytest.mark.parametrize(
    ("n_rows", "vocab", "rows"), [(1, 31, [0]), (3, 100, [2]), (4, 5000, [0, 1, 2, 3]), (5, 8193, [1, 4])]
)
def test_apply_mask(make: type, n_rows: int, vocab: int, rows: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_rows, vocab, generator=random)
    words = torch.randint(-(2**31), 2**31, (len(rows), (vocab + 31) // 32 + 1), generator=random).int()
    expected = logits.clone()
    for c, row in enumerate(rows):
        for v in range(vocab):
            if not int(words[c, v // 32]) >> (v % 32) & 1:
                expected[row, v] = float("-inf")
    given = logits.to(DEVICE)
    got = make().apply_mask(given, words.to(DEVICE), torch.tensor(rows, device=DEVICE))
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(given.cpu(), logits), "an op writes to no input"
