"""The input of a batch: JSON lines, checked as a whole before anything runs, then read one by one.

Used by `openai_batch_run.py`. Everything is bounded while it is read. Knows no requests' fields.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.serve.body import decode_object
from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Checked", "Line", "check", "lines"]

MAX_REQUESTS = 50_000  # OpenAI's
MAX_LINE = 8 * 2**20
MAX_ERRORS = 50  # that are told
MAX_ID = 512
_FIELDS = {"custom_id", "method", "url", "body"}


@dataclass(frozen=True, slots=True)
class Line:
    number: int  # from 1
    custom_id: str
    body: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Checked:
    total: int
    model: str  # of the first request, "" where it names none
    errors: list[dict[str, Any]]


def check(path: Path, endpoint: str) -> Checked:
    """Read all of it once. Blocks."""
    errors: list[dict[str, Any]] = []
    ids: set[str] = set()
    total, model = 0, ""
    for number, raw in _raw_lines(path):
        total += 1
        if total > MAX_REQUESTS:
            errors.append(_error("too_many_requests", f"more than {MAX_REQUESTS} requests", number, None))
            break
        try:
            line = _line(number, raw, endpoint)
            if line.custom_id in ids:
                raise HttpError(400, "this custom_id was used before", code="duplicate_custom_id", param="custom_id")
        except HttpError as error:
            errors.append(_error(error.code or "invalid_json_line", error.message, number, error.param))
            if len(errors) == MAX_ERRORS:
                break
            continue
        ids.add(line.custom_id)
        if not model and isinstance(named := line.body.get("model"), str):
            model = named[:256]
    if not total:
        errors.append(_error("empty_file", "the file holds no requests", None, None))
    return Checked(total, model, errors)


def lines(path: Path, endpoint: str) -> Iterator[Line]:
    """The lines of a file that `check` found sound. Each is read when it is asked for."""
    for number, raw in _raw_lines(path):
        yield _line(number, raw, endpoint)


def _raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as stream:
        number = 0
        while raw := stream.readline(MAX_LINE + 1):
            number += 1
            if stripped := raw.strip():
                yield number, stripped
            if len(raw) > MAX_LINE and not raw.endswith(b"\n"):
                return  # the rest of it belongs to a line that is refused


def _line(number: int, raw: bytes, endpoint: str) -> Line:
    if len(raw) > MAX_LINE:
        raise HttpError(400, f"the line is longer than {MAX_LINE} bytes", code="line_too_long")
    try:
        value = decode_object(raw)
    except HttpError as error:
        raise HttpError(400, error.message.replace("request body", "line"), code="invalid_json_line") from None
    for name in value:
        if name not in _FIELDS:
            raise HttpError(400, f"unknown field {name[:80]!r}", code="invalid_request", param=name[:80])
    number_of, body = value.get("custom_id"), value.get("body")
    if not isinstance(number_of, str) or not 0 < len(number_of) <= MAX_ID:
        raise HttpError(
            400, f"custom_id must be 1 to {MAX_ID} characters", code="missing_required_parameter", param="custom_id"
        )
    if value.get("method") != "POST":
        raise HttpError(400, "method must be POST", code="invalid_method", param="method")
    if value.get("url") != endpoint:
        raise HttpError(400, f"url must be the batch's endpoint, {endpoint}", code="mismatched_endpoint", param="url")
    if not isinstance(body, dict):
        raise HttpError(400, "body must be an object", code="missing_required_parameter", param="body")
    return Line(number, number_of, body)


def _error(code: str, message: str, line: int | None, param: str | None) -> dict[str, Any]:
    return {"code": code, "message": message, "line": line, "param": param}
