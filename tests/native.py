"""The native library for tests: loaded, or the test is skipped with the reason; models recorded on a tape.

SEPTET_TEST_LIBRARY names another build of it (tests/contract/test_native_linear.py says how avx512 is emulated; then
SEPTET_CPU_PATH=avx512 must be set too).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from septet.engine.forward import TapeForward
from septet.kernels.native.library import FILE, NativeUnavailable, load

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.native.library import Library
    from septet.kernels.native.tape import Tape
    from septet.layers.batch import ForwardBatch

__all__ = ["TapeModel", "native_library"]


def native_library() -> Library:
    try:
        return load(Path(os.environ.get("SEPTET_TEST_LIBRARY", FILE)))
    except NativeUnavailable as error:
        pytest.skip(str(error))


class TapeModel:
    """A tape where `tests.forward.Harness` wants a model."""

    tape: Tape

    def forward(self, batch: ForwardBatch) -> Tensor:
        logits = TapeForward(self.tape).run(batch, wanted=True)
        assert logits is not None
        return logits
