"""An answer that the engine cuts short because it is stopped: a typed error in every dialect, never a whole one."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve.app import Service, Settings, create_app
from tests.fakes import FakeClient, session
from tests.unit.test_serve_openai import ask

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from septet.request import Request

HI = [{"role": "user", "content": "hi"}]
WORDS = "stopped before this answer was complete"
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": HI}),
    ("/v1/completions", {"prompt": "hi"}),
    ("/v1/responses", {"input": "hi"}),
    ("/v1/messages", {"model": "fake", "messages": HI, "max_tokens": 9}),
    ("/api/chat", {"model": "fake", "messages": HI}),
    ("/api/generate", {"model": "fake", "prompt": "hi"}),
    ("/", {"inputs": "hi"}),
    ("/completion", {"prompt": "hi"}),
    ("/generate", {"text": "hi"}),
]


class Stopped(FakeClient):
    """Two tokens, and the engine is told to end everything."""

    async def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        yield Update(request.id, (104,))
        yield Update(request.id, (105,))
        yield Update(request.id, finish_reason=FinishReason.ABORT)


@pytest.mark.parametrize(("path", "body"), ROUTES, ids=[path for path, _ in ROUTES])
@pytest.mark.parametrize("stream", [False, True])
def test_a_cut_answer_is_an_error(path: str, body: dict[str, Any], stream: bool) -> None:
    service = Service(session(Stopped()), Settings())
    response = ask(create_app(service), "POST", path, json=body | {"stream": stream})
    if not stream:
        assert response.status_code >= 500 or (path == "/" and response.status_code == 424), response.text
    assert WORDS in response.text
    last = [line for line in response.text.splitlines() if line.strip() and "[DONE]" not in line][-1]
    assert "error" in json.dumps(json.loads(last.removeprefix("data: "))), last
    for complete in (
        '"end_turn"',
        '"status":"completed"',
        '"eos_token"',
        '"stop_type":"eos"',
        '"done":true',
        '"abort"',
    ):
        assert complete not in response.text
    assert service.metrics.plain.success == 0
    assert sum(service.metrics.plain.failure.values()) == 1
