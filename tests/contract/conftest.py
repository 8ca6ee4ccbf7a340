"""Contract tests run Triton kernels through its interpreter where there is no GPU: chosen before Triton is imported."""

from __future__ import annotations

import os
import random
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # tiny tensors; the other core has its own tests


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """`torch.empty` gives NaN (and the largest integer), so that what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def seed() -> int:
    """Fresh inputs at every run; SEPTET_TEST_SEED repeats one. Shown by pytest when a test fails."""
    value = int(os.environ.get("SEPTET_TEST_SEED") or random.SystemRandom().randrange(2**32))
    print(f"SEPTET_TEST_SEED={value}")
    return value
