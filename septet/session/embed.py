"""Texts as vectors: pooled hidden states of a session, cut to the wanted size and scaled to length 1.

Called by the HTTP dialects. Knows no API's JSON and nothing of how the engine pools.
"""

from __future__ import annotations

import asyncio
import math
import sys
from array import array
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.session.session import Prompt, Session

__all__ = ["POOLINGS", "embed", "unit"]

POOLINGS = ("mean", "last")
AT_ONCE = 64  # prompts of one call that are with the engine


async def embed(
    session: Session,
    prompts: Sequence[Prompt],
    *,
    pooling: str = "mean",
    dimensions: int | None = None,
    normalize: bool = True,
    priority: int = 0,
    arrival: float | None = None,
) -> list[array[float]]:
    """One vector per prompt, float32. InvalidRequest for more `dimensions` than the model has; errors end all."""
    if pooling not in POOLINGS:
        raise InvalidRequest(f"pooling must be one of {', '.join(POOLINGS)}", param="pooling")
    vectors: list[array[float]] = [array("f")] * len(prompts)
    todo = iter(range(len(prompts)))

    async def work() -> None:
        for i in todo:
            states = _floats(await session.pooled(prompts[i], pooling, priority=priority, arrival=arrival))
            vectors[i] = unit(_cut(states, dimensions), normalize)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(AT_ONCE, len(prompts))):
                group.create_task(work())
    except BaseExceptionGroup as failed:  # the first error has cancelled the others
        raise failed.exceptions[0] from None
    return vectors


def unit(values: array[float], normalize: bool = True) -> array[float]:
    """Scaled to Euclidean length 1; a vector of zeros stays one."""
    length = math.sqrt(math.fsum(v * v for v in values)) if normalize else 0.0
    return array("f", (v / length for v in values)) if length > 0 else values


def _floats(raw: bytes) -> array[float]:
    values = array("f", raw)
    if sys.byteorder == "big":
        values.byteswap()
    return values


def _cut(values: array[float], dimensions: int | None) -> array[float]:
    if dimensions is None:
        return values
    if not 1 <= dimensions <= len(values):
        raise InvalidRequest(f"dimensions must be 1 to {len(values)}, which this model has", param="dimensions")
    return values[:dimensions]
