"""Sizes, computed once for everybody: bytes of weights, of caches, of blocks.

Owned by the base room, standard library only. The pool, the loaders and the benchmarks call the same functions, so that
no two of them disagree about how large a thing is. Knows no file format's layout beyond the size of its blocks.
"""

from __future__ import annotations

__all__ = ["BLOCKS"]

BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "BF16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "IQ4_NL": (32, 18),
    "IQ4_XS": (256, 136),
}
"""GGML types that Septet reads: name -> (elements per block, bytes per block). Source: ggml-common.h of llama.cpp."""
