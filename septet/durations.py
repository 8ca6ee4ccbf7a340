"""Durations as Ollama's clients and its command line write them: 300, "5m", "1h30m", "-1".

Read by the command line (`--keep-alive`) and by the Ollama dialect (`keep_alive`). Standard library only.
"""

from __future__ import annotations

import math
import re

from septet.errors import InvalidRequest

__all__ = ["seconds_of"]

_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_WHOLE = re.compile(r"([-+]?)((?:\d{1,18}(?:\.\d{0,18})?(?:ns|us|µs|ms|s|m|h))+)")
_PART = re.compile(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)")
_NUMBER = re.compile(r"[-+]?\d{1,18}(\.\d{0,18})?")


def seconds_of(value: object, name: str) -> float:
    """Seconds; negative = for ever. A number without a unit is seconds. InvalidRequest for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18 and not math.isnan(value):
        return float(value)
    text = value.strip() if isinstance(value, str) and len(value) < 100 else ""
    if _NUMBER.fullmatch(text):
        return float(text)
    if match := _WHOLE.fullmatch(text):
        total = sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(match[2]))
        return -total if match[1] == "-" else total
    raise InvalidRequest(f"{name} must be seconds or a duration as 5m or 1h30m, not {repr(value)[:40]}", param=name)
