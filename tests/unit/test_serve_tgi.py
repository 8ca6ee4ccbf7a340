"""TGI's API over a scripted engine, spoken to as ASGI: shapes, streams, headers, error types, bad input."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve.tgi_shape import simple_tokens
from tests.fakes import FakeClient
from tests.unit.test_parsers_chat import SCHEMA, Teachable
from tests.unit.test_serve_openai import app_of, ask

if TYPE_CHECKING:
    import httpx


class Lingering(FakeClient):
    """Takes a moment to leave, in which a writer may begin."""

    async def generate(self, request: Any) -> Any:
        try:
            async for update in super().generate(request):
                yield update
        finally:
            await asyncio.sleep(0.001)


WHOLE, STREAM, EITHER = "/generate", "/generate_stream", "/"


def post(path: str, body: Any, client: FakeClient | None = None) -> httpx.Response:
    return ask(app_of(client), "POST", path, json=body)


def params_of(parameters: Any, path: str = WHOLE) -> Any:
    client = Teachable("ab", eos=True)
    response = post(path, {"inputs": "hi", "parameters": parameters}, client)
    assert response.status_code == 200, response.text
    return client.seen[0].params


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in response.text
    return [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-1]]


def test_generate() -> None:
    response = post(WHOLE, {"inputs": "hi", "parameters": {"max_new_tokens": 3}}, FakeClient("hello"))
    assert response.json() == {"generated_text": "hel"}
    told = response.headers
    assert (told["x-prompt-tokens"], told["x-generated-tokens"], told["x-compute-characters"]) == ("2", "3", "2")
    assert told["x-compute-type"] == "cpu"
    assert float(told["x-compute-time"]) > 0
    for name in ("x-total-time", "x-validation-time", "x-inference-time", "x-time-per-token"):
        assert int(told[name]) >= 0


def test_details() -> None:
    parameters = {"details": True, "decoder_input_details": True, "top_n_tokens": 2, "seed": 7, "temperature": 0.5}
    answer = post(WHOLE, {"inputs": "hi", "parameters": parameters}, FakeClient("é", eos=True)).json()
    details = answer["details"]
    assert answer["generated_text"] == "é"
    assert (details["finish_reason"], details["generated_tokens"], details["seed"]) == ("eos_token", 3, 7)
    assert details["prefill"] == [
        {"id": 104, "text": "h", "logprob": None},
        {"id": 105, "text": "i", "logprob": -1.0},
    ]
    assert [(t["id"], t["text"], t["special"]) for t in details["tokens"]] == [
        (0xC3, "", False),
        (0xA9, "é", False),
        (256, "<eos>", True),
    ]
    assert [t["logprob"] for t in details["top_tokens"][0]] == [-1.0, -2.0]
    assert "best_of_sequences" not in details


def test_stop_and_full_text() -> None:
    parameters = {"stop": ["STOP"], "return_full_text": True, "details": True, "max_new_tokens": 50}
    answer = post(WHOLE, {"inputs": "hi", "parameters": parameters}, FakeClient("one STOP two")).json()
    assert answer["generated_text"] == "hione STOP"
    assert answer["details"]["finish_reason"] == "stop_sequence"
    assert answer["details"]["seed"] is None, "the likeliest tokens were taken"


def test_best_of() -> None:
    replies = iter(["ab", "cd", "ef"])
    client = FakeClient(lambda request: next(replies), eos=True)
    answer = post(WHOLE, {"inputs": "hi", "parameters": {"best_of": 3, "do_sample": True, "details": True}}, client)
    details = answer.json()["details"]
    texts = [answer.json()["generated_text"], *(s["generated_text"] for s in details["best_of_sequences"])]
    assert sorted(texts) == ["ab", "cd", "ef"]
    assert len({s["seed"] for s in (details, *details["best_of_sequences"])}) == 3


def test_sampling() -> None:
    assert params_of({}).temperature == 0
    assert params_of(None).temperature == 1
    assert params_of({"do_sample": True}).temperature == 1
    assert params_of({"temperature": 1.0}).temperature == 0
    params = params_of({"top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "frequency_penalty": 0.5})
    assert (params.temperature, params.top_k, params.top_p) == (1, 5, 0.9)
    assert (params.repetition_penalty, params.frequency_penalty) == (1.1, 0.5)
    assert params_of({"seed": 2**64 - 1}).seed == -1
    assert params_of({"typical_p": 1.0, "watermark": False, "adapter_id": None}).max_tokens == 198


@pytest.mark.parametrize(
    ("grammar", "kind"),
    [
        ({"type": "json", "value": SCHEMA}, "json_schema"),
        ({"type": "json", "value": json.dumps(SCHEMA)}, "json_schema"),
        ({"type": "json_schema", "value": {"name": "n", "schema": SCHEMA}}, "json_schema"),
        ({"type": "regex", "value": "[a-z]+"}, "regex"),
    ],
)
def test_grammars(grammar: Any, kind: str) -> None:
    structured = params_of({"grammar": grammar}).structured
    assert structured.kind == kind
    assert structured.spec == "[a-z]+" if kind == "regex" else json.loads(structured.spec) == SCHEMA


def test_truncate_keeps_the_end() -> None:
    client = FakeClient()
    post(WHOLE, {"inputs": "x" * 500 + "end", "parameters": {"truncate": 5}}, client)
    assert bytes(client.seen[0].tokens) == b"xxend"


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("path", [STREAM, EITHER])
def test_stream(path: str, chunk: int) -> None:
    client = FakeClient("aé", eos=True)
    client.chunk = chunk
    body: dict[str, Any] = {"inputs": "hi", "parameters": {"details": True, "top_n_tokens": 1}}
    response = post(path, body | ({"stream": True} if path == EITHER else {}), client)
    events = events_of(response)
    assert response.headers["x-compute-characters"] == "2"
    assert [e["index"] for e in events] == [1, 2, 3, 4]
    assert [e["token"]["text"] for e in events] == ["a", "", "é", "<eos>"]
    assert all(e["generated_text"] is None and e["details"] is None for e in events[:-1])
    assert events[-1]["generated_text"] == "aé"
    assert events[-1]["details"] == {
        "finish_reason": "eos_token",
        "generated_tokens": 4,
        "seed": None,
        "input_length": 2,
    }
    assert len(events[0]["top_tokens"]) == 1


def test_tokens_join_to_the_text_even_within_a_character() -> None:
    body = {"inputs": "hi", "parameters": {"max_new_tokens": 2, "details": True}}
    whole = post(WHOLE, body, FakeClient("aé")).json()
    assert [t["text"] for t in whole["details"]["tokens"]] == ["a", "\ufffd"]
    events = events_of(post(STREAM, body, FakeClient("aé")))
    assert "".join(e["token"]["text"] for e in events) == whole["generated_text"] == events[-1]["generated_text"]


def test_root_answers_in_an_array() -> None:
    answer = post(EITHER, {"inputs": "hi", "parameters": {"max_new_tokens": 2}}, FakeClient("hello")).json()
    assert answer == [{"generated_text": "he"}]


def test_an_error_within_a_stream_is_its_last_event() -> None:
    client = FakeClient()
    client.pause = lambda: asyncio.sleep(0.01)  # as engines do: a token that waits for nobody is told
    client.failure = Update("", finish_reason=FinishReason.ERROR, error="boom", error_kind="internal_error")
    events = events_of(post(STREAM, {"inputs": "hi"}, client))
    assert events[-1] == {"error": "boom", "error_type": "generation"}
    whole = post(WHOLE, {"inputs": "hi"}, client)
    assert (whole.status_code, whole.json()["error_type"]) == (424, "generation")
    client.failure = Update("", finish_reason=FinishReason.ERROR, error="gone", error_kind="engine_dead_error")
    assert post(WHOLE, {"inputs": "hi"}, client).json()["error_type"] == "incomplete_generation"
    client.failure = Update("", finish_reason=FinishReason.ERROR, error="full", error_kind="out_of_memory_error")
    assert post(WHOLE, {"inputs": "hi"}, client).status_code == 424


def test_info() -> None:
    info = ask(app_of(), "GET", "/info").json()
    assert (info["model_id"], info["max_total_tokens"], info["max_input_tokens"]) == ("fake", 200, 199)
    assert set(info) >= {"max_best_of", "max_stop_sequences", "max_concurrent_requests", "version", "router", "sha"}


def test_tokens() -> None:
    assert post("/tokenize", {"inputs": "hé"}).json() == [
        {"id": 104, "text": "h", "start": 0, "stop": 1},
        {"id": 0xC3, "text": "\ufffd", "start": 1, "stop": 2},
        {"id": 0xA9, "text": "\ufffd", "start": 2, "stop": 3},
    ]
    told = post("/chat_tokenize", {"messages": [{"role": "user", "content": "hi"}]}).json()
    assert told["templated_text"] == "[user]hi[assistant]"
    assert "".join(t["text"] for t in told["tokenize_response"]) == "[user]hi[assistant]"
    framed = simple_tokens("hi", [(1, b"<s>"), (2, b" hi")])
    assert framed == [{"id": 1, "text": "", "start": 0, "stop": 0}, {"id": 2, "text": "hi", "start": 0, "stop": 2}]


def test_a_list_of_tokens_is_bounded() -> None:
    response = post("/tokenize", {"inputs": "x" * 200_000})
    assert (response.status_code, response.json()["error_type"]) == (422, "validation")
    assert len(post("/tokenize", {"inputs": "x" * 1000}).json()) == 1000, "it need not fit the context"


def test_a_slow_reader_gets_every_token_once() -> None:
    sent: list[bytes] = []
    body = [{"type": "http.request", "body": b'{"inputs": "hi"}', "more_body": False}]

    async def receive() -> Any:
        return body.pop() if body else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        await asyncio.sleep(0.002)
        sent.append(message.get("body", b""))

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": STREAM, "headers": headers, "query_string": b""}
    client = Lingering("abcdefghij")
    client.chunk = 4
    asyncio.run(app_of(client)(scope, receive, send))
    events = [json.loads(part[6:]) for part in b"".join(sent).split(b"\n\n")[:-1]]
    assert [e["index"] for e in events] == list(range(1, 11))
    assert "".join(e["token"]["text"] for e in events) == events[-1]["generated_text"] == "abcdefghij"


def test_vllms_tokenize_is_still_there() -> None:
    assert post("/tokenize", {"prompt": "hi"}).json()["tokens"] == [104, 105]


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"temperature": 0}, "`temperature` must be strictly positive"), ({"temperature": -1}, "temperature"),
        ({"temperature": 1e308}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 2}, "top_p"),
        ({"top_k": 0}, "top_k"), ({"top_k": 2**40}, "top_k"), ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"frequency_penalty": 3}, "frequency_penalty"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": -1}, "max_new_tokens"), ({"max_new_tokens": 199}, "`max_new_tokens` must be <= 200"),
        ({"max_new_tokens": 2**40}, "max_new_tokens"), ({"seed": -1}, "seed"), ({"seed": 2**64}, "seed"),
        ({"stop": "x"}, "stop"), ({"stop": [""]}, "stop"), ({"stop": ["x"] * 99}, "stop"), ({"stop": [5]}, "stop"),
        ({"best_of": 0}, "best_of"), ({"best_of": 10**30}, "best_of"), ({"best_of": 2}, "best_of"),
        ({"best_of": 2, "do_sample": True, "seed": 1}, "best_of"), ({"top_n_tokens": 21}, "top_n_tokens"),
        ({"top_n_tokens": -1}, "top_n_tokens"), ({"truncate": 0}, "truncate"), ({"truncate": -3}, "truncate"),
        ({"typical_p": 0.5}, "typical_p"), ({"watermark": True}, "watermark"), ({"adapter_id": "x"}, "adapter_id"),
        ({"grammar": {"type": "xml", "value": ""}}, "grammar"), ({"grammar": {"type": "regex"}}, "grammar"),
        ({"grammar": {"type": "regex", "value": ""}}, "grammar"), ({"grammar": "x"}, "grammar"),
        ({"surprise": 1}, "'surprise'"), ([1], "parameters"), ({"details": "yes"}, "details"),
        ({"do_sample": 1}, "do_sample"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", [WHOLE, STREAM, EITHER])
def test_bad_parameters_are_named(path: str, parameters: Any, words: str) -> None:
    client = FakeClient()
    response = post(path, {"inputs": "hi", "parameters": parameters}, client)
    assert response.status_code == 422, response.text[:300]
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == "validation"
    assert words in response.json()["error"]
    assert len(response.json()["error"]) < 600
    assert client.seen == []


@pytest.mark.parametrize("path", [WHOLE, STREAM, EITHER])
@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"inputs": ""}, 422, "`inputs` cannot be empty"), ({"inputs": 5}, 422, "inputs"),
        ({"inputs": "x" * 300}, 422, "maximum context length"), ({"inputs": "x", "surprise": 1}, 422, "'surprise'"),
        ({"inputs": "x", "model": "gpt"}, 404, "gpt"), ({"inputs": "x", "stream": "a"}, 422, "stream"),
    ],
)  # fmt: skip
def test_bad_bodies_are_named(path: str, body: Any, status: int, words: str) -> None:
    response = post(path, body)
    if body.get("stream") and path != EITHER:
        return  # there the route says it
    assert (response.status_code, response.json()["error_type"]) == (status, "validation")
    assert words in response.json()["error"]


@pytest.mark.parametrize("path", [WHOLE, STREAM, EITHER])
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b'{"inputs": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"inputs": "\\ud800"}', "application/json", 400),
        (b"{}", "text/plain", 415),
    ],
)
def test_bodies_that_are_none(path: str, body: bytes, kind: str, status: int) -> None:
    response = ask(app_of(), "POST", path, content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert "error" in response.json()


def test_streaming_refuses_what_it_can_not_tell() -> None:
    for parameters in ({"decoder_input_details": True}, {"best_of": 2, "do_sample": True}):
        response = post(STREAM, {"inputs": "hi", "parameters": parameters})
        assert (response.status_code, response.json()["error_type"]) == (422, "validation")
