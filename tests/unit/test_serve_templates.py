"""Templates from requests, and arguments that would steer the model's own: refused by name, from every route (B14)."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fakes import FakeClient
from tests.unit.test_serve_openai import CHAT, HI, TEXT, app_of, ask

BOMB = "{% for i in range(10**9) %}x{% endfor %}"
MESSAGES = [{"role": "user", "content": "hi"}]
FIELDS: list[tuple[str, dict[str, Any], str]] = [  # route, body, the field that brings a template
    (CHAT, HI, "chat_template"),
    (TEXT, {"prompt": "x"}, "chat_template"),
    ("/v1/responses", {"input": "x"}, "chat_template"),
    ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4}, "chat_template"),
    ("/v1/embeddings", {"input": "x"}, "chat_template"),
    ("/v1/batches", {}, "chat_template"),
    ("/tokenize", {"messages": MESSAGES}, "chat_template"),
    ("/apply-template", {"messages": MESSAGES}, "chat_template"),
    ("/completion", {"prompt": "x"}, "chat_template"),
    ("/generate", {"text": "x"}, "chat_template"),
    ("/generate", {"inputs": "x"}, "chat_template"),
    ("/chat_tokenize", {"messages": MESSAGES}, "chat_template"),
    ("/api/chat", {"model": "fake", "messages": MESSAGES}, "template"),
    ("/api/chat", {"model": "fake", "messages": MESSAGES}, "chat_template"),
    ("/api/generate", {"model": "fake", "prompt": "x"}, "template"),
]
STEERED = [(CHAT, HI), ("/v1/responses", {"input": "x"}), ("/v1/messages", {"messages": MESSAGES, "max_tokens": 4})]
STEERED += [("/tokenize", {"messages": MESSAGES}), ("/apply-template", {"messages": MESSAGES})]
ARGUMENTS = ("chat_template", "tokenize", "messages", "tools", "add_generation_prompt", "bos_token", "raise_exception")


def refused(route: str, body: dict[str, Any], named: str) -> None:
    client = FakeClient()
    answer = ask(app_of(client), "POST", route, json=body)
    assert answer.status_code in (400, 422), (route, answer.text[:200])
    assert named in answer.text
    assert client.seen == []


@pytest.mark.parametrize(("route", "body", "field"), FIELDS, ids=[f"{route}-{field}" for route, _, field in FIELDS])
def test_a_template_in_a_request_is_refused(route: str, body: dict[str, Any], field: str) -> None:
    refused(route, {**body, field: BOMB}, field)


@pytest.mark.parametrize(("route", "body"), STEERED, ids=[route for route, _ in STEERED])
def test_arguments_of_the_renderer_are_refused(route: str, body: dict[str, Any]) -> None:
    for name in ARGUMENTS:
        refused(route, {**body, "chat_template_kwargs": {name: BOMB}}, "chat_template_kwargs")
