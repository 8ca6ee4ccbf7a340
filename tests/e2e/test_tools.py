"""A conversation with tools between the `openai` package, unmodified, and a real server with the default model.

The model is small: what a call says is up to it, that it is a call, of a known function, with arguments of the schema,
is up to the server.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.serving import Server

TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city now",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "maxLength": 20},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_time",
            "description": "The time in a city now",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 20}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
]
ASK: list[Any] = [{"role": "user", "content": "What is the weather like in Paris, in celsius?"}]
NAMED: Any = {"type": "function", "function": {"name": "get_weather"}}


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=240) as client:
        yield client


def streamed(client: openai.OpenAI, **body: Any) -> tuple[dict[str, Any], str, int]:
    """(the assistant's message put together from deltas, finish reason, deltas that carried arguments)."""
    content, calls, reason, pieces = "", {}, "", 0
    for chunk in client.chat.completions.create(model="smollm2", stream=True, **body):
        choice = chunk.choices[0]
        content += choice.delta.content or ""
        for piece in choice.delta.tool_calls or []:
            assert piece.function is not None
            if piece.index not in calls:
                assert piece.id
                assert piece.function.name
                function = {"name": piece.function.name, "arguments": ""}
                calls[piece.index] = {"id": piece.id, "type": "function", "function": function}
            else:
                assert piece.id is None
                assert piece.function.name is None
            calls[piece.index]["function"]["arguments"] += piece.function.arguments or ""
            pieces += bool(piece.function.arguments)
        reason = choice.finish_reason or reason
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = list(calls.values())
    return message, reason, pieces


def checked(call: dict[str, Any]) -> dict[str, Any]:
    """The arguments, held to the schema of their function."""
    arguments: dict[str, Any] = json.loads(call["function"]["arguments"])
    assert isinstance(arguments["city"], str)
    assert len(arguments["city"]) <= 20
    if call["function"]["name"] == "get_weather":
        assert set(arguments) == {"city", "unit"}
        assert arguments["unit"] in ("celsius", "fahrenheit")
    else:
        assert call["function"]["name"] == "get_time"
        assert set(arguments) == {"city"}
    return arguments


def test_a_conversation_of_two_turns(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"tools": TOOLS, "temperature": 0, "max_tokens": 80}
    message, reason, pieces = streamed(client, messages=ASK, tool_choice=NAMED, **body)
    assert reason == "tool_calls"
    [call] = message["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert checked(call)["city"]
    assert pieces > 1  # as they are written, not at the end

    result = {"role": "tool", "tool_call_id": call["id"], "content": "18 degrees celsius, light rain"}
    turns = [*ASK, message, result]
    message, reason, _ = streamed(client, messages=turns, tool_choice="none", **body)
    assert reason == "stop"
    assert "tool_calls" not in message
    assert "18" in message["content"] or "rain" in message["content"]  # it has read the result


def test_required_calls_some_function(client: openai.OpenAI) -> None:
    """At temperature 1 the small model would rather ramble; it is held to the first byte."""
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, tools=TOOLS, tool_choice="required", parallel_tool_calls=False,
        temperature=1, n=4, seed=1, max_tokens=120,
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        checked(call.model_dump())


def test_auto_is_free_to_answer_and_its_calls_are_sound(client: openai.OpenAI) -> None:
    """At temperature 1 the small model calls, rambles or does both; every call that is told is valid."""
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, tools=TOOLS, temperature=1, n=6, seed=3, max_tokens=50
    )
    for choice in answer.choices:
        calls = choice.message.tool_calls or []
        for call in calls:
            checked(call.model_dump())
        assert calls or choice.message.content
        assert choice.finish_reason in (("tool_calls", "length") if calls else ("stop", "length"))


def test_the_clients_own_stream_helper_agrees(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="smollm2", messages=ASK, tools=TOOLS, tool_choice=NAMED, temperature=0, max_tokens=80
    ) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.tool_calls is not None
    checked(choice.message.tool_calls[0].model_dump())


def test_tools_leave_plain_chat_as_it_is(client: openai.OpenAI) -> None:
    ask: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    answer = client.chat.completions.create(
        model="smollm2", messages=ask, tools=TOOLS, tool_choice="none", temperature=0, max_tokens=30
    )
    assert answer.choices[0].message.content == "The capital of France is Paris."
