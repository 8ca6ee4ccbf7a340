"""Kernels that are compiled at their launch though a rehearsal was to find them: each is a line of the log's details.

Used by `rehearsal.py`. What differs from the nearest kernel that it has found says why it was missed.
"""

from __future__ import annotations

import json
import logging
import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Missed", "differences"]

log = logging.getLogger(__name__)


class Missed:
    """`ours`: how threads that compile ahead are named."""

    def __init__(self, ours: str) -> None:
        self._ours = ours
        self._known: dict[str, list[dict[str, str]]] = {}

    def know(self, needed: Iterable[tuple[Any, str]]) -> None:
        """(Triton function, specialization data) of what has been found. From now on the others are told."""
        if not log.isEnabledFor(logging.DEBUG):
            return
        for kernel, data in needed:
            self._known.setdefault(kernel.__name__, []).append(_settings(kernel.arg_names, json.loads(data)))
        from triton import knobs

        knobs.compilation.listener = self._compiled

    def _compiled(self, *, src: Any, times: Any, cache_hit: bool, **more: object) -> None:
        if cache_hit or threading.current_thread().name.startswith(self._ours):
            return
        data = {
            "signature": src.signature,
            "constant_keys": list(src.constants),
            "constant_vals": list(src.constants.values()),
            "attrs_keys": list(src.attrs),
            "attrs_vals": list(src.attrs.values()),
        }
        known = self._known.get(src.name, [])
        words = differences(known, _settings(src.fn.arg_names, data)) if known else "none of its kind was found"
        log.debug("compiled at its launch in %.2f s: %s: %s", times.total / 1e6, src.name, words)


def _settings(names: list[str], data: dict[str, Any]) -> dict[str, str]:
    """What a kernel was compiled for: {argument: value, or type and what is known of it}."""
    settings = {name: str(kind) for name, kind in data["signature"].items()}
    for (at, *_), value in zip(data["constant_keys"], data["constant_vals"], strict=True):
        settings[names[at]] = str(value)
    for (at, *_), value in zip(data["attrs_keys"], data["attrs_vals"], strict=True):
        settings[names[at]] += f" {[list(one) for one in value]}"
    return settings


def differences(known: list[dict[str, str]], got: dict[str, str]) -> str:
    """`got` against the nearest of `known`."""
    apart = [{name for name in got if one.get(name) != got[name]} for one in known]
    nearest = min(range(len(known)), key=lambda i: len(apart[i]))
    told = (f"{name} {known[nearest].get(name)} -> {got[name]}" for name in got if name in apart[nearest])
    return ", ".join(told) or "the same, with other options"
