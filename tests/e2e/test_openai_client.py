"""The `openai` package, unmodified, against a real server with the default model."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.serving import Server

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."
ASK: list[Any] = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=240) as client:
        yield client


def metrics(server: Server) -> dict[str, float]:
    """name -> value of the metrics without further labels."""
    text = httpx.get(server.root + "/metrics", timeout=60).text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_completion_tokens=30)
    choice = answer.choices[0]
    assert choice.message.content == ANSWER
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 8


def test_chat_again_comes_from_the_prefix_cache(client: openai.OpenAI) -> None:
    for _ in range(2):
        answer = client.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_tokens=3)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    cached = answer.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert cached >= answer.usage.prompt_tokens - 1


def test_streaming(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="smollm2", messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8


def test_a_long_answer_comes_in_pieces(client: openai.OpenAI) -> None:
    """Its first token alone, the others a few at a time (`stream_gap_ms`)."""
    stream = client.chat.completions.create(
        model="smollm2", messages=ASK, temperature=0, stream=True, max_tokens=64, extra_body={"ignore_eos": True}
    )
    assert sum(bool(c.choices and c.choices[0].delta.content) for c in stream) > 3


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=["The capital of France is", "1, 2, 3, 4, 5,"], temperature=0, max_tokens=4
    )
    assert [c.index for c in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text
    assert "6" in answer.choices[1].text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_completion_stream_equals_whole(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "smollm2",
        "prompt": "Once upon a time",
        "temperature": 1,
        "seed": 7,
        "max_tokens": 8,
    }
    whole = client.completions.create(**ask).choices[0].text
    streamed = "".join(c.choices[0].text for c in client.completions.create(**ask, stream=True))
    assert streamed == whole


def test_n_with_seed(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        answer = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "Say a number."}], n=3, seed=11, max_tokens=4
        )
        return [c.message.content for c in sorted(answer.choices, key=lambda c: c.index)]

    first = ask()
    assert len(set(first)) > 1
    assert ask() == first


def test_stop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=ASK, temperature=0, stop=[" Paris"])
    assert answer.choices[0].message.content == "The capital of France is"
    assert answer.choices[0].finish_reason == "stop"


def test_max_tokens(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_tokens=2)
    assert answer.choices[0].message.content == "The capital"
    assert answer.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, temperature=0, max_tokens=3, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content) == "The capital of"
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the best
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-4)
        assert 0 >= entry.logprob > -5
        assert bytes(entry.bytes or []).decode() == entry.token


def test_completion_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt="The capital of France is Paris", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs is not None
    paris = logprobs.tokens.index(" Paris")
    assert logprobs.token_logprobs[paris] > -2
    assert logprobs.token_logprobs[0] is None


def test_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="temperature") as bad:
        client.chat.completions.create(model="smollm2", messages=ASK, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 1024") as long:
        client.completions.create(model="smollm2", prompt="word " * 3000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="'surprise'"):
        client.chat.completions.create(model="smollm2", messages=ASK, extra_body={"surprise": 1})


def test_vllm_extras(client: openai.OpenAI) -> None:
    extra = {"top_k": 1, "min_tokens": 4, "ignore_eos": True, "return_token_ids": True}
    answer = client.chat.completions.create(
        model="smollm2", messages=ASK, temperature=1, max_tokens=12, extra_body=extra
    )
    assert (answer.choices[0].message.content or "").startswith(ANSWER)
    assert answer.choices[0].finish_reason == "length"
    assert len(answer.choices[0].token_ids) == 12  # type: ignore[attr-defined]


def test_many_at_once_equal_one_alone(client: openai.OpenAI) -> None:
    def ask(i: int) -> str | None:
        answer = client.chat.completions.create(model="smollm2", messages=ASK, temperature=0, max_tokens=8)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(ask, range(8))) == {ANSWER}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(server: Server, stream: bool) -> None:
    body = {"messages": ASK, "max_tokens": 900, "ignore_eos": True, "stream": stream, "temperature": 0}
    try:
        with httpx.stream("POST", server.url + "/chat/completions", json=body, timeout=3) as response:
            next(response.iter_lines())
    except httpx.ReadTimeout:
        pass  # nothing comes of an answer that is not streamed, or of a slow machine
    deadline = time.monotonic() + 120
    while (now := metrics(server))["vllm:num_requests_running"] or now["vllm:num_requests_waiting"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert now["septet:kv_slots_leased"] == 0


def test_health_and_metrics(server: Server) -> None:
    assert httpx.get(server.root + "/health").status_code == 200
    now = metrics(server)
    assert now["vllm:generation_tokens_total"] > 0
    assert now["vllm:prefix_cache_hits_total"] > 0
    assert now["septet:kv_waste_ratio"] < 0.5
