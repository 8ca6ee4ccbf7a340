"""Ollama's API over a scripted engine, spoken to as ASGI: shapes, streams, errors, names."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve.app import Service, Settings, create_app
from septet.serve.ollama_call import _closed
from septet.session.reading import ReplyFormat
from tests.fakes import ByteTokenizer, FakeClient, session
from tests.unit.test_serve_openai import ask

if TYPE_CHECKING:
    import httpx

GENERATE, CHAT = "/api/generate", "/api/chat"
HI = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}
ASK = {"model": "fake", "prompt": "hi"}


def post(path: str, body: Any, client: FakeClient | None = None, method: str = "POST", **parts: Any) -> httpx.Response:
    app = create_app(Service(session(client or FakeClient(), **parts), Settings()))
    return ask(app, method, path, json=body)


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


class Constrained(FakeClient):
    """Takes requests with a grammar, and keeps to none."""

    def teach(self, vocabulary: Any) -> None: ...


# -- generate and chat ------------------------------------------------------------------------------------------------
def test_generate_streams_lines_and_ends_with_figures() -> None:
    lines = lines_of(post(GENERATE, ASK, FakeClient("abc", eos=True)))
    assert "".join(line["response"] for line in lines) == "abc"
    assert [line["done"] for line in lines] == [False, False, False, True]
    assert all(line["model"] == "fake" and line["created_at"].endswith("Z") for line in lines)
    last = lines[-1]
    assert last["done_reason"] == "stop"
    assert (last["prompt_eval_count"], last["eval_count"]) == (len("[user]hi[assistant]"), 4)
    assert bytes(last["context"][:-1]) == b"[user]hi[assistant]abc"
    parts = [last[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")]
    assert all(isinstance(part, int) and part >= 0 for part in parts)
    assert sum(parts) == last["total_duration"] > 1000  # nanoseconds


def test_generate_whole() -> None:
    response = post(GENERATE, {**ASK, "stream": False, "options": {"num_predict": 2}}, FakeClient("abc"))
    assert response.headers["content-type"] == "application/json"
    answer = response.json()
    assert (answer["response"], answer["done"], answer["done_reason"]) == ("ab", True, "length")
    assert answer["eval_count"] == 2


def test_chat_streams_a_message() -> None:
    lines = lines_of(post(CHAT, HI, FakeClient("abc", eos=True)))
    assert all(line["message"]["role"] == "assistant" for line in lines)
    assert "".join(line["message"]["content"] for line in lines) == "abc"
    assert lines[-1]["done_reason"] == "stop"
    assert "context" not in lines[-1]


def test_raw_system_and_context() -> None:
    client = FakeClient("x")
    post(GENERATE, {**ASK, "raw": True}, client)
    post(GENERATE, {**ASK, "system": "be"}, client)
    post(GENERATE, {**ASK, "context": list(b"before")}, client)
    assert [bytes(r.tokens) for r in client.seen] == [
        b"hi",
        b"[system]be[user]hi[assistant]",
        b"before[user]hi[assistant]",
    ]


def test_ollamas_defaults_and_options_reach_the_engine() -> None:
    client = FakeClient()
    post(CHAT, HI, client)
    params = client.seen[0].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.9, 0.0)
    assert (params.repetition_penalty, params.max_tokens) == (1.0, 200 - len("[user]hi[assistant]"))
    options = {"temperature": 0, "top_k": 5.0, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1, "seed": 7,
               "stop": "z", "presence_penalty": 0.5, "frequency_penalty": -0.5, "num_predict": 3, "num_ctx": 2048,
               "num_gpu": 1, "num_thread": 4, "mirostat": 0, "no_such_option": 1}  # fmt: skip
    assert post(CHAT, {**HI, "options": options}, client).status_code == 200
    params = client.seen[1].params
    assert (params.temperature, params.top_k, params.top_p, params.min_p, params.seed) == (0, 5, 0.5, 0.1, 7)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.5, -0.5)
    assert (params.stop, params.max_tokens) == (("z",), 3)
    post(CHAT, {**HI, "options": {"num_predict": -1, "seed": -1, "repeat_penalty": 1.5, "repeat_last_n": 0}}, client)
    assert client.seen[2].params.repetition_penalty == 1.0


def test_format_binds_the_answer_and_closes_objects() -> None:
    client = Constrained()
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for form in ("json", schema):
        assert post(CHAT, {**HI, "format": form}, client).status_code == 200
    bound = [request.params.structured for request in client.seen]
    assert bound[0] is not None
    assert bound[1] is not None
    assert json.loads(bound[1].spec)["additionalProperties"] is False


def test_only_objects_that_say_nothing_are_closed() -> None:
    inner = {"properties": {"x": {}}}
    schema = {
        "properties": {"properties": inner, "open": {"properties": {}, "additionalProperties": True}},
        "allOf": [inner],
        "$defs": {"d": inner},
        "enum": [inner],
    }
    closed = _closed(schema)
    assert closed["properties"]["properties"] == {**inner, "additionalProperties": False}
    assert closed["properties"]["open"] == schema["properties"]["open"]
    assert closed["$defs"]["d"]["additionalProperties"] is False
    assert (closed["allOf"], closed["enum"]) == ([inner], [inner])
    assert "additionalProperties" not in closed


def test_logprobs() -> None:
    answer = post(CHAT, {**HI, "stream": False, "logprobs": True, "top_logprobs": 2}, FakeClient("é")).json()
    assert [one["bytes"] for one in answer["logprobs"]] == [[0xC3], [0xA9]]
    assert [top["logprob"] for top in answer["logprobs"][0]["top_logprobs"]] == [-1.0, -2.0]


TOOLS = [{"function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>'
PARTS = {"reply_format": ReplyFormat.of(None, ByteTokenizer())}  # type: ignore[arg-type]


@pytest.mark.parametrize("stream", [True, False])
def test_tools_are_called_with_arguments_as_an_object(stream: bool) -> None:
    body = {**HI, "tools": [TOOLS[0]], "stream": stream, "options": {"num_predict": 100}}
    client = Constrained(CALL, eos=True)
    session_parts = {**PARTS, "limits": type(session().limits)(4000, 257)}
    response = post(CHAT, body, client, **session_parts)
    lines = lines_of(response) if stream else [response.json()]
    calls = [call for line in lines for call in line["message"].get("tool_calls", [])]
    assert len(calls) == 1
    assert calls[0]["function"] == {"index": 0, "name": "add", "arguments": {"a": 2}}
    assert b'"add"' in bytes(client.seen[0].tokens)


def test_calls_and_results_of_a_conversation() -> None:
    client = FakeClient()
    messages = [
        {"role": "user", "content": "2?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]},
        {"role": "tool", "content": "4", "tool_name": "add"},
    ]
    assert post(CHAT, {"model": "fake", "messages": messages}, client, **PARTS).status_code == 200
    text = bytes(client.seen[0].tokens).decode()
    assert '"arguments": {"a": 2}' in text
    assert "<tool_response>" in text


THINKING = {"reply_format": ReplyFormat.of("<think></think>", ByteTokenizer())}  # type: ignore[arg-type]


def test_thoughts_are_told_apart_shown_or_not() -> None:
    client = FakeClient("<think>hm</think>yes", eos=True)
    for think, thoughts in ((None, "hm"), (True, "hm"), ("high", "hm"), (False, None)):
        message = post(CHAT, {**HI, "stream": False, "think": think}, client, **THINKING).json()["message"]
        assert message["content"] == "yes"
        assert message.get("thinking") == thoughts
    answer = post(GENERATE, {**ASK, "stream": False, "think": True}, client, **THINKING).json()
    assert (answer["response"], answer["thinking"]) == ("yes", "hm")
    assert "does not support thinking" in post(CHAT, {**HI, "think": True}).json()["error"]


def test_an_error_within_a_stream_is_a_line() -> None:
    client = FakeClient("hello")
    client.failure = Update("x", finish_reason=FinishReason.ERROR, error="the step failed")
    lines = lines_of(post(GENERATE, ASK, client))
    assert lines[-1] == {"error": "the step failed"}


def test_an_empty_request_loads_and_one_model_that_stays_is_not_unloaded() -> None:
    for path, body in ((GENERATE, {"model": "fake"}), (CHAT, {"model": "fake", "messages": []})):
        answer = post(path, body).json()
        assert (answer["done"], answer["done_reason"]) == (True, "load")
    assert "keeps its one model loaded" in post(GENERATE, {"model": "fake", "keep_alive": 0}).json()["error"]


def test_curls_default_type_is_taken_and_others_are_not() -> None:
    app = create_app(Service(session(), Settings()))
    form = {"content-type": "application/x-www-form-urlencoded"}
    raw = json.dumps({**ASK, "stream": False}).encode()
    assert ask(app, "POST", GENERATE, content=raw, headers=form).status_code == 200
    assert ask(app, "POST", GENERATE, content=raw, headers={"content-type": "text/html"}).status_code == 415
    for simple in (form, {"content-type": "text/plain"}):  # what a page may send without asking first
        foreign = {**simple, "origin": "http://evil.example"}
        assert ask(app, "POST", GENERATE, content=raw, headers=foreign).status_code == 403


# -- bad input --------------------------------------------------------------------------------------------------------
def refused(path: str, body: Any, words: str, status: int = 400) -> None:
    client = FakeClient()
    begun = time.monotonic()
    response = post(path, body, client)
    assert time.monotonic() - begun < 5
    assert response.status_code == status, response.text[:300]
    assert client.seen == []
    assert set(response.json()) == {"error"}
    assert words in response.json()["error"]
    assert 0 < len(response.json()["error"]) < 600


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model", None, "model is required"),
        ("model", 5, "model must be a string"),
        ("options", [], "options must be an object"),
        ("options", {"temperature": "hot"}, "temperature must be a number"),
        ("options", {"temperature": -1}, "temperature"),
        ("options", {"temperature": 1e308}, "temperature"),
        ("options", {"top_p": 7}, "top_p"),
        ("options", {"top_k": 1.5}, "top_k must be an integer"),
        ("options", {"seed": 2**70}, "seed must be an integer of 64 bits"),
        ("options", {"num_ctx": "x"}, "num_ctx"),
        ("options", {"num_predict": 2**40}, "max_tokens"),
        ("options", {"mirostat": 2}, "mirostat is not supported"),
        ("options", {"typical_p": 0.5}, "typical_p is not supported"),
        ("options", {"repeat_penalty": 1.2, "repeat_last_n": 5}, "repeat_last_n 5 is not supported"),
        ("options", {"stop": ["x"] * 100}, "stop"),
        ("options", {"stop": [1]}, "stop must be a string"),
        ("options", {f"o{i}": 1 for i in range(300)}, "options holds 300"),
        ("keep_alive", "soon", "keep_alive must be seconds or a duration"),
        ("keep_alive", 1e300, "keep_alive"),
        ("keep_alive", [], "keep_alive"),
        ("format", "xml", 'format must be "json" or a JSON schema'),
        ("format", 5, 'format must be "json" or a JSON schema'),
        ("think", "hardest", "think must be"),
        ("think", 3, "think must be"),
        ("template", "{{ x }}", "templates in requests are not accepted"),
        ("top_logprobs", 21, "top_logprobs"),
        ("logprobs", 1, "logprobs must be true or false"),
        ("stream", "yes", "stream must be true or false"),
        ("no_such_field", 1, "unknown field 'no_such_field'"),
    ],
)
@pytest.mark.parametrize("path", [GENERATE, CHAT])
def test_wrong_values_are_named(path: str, field: str, value: Any, words: str) -> None:
    refused(path, {**(HI if path == CHAT else ASK), field: value}, words)


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        (GENERATE, {"suffix": "x"}, "fill-in-the-middle"),
        (GENERATE, {"images": ["AAAA"]}, "takes text only"),
        (GENERATE, {"width": 512}, "image generation"),
        (GENERATE, {"raw": True, "system": "x"}, "raw takes the prompt as it is"),
        (GENERATE, {"raw": True, "context": [1]}, "raw takes the prompt as it is"),
        (GENERATE, {"context": [999_999]}, "no token id"),
        (GENERATE, {"context": [-1]}, "no token id"),
        (GENERATE, {"context": ["x"]}, "no token id"),
        (GENERATE, {"prompt": "x" * 500}, "too long"),
        (CHAT, {"messages": "hi"}, "messages must be an array"),
        (CHAT, {"messages": ["hi"]}, "messages[0] must be an object"),
        (CHAT, {"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "images": ["A"]}]}, "takes text only"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "magic": 1}]}, "magic"),
        (CHAT, {"messages": [{"role": "user", "content": "x"}] * 5000}, "at most 4096"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "/x"}}]}]}, "letters, digits"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "x"}}]}]}, "tool_calls"),
        (CHAT, {"tools": [{"function": {"name": "x y"}}]}, "tools[0]"),
        (CHAT, {"tools": ["x"]}, "tools[0]"),
        (CHAT, {"tools": [TOOLS[0]] * 200}, "at most 128"),
    ],
)  # fmt: skip
def test_wrong_bodies_are_named(path: str, more: dict[str, Any], words: str) -> None:
    refused(path, {**(HI if path == CHAT else ASK), **more}, words)


@pytest.mark.parametrize(
    "name", ["nope", "../x", "/etc/passwd", "a\0b", "\x1b[31m", "x" * 10_000, "fake:other", "fake/"]
)
@pytest.mark.parametrize("path", [GENERATE, CHAT, "/api/show", "/api/embed"])
def test_names_that_are_no_models(path: str, name: str) -> None:
    body: dict[str, Any] = {"model": name}
    response = post(path, body | ({"input": "x"} if path == "/api/embed" else {}))
    assert response.status_code == 404, response.text[:300]
    assert response.json()["error"].isprintable()
    assert len(response.json()["error"]) < 400


@pytest.mark.parametrize("path", [GENERATE, CHAT, "/api/show", "/api/create", "/api/copy", "/api/pull", "/api/push"])
@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"a": NaN}', b'{"a":' * 50_000, b'{"model": 1, "model": 2}'])
def test_bodies_that_are_no_json_objects(path: str, body: bytes) -> None:
    app = create_app(Service(session(), Settings()))
    response = ask(app, "POST", path, content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert (
        "JSON" in response.json()["error"]
        or "nested" in response.json()["error"]
        or "twice" in response.json()["error"]
    )


# -- names and what is here -------------------------------------------------------------------------------------------
def test_tags_ps_show_version_and_the_root() -> None:
    app = create_app(Service(session(), Settings()))
    tags = ask(app, "GET", "/api/tags").json()["models"]
    assert [model["name"] for model in tags] == ["fake:latest"]
    running = ask(app, "GET", "/api/ps").json()["models"]
    assert running[0]["context_length"] == 200
    assert ask(app, "POST", "/api/show", json={"model": "fake:latest"}).json()["capabilities"][0] == "completion"
    assert ask(app, "GET", "/api/version").json()["version"].count(".") == 2
    for method in ("GET", "HEAD"):
        root = ask(app, method, "/")
        assert (root.status_code, root.text) == (200, "Ollama is running" if method == "GET" else root.text)


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "/api/pull", {"model": "smollm2"}),
        ("POST", "/api/create", {"model": "x", "from": "fake"}),
        ("POST", "/api/copy", {"source": "fake", "destination": "x"}),
        ("DELETE", "/api/delete", {"model": "fake"}),
        ("HEAD", "/api/blobs/sha256:" + "0" * 64, None),
        ("POST", "/api/blobs/sha256:" + "0" * 64, {}),
    ],
)
def test_a_server_of_named_models_lets_nobody_change_the_store(method: str, path: str, body: Any) -> None:
    response = post(path, body, method=method)
    assert response.status_code == 403
    assert method == "HEAD" or "--manage" in response.json()["error"]


def test_push_is_refused_by_name() -> None:
    assert "push is not supported" in post("/api/push", {"model": "fake"}).json()["error"]
