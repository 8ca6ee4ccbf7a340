"""Programmatic dependent launch: a kernel starts while its predecessor still runs, and waits only before it reads.

Used by the kernels of a decode step. `gdc_launch_dependents` lets the next kernel of the stream start at once;
`gdc_wait` returns when every kernel before this one has ended and its writes are seen (CUDA C++ programming guide,
"Programmatic Dependent Launch"; PTX griddepcontrol). The rule of the house: before `gdc_wait` a kernel touches nothing
but constant weights and what was complete before the step's first kernel, which is launched the plain way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

__all__ = ["launch_options", "overlaps", "prefetch"]


@triton.jit
def prefetch(at):  # type: ignore[no-untyped-def]
    """Ask the L2 cache for the lines (128 bytes) that these pointers lie in."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@cache
def overlaps() -> bool:
    """Does this GPU have it (compute capability 9.0 and later)? Never through Triton's interpreter."""
    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def launch_options() -> dict[str, Any]:
    """Keyword arguments of a launch that may overlap its predecessor; PDL is the kernel's own constant."""
    return {"PDL": True, "launch_pdl": True} if overlaps() else {"PDL": False}
