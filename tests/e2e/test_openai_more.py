"""Responses, embeddings, files and batches through the `openai` package, unmodified, against a real server."""

from __future__ import annotations

import io
import json
import time
from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from pydantic import BaseModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.serving import Server

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."
FIXED: dict[str, Any] = {"model": "smollm2", "temperature": 0}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city now",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


class City(BaseModel):
    name: Literal["Paris", "Rome", "Oslo"]
    country: Literal["France", "Italy", "Norway"]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=240) as client:
        yield client


# -- responses --------------------------------------------------------------------------------------------------------
def test_response_and_the_next_one(client: openai.OpenAI) -> None:
    first = client.responses.create(input=QUESTION, max_output_tokens=30, **FIXED)
    assert first.output_text == ANSWER
    assert first.status == "completed"
    assert first.usage is not None
    assert first.usage.output_tokens == 8
    assert client.responses.retrieve(first.id).output_text == ANSWER
    items = client.responses.input_items.list(first.id).data
    assert items[0].content[0].text == QUESTION  # type: ignore[union-attr, index]
    second = client.responses.create(
        input="And of Italy?", previous_response_id=first.id, max_output_tokens=12, **FIXED
    )
    assert "Rome" in second.output_text
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens > 8
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_response_streamed(client: openai.OpenAI) -> None:
    with client.responses.stream(input=QUESTION, max_output_tokens=30, **FIXED) as stream:  # checks every event's place
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert final.output_text == ANSWER
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds.count("response.output_text.delta") > 1
    assert kinds[-1] == "response.completed"


def test_response_of_a_schema(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(input="Name a city.", text_format=City, max_output_tokens=60, **FIXED)
    assert isinstance(parsed.output_parsed, City)


def test_response_with_a_tool(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"tools": [WEATHER], "max_output_tokens": 80, **FIXED}
    input: list[Any] = [{"role": "user", "content": "What is the weather like in Paris?"}]
    asked = client.responses.create(input=input, tool_choice="required", **ask)
    call = asked.output[0]
    assert call.type == "function_call"
    assert call.name == "get_weather"
    assert set(json.loads(call.arguments)) == {"city"}
    streamed = list(client.responses.create(input=input, tool_choice="required", stream=True, **ask))
    first = [e for e in streamed if e.type == "response.function_call_arguments.delta" and e.output_index == 0]
    assert "".join(e.delta for e in first) == call.arguments  # other calls may follow it
    input += [*asked.output, {"type": "function_call_output", "call_id": call.call_id, "output": "21 degrees, sunny"}]
    told = client.responses.create(input=input, tool_choice="none", **ask)
    assert told.output_text


def test_response_errors(client: openai.OpenAI) -> None:
    image = {"type": "input_image", "image_url": "http://127.0.0.1/x.png"}
    with pytest.raises(openai.BadRequestError, match="input_image"):
        client.responses.create(input=[{"role": "user", "content": [image]}], **FIXED)  # type: ignore[list-item, misc]
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(input="x", previous_response_id="resp_none", **FIXED)
    assert missing.value.code == "previous_response_not_found"


# -- embeddings -------------------------------------------------------------------------------------------------------
def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["The cat sits on the mat.", "A cat is sitting on a rug.", "Stock prices in Tokyo fell sharply today."]
    vectors = [d.embedding for d in client.embeddings.create(model="smollm2", input=texts).data]  # sent as base64

    def dot(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True))

    assert [len(v) for v in vectors] == [576] * 3
    assert [dot(v, v) for v in vectors] == pytest.approx([1.0] * 3, abs=1e-5)
    assert dot(vectors[0], vectors[1]) > dot(vectors[0], vectors[2]) + 0.02
    plain = client.embeddings.create(model="smollm2", input=texts[0], encoding_format="float")  # its prompt was seen
    assert plain.data[0].embedding == pytest.approx(vectors[0], abs=2e-3)
    short = client.embeddings.create(model="smollm2", input=texts[0], dimensions=64, encoding_format="float")
    assert len(short.data[0].embedding) == 64


# -- batches ----------------------------------------------------------------------------------------------------------
def test_batch(client: openai.OpenAI) -> None:
    bodies: list[Any] = [{"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 12, **FIXED}] * 3
    bodies.append({"messages": [], **FIXED})
    lines = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(bodies)
    ]
    upload = io.BytesIO("\n".join(map(json.dumps, lines)).encode())
    file = client.files.create(file=("in.jsonl", upload), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"test": "yes"}
    )
    deadline = time.monotonic() + 240
    while (batch := client.batches.retrieve(batch.id)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert batch.status == "completed", batch.errors
    assert batch.request_counts is not None
    assert (batch.request_counts.completed, batch.request_counts.failed) == (3, 1)
    assert batch.output_file_id is not None
    assert batch.error_file_id is not None
    answers = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert {a["custom_id"] for a in answers} == {"r0", "r1", "r2"}
    assert all(a["response"]["body"]["choices"][0]["message"]["content"] == ANSWER for a in answers)
    (error,) = client.files.content(batch.error_file_id).text.splitlines()
    assert json.loads(error)["response"]["status_code"] == 400
    assert batch.id in [b.id for b in client.batches.list(limit=5)]
    for number in (file.id, batch.output_file_id, batch.error_file_id):
        assert number in [f.id for f in client.files.list()]
        assert client.files.delete(number).deleted
