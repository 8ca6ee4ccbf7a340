"""Bad input to every generation route: one clear 4xx that names the thing, and the engine never hears of it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from septet.serve.guard import host_of, is_loopback
from tests.fakes import FakeClient
from tests.unit.test_serve_openai import CHAT, HI, TEXT, app_of, ask

BODIES = {CHAT: HI, TEXT: {"prompt": "hi"}}
ROUTES = [CHAT, TEXT]
MORE = ["/v1/responses", "/v1/embeddings", "/v1/batches", "/tokenize", "/detokenize"]  # same reader of bodies
JSON = {"content-type": "application/json"}


def refused(path: str, status: int = 400, settings: dict[str, Any] | None = None, **request: Any) -> dict[str, Any]:
    """Send, and check what holds of every refusal."""
    client = FakeClient()
    begun = time.monotonic()
    response = ask(app_of(client, **(settings or {})), "POST", path, **request)
    assert time.monotonic() - begun < 5
    assert response.status_code == status, response.text[:300]
    assert client.seen == []
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert 0 < len(error["message"]) < 600
    assert "Traceback" not in response.text
    assert " at 0x" not in response.text
    return error


@pytest.mark.parametrize("path", [*ROUTES, *MORE])
@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b'"x"', "object"),
        (b"null", "object"),
        (b'{"n": NaN}', "JSON"),
        (b'{"n": Infinity}', "JSON"),
        (b'{"n": 1e999}', "JSON"),
        (b'{"n": ' + b"1" * 1_000_000 + b"}", "JSON"),
        (b"[" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"n": 1, "n": 2}', "'n' twice"),
        (b'{"messages": [{"role": "user", "role": "system"}]}', "'role' twice"),
        (b'{"user": "\\ud800"}', "JSON"),
        (b'{"user": "\xff"}', "JSON"),
        (b'{"user": "\xed\xa0\x80"}', "JSON"),
        (b'{"n": 1} trailing', "JSON"),
    ],
)
def test_json_that_is_none(path: str, body: bytes, words: str) -> None:
    assert words in refused(path, content=body, headers=JSON)["message"]


@pytest.mark.parametrize("path", [*ROUTES, *MORE])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({**JSON, "content-encoding": "gzip"}, 415),
        ({**JSON, "content-length": "-5"}, 400),
        ({**JSON, "content-length": "abc"}, 400),
        ({**JSON, "content-length": "9" * 30}, 400),
        ({**JSON, "content-length": "999999999"}, 413),
    ],
)
def test_headers_of_the_body(path: str, headers: dict[str, str], status: int) -> None:
    refused(path, status, content=b"{}", headers=headers)


@pytest.mark.parametrize("path", [*ROUTES, *MORE])
def test_body_without_a_length_is_cut_off_while_it_streams(path: str) -> None:
    sent = 0

    async def endless() -> Any:
        nonlocal sent
        while True:
            sent += 1000
            yield b"x" * 1000

    refused(path, 413, {"max_body_bytes": 10_000}, content=endless(), headers=JSON)
    assert sent <= 20_000


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("value", [b"1,", b"[],", b'{"a":1},', b"[[[1]]],"])
def test_a_body_of_millions_of_values_is_refused_before_it_is_decoded(path: str, value: bytes) -> None:
    body = b'{"prompt": [' + value * (15_000_000 // len(value)) + b"1]}"
    begun = time.process_time()
    assert "values" in refused(path, 413, content=body, headers=JSON)["message"]
    assert time.process_time() - begun < 1.0, "decoding takes seconds, in which nobody gets a token"


def test_a_long_text_is_not_many_values() -> None:
    error = refused(TEXT, content=b'{"prompt": "' + b"a, b: [c] " * 50_000 + b'"}', headers=JSON)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize("path", [*ROUTES, *MORE])
def test_slow_body_times_out(path: str) -> None:
    async def slow() -> Any:
        yield b"{"
        await asyncio.sleep(3600)

    refused(path, 408, {"body_timeout_s": 0.05}, content=slow(), headers=JSON)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0), ("n", 129), ("n", 10**30), ("n", "2"), ("n", True), ("n", 1.5),
        ("temperature", -0.1), ("temperature", 1e308), ("temperature", "hot"), ("temperature", [1]),
        ("top_p", 0), ("top_p", 1.1), ("min_p", -1), ("top_k", -2), ("top_k", 10**12), ("top_k", 1.5),
        ("presence_penalty", 3), ("frequency_penalty", -2.1), ("repetition_penalty", 0),
        ("seed", 2**64), ("seed", "x"), ("seed", 1.5),
        ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2**40), ("max_tokens", "9"), ("max_tokens", 1.5),
        ("min_tokens", -1), ("min_tokens", 10**6),
        ("stop", [""]), ("stop", ["x"] * 65), ("stop", "x" * 2000), ("stop", [1]), ("stop", {"a": 1}),
        ("stop_token_ids", [-1]), ("stop_token_ids", ["a"]), ("stop_token_ids", [10**6]), ("stop_token_ids", "a"),
        ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": "a"}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"999999": 1}), ("logit_bias", [1]), ("logit_bias", {str(i): 1 for i in range(2000)}),
        ("stream", "yes"), ("stream_options", {"include_usage": True}), ("ignore_eos", 1),
        ("skip_special_tokens", "no"), ("prompt_logprobs", -1), ("prompt_logprobs", 21),
        ("priority", "high"), ("priority", True), ("priority", 2**40), ("cache_salt", 5), ("cache_salt", "x" * 999),
        ("model", 5), ("echo", "a"),
        ("response_format", {"type": "xml"}), ("best_of", 3), ("use_beam_search", True),
        ("guided_json", 3), ("structured_outputs", {"regexp": "a"}), ("truncate_prompt_tokens", 5),
        ("prompt_embeds", "AAAA"), ("logits_processors", ["os.system"]),
    ],
)  # fmt: skip
def test_fields_out_of_range_are_named(path: str, field: str, value: Any) -> None:
    error = refused(path, json={**BODIES[path], field: value})
    assert field in (error["param"] or "")
    assert field in error["message"]


@pytest.mark.parametrize("path", ROUTES)
def test_unknown_field_is_named(path: str) -> None:
    assert "'temprature'" in refused(path, json={**BODIES[path], "temprature": 1})["message"]
    assert len(refused(path, json={**BODIES[path], "x" * 100_000: 1})["message"]) < 200


@pytest.mark.parametrize("path", ROUTES)
def test_harmless_fields_and_nulls_are_ignored(path: str) -> None:
    harmless = {
        "user": "me",
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "k",
        "response_format": {"type": "text"},
        "temperature": None,
        "stop": None,
        "n": None,
    }
    if path == CHAT:
        harmless |= {"tools": None, "tool_choice": "none", "store": False, "modalities": ["text"], "functions": []}
    assert ask(app_of(), "POST", path, json={**BODIES[path], **harmless}).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]), ("tool_choice", "required"), ("functions", [{}]), ("store", True),
        ("modalities", ["audio"]), ("audio", {}), ("web_search_options", {}),
        ("chat_template", "{{ 1 }}"), ("chat_template_kwargs", {"tokenize": True}), ("top_logprobs", 3),
        ("chat_template_kwargs", {"add_generation_prompt": False}), ("chat_template_kwargs", {"tools": []}),
        ("chat_template_kwargs", {"messages": []}), ("chat_template_kwargs", {"self": 1}),
        ("documents", [{}]), ("logprobs", 3),
        ("max_completion_tokens", 0), ("min_p", 2), ("add_special_tokens", True), ("suffix", "x"), ("prompt", "x"),
    ],
)  # fmt: skip
def test_chat_refuses_what_it_would_not_do(field: str, value: Any) -> None:
    message = refused(CHAT, json={**HI, field: value})["message"]
    assert field in message or "add_generation_prompt" in message


@pytest.mark.parametrize(
    "messages",
    [
        [], {}, "hi", [1], [{}], [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"content": "x"}],
        [{"role": ["user"], "content": "x"}], [{"role": "user", "content": 5}], [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}], [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": ["x"]}], [{"role": "user", "content": [{"type": "text", "text": "a"}] * 300}],
        [{"role": "user", "content": "x", "tool_calls": [{}]}], [{"role": "tool", "content": "x"}],
        [{"role": "user", "content": "x", "name": 5}], [{"role": "user", "content": "x"}] * 5000,
    ],
)  # fmt: skip
def test_messages_of_the_wrong_shape(messages: Any) -> None:
    assert "messages" in refused(CHAT, json={"messages": messages})["message"]


@pytest.mark.parametrize(
    "prompt",
    [None, 5, {}, [], [[]], "", ["a", ""], ["a", 5], [1, "a"], [1, None], [-1], [257], [10**30], [1.5], ["x"] * 5000,
     [[1, [2]]], "x" * 200],
)  # fmt: skip
def test_prompts_of_the_wrong_shape(prompt: Any) -> None:
    error = refused(TEXT, json={"prompt": prompt})
    assert "prompt" in error["message"]
    if prompt == "x" * 200:
        assert error["code"] == "context_length_exceeded"


def test_prompts_times_n_is_bounded() -> None:
    refused(TEXT, json={"prompt": ["x"] * 100, "n": 100})


def test_suffix_is_refused_by_name() -> None:
    assert refused(TEXT, json={"prompt": "a", "suffix": "b"})["param"] == "suffix"


def test_errors_speak_of_the_field_that_was_given() -> None:
    assert refused(CHAT, json={**HI, "logprobs": True, "top_logprobs": 21})["param"] == "top_logprobs"
    assert refused(CHAT, json={**HI, "max_tokens": 0})["param"] == "max_tokens"


def test_stream_options_are_held_to_a_list() -> None:
    assert "'stream_options.x'" in refused(CHAT, json={**HI, "stream": True, "stream_options": {"x": 1}})["message"]


# -- routes, hosts, origins -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404), ("GET", "/v1/models/", 404), ("GET", "//v1/models", 404), ("GET", "/v1/%2e%2e/x", 404),
        ("GET", CHAT, 405), ("DELETE", CHAT, 405), ("POST", "/health", 405), ("PUT", "/v1/models", 405),
        ("POST", CHAT + "/", 404), ("GET", "/v1/models/..%2f..%2fetc", 404), ("GET", "/v1/models/" + "x" * 5000, 404),
    ],
)  # fmt: skip
def test_wrong_routes_and_methods_have_openais_shape(method: str, path: str, status: int) -> None:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of())) as http:
            return await http.request(method, "http://localhost" + path)

    response = asyncio.run(go())
    assert response.status_code == status
    assert response.json()["error"]["type"] in ("invalid_request_error", "not_found_error")
    assert len(response.text) < 600


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:8000", "[::1]:8000", "api.localhost"])
def test_loopback_names_are_served(host: str) -> None:
    assert ask(app_of(), "GET", "/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost.evil.example", 403), ("10.0.0.1", 403),
        ("localhost/x", 400), ("localhost?x", 400), ("localhost#x", 400), ("a@localhost", 400), ("", 400), ("x y", 400),
        ("localhost:99999999", 400), ("[::1", 400),
    ],
)  # fmt: skip
def test_foreign_or_broken_hosts_are_refused_on_loopback(host: str, status: int) -> None:
    response = ask(app_of(), "GET", "/v1/models", headers={"host": host})
    assert response.status_code == status
    assert "error" in response.json()


def test_hosts_are_free_beyond_loopback_and_where_allowed() -> None:
    assert ask(app_of(host="0.0.0.0"), "GET", "/health", headers={"host": "gpu.example"}).status_code == 200
    app = app_of(allowed_hosts=("gpu.example",))
    assert ask(app, "GET", "/health", headers={"host": "gpu.example:8000"}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "file://", "http://localhost.evil.example"])
def test_foreign_origins_are_refused(origin: str) -> None:
    for host in ("127.0.0.1", "0.0.0.0"):
        response = ask(app_of(host=host), "POST", CHAT, json=HI, headers={"origin": origin})
        assert response.status_code == 403


def test_own_and_allowed_origins_are_served() -> None:
    own = ask(app_of(), "POST", CHAT, json=HI, headers={"origin": "http://localhost:3000"})
    assert own.status_code == 200
    app = app_of(allowed_origins=("https://ui.example",))
    response = ask(app, "POST", CHAT, json=HI, headers={"origin": "https://ui.example"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://ui.example"
    assert ask(app, "POST", CHAT, json=HI, headers={"origin": "https://ui.example.evil"}).status_code == 403


def test_host_parsing() -> None:
    assert host_of("LOCALHOST:80") == "localhost"
    assert host_of("a\nb") is None
    assert is_loopback("127.9.9.9")
    assert not is_loopback("128.0.0.1")
