"""vLLM's additions to OpenAI's routes, and its /tokenize, /detokenize and embeddings, over a scripted engine."""

from __future__ import annotations

import asyncio
import base64
import math
import struct
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.client import InlineClient
from septet.engine.echo import POOL_WIDTH, EchoExecutor
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.serve.app import Service, Settings, create_app
from tests import fakes
from tests.fakes import FakeClient
from tests.unit.test_serve_openai import CHAT, HI, TEXT, app_of, ask, events_of, post

if TYPE_CHECKING:
    import httpx

EMBED = "/v1/embeddings"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"


# -- chat and completions ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("path", "body"), [(CHAT, HI), (TEXT, {"prompt": "hi"})])
def test_usage_in_every_chunk(path: str, body: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(
        post(path, {**body, "stream": True, "n": 2, "stream_options": options}, FakeClient("abc", eos=True))
    )
    for index in (0, 1):
        own = [c["usage"]["completion_tokens"] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        assert own == sorted(own)
        assert own[-1] == 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 8
    without = events_of(post(path, {**body, "stream": True, "stream_options": {"continuous_usage_stats": True}}))
    assert all("usage" not in c for c in without)


def test_prompt_token_ids_in_a_stream() -> None:
    body = {"stream": True, "return_token_ids": True}
    chunks = events_of(post(CHAT, {**HI, **body}, FakeClient("ab")))
    assert bytes(chunks[0]["prompt_token_ids"]) == b"[user]hi[assistant]"
    assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == list(b"ab")
    chunks = events_of(post(TEXT, {"prompt": ["x", "y"], **body}, FakeClient("ab")))
    told = {
        c["choices"][0]["index"]: c["choices"][0]["prompt_token_ids"]
        for c in chunks
        if "prompt_token_ids" in c["choices"][0]
    }
    assert told == {0: [ord("x")], 1: [ord("y")]}


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        (TEXT, {"prompt": "x", "suffix": "y"}, "fill-in-the-middle"),
        (CHAT, {**HI, "stream": True, "prompt_logprobs": 1}, "can't be streamed"),
        (CHAT, {**HI, "truncate_prompt_tokens": 3}, "never cut"),
        (CHAT, {**HI, "bad_words": ["x"]}, "logit_bias"),
        (CHAT, {**HI, "chat_template": "{{ 1 }}"}, "templates in requests"),
        (CHAT, {**HI, "prompt_embeds": "AAAA"}, "tensors"),
        (CHAT, {**HI, "logits_processors": ["os.system"]}, "never run"),
        (CHAT, {**HI, "cache_salt": "s" * 1000}, "cache_salt"),
        (CHAT, {**HI, "priority": 2**40}, "priority"),
        (CHAT, {**HI, "stop_token_ids": [999]}, "stop_token_ids"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(path: str, body: Any, words: str) -> None:
    client = FakeClient()
    response = post(path, body, client)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]
    assert client.seen == []


# -- tokens -----------------------------------------------------------------------------------------------------------
def test_tokenize_and_back() -> None:
    app = app_of()
    told = ask(app, "POST", TOKENIZE, json={"model": "fake", "prompt": "héy", "return_token_strs": True}).json()
    assert told == {
        "count": 4,
        "max_model_len": 200,
        "tokens": list("héy".encode()),
        "token_strs": ["h", "�", "�", "y"],
    }
    back = ask(app, "POST", DETOKENIZE, json={"tokens": told["tokens"]}).json()
    assert back == {"prompt": "héy", "content": "héy", "text": "héy"}, "vLLM's name, llama.cpp's and SGLang's"
    chat = ask(app, "POST", TOKENIZE, json={"messages": HI["messages"]}).json()
    assert bytes(chat["tokens"]) == b"[user]hi[assistant]"
    plain = ask(app, "POST", TOKENIZE, json={"messages": HI["messages"], "add_generation_prompt": False}).json()
    assert bytes(plain["tokens"]) == b"[user]hi"
    long = ask(app, "POST", TOKENIZE, json={"prompt": "x" * 100_000}).json()  # counting needs no room in the context
    assert long["count"] == 100_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (TOKENIZE, {}),
        (TOKENIZE, {"prompt": "x", "messages": HI["messages"]}),
        (TOKENIZE, {"prompt": 3}),
        (TOKENIZE, {"prompt": "x", "surprise": 1}),
        (TOKENIZE, {"messages": [{"role": "user", "content": "x"}], "chat_template": "{{ 1 }}"}),
        (TOKENIZE, {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"tokenize": True}}),
        (DETOKENIZE, {}),
        (DETOKENIZE, {"tokens": [-1]}),
        (DETOKENIZE, {"tokens": [10**30]}),
        (DETOKENIZE, {"tokens": ["a"]}),
        (DETOKENIZE, {"tokens": [True]}),
        (DETOKENIZE, {"tokens": 5}),
    ],
)
def test_bad_tokens(path: str, body: Any) -> None:
    response = ask(app_of(), "POST", path, json=body)
    assert response.status_code == 400
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


# -- embeddings -------------------------------------------------------------------------------------------------------
def embed(body: Any) -> httpx.Response:
    """Over the real scheduler and an executor without a model; its prefix cache is on and warm."""

    async def go() -> httpx.Response:
        import httpx

        cache = KVCache(257)
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=fakes.MAX_LEN)
        scheduler = Scheduler(limits, cache, 257)
        client = InlineClient(scheduler, EchoExecutor(vocab_size=257), fakes.info(), strict=True)
        app = create_app(Service(fakes.session(client), Settings()))  # type: ignore[arg-type]
        try:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
                await http.post(TEXT, json={"prompt": "a" * 40, "max_tokens": 1})
                response = await http.post(EMBED, json=body)
                assert cache.leased == 0
                return response
        finally:
            await client.close()

    return asyncio.run(asyncio.wait_for(go(), 20))


def unit(values: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in values))
    return [v / length for v in values]


def histogram(text: str) -> list[float]:
    return [sum(byte % POOL_WIDTH == i for byte in text.encode()) / len(text.encode()) for i in range(POOL_WIDTH)]


def test_embeddings_of_texts_and_ids() -> None:
    text = "a" * 40 + "bcd"  # longer than a step, and its beginning is in the cache
    answer = embed({"model": "fake", "input": [text, "xyz"]}).json()
    assert answer["object"] == "list"
    assert [d["index"] for d in answer["data"]] == [0, 1]
    for told, given in zip(answer["data"], (text, "xyz"), strict=True):
        assert told["embedding"] == pytest.approx(unit(histogram(given)), abs=1e-6)
    assert answer["usage"] == {"prompt_tokens": 46, "total_tokens": 46}
    ids = embed({"input": [list(text.encode()), list(b"xyz")]}).json()
    assert ids["data"] == answer["data"]
    assert embed({"input": list(b"xyz")}).json()["data"][0]["embedding"] == answer["data"][1]["embedding"]


def test_embeddings_last_base64_dimensions() -> None:
    last = embed({"input": "xyz", "pooling": "last"}).json()["data"][0]["embedding"]
    assert last == [float(ord("z") % POOL_WIDTH == i) for i in range(POOL_WIDTH)]
    coded = embed({"input": "abc", "encoding_format": "base64"}).json()["data"][0]["embedding"]
    floats = struct.unpack(f"<{POOL_WIDTH}f", base64.b64decode(coded))
    assert list(floats) == pytest.approx(unit(histogram("abc")), abs=1e-6)
    cut = embed({"input": "abc", "dimensions": 3}).json()["data"][0]["embedding"]
    assert cut == pytest.approx(unit(histogram("abc")[:3]), abs=1e-6)
    raw = embed({"input": "abc", "normalize": False}).json()["data"][0]["embedding"]
    assert raw == pytest.approx(histogram("abc"), abs=1e-6)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["ok", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"a": 1}}, "input"),
        ({"input": ["a", 1]}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [257]}, "input"),
        ({"input": [1.5]}, "input"),
        ({"input": "x" * 201}, "input"),
        ({"input": ["x"] * 2049}, "input"),
        ({"input": "x", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "x", "dimensions": 0}, "dimensions"),
        ({"input": "x", "dimensions": 9}, "dimensions"),
        ({"input": "x", "pooling": "max"}, "pooling"),
        ({"input": "x", "priority": 2**40}, "priority"),
        ({"input": "x", "surprise": 1}, "surprise"),
        ({"input": "x", "truncate_prompt_tokens": 1}, "truncate_prompt_tokens"),
    ],
)
def test_bad_embeddings(body: Any, param: str) -> None:
    response = embed(body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_the_document_lists_every_route() -> None:
    from septet.serve.app import DIALECTS

    document = ask(app_of(), "GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    wanted = {(m.lower(), p.replace(":path", "")) for d in DIALECTS for m, p, _ in d.routes}
    listed = {(method, path) for path, operations in document["paths"].items() for method in operations}
    assert listed == wanted
    body = document["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["temperature"] == {"type": ["number", "null"]}
    assert body["additionalProperties"] is False
