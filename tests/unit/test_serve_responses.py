"""/v1/responses over a scripted engine: objects, events in order, tools, formats, what is kept, what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve.openai_responses_store import ResponseStore
from septet.session.reading import ReplyFormat
from septet.session.session import Limits
from septet.text.parsers.dialects import DIALECTS
from tests.fakes import ByteTokenizer, FakeClient, session
from tests.unit.test_serve_openai import app_of, ask

if TYPE_CHECKING:
    import httpx

URL = "/v1/responses"


def post(body: Any, client: FakeClient | None = None, app: Any = None) -> httpx.Response:
    return ask(app or app_of(client), "POST", URL, json=body)


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.headers["content-type"].startswith("text/event-stream")
    told = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == len(told)
        told.append(event)
    return told


def test_whole() -> None:
    answer = post(
        {"model": "fake", "input": "hi", "instructions": "be", "metadata": {"a": "b"}}, FakeClient("hey", eos=True)
    )
    body = answer.json()
    assert body["id"].startswith("resp_")
    assert (body["object"], body["status"], body["error"]) == ("response", "completed", None)
    assert body["metadata"] == {"a": "b"}
    (item,) = body["output"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert item["content"] == [{"type": "output_text", "text": "hey", "annotations": [], "logprobs": []}]
    n = len("[system]be[user]hi[assistant]")
    assert body["usage"]["input_tokens"] == n
    assert body["usage"]["output_tokens"] == 4
    assert body["usage"]["input_tokens_details"] == {"cached_tokens": 3}


def test_cut_is_incomplete() -> None:
    body = post({"input": "hi", "max_output_tokens": 2}, FakeClient("hello")).json()
    assert body["status"] == "incomplete"
    assert body["incomplete_details"] == {"reason": "max_output_tokens"}
    assert body["output"][0]["content"][0]["text"] == "he"
    assert body["output"][0]["status"] == "incomplete"


def test_stream() -> None:
    events = events_of(post({"input": "hi", "stream": True}, FakeClient("abc", eos=True)))
    assert [e["type"] for e in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * 3,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[0]["response"]["status"] == "in_progress"
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == "abc"
    assert len({e["item_id"] for e in events if "item_id" in e}) == 1
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == "abc"
    assert events[-1]["response"]["usage"]["output_tokens"] == 4


def with_tools(text: str) -> tuple[Any, FakeClient]:
    """An app whose model writes calls and thoughts as Qwen3 does."""
    from septet.serve.app import Service, Settings, create_app

    client = FakeClient(text, eos=True)
    template = "<think>"
    reply = ReplyFormat.of(template, ByteTokenizer(), tool_call_parser="hermes", reasoning_parser="qwen3")
    made = session(client, reply_format=reply, limits=Limits(4000, 257))
    made._taught = True  # this engine takes no vocabulary
    return create_app(Service(made, Settings())), client


TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


def test_tools_and_thoughts() -> None:
    assert "hermes" in DIALECTS
    app, _ = with_tools(f"<think>hm</think>ok{CALL}")
    body = post({"input": "hi", "tools": [TOOL]}, app=app).json()
    assert [item["type"] for item in body["output"]] == ["reasoning", "message", "function_call"]
    thoughts, _, call = body["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "hm"}]
    assert (call["name"], json.loads(call["arguments"]), call["status"]) == ("add", {"a": 1}, "completed")
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    streamed = events_of(post({"input": "hi", "tools": [TOOL], "stream": True}, app=app))
    kinds = [e["type"].removeprefix("response.") for e in streamed]
    assert "reasoning_text.delta" in kinds
    done = next(e for e in streamed if e["type"] == "response.function_call_arguments.done")
    deltas = [e["delta"] for e in streamed if e["type"] == "response.function_call_arguments.delta"]
    assert json.loads("".join(deltas)) == json.loads(done["arguments"]) == {"a": 1}
    assert [e["output_index"] for e in streamed if e["type"] == "response.output_item.done"] == [0, 1, 2]


def test_items_become_one_conversation() -> None:
    app, client = with_tools("done")
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "add"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}', "id": "fc_1"},
        {"type": "function_call_output", "call_id": "c1", "output": "2"},
    ]
    assert post({"input": items, "tools": [TOOL]}, app=app).status_code == 200
    text = bytes(client.seen[0].tokens).decode()
    assert text.startswith("[system]")  # the template knows no tools: they are written as text
    assert "[user]add[assistant]ok" in text
    assert text.index('"a": 1') < text.index("2")


def test_previous_response_goes_on() -> None:
    client = FakeClient("yes", eos=True)
    app = app_of(client)
    first = post({"input": "one", "instructions": "be brief"}, app=app).json()
    second = post({"input": "two", "previous_response_id": first["id"]}, app=app).json()
    assert bytes(client.seen[1].tokens) == b"[user]one[assistant]yes[user]two[assistant]"
    assert second["previous_response_id"] == first["id"]
    third = events_of(post({"input": "3", "previous_response_id": second["id"], "stream": True}, app=app))
    assert bytes(client.seen[2].tokens).startswith(b"[user]one[assistant]yes[user]two[assistant]yes[user]3")
    assert ask(app, "GET", f"{URL}/{third[-1]['response']['id']}").json() == third[-1]["response"]


def test_stored_ones() -> None:
    app = app_of(FakeClient("yes", eos=True))
    made = post({"input": "one"}, app=app).json()
    assert ask(app, "GET", f"{URL}/{made['id']}").json() == made
    items = ask(app, "GET", f"{URL}/{made['id']}/input_items").json()
    assert items["data"][0]["content"] == [{"type": "input_text", "text": "one"}]
    assert ask(app, "POST", f"{URL}/{made['id']}/cancel").status_code == 400
    assert ask(app, "DELETE", f"{URL}/{made['id']}").json()["deleted"] is True
    for method in ("GET", "DELETE"):
        gone = ask(app, method, f"{URL}/{made['id']}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "response_not_found")
    refused = post({"input": "two", "previous_response_id": made["id"]}, app=app)
    assert refused.status_code == 404
    assert refused.json()["error"]["param"] == "previous_response_id"
    unkept = post({"input": "one", "store": False}, app=app).json()
    assert ask(app, "GET", f"{URL}/{unkept['id']}").status_code == 404


def test_store_is_bounded_and_each_key_has_its_own() -> None:
    from septet.serve.errors import HttpError

    store = ResponseStore(max_responses=3, max_bytes=1000)
    for i in range(5):
        store.add("a", {"id": f"r{i}"}, [], [])
    assert len(store) == 3
    store.add("a", {"id": "large"}, [], [{"text": "x" * 900}])
    assert store.get("a", "large")
    store.add("a", {"id": "too large"}, [], [{"text": "x" * 2000}])
    for owner, number in (("a", "r0"), ("b", "large"), ("a", "too large")):
        with pytest.raises(HttpError, match="no response"):
            store.get(owner, number)


def test_logprobs_and_format_and_sampling_reach_the_engine() -> None:
    client = FakeClient("é", eos=True)
    schema = {"type": "object", "properties": {}}
    body = {
        "input": "hi",
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "temperature": 0.5,
        "top_k": 3,
        "seed": 1,
        "cache_salt": "s",
    }
    answer = post(body, client).json()
    entries = answer["output"][0]["content"][0]["logprobs"]
    assert [len(e["top_logprobs"]) for e in entries] == [2, 2]
    assert (client.seen[0].params.temperature, client.seen[0].params.top_k, client.seen[0].cache_salt) == (0.5, 3, "s")
    from septet.serve.openai_responses_call import parse_responses

    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    structured = parse_responses({"input": "hi", "text": {"format": form}}).chat.params.structured
    assert structured is not None
    assert json.loads(structured.spec) == schema


def test_error_in_a_stream_is_response_failed() -> None:
    client = FakeClient("hello")
    client.failure = Update("x", finish_reason=FinishReason.ERROR, error="it broke", error_kind="engine_dead_error")
    events = events_of(post({"input": "hi", "stream": True}, client))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "engine_dead_error", "message": "it broke"}
    client.failure = Update("x", finish_reason=FinishReason.ERROR, error="full", error_kind="overloaded_error")
    client._updates = lambda request: [client.failure]  # type: ignore[method-assign, list-item]
    assert post({"input": "hi", "stream": True}, client).status_code == 429


def test_input_tokens() -> None:
    counted = ask(app_of(), "POST", f"{URL}/input_tokens", json={"input": "hi"}).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": len("[user]hi[assistant]")}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc/passwd"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": [{"type": "function_call", "call_id": "c", "name": "n", "arguments": "{"}]}, None),
        ({"input": "x", "surprise": 1}, "surprise"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "truncation": "auto"}, "truncation"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": "1"}, "max_output_tokens"),
        ({"input": "x", "temperature": -1}, "temperature"),
        ({"input": "x", "top_logprobs": 99}, "top_logprobs"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"input": "x", "tools": [1]}, "tools[0]"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"input": "x", "text": {"format": {"type": "odd"}}}, None),
        ({"input": "x", "text": 1}, "text"),
        ({"input": "x", "include": ["computer"]}, "include"),
        ({"input": "x", "metadata": {"a": 1}}, "metadata"),
        ({"input": "x", "previous_response_id": 1}, "previous_response_id"),
        ({"input": "x", "reasoning": {"loud": True}}, "reasoning"),
        ({"input": "x" * 300}, "input"),
        ({"input": "x", "cache_salt": "s" * 10_000}, "cache_salt"),
    ],
)
def test_refusals(body: Any, param: str | None) -> None:
    client = FakeClient()
    for stream in (False, True):
        response = post({**body, "stream": stream}, client)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert param is None or error["param"] == param
    assert client.seen == []
