"""Anthropic's API over a scripted engine, spoken to as ASGI: shapes, streams, blocks, errors, bad input."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve import anthropic
from septet.serve.app import Service, Settings, create_app
from septet.serve.keys import Keys
from tests.fakes import FakeClient, session
from tests.unit.test_parsers_chat import CALL, SCHEMA, NativeTemplate, Teachable, made
from tests.unit.test_serve_openai import app_of, ask

if TYPE_CHECKING:
    import httpx

PATH = "/v1/messages"
HI: dict[str, Any] = {"model": "fake", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
TOOLS = [{"name": "get_weather", "description": "Weather", "input_schema": SCHEMA}]
CLIENT = {"anthropic-version": "2023-06-01", "x-api-key": "none"}


class Template(NativeTemplate):
    variables = frozenset({"enable_thinking"})

    def render(self, messages: Any, *, enable_thinking: bool = False, **options: Any) -> str:
        return super().render(messages, think=enable_thinking, **options)


def post(body: Any, client: FakeClient | None = None, path: str = PATH) -> httpx.Response:
    return ask(app_of(client), "POST", path, json=body, headers=CLIENT)


def posted(body: Any, client: FakeClient) -> httpx.Response:
    """To a model that has tools and thoughts."""
    return ask(create_app(Service(made(client, Template()), Settings())), "POST", PATH, json=body, headers=CLIENT)


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for part in response.text.split("\n\n")[:-1]:
        name, data = part.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def seen(client: FakeClient) -> str:
    return bytes(client.seen[0].tokens).decode()


def test_message() -> None:
    response = post({**HI, "max_tokens": 3}, FakeClient("hello"))
    answer = response.json()
    assert answer.pop("id").startswith("msg_")
    assert response.headers["request-id"].startswith("req_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": "fake",
        "content": [{"type": "text", "text": "hel"}],
        "stop_reason": "max_tokens",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len("[user]hi[assistant]") - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "cache_creation": {"ephemeral_5m_input_tokens": 0, "ephemeral_1h_input_tokens": 0},
            "output_tokens": 3,
            "output_tokens_details": {"thinking_tokens": 0},
        },
    }


def test_stream() -> None:
    response = post({**HI, "stream": True}, FakeClient("abc", eos=True))
    events = events_of(response)
    assert response.headers["request-id"].startswith("req_")
    kinds = [e["type"] for e in events]
    assert kinds == [
        "message_start", "ping", "content_block_start", *["content_block_delta"] * 3, "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
    assert events[2] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    assert "".join(e["delta"]["text"] for e in events[3:6]) == "abc"
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == 4


def test_stop_sequence_and_sampling() -> None:
    client = FakeClient("one STOP two")
    body = {**HI, "stop_sequences": ["STOP"], "temperature": 0.5, "top_p": 0.9, "top_k": 7}
    answer = post({**body, "metadata": {"user_id": "u"}, "service_tier": "auto"}, client).json()
    assert answer["content"] == [{"type": "text", "text": "one "}]
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "STOP")
    params = client.seen[0].params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (0.5, 0.9, 7, 50)


def test_the_end_of_the_context_has_its_own_reason() -> None:
    answer = post({**HI, "max_tokens": 5000}, FakeClient("x" * 500)).json()
    assert answer["stop_reason"] == "model_context_window_exceeded"


def test_no_tokens_at_all_warm_the_cache() -> None:
    for stream in (False, True):
        response = post({**HI, "max_tokens": 0, "stream": stream})
        if stream:
            kinds = [e["type"] for e in events_of(response)]
            assert kinds == ["message_start", "ping", "message_delta", "message_stop"]
        else:
            assert (response.json()["content"], response.json()["usage"]["output_tokens"]) == ([], 0)
            assert response.json()["stop_reason"] == "max_tokens"


def test_system_blocks_turns_and_prefill() -> None:
    client = FakeClient()
    cached = {"type": "ephemeral", "ttl": "1h"}
    body = {
        **HI,
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=1"},
            {"type": "text", "text": "s", "cache_control": cached},
            {"type": "text", "text": "t"},
        ],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "c"},
            {"role": "assistant", "content": [{"type": "text", "text": "The answer"}]},
        ],
        "cache_control": cached,
    }
    assert post(body, client).status_code == 200
    assert seen(client) == "[system]s\nt[user]a\nb\nc[assistant]The answer"


def test_tools_there_and_back() -> None:
    client = Teachable(CALL, eos=True)
    answer = posted({**HI, "max_tokens": 999, "tools": TOOLS}, client).json()
    assert answer["stop_reason"] == "tool_use"
    text, call = answer["content"]
    assert text["text"].strip() == "Let me see."
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Paris"})
    assert call["id"].startswith("toolu_")

    client = Teachable("Sunny", eos=True)
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": [{"type": "text", "text": "21 C"}]}
    failed = {"type": "tool_result", "tool_use_id": call["id"], "content": "no such city", "is_error": True}
    turn = {"role": "user", "content": [result, failed, {"type": "text", "text": "Well?"}]}
    messages = [*HI["messages"], {"role": "assistant", "content": answer["content"]}, turn]
    assert posted({**HI, "tools": TOOLS, "messages": messages}, client).status_code == 200
    tools, told = json.loads(seen(client))
    assert tools[0]["function"]["parameters"] == SCHEMA
    assert told[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    shared = {"role": "tool", "tool_call_id": call["id"], "name": "get_weather"}
    assert told[2:] == [
        shared | {"content": "21 C"},
        shared | {"content": "Error: no such city"},
        {"role": "user", "content": "Well?"},
    ]


def test_a_call_in_a_stream() -> None:
    events = events_of(posted({**HI, "max_tokens": 999, "tools": TOOLS, "stream": True}, Teachable(CALL, eos=True)))
    start = next(e for e in events if e["type"] == "content_block_start" and e["index"] == 1)
    assert start["content_block"] | {"id": ""} == {"type": "tool_use", "id": "", "name": "get_weather", "input": {}}
    pieces = [e["delta"] for e in events if e["type"] == "content_block_delta" and e["index"] == 1]
    assert {p["type"] for p in pieces} == {"input_json_delta"}
    assert json.loads("".join(p["partial_json"] for p in pieces)) == {"city": "Paris"}
    assert events[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("choice", "forced"),
    [
        ({"type": "auto"}, False),
        ({"type": "any"}, True),
        ({"type": "any", "disable_parallel_tool_use": True}, True),
        ({"type": "tool", "name": "get_weather"}, True),
        ({"type": "none"}, False),
    ],
)
def test_tool_choice(choice: dict[str, Any], forced: bool) -> None:
    client = Teachable(CALL.removeprefix("Let me see.\n"), eos=True)
    answer = posted({**HI, "max_tokens": 999, "tools": TOOLS, "tool_choice": choice}, client).json()
    bound = client.seen[0].params.structured
    assert (bound is None) == (choice["type"] == "none")
    assert (bound is not None and '"at_least_one": true' in bound.spec) == forced
    if choice["type"] == "none":
        assert json.loads(seen(client))[0] is None
        assert [block["type"] for block in answer["content"]] == ["text"]
    else:
        assert [block["type"] for block in answer["content"]] == ["tool_use"], "white space makes no text block"


def test_thinking() -> None:
    client = Teachable("hm, 2</think>\n\nfour", eos=True)
    body = {**HI, "thinking": {"type": "enabled", "budget_tokens": 40}}
    thought, text = posted(body, client).json()["content"]
    assert seen(client).endswith("<think>\n")
    assert (thought["type"], thought["thinking"]) == ("thinking", "hm, 2")
    assert thought["signature"]
    assert text["text"].strip() == "four"
    deltas = [e["delta"] for e in events_of(posted({**body, "stream": True}, client)) if "delta" in e]
    kinds = list(dict.fromkeys(d["type"] for d in deltas if "type" in d))
    assert kinds == ["thinking_delta", "signature_delta", "text_delta"]
    assert "".join(d.get("thinking", "") for d in deltas) == "hm, 2"

    hidden = posted({**HI, "thinking": {"type": "adaptive", "display": "omitted"}}, client).json()["content"]
    assert (hidden[0]["type"], hidden[0]["thinking"]) == ("thinking", "")
    client = Teachable("four", eos=True)
    posted(HI, client)
    assert not seen(client).endswith("<think>\n"), "no thoughts unless asked for"


def test_thoughts_of_earlier_turns_reach_the_template() -> None:
    client = Teachable("x", eos=True)
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    blocks = [thought, {"type": "redacted_thinking", "data": "?"}, {"type": "text", "text": "a"}]
    posted({**HI, "messages": [*HI["messages"], {"role": "assistant", "content": blocks}, *HI["messages"]]}, client)
    told = json.loads(seen(client))[1]
    assert told[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}


def test_a_schema_binds_the_answer() -> None:
    client = Teachable("{}", eos=True)
    form = {"type": "json_schema", "schema": SCHEMA}
    posted({**HI, "output_config": {"format": form, "effort": "low"}}, client)
    structured = client.seen[0].params.structured
    assert structured is not None
    assert json.loads(structured.spec) == SCHEMA


def test_count_tokens() -> None:
    client = FakeClient()
    response = post({k: v for k, v in HI.items() if k != "max_tokens"}, client, PATH + "/count_tokens")
    assert response.json() == {"input_tokens": len("[user]hi[assistant]")}
    assert response.headers["request-id"]
    assert client.seen == []


def test_models_by_header() -> None:
    app = app_of(served_names=("a", "b", "c"))
    assert ask(app, "GET", "/v1/models").json()["object"] == "list"
    page = ask(app, "GET", "/v1/models?limit=2", headers=CLIENT).json()
    assert ([m["id"] for m in page["data"]], page["has_more"], page["last_id"]) == (["a", "b"], True, "b")
    page = ask(app, "GET", "/v1/models?after_id=b", headers=CLIENT).json()
    assert ([m["id"] for m in page["data"]], page["has_more"]) == (["c"], False)
    page = ask(app, "GET", "/v1/models?before_id=c&limit=1", headers=CLIENT).json()
    assert ([m["id"] for m in page["data"]], page["has_more"]) == (["b"], True)
    one = ask(app, "GET", "/v1/models/a", headers=CLIENT).json()
    assert (one["type"], one["id"], one["max_input_tokens"]) == ("model", "a", 200)
    assert ask(app, "GET", "/v1/models/a").json()["object"] == "model"
    missing = ask(app, "GET", "/v1/models/z", headers=CLIENT)
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found_error")


def test_errors_have_their_shape() -> None:
    response = post({**HI, "model": "gpt"})
    body = response.json()
    assert (response.status_code, body["type"], body["error"]["type"]) == (404, "error", "not_found_error")
    assert body["request_id"] == response.headers["request-id"] == "req_" + response.headers["x-request-id"]


def test_a_missing_key_is_told_in_the_same_shape() -> None:
    key = "k" * 16
    app = create_app(Service(session(), Settings(), Keys.load(plain=[key])))
    refused = ask(app, "POST", PATH, json=HI, headers=CLIENT)
    assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")
    assert ask(app, "POST", PATH, json=HI, headers={**CLIENT, "x-api-key": key}).status_code == 200


def test_an_error_within_a_stream_is_its_last_event() -> None:
    client = FakeClient()
    client.failure = Update("", finish_reason=FinishReason.ERROR, error="boom", error_kind="engine_dead_error")
    events = events_of(post({**HI, "stream": True}, client))
    assert events[-1]["type"] == "error"
    assert events[-1]["error"] == {"type": "api_error", "message": "boom"}


def test_a_silent_stream_gets_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anthropic, "PING_S", 0.01)
    client = FakeClient("a")
    client.pause = lambda: asyncio.sleep(0.05)
    kinds = [e["type"] for e in events_of(post({**HI, "stream": True}, client))]
    assert kinds[0] == "message_start"
    assert kinds.count("ping") > 2
    assert kinds[-1] == "message_stop"


IMAGE = {"type": "image", "source": {"type": "url", "url": "http://127.0.0.1/x"}}
BLOCK = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "x"}
USE = {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_tokens": None}, "max_tokens"), ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 2**40}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"), ({"model": None}, "model"), ({"model": 5}, "model"),
        ({"messages": []}, "messages"), ({"messages": "hi"}, "messages"), ({"messages": [5]}, "messages[0]"),
        ({"messages": HI["messages"] * 5000}, "messages"), ({"surprise": 1}, "'surprise'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "'name'"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "text must be a string"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 1100}]}, "1024 blocks"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "document", "source": {}}]}]}, "'document'"),
        ({"messages": [{"role": "user", "content": [BLOCK]}]}, "tool_use_id names no tool_use"),
        ({"messages": [{"role": "user", "content": [{**BLOCK, "tool_use_id": "a\nb"}]}]}, "tool_use_id"),
        ({"messages": [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [
            {**BLOCK, "content": [{"type": "image"}]}]}]}, "'image'"),
        ({"messages": [{"role": "assistant", "content": [{**USE, "input": "x"}]}]}, "input"),
        ({"messages": [{"role": "assistant", "content": [{**USE, "name": "a b"}]}]}, "name"),
        ({"system": 5}, "system"), ({"system": [{"type": "image"}]}, "'image'"),
        ({"system": [{"type": "text", "text": "a", "cache_control": {"ttl": "9h"}}]}, "cache_control"),
        ({"cache_control": {"type": "ephemeral", "ttl": "9h"}}, "cache_control"),
        ({"stop_sequences": [""]}, "stop_sequences"), ({"stop_sequences": ["x"] * 65}, "stop_sequences"),
        ({"stop_sequences": "x"}, "stop_sequences"), ({"temperature": -1}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_k": -5}, "top_k"), ({"stream": "yes"}, "stream"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens"), ({"thinking": {"type": "on"}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 50}}, "less than max_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": -5}}, "budget_tokens"),
        ({"thinking": {"type": "adaptive", "x": 1}}, "'x'"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305'"),
        ({"tools": [{"name": "f"}]}, "input_schema"), ({"tools": [*TOOLS, *TOOLS]}, "'get_weather'"),
        ({"tools": TOOLS * 200}, "tools holds 200"), ({"tools": [{**TOOLS[0], "name": "x" * 200}]}, "name"),
        ({"tools": [{**TOOLS[0], "surprise": 1}]}, "surprise"),
        ({"tools": [{**TOOLS[0], "defer_loading": True}]}, "defer_loading"),
        ({"tool_choice": {"type": "any"}}, "needs tools"), ({"tool_choice": {"type": "x"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "g"}}, "'g'"),
        ({"container": "c"}, "container"), ({"mcp_servers": [{"url": "http://127.0.0.1"}]}, "mcp_servers"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"output_config": {"effort": "huge"}}, "effort"), ({"output_config": {"x": 1}}, "'x'"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "maximum context length"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_named(change: dict[str, Any], words: str, stream: bool) -> None:
    client = FakeClient()
    response = post({**HI, "stream": stream, **change}, client)
    error = response.json()
    assert response.status_code == 400, response.text[:300]
    assert set(error) == {"type", "error", "request_id"}
    assert error["error"]["type"] == "invalid_request_error"
    assert words in error["error"]["message"]
    assert len(error["error"]["message"]) < 600
    assert client.seen == []


@pytest.mark.parametrize("path", [PATH, PATH + "/count_tokens"])
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b"[1]", "application/json", 400),
        (b'{"n": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"model": "a", "model": "b"}', "application/json", 400),
        (b'{"model": "\\ud800"}', "application/json", 400),
        (b"{}", "text/plain", 415),
    ],
)
def test_bodies_that_are_none(path: str, body: bytes, kind: str, status: int) -> None:
    response = ask(app_of(), "POST", path, content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert ask(app_of(max_body_bytes=10), "POST", path, json=HI).json()["error"]["type"] == "request_too_large"


@pytest.mark.parametrize("path", [PATH, PATH + "/count_tokens"])
@pytest.mark.parametrize("content", [[], {}, None])
def test_a_message_of_nothing_is_refused(path: str, content: Any) -> None:
    response = post({**HI, "messages": [{"role": "user", "content": content}]}, path=path)
    assert response.status_code == 400
    assert "messages[0].content" in response.json()["error"]["message"]


KEEP = {"type": "clear_thinking_20251015", "keep": "all"}
CLEAR = {"type": "clear_tool_uses_20250919"}


@pytest.mark.parametrize("edits", [[], [KEEP], [KEEP, CLEAR], [CLEAR | {"trigger": {"type": "tool_uses", "value": 1}}]])
@pytest.mark.parametrize("stream", [False, True])
def test_edits_that_change_nothing_are_taken_and_told(edits: list[Any], stream: bool) -> None:
    response = post({**HI, "context_management": {"edits": edits}, "stream": stream})
    assert response.status_code == 200, response.text
    told = events_of(response)[-2] if stream else response.json()
    assert told["context_management"] == {"applied_edits": []}


@pytest.mark.parametrize(
    "edit", [KEEP | {"keep": {"type": "thinking_turns", "value": 1}}, {"type": "compact_20260112"}, "x", {}]
)
def test_edits_that_would_change_something_are_refused_by_name(edit: Any) -> None:
    response = post({**HI, "context_management": {"edits": [edit]}})
    assert response.status_code == 400
    assert "context_management" in response.json()["error"]["message"]


def test_tool_uses_to_be_cleared_are_refused_from_their_trigger_on() -> None:
    used = [
        *HI["messages"],
        {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "get_weather", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "fine"}]},
    ]
    for value, status in ((5, 400), (100_000, 200)):
        edit = CLEAR | {"trigger": {"type": "input_tokens", "value": value}}
        body = {**HI, "messages": used, "tools": TOOLS, "context_management": {"edits": [edit]}}
        assert posted(body, Teachable("ok", eos=True)).status_code == status
