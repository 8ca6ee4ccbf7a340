"""Every error that Septet raises on purpose.

Owned by the base room. Each error names the thing that is wrong and the way out, and carries what a surface needs to
render it (`kind`, `param`) without knowing HTTP. Nothing here is retried silently.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "EngineDead",
    "InvalidRequest",
    "ModelFileError",
    "ModelNotFound",
    "OfflineError",
    "OutOfMemory",
    "Overloaded",
    "SeptetError",
    "UnsupportedModel",
]


_FIELD = re.compile(r"\w+")
_QUOTED_OR_FIELD = re.compile(r"""(?<!\w)'(?:[^'\\]|\\.)*'|(?<!\w)"(?:[^"\\]|\\.)*"|\w+""")


class SeptetError(Exception):
    """Base of all deliberate errors. `str(error)` is safe to show to a user: no addresses, no paths of ours."""

    kind = "internal_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(SeptetError):
    """The request itself is wrong (a value, a field, a length). Ends this request only."""

    kind = "invalid_request_error"

    def renamed(self, names: Mapping[str, str]) -> InvalidRequest:
        """The same in the words of an API that has other names for these fields. What the message quotes is left."""
        param = self.param and _FIELD.sub(lambda found: names.get(found[0], found[0]), self.param, count=1)
        return InvalidRequest(
            _QUOTED_OR_FIELD.sub(lambda found: names.get(found[0], found[0]), self.message), param=param
        )


class ModelNotFound(SeptetError):
    """No model of that name in the catalogue, in the store or at that path."""

    kind = "not_found_error"


class ModelFileError(SeptetError):
    """A model file is missing a part, truncated, hostile or of an unsafe kind."""

    kind = "model_file_error"


class UnsupportedModel(SeptetError):
    """The file is sound but asks for something Septet does not implement (architecture, block type, rope scaling)."""

    kind = "unsupported_model_error"


class OfflineError(SeptetError):
    """A download was needed and the source can't be reached."""

    kind = "offline_error"


class OutOfMemory(SeptetError):
    """The arithmetic does not fit: says needed, free and what to change."""

    kind = "out_of_memory_error"


class Overloaded(SeptetError):
    """An admission limit is reached; try again after `retry_after_s` seconds."""

    kind = "overloaded_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class EngineDead(SeptetError):
    """The engine process ended or failed; requests in flight can't finish. `retry_after_s`: when another may serve."""

    kind = "engine_dead_error"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s
