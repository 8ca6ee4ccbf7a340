"""Errors as HTTP: which status, which body, in OpenAI's shape `{"error": {message, type, param, code}}`.

The same body goes into a plain response and into an event of a stream. Only `SeptetError` texts reach a client;
anything else is logged here and answered as an internal error without detail.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from septet.errors import (
    EngineDead,
    InvalidRequest,
    ModelNotFound,
    OutOfMemory,
    Overloaded,
    SeptetError,
)

__all__ = ["ClientGone", "DeadlineExceeded", "HttpError", "error_body", "headers_of", "status_of"]

log = logging.getLogger(__name__)

_STATUS: tuple[tuple[type[SeptetError], int], ...] = (
    (InvalidRequest, 400),
    (ModelNotFound, 404),
    (Overloaded, 429),
    (OutOfMemory, 503),
    (EngineDead, 503),
)


class ClientGone(Exception):
    """The client closed the connection: nobody to answer, the work is cancelled."""


class HttpError(SeptetError):
    """Wrong at the level of HTTP, before any field was read."""

    kind = "invalid_request_error"

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


class DeadlineExceeded(HttpError):
    """The request's own time limit or the server's is over. Trying again at once would only add to the load."""

    kind = "timeout_error"

    def __init__(self, message: str) -> None:
        super().__init__(504, message, code="deadline_exceeded")


def status_of(error: BaseException) -> int:
    if isinstance(error, HttpError):
        return error.status
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)


def headers_of(error: BaseException) -> dict[str, str]:
    if isinstance(error, Overloaded | EngineDead) and error.retry_after_s is not None:
        seconds, milliseconds = math.ceil(error.retry_after_s), math.ceil(1000 * error.retry_after_s)
        return {"retry-after": str(max(1, seconds)), "retry-after-ms": str(max(1, milliseconds))}
    if isinstance(error, DeadlineExceeded):
        return {"x-should-retry": "false"}
    if isinstance(error, HttpError) and error.status in (408, 413):
        return {"connection": "close"}  # the rest of the body is not read
    if isinstance(error, HttpError) and error.status == 401:
        return {"www-authenticate": "Bearer"}
    return {}


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. Logs what is not meant for the client."""
    if not isinstance(error, SeptetError):
        log.error("request failed", exc_info=error)
        return _shape("internal error; the server's log has the details", "internal_error", None, "internal_error")
    return _shape(error.message, error.kind, error.param, _code(error))


def _shape(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _code(error: SeptetError) -> str | None:
    if isinstance(error, HttpError):
        return error.code
    if isinstance(error, ModelNotFound):
        return "model_not_found"
    if isinstance(error, InvalidRequest) and "maximum context length" in error.message:
        return "context_length_exceeded"
    return None if isinstance(error, InvalidRequest) else error.kind
