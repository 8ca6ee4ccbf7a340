"""The OpenAPI 3.1 document of all routes, built from the dialects' own tables.

Called by `app.py` for /openapi.json. Knows how OpenAPI is written, nothing of what the routes do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import septet

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from septet.serve.dialect import Dialect, Handler

__all__ = ["document"]

_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
_WITH_BODY = ("POST", "PUT", "PATCH")


def document(dialects: Sequence[Dialect]) -> dict[str, Any]:
    """Where several dialects share a path the body may follow any of their schemas."""
    paths: dict[str, dict[str, Any]] = {}
    for dialect in dialects:
        for method, pattern, handler in dialect.routes:
            path = _PARAMETER.sub(r"{\1}", pattern)
            operations = paths.setdefault(path, {})
            schema = dialect.schemas.get(pattern) if method in _WITH_BODY else None
            operation = operations.setdefault(method.lower(), _operation(dialect, method, pattern, handler))
            if schema is not None:
                _add_body(operation, schema)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Septet", "version": septet.__version__},
        "paths": paths,
    }


def _operation(dialect: Dialect, method: str, pattern: str, handler: Handler) -> dict[str, Any]:
    name = handler.__name__ if hasattr(handler, "__name__") else pattern
    operation: dict[str, Any] = {
        "operationId": f"{dialect.name}_{method.lower()}_{re.sub(r'[^a-z0-9]+', '_', pattern.lower()).strip('_')}",
        "tags": [dialect.name],
        "summary": (getattr(handler, "__doc__", None) or name.replace("_", " ")).strip().splitlines()[0],
        "responses": {"200": {"description": "the answer"}, "default": {"description": "an error, in its own shape"}},
    }
    if parameters := _PARAMETER.findall(pattern):
        text = {"type": "string", "minLength": 1}
        operation["parameters"] = [{"name": p, "in": "path", "required": True, "schema": text} for p in parameters]
    return operation


def _add_body(operation: dict[str, Any], schema: Mapping[str, Any]) -> None:
    body = operation.get("requestBody")
    if body is None:
        content = {"application/json": {"schema": dict(schema)}}
        operation["requestBody"] = {"required": True, "content": content}
        return
    media = body["content"]["application/json"]
    known = media["schema"]
    media["schema"] = {"anyOf": [*known.get("anyOf", [known]), dict(schema)]}
