"""OpenAI's API over a scripted engine, spoken to as ASGI: shapes, streams, errors, disconnects."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve.app import Service, Settings, create_app
from tests.fakes import FakeClient, session

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
HI = {"model": "fake", "messages": [{"role": "user", "content": "hi"}]}


def app_of(client: FakeClient | None = None, **settings: Any) -> Any:
    return create_app(Service(session(client), Settings(**settings)))


def ask(app: Any, method: str, path: str, **request: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
            return await http.request(method, path, **request)

    return asyncio.run(go())


def post(path: str, body: Any, client: FakeClient | None = None, **settings: Any) -> httpx.Response:
    return ask(app_of(client, **settings), "POST", path, json=body)


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# -- chat -------------------------------------------------------------------------------------------------------------
def test_chat() -> None:
    answer = post(CHAT, {**HI, "max_completion_tokens": 3}, FakeClient("hello")).json()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "hel", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
        }
    ]
    n_prompt = len("[user]hi[assistant]")
    assert answer["usage"] == {
        "prompt_tokens": n_prompt,
        "completion_tokens": 3,
        "total_tokens": n_prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_chat_stream_has_role_first_then_text_reason_usage() -> None:
    body = {**HI, "stream": True, "stream_options": {"include_usage": True}, "n": 2}
    chunks = events_of(post(CHAT, body, FakeClient("abc", eos=True)))
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks[:-1] if c["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in own) == "abc"
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
        assert own[-1]["finish_reason"] == "stop"
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8


def test_chat_logprobs() -> None:
    answer = post(CHAT, {**HI, "logprobs": True, "top_logprobs": 2}, FakeClient("é")).json()
    first = answer["choices"][0]["logprobs"]["content"][0]
    assert first["bytes"] == [0xC3]
    assert first["logprob"] == -1.0
    assert [t["logprob"] for t in first["top_logprobs"]] == [-1.0, -2.0]
    streamed = events_of(post(CHAT, {**HI, "logprobs": True, "stream": True}, FakeClient("é")))
    told = [e for c in streamed if (lp := c["choices"][0].get("logprobs")) for e in lp["content"]]
    assert [e["bytes"] for e in told] == [[0xC3], [0xA9]]


def test_chat_stop_and_sampling_reach_the_engine() -> None:
    client = FakeClient("one STOP two")
    body = {
        **HI,
        "stop": "STOP",
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 5,
        "min_tokens": 2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": -3},
        "ignore_eos": True,
        "stop_token_ids": [1],
        "priority": 4,
        "cache_salt": "s",
        "max_tokens": 50,
    }
    answer = post(CHAT, body, client).json()
    assert answer["choices"][0]["message"]["content"] == "one "
    assert answer["choices"][0]["stop_reason"] == "STOP"
    request = client.seen[0]
    params = request.params
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 7, 0.1, 5)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, -0.5, 1.1)
    assert (params.logit_bias, params.ignore_eos, params.stop_token_ids) == ({7: -3}, True, (1,))
    assert (request.priority, request.cache_salt, params.max_tokens, params.min_tokens) == (4, "s", 50, 2)


def test_chat_messages_parts_and_developer() -> None:
    client = FakeClient()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    post(CHAT, {"messages": [{"role": "developer", "content": "d"}, {"role": "user", "content": parts}]}, client)
    assert bytes(client.seen[0].tokens) == b"[system]d[user]a\nb[assistant]"


def test_chat_continues_a_message() -> None:
    client = FakeClient(" more")
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}]
    answer = post(CHAT, {"messages": messages, "continue_final_message": True, "echo": True}, client).json()
    assert bytes(client.seen[0].tokens) == b"[user]hi[assistant]So"
    assert answer["choices"][0]["message"]["content"] == "So more"


def test_token_ids_and_prompt_logprobs_beside_the_answer() -> None:
    answer = post(CHAT, {**HI, "return_token_ids": True, "prompt_logprobs": 0}, FakeClient("ok")).json()
    assert answer["choices"][0]["token_ids"] == list(b"ok")
    assert bytes(answer["prompt_token_ids"]) == b"[user]hi[assistant]"
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_logprobs"][1] == {"117": {"logprob": -1.0, "rank": 1, "decoded_token": "u"}}


# -- completions ------------------------------------------------------------------------------------------------------
def test_completion_defaults_to_16_tokens() -> None:
    client = FakeClient("x" * 50)
    answer = post(TEXT, {"model": "fake", "prompt": "hi"}, client).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == "x" * 16
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("prompt", [["a", "b"], [[97], [98]], ["a", [98]]])
def test_completion_batch_numbers_choices_by_prompt(prompt: Any) -> None:
    client = FakeClient(lambda r: "<" + bytes(r.tokens).decode() + ">")
    answer = post(TEXT, {"prompt": prompt, "n": 2, "best_of": 2}, client).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "<a>"), (1, "<a>"), (2, "<b>"), (3, "<b>")]
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 6}  # three per prompt, not per choice


def test_completion_of_token_ids() -> None:
    client = FakeClient("!")
    answer = post(TEXT, {"prompt": list(b"abc"), "echo": True}, client).json()
    assert answer["choices"][0]["text"] == "abc!"


@pytest.mark.parametrize("stream", [False, True])
def test_completion_echo_with_logprobs(stream: bool) -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 1, "stream": stream}
    response = post(TEXT, body, FakeClient("de"))
    choices = [c["choices"][0] for c in events_of(response)] if stream else response.json()["choices"]
    assert "".join(c["text"] for c in choices) == "abcde"
    tokens = [t for c in choices for t in c["logprobs"]["tokens"]]
    assert tokens == list("abcde")
    assert [o for c in choices for o in c["logprobs"]["text_offset"]] == [0, 1, 2, 3, 4]
    assert [p for c in choices for p in c["logprobs"]["token_logprobs"]] == [None, -1.0, -1.0, -1.0, -1.0]


def test_completion_scores_a_prompt_without_output() -> None:
    body = {"prompt": "abc", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = post(TEXT, body, FakeClient("z")).json()
    assert answer["choices"][0]["text"] == "abc"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c"]
    assert answer["usage"]["completion_tokens"] == 0


def test_completion_stream_with_echo() -> None:
    chunks = events_of(post(TEXT, {"prompt": "ab", "echo": True, "stream": True}, FakeClient("cd")))
    assert [c["choices"][0]["text"] for c in chunks] == ["ab", "c", "d", ""]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


# -- models -----------------------------------------------------------------------------------------------------------
def test_models() -> None:
    app = app_of(served_names=("fake", "other/name"))
    listed = ask(app, "GET", "/v1/models").json()
    assert [m["id"] for m in listed["data"]] == ["fake", "other/name"]
    assert listed["data"][0]["max_model_len"] == 200
    assert ask(app, "GET", "/v1/models/other/name").json()["id"] == "other/name"
    missing = ask(app, "GET", "/v1/models/nope")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_any_served_name_answers_and_no_name_means_the_model() -> None:
    assert post(CHAT, {**HI, "model": "b"}, served_names=("a", "b")).json()["model"] == "b"
    assert post(CHAT, {"messages": HI["messages"]}, served_names=("a", "b")).json()["model"] == "a"
    refused = post(CHAT, {**HI, "model": "c"}, served_names=("a", "b"))
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "model")


# -- faults -----------------------------------------------------------------------------------------------------------
def failing(kind: str) -> FakeClient:
    client = FakeClient("hello")
    client.failure = Update("x", finish_reason=FinishReason.ERROR, error="it broke", error_kind=kind)
    return client


def test_error_before_the_first_event_has_its_status() -> None:
    client = failing("overloaded_error")
    client._updates = lambda request: [client.failure]  # type: ignore[method-assign, list-item]
    for stream in (False, True):
        response = post(CHAT, {**HI, "stream": stream}, client)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "overloaded_error"


def test_error_within_a_stream_is_its_last_event() -> None:
    chunks = events_of(post(CHAT, {**HI, "stream": True}, failing("engine_dead_error")))
    assert chunks[-1] == {
        "error": {"message": "it broke", "type": "engine_dead_error", "param": None, "code": "engine_dead_error"}
    }


def test_an_unforeseen_error_tells_nothing(caplog: pytest.LogCaptureFixture) -> None:
    client = FakeClient()
    client._updates = lambda request: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    response = post(CHAT, HI, client)
    assert response.status_code == 500
    assert "division" not in response.text
    assert "ZeroDivisionError" in caplog.text


def test_dead_engine_is_503_everywhere_that_needs_it() -> None:
    client = FakeClient()
    client.dead = True
    app = app_of(client)
    assert ask(app, "GET", "/health").status_code == 503
    assert ask(app, "POST", CHAT, json=HI).status_code == 503
    assert ask(app, "GET", "/metrics").status_code == 200


def test_health_while_draining() -> None:
    service = Service(session(), Settings())
    app = create_app(service)
    assert ask(app, "GET", "/health").json() == {"status": "ok"}
    service.draining = True
    assert ask(app, "GET", "/health").status_code == 503
    assert ask(app, "GET", "/live").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_client_that_leaves_aborts_its_requests(path: str, stream: bool) -> None:
    client = FakeClient("a" * 100)
    client.pause = lambda: asyncio.sleep(0.005)
    body = {"n": 2, "stream": stream, "max_tokens": 100, **(HI if path == CHAT else {"prompt": "hi"})}
    sent: list[Any] = []

    async def go() -> None:
        messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while len(client.seen) < 2 or (stream and not sent):  # leave once the answer is under way
                await asyncio.sleep(0.005)
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await app_of(client)(scope | {"root_path": "", "http_version": "1.1"}, receive, send)

    asyncio.run(asyncio.wait_for(go(), 20))
    assert len(client.seen) == 2
    assert sorted(client.aborted) == sorted(r.id for r in client.seen)
    assert bool(sent) is stream


def test_reader_that_takes_nothing_is_dropped() -> None:
    client = FakeClient("a" * 100)
    body = json.dumps({**HI, "stream": True}).encode()

    async def go() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.sleep(3600)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.sleep(3600)

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": headers, "query_string": b""}
        await app_of(client, write_timeout_s=0.05)(scope | {"root_path": ""}, receive, send)

    asyncio.run(asyncio.wait_for(go(), 2))
    assert client.aborted == [client.seen[0].id]


# -- metrics ----------------------------------------------------------------------------------------------------------
def test_metrics_in_vllms_names() -> None:
    app = app_of(FakeClient("abc", eos=True))
    ask(app, "POST", CHAT, json={**HI, "n": 2})
    ask(app, "POST", CHAT, json={**HI, "model": "none"})
    text = ask(app, "GET", "/metrics").text
    labels = '{engine="0",model_name="fake"}'
    for line in (
        f"vllm:num_requests_running{labels} 2.0",
        f"vllm:num_requests_waiting{labels} 1.0",
        f"vllm:kv_cache_usage_perc{labels} 0.25",
        f"vllm:prefix_cache_queries_total{labels} 40.0",
        f"vllm:prefix_cache_hits_total{labels} 10.0",
        f"septet:engine_up{labels} 1.0",
        f"septet:failed_steps_total{labels} 3.0",
        f"septet:audit_failures_total{labels} 1.0",
        'vllm:request_success_total{engine="0",finished_reason="stop",model_name="fake"} 2.0',
        f"vllm:time_to_first_token_seconds_count{labels} 2.0",
        f"vllm:request_generation_tokens_sum{labels} 8.0",
        f"vllm:request_prompt_tokens_count{labels} 1.0",
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="200"} 1.0',
        'http_requests_total{handler="/v1/chat/completions",method="POST",status="404"} 1.0',
    ):
        ordered = line.replace(labels, '{model_name="fake",engine="0"}')
        assert any(want in text for want in (line, ordered)) or _sorted_in(line, text), line


def _sorted_in(line: str, text: str) -> bool:
    """Labels may come in any order."""

    def key(one: str) -> tuple[str, tuple[str, ...], str]:
        name, _, rest = one.partition("{")
        inner, _, value = rest.partition("}")
        return name, tuple(sorted(inner.split(","))), value.strip()

    return any(key(one) == key(line) for one in text.splitlines() if "{" in one)


def test_metrics_survive_a_silent_engine() -> None:
    client = FakeClient()

    async def silent() -> Any:
        await asyncio.sleep(3600)

    client.stats = silent  # type: ignore[method-assign]
    assert ask(app_of(client, stats_timeout_s=0.05), "GET", "/metrics").status_code == 200


def test_version() -> None:
    import septet

    assert ask(app_of(), "GET", "/version").json() == {"version": septet.__version__}


@pytest.mark.parametrize("name", ["tgi", "dummy"])
def test_a_server_of_one_model_answers_to_the_names_that_tgis_clients_send(name: str) -> None:
    assert post(CHAT, {**HI, "model": name}).json()["model"] == name


def test_what_a_model_that_does_not_think_need_not_be_told_is_ignored() -> None:
    quiet = {"reasoning_effort": "low", "chat_template_kwargs": {"enable_thinking": False}}
    assert post(CHAT, HI | quiet).status_code == 200
    loud = post(CHAT, HI | {"chat_template_kwargs": {"enable_thinking": True}})
    assert (loud.status_code, loud.json()["error"]["param"]) == (400, "chat_template_kwargs")
