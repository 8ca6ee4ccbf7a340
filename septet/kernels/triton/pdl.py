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

__all__ = ["launch_options", "overlaps"]


@cache
def overlaps() -> bool:
    """Does this GPU have it (compute capability 9.0 and later)? Never through Triton's interpreter."""
    import triton

    if triton.knobs.runtime.interpret or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= (9, 0)


def launch_options() -> dict[str, Any]:
    """Keyword arguments of a launch that may overlap its predecessor; PDL is the kernel's own constant."""
    return {"PDL": True, "launch_pdl": True} if overlaps() else {"PDL": False}
