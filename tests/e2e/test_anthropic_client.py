"""The `anthropic` package, unmodified, against a real server with the default model."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import anthropic
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.serving import Server

ASK: list[Any] = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
TOOLS: list[Any] = [
    {
        "name": "get_weather",
        "description": "The weather in a city now",
        "input_schema": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    }
]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=server.root, api_key="none", max_retries=0, timeout=240) as client:
        yield client


def greedy(**more: Any) -> dict[str, Any]:
    return {"model": "smollm2", "max_tokens": 8, "messages": ASK, "extra_body": {"temperature": 0}, **more}


def test_message_streamed_and_not(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**greedy(system=[{"type": "text", "text": "Be brief."}]))
    assert whole.content[0].type == "text"
    assert "Paris" in whole.content[0].text
    assert whole.stop_reason in ("end_turn", "max_tokens")
    assert whole._request_id is not None
    assert whole._request_id.startswith("req_")
    with client.messages.stream(**greedy(system="Be brief.")) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text
    assert [block.type for block in last.content] == [block.type for block in whole.content]
    assert last.stop_reason == whole.stop_reason
    assert last.usage.output_tokens == whole.usage.output_tokens
    total = last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0)
    assert total == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    assert (last.usage.cache_read_input_tokens or 0) > total // 2, "the same prompt again comes out of the cache"


def test_events_in_order(client: anthropic.Anthropic) -> None:
    events = list(client.messages.create(**greedy(stream=True)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_stop_sequence_and_prefill(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(**greedy(stop_sequences=["ris"]))
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "ris")
    begun = [*ASK, {"role": "assistant", "content": "The capital of France is"}]
    answer = client.messages.create(**greedy(messages=begun))
    assert answer.content[0].type == "text"
    assert answer.content[0].text.strip().startswith("Paris")


def test_a_call_and_its_result(client: anthropic.Anthropic) -> None:
    question: list[Any] = [{"role": "user", "content": "What is the weather like in Paris, in celsius?"}]
    wanted = greedy(max_tokens=96, messages=question, tools=TOOLS, tool_choice={"type": "tool", "name": "get_weather"})
    answer = client.messages.create(**wanted)
    call = next(block for block in answer.content if block.type == "tool_use")
    assert (answer.stop_reason, call.name) == ("tool_use", "get_weather")
    assert set(call.input) == {"city", "unit"}
    with client.messages.stream(**wanted) as stream:
        streamed = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    assert (streamed.name, streamed.input) == (call.name, call.input)
    result: list[Any] = [{"type": "tool_result", "tool_use_id": call.id, "content": "21 degrees, sunny"}]
    turn: list[Any] = [{"role": "assistant", "content": answer.content}, {"role": "user", "content": result}]
    told = client.messages.create(**greedy(max_tokens=4, messages=question + turn, tools=TOOLS))
    assert told.usage.output_tokens > 0


def test_structured_output(client: anthropic.Anthropic) -> None:
    form = {"type": "json_schema", "schema": {"enum": ["Paris", "London"]}}
    answer = client.messages.create(**greedy(output_config={"format": form}))
    assert answer.content[0].type == "text"
    assert answer.content[0].text == '"Paris"'


def test_what_cache_control_holds_is_told_in_the_usage(client: anthropic.Anthropic) -> None:
    rules = f"You are clerk {uuid.uuid4()}. " + "You answer with one word. " * 20
    system: list[Any] = [{"type": "text", "text": rules, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]
    first = client.messages.create(**greedy(max_tokens=1, system=system)).usage
    held = (first.cache_read_input_tokens or 0) + (first.cache_creation_input_tokens or 0)
    assert (first.cache_creation_input_tokens or 0) > 100
    assert first.cache_creation is not None
    assert first.cache_creation.ephemeral_1h_input_tokens == first.cache_creation_input_tokens
    assert (
        held + first.input_tokens
        == client.messages.count_tokens(model="smollm2", messages=ASK, system=system).input_tokens
    )
    other: list[Any] = [{"role": "user", "content": "What is the capital of Norway?"}]
    with client.messages.stream(**greedy(max_tokens=1, system=system, messages=other)) as stream:
        second = stream.get_final_message().usage
    assert (second.cache_read_input_tokens or 0) >= held
    assert second.cache_creation_input_tokens == 0


def test_count_and_models(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="smollm2", messages=ASK).input_tokens
    usage = client.messages.create(**greedy(max_tokens=1)).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").max_input_tokens == 1024


def test_errors(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(**greedy(model="claude"))
    assert missing.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    with pytest.raises(anthropic.BadRequestError, match="'image'"):
        client.messages.create(**greedy(messages=[{"role": "user", "content": [image]}]))
    with pytest.raises(anthropic.BadRequestError, match=r"thinking\.budget_tokens"):
        client.messages.create(**greedy(max_tokens=64, thinking={"type": "enabled", "budget_tokens": 32}))
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        client.messages.create(**greedy(messages=[{"role": "user", "content": "word " * 3000}]))
