"""`apply_mask` of every table of ops against the definition, bit by bit: sizes that end within a word, rows skipped."""

from __future__ import annotations

import pytest
import torch

from septet.kernels.reference import ReferenceOps
from septet.kernels.triton import TritonOps

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("make", [ReferenceOps, TritonOps])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("vocab", "lines"), [(31, [0]), (100, [-1, 0, -1]), (5000, [2, 1, 0, 2]), (8193, [-1, -1]), (8193, [1, -1, 0])]
)
def test_apply_mask(make: type, dtype: torch.dtype, vocab: int, lines: list[int], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(lines), vocab, generator=random).to(dtype)
    words = torch.randint(-(2**31), 2**31, (3, (vocab + 31) // 32 + 1), generator=random).int()
    expected = logits.float()
    for row, line in enumerate(lines):
        for v in range(vocab):
            if line >= 0 and not int(words[line, v // 32]) >> (v % 32) & 1:
                expected[row, v] = float("-inf")
    before, given = logits.clone(), logits.to(DEVICE)
    got = make().apply_mask(given, words.to(DEVICE), torch.tensor(lines, device=DEVICE))
    assert got.dtype == torch.float32
    assert torch.equal(got.cpu(), expected)
    assert torch.equal(given.cpu(), before), "an op writes to no input"
