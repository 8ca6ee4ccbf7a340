"""Every bad input through every route of every dialect: one 4xx, quickly, that tells nothing of our insides.

A fix in one dialect that its sibling lacks is how other engines were broken; a new route is swept as soon as it is
listed.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import httpx
import pytest

from septet.serve.app import DIALECTS, Service, Settings, create_app
from tests.fakes import FakeClient, session

NOT_JSON = {"/api/blobs/{digest}", "/v1/files"}  # uploads
REFUSED = {"/props", "/abort_request", "/slots/{slot}", "/flush_cache"}  # with 501, whatever is sent
NO_BODY = re.compile(r"/cancel$|^/api/push$")
ROUTES = sorted({path for d in DIALECTS for method, path, _ in d.routes if method == "POST"} - NOT_JSON - REFUSED)
JSON = {"content-type": "application/json"}

BODIES = {
    "nothing": b"",
    "half": b'{"prompt": "x',
    "a list": b"[1, 2]",
    "a string": b'"x"',
    "null": b"null",
    "NaN": b'{"temperature": NaN}',
    "infinity": b'{"temperature": 1e999}',
    "a number of a million digits": b'{"seed": ' + b"1" * 1_000_000 + b"}",
    "a hundred thousand lists": b"[" * 100_000,
    "a hundred thousand objects": b'{"a":' * 100_000,
    "a key twice": b'{"model": "fake", "model": "other"}',
    "a lone surrogate": b'{"model": "\\ud800"}',
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "trailing": b'{"model": "fake"} x',
    "millions of values": b'{"prompt": [' + b"1," * 2_000_000 + b"1]}",
}
LONG, MANY = "x" * 30_000, [1] * 5000
ODD: tuple[Any, ...] = (None, True, -1, 1.5, 10**30, "x", LONG, [], [None], [[]], {}, {"a": {"b": []}}, MANY)
FIELDS = (
    *("model", "prompt", "messages", "input", "inputs", "text", "input_ids", "stream", "temperature", "top_p", "top_k"),
    *("n", "stop", "max_tokens", "seed", "logprobs", "tools", "tool_choice", "response_format", "format", "options"),
    *("parameters", "sampling_params", "keep_alive", "system", "suffix", "logit_bias", "priority", "cache_salt"),
    *("timeout", "chat_template_kwargs", "json_schema", "grammar", "template", "files", "from", "name", "source"),
    "destination",
)
INSIDES = re.compile(r"Traceback| at 0x[0-9a-f]|/site-packages/|septet/serve/|line \d+, in ")


def sent(requests: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, httpx.Response, float]]:
    app = create_app(Service(session(FakeClient()), Settings(body_timeout_s=5)))

    async def go() -> list[tuple[str, httpx.Response, float]]:
        answers = []
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            for path, request in requests:
                begun = time.monotonic()
                response = await http.post(path, **request)
                answers.append((path, response, time.monotonic() - begun))
        return answers

    return asyncio.run(go())


def concrete(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x", path)


def check(what: str, path: str, response: httpx.Response, seconds: float, statuses: range) -> None:
    assert response.status_code in statuses, (what, path, response.status_code, response.text[:300])
    assert not INSIDES.search(response.text), (what, path, response.text[:300])
    assert len(response.text) < 5000, (what, path)
    assert seconds < 3, (what, path, seconds)


@pytest.mark.parametrize("what", list(BODIES))
def test_a_body_that_is_no_json_object_is_refused_everywhere(what: str) -> None:
    asked = [path for path in ROUTES if not NO_BODY.search(path)]
    for path, response, seconds in sent([(concrete(p), {"content": BODIES[what], "headers": JSON}) for p in asked]):
        check(what, path, response, seconds, range(400, 500))


@pytest.mark.parametrize(
    "headers",
    [
        JSON | {"content-encoding": "gzip"}, JSON | {"content-length": "-1"}, JSON | {"content-length": "999999999999"},
        {"content-type": "multipart/form-data; boundary=x"}, {"content-type": "application/xml"},
    ],
)  # fmt: skip
def test_headers_that_lie_about_the_body_are_refused_everywhere(headers: dict[str, str]) -> None:
    asked = [path for path in ROUTES if not NO_BODY.search(path)]
    for path, response, seconds in sent([(concrete(p), {"content": b"{}", "headers": headers}) for p in asked]):
        check(str(headers), path, response, seconds, range(400, 500))


@pytest.mark.parametrize("field", FIELDS)
def test_an_odd_value_in_any_field_is_never_an_internal_error(field: str) -> None:
    """It may be ignored where the dialect does not know the field; it must not reach where it breaks something."""
    good = {"model": "fake", "prompt": "a", "input": "a", "inputs": "a", "text": "a", "max_tokens": 2}
    messages = {"messages": [{"role": "user", "content": "a"}]}
    requests = []
    for number, path in enumerate(ROUTES):
        base = messages | {"model": "fake", "max_tokens": 2} if "chat" in path or "messages" in path else good
        values = [
            ODD[(number + 4 * i + FIELDS.index(field)) % len(ODD)] for i in range(3)
        ]  # all of them over the routes
        requests += [(concrete(path), {"json": base | {field: value}}) for value in values]
    for path, response, seconds in sent(requests):
        check(field, path, response, seconds, range(200, 502))
        assert response.status_code != 500, (field, path, response.text[:300])
