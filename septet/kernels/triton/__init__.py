"""Triton kernels for NVIDIA GPUs, one file per op; `TritonOps` is the table that layers hold.

Importing this package loads Triton: engine/build does so only where these kernels are chosen.
"""

from septet.kernels.triton.ops import TritonOps

__all__ = ["TritonOps"]
