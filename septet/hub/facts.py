"""Typed reading of what a model file says of itself: JSON files, and values by name with a type and a range.

Called by the hub's readers. A file is hostile until proven sound: sizes are capped, NaN, deep nesting and wrong types
are refused with one `ModelFileError` that names the file, the key and the rule. Knows no model and no torch.
"""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Facts", "parse_json", "read_json", "shown"]


def shown(value: object) -> str:
    """A value out of a file, safe to print: escaped and short."""
    if isinstance(value, str):
        value = value[:81]
    elif isinstance(value, list | tuple):
        value = list(value[:16])
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in `path`. ModelFileError: not there, no regular file, larger than `max_bytes`, not an object."""
    try:
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise ModelFileError(f"{path.name} is not a regular file")
        if info.st_size > max_bytes:
            raise ModelFileError(f"{path.name} has {info.st_size} bytes; at most {max_bytes} are accepted")
        raw = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"can't read {path.name}: {error.strerror}") from None
    return parse_json(raw, path.name)


def parse_json(raw: bytes, name: str) -> dict[str, Any]:
    """The JSON object in `raw`; `name` is for messages."""
    try:
        value = json.loads(raw, parse_constant=_no_constant)
    except RecursionError:
        raise ModelFileError(f"{name} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and numbers of thousands of digits too
        raise ModelFileError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{name} must hold a JSON object, not {shown(value)}")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


@dataclass(frozen=True, slots=True)
class Facts:
    """Values of one file by key. A key that is missing or null takes `default`; without one it is an error."""

    file: str
    values: Mapping[str, Any]

    def bad(self, key: str, rule: str) -> ModelFileError:
        return ModelFileError(f"{self.file}: {key} must be {rule}, not {shown(self.values.get(key))}")

    def _get(self, key: str, default: Any, rule: str) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is ...:
            raise ModelFileError(f"{self.file}: {key} is missing ({rule})")
        return default

    def integer(self, key: str, low: int, high: int, default: Any = ...) -> Any:
        """An integer in [low, high], or `default`."""
        rule = f"an integer in [{low}, {high}]"
        value = self._get(key, default, rule)
        if value is default:
            return value
        if isinstance(value, list) and value and all(v == value[0] for v in value):
            value = value[0]  # GGUF may list a value per layer; one that varies is not supported
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.bad(key, rule)
        return value

    def number(self, key: str, low: float, high: float, default: Any = ...) -> Any:
        """A finite number in [low, high] as a float, or `default`."""
        rule = f"a number in [{low:g}, {high:g}]"
        value = self._get(key, default, rule)
        if value is default:
            return value
        ok = isinstance(value, int | float) and not isinstance(value, bool)
        if not ok or not low <= value <= high or not math.isfinite(value):
            raise self.bad(key, rule)
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default, "true or false")
        if not isinstance(value, bool):
            raise self.bad(key, "true or false")
        return value

    def text(self, key: str, default: Any = ...) -> Any:
        value = self._get(key, default, "a string")
        if value is default:
            return value
        if not isinstance(value, str):
            raise self.bad(key, "a string")
        return value

    def ids(self, key: str) -> tuple[int, ...]:
        """Token ids: one or a list of up to 256, in the order given."""
        value = self._get(key, [], "token ids")
        values = value if isinstance(value, list) else [value]
        if len(values) > 256 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
            raise self.bad(key, "a token id or a list of them")
        return tuple(values)

    def part(self, key: str) -> Facts | None:
        """A nested object; None if missing."""
        value = self._get(key, None, "an object")
        if value is not None and not isinstance(value, dict):
            raise self.bad(key, "an object")
        return None if value is None else Facts(f"{self.file}: {key}", value)
