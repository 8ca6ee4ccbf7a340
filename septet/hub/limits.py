"""Ranges of what a checkpoint may claim of itself: generous for real models, small enough to be safe to compute with.

Read by the two dialects of `model_config`.
"""

from __future__ import annotations

__all__ = ["EPS", "FACTOR", "HEADS", "HEAD_DIM", "LAYERS", "POSITIONS", "SOFT_CAP", "THETA", "VOCAB", "WIDTH"]

VOCAB = (1, 2**22)
WIDTH = (1, 2**20)  # hidden and intermediate size
LAYERS = (1, 1024)
HEADS = (1, 1024)
HEAD_DIM = (2, 2048)
POSITIONS = (1, 2**30)  # context lengths and windows
EPS = (0.0, 0.1)
THETA = (1.0, 1e15)
FACTOR = (1.0, 1e6)
SOFT_CAP = (0.0, 1e6)
