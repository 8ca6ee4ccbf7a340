"""llama.cpp's and SGLang's own routes against a real server: their shapes, streamed and not, over plain HTTP."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from tests.e2e.serving import Server

PROMPT = "The capital of France is"


def post(server: Server, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(server.root + path, json=body, timeout=240).json()


def streamed(server: Server, path: str, body: dict[str, Any]) -> list[str]:
    with httpx.stream("POST", server.root + path, json={**body, "stream": True}, timeout=240) as response:
        return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_llamacpp_completion(server: Server) -> None:
    body = {"prompt": PROMPT, "n_predict": 6, "temperature": 0, "n_probs": 2, "return_tokens": True}
    whole = post(server, "/completion", body)
    assert whole["content"].strip().startswith("Paris")
    assert (whole["stop_type"], whole["tokens_predicted"], len(whole["tokens"])) == ("limit", 6, 6)
    assert whole["timings"]["predicted_per_second"] > 0
    parts = [json.loads(line) for line in streamed(server, "/completion", body)]
    assert "".join(part["content"] for part in parts) == whole["content"]
    assert [token for part in parts for token in part["tokens"]] == whole["tokens"]
    assert parts[-1]["tokens_cached"] > 0
    assert post(server, "/detokenize", {"tokens": whole["tokens"]})["content"] == whole["content"]
    assert post(server, "/tokenize", {"content": whole["content"]})["tokens"] == whole["tokens"]


def test_llamacpp_grammar_template_and_server(server: Server) -> None:
    answer = post(server, "/completion", {"prompt": PROMPT, "n_predict": 8, "grammar": 'root ::= " Paris" | " Rome"'})
    assert answer["content"] in (" Paris", " Rome")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    bound = post(server, "/completion", {"prompt": PROMPT, "n_predict": 20, "json_schema": schema})
    assert json.loads(bound["content"])["a"] in (1, 2)
    prompt = post(server, "/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})["prompt"]
    assert "<|im_start|>user\nHi<|im_end|>" in prompt
    assert httpx.get(server.root + "/props").json()["default_generation_settings"]["n_ctx"] == 1024
    slots = httpx.get(server.root + "/slots").json()
    assert {"id", "n_ctx", "is_processing"} <= set(slots[0])
    (vector,) = post(server, "/embedding", {"content": "Hi"})
    assert abs(sum(x * x for x in vector["embedding"][0]) - 1) < 1e-3


def test_sglang_generate(server: Server) -> None:
    body = {"text": PROMPT, "sampling_params": {"temperature": 0, "max_new_tokens": 6}, "return_logprob": True}
    whole = post(server, "/generate", body)
    assert whole["text"].strip().startswith("Paris")
    assert whole["meta_info"]["finish_reason"] == {"type": "length", "length": 6}
    assert [entry[1] for entry in whole["meta_info"]["output_token_logprobs"]] == whole["output_ids"]
    *lines, done = streamed(server, "/generate", body)
    parts = [json.loads(line) for line in lines]
    assert done == "[DONE]"
    assert (parts[-1]["text"], parts[-1]["output_ids"]) == (whole["text"], whole["output_ids"])
    assert all(later["text"].startswith(part["text"]) for part, later in pairwise(parts))
    bound = {"max_new_tokens": 8, "regex": " (Paris|Rome)"}
    assert post(server, "/generate", {"text": PROMPT, "sampling_params": bound})["text"] in (" Paris", " Rome")


def test_sglang_server(server: Server) -> None:
    assert httpx.get(server.root + "/get_model_info").json()["is_generation"] is True
    assert httpx.get(server.root + "/get_server_info").json()["context_length"] == 1024
    assert httpx.get(server.root + "/health_generate", timeout=60).status_code == 200
    assert httpx.get(server.root + "/flush_cache").status_code == 501
