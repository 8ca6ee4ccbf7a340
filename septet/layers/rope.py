"""Rotary embedding tables (arXiv 2104.09864): the cosines and sines of every position, computed once per model.

`Attention` hands a table to `Ops.qkv_write`, which rotates. Layers with the same `RopeConfig` share one table. Angles
are float32 products of float32 frequencies and positions, as transformers computes them (and models were trained).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from septet.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from septet.config import RopeConfig
    from septet.layers.build import Build

__all__ = ["RopeTables", "inverse_frequencies"]


class RopeTables:
    """One table (max_len, E) float32 = [cos | sin] per distinct RopeConfig.

    `rope_freqs.weight` (E/2,) of the checkpoint, where there is one, divides the frequencies: GGUF's way to say
    llama3 scaling, already worked out.
    """

    def __init__(self, build: Build) -> None:
        self.build = build
        factors: Any = build.source.optional("rope_freqs.weight", (build.config.head_dim // 2,))
        self.factors = None if factors is None else np.asarray(factors, dtype=np.float32)
        self.tables: dict[RopeConfig, Tensor] = {}

    def table(self, rope: RopeConfig) -> Tensor:
        """(max_len, E) float32, placed by the build: [cos of E/2 angles | sin of E/2 angles]."""
        if rope not in self.tables:
            freqs = inverse_frequencies(rope, self.build.config.head_dim, self.factors)
            n, half = self.build.max_len, len(freqs)
            angles = np.arange(n, dtype=np.float32)[:, None] * freqs
            table = np.empty((n, 2 * half), dtype=np.float32)
            np.cos(angles, out=table[:, :half])
            np.sin(angles, out=table[:, half:])
            self.tables[rope] = self.build.place(table)
        return self.tables[rope]


def inverse_frequencies(rope: RopeConfig, head_dim: int, factors: np.ndarray | None = None) -> np.ndarray:
    """(E/2,) float32: the angle per position of each pair. UnsupportedModel for an unknown scaling."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    freqs = np.float32(1.0) / np.float32(rope.theta) ** exponents
    if rope.kind == "linear":
        freqs = freqs / np.float32(rope.factor)
    elif rope.kind == "llama3":
        # A file with both says the same scaling twice: the worked-out factors are the checkpoint's own.
        freqs = freqs if factors is not None else _llama3(freqs, rope)
    elif rope.kind != "default":
        raise UnsupportedModel(f"rope scaling {rope.kind!r} is not supported; supported: default, linear, llama3")
    return freqs if factors is None else freqs / factors


def _llama3(freqs: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, a ramp between.

    The ramp is linear in (original context / wavelength), from `low_freq_factor` to `high_freq_factor`.
    """
    if rope.original_max_position <= 0 or rope.high_freq_factor <= rope.low_freq_factor:
        raise UnsupportedModel(
            "llama3 rope scaling needs original_max_position_embeddings > 0 and high_freq_factor > low_freq_factor"
        )
    turns = rope.original_max_position * freqs / (2 * math.pi)  # rotations within the original context
    keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clip(0.0, 1.0)
    scaled: np.ndarray = (1.0 - keep) * freqs / rope.factor + keep * freqs
    return scaled
