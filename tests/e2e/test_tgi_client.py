"""TGI's client (huggingface_hub's InferenceClient, unmodified) against a real server with the default model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import ValidationError

if TYPE_CHECKING:
    from tests.e2e.serving import Server

PROMPT = "The capital of France is"


@pytest.fixture(scope="module")
def client(server: Server) -> InferenceClient:
    return InferenceClient(model=server.root, timeout=240)


def test_text_streamed_and_not(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=8)
    assert whole.strip().startswith("Paris")
    streamed = list(client.text_generation(PROMPT, max_new_tokens=8, stream=True))
    assert len(streamed) == 8
    assert "".join(streamed) == whole
    full = client.text_generation(PROMPT, max_new_tokens=8, return_full_text=True)
    assert full == PROMPT + whole


def test_chat_streamed_and_not(client: InferenceClient) -> None:
    """It names no model, and sends one that nobody has."""
    ask = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    whole = client.chat_completion(ask, temperature=0, max_tokens=20)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    parts = client.chat_completion(ask, temperature=0, max_tokens=20, stream=True)
    streamed = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert streamed == whole.choices[0].message.content


def test_details(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=4, details=True, decoder_input_details=True, top_n_tokens=2, seed=3, do_sample=True
    )
    details = answer.details
    assert details is not None
    assert (details.finish_reason, details.generated_tokens, details.seed) == ("length", 4, 3)
    assert "".join(token.text for token in details.tokens) == answer.generated_text
    assert "".join(token.text for token in details.prefill) == PROMPT
    assert details.top_tokens is not None
    assert all(len(top) == 2 for top in details.top_tokens)
    same = client.text_generation(PROMPT, max_new_tokens=4, seed=3, do_sample=True)
    assert same == answer.generated_text

    *tokens, last = client.text_generation(PROMPT, max_new_tokens=4, details=True, stream=True)
    assert all(token.details is None for token in tokens)
    assert (last.details.finish_reason, last.details.generated_tokens) == ("length", 4)
    assert last.generated_text == "".join(token.token.text for token in [*tokens, last])


def test_stop_best_of_and_grammar(client: InferenceClient) -> None:
    stopped = client.text_generation(PROMPT, max_new_tokens=20, stop=["ris"], details=True)
    assert stopped.generated_text.endswith("ris")
    assert stopped.details.finish_reason == "stop_sequence"
    best = client.text_generation(PROMPT, max_new_tokens=4, best_of=2, do_sample=True, details=True)
    assert len(best.details.best_of_sequences) == 1
    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    bound: Any = {"type": "json", "value": schema | {"additionalProperties": False}}
    answer = client.text_generation("The capital of France as JSON: ", max_new_tokens=30, grammar=bound)
    assert json.loads(answer)["city"] in ("Paris", "Rome")


def test_errors_are_typed(client: InferenceClient) -> None:
    with pytest.raises(ValidationError, match="strictly positive"):
        client.text_generation(PROMPT, temperature=0)
    with pytest.raises(ValidationError, match="typical_p"):
        client.text_generation(PROMPT, typical_p=0.5)
    with pytest.raises(ValidationError, match="must be <= 1024"):
        client.text_generation(PROMPT, max_new_tokens=2000)


def test_routes_beside(server: Server) -> None:
    answer = httpx.post(
        server.root + "/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}, timeout=120
    )
    assert set(answer.json()) == {"generated_text"}
    n_prompt = int(answer.headers["x-prompt-tokens"])
    assert (n_prompt > 0, answer.headers["x-generated-tokens"]) == (True, "4")
    info = httpx.get(server.root + "/info").json()
    assert (info["model_id"], info["max_total_tokens"]) == ("smollm2", 1024)
    tokens = httpx.post(server.root + "/tokenize", json={"inputs": PROMPT}).json()
    assert len(tokens) == n_prompt
    assert "".join(PROMPT[token["start"] : token["stop"]] for token in tokens) == PROMPT
    with httpx.stream("POST", server.root + "/generate_stream", json={"inputs": PROMPT}, timeout=60) as response:
        first = next(response.iter_lines())
    assert json.loads(first.removeprefix("data: "))["index"] == 1
