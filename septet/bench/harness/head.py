"""What stands at the head of results: command, commit, date, machine, libraries. Used by the command."""

from __future__ import annotations

import math
import shlex
import sys
from typing import Any

from septet.advisor.hardware import all_hardware
from septet.bench import host
from septet.errors import InvalidRequest

__all__ = ["head"]


def head(*, seed: int, rounds: int, scale: float, price: float | None, ours: bool = True) -> dict[str, Any]:
    """`ours`: an engine is started here; else this is only the machine of the client, whose price is no engine's."""
    if price is not None and not (math.isfinite(price) and 0 < price < 1e6):
        raise InvalidRequest(f"--price {price:g} is no price of an hour", param="price")
    found = host.head("bench", shlex.join(["septet", *sys.argv[1:]]))
    card = str(found["machine"].get("gpu", "")) if ours else ""
    return {**found, "seed": seed, "rounds": rounds, "scale": scale, "price": _price(price, card), "limits": {}}


def _price(given: float | None, card: str) -> dict[str, Any] | None:
    if given is not None:
        return {"usd_per_hour": given, "by": "given"}
    for known in all_hardware():
        if card and known.name.upper() in card.upper():
            return {"usd_per_hour": known.usd_per_hour, "by": f"assumed for one {known.title}"}
    return None
