"""llama.cpp's API over a scripted engine, spoken to as ASGI: shapes, streams, paths shared with others, bad input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from tests.fakes import FakeClient
from tests.unit.test_parsers_chat import SCHEMA, Teachable
from tests.unit.test_serve_openai import app_of, ask

if TYPE_CHECKING:
    import httpx

PATH = "/completion"


def post(body: Any, client: FakeClient | None = None, path: str = PATH) -> httpx.Response:
    return ask(app_of(client), "POST", path, json=body)


def params_of(**fields: Any) -> Any:
    client = Teachable("ab", eos=True)
    response = post({"prompt": "hi", **fields}, client)
    assert response.status_code == 200, response.text
    return client.seen[0].params


def events_of(response: httpx.Response) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    assert "[DONE]" not in response.text
    return [json.loads(part.removeprefix("data: ")) for part in response.text.split("\n\n")[:-1]]


@pytest.mark.parametrize("path", [PATH, "/completions"])
def test_completion(path: str) -> None:
    body = {"prompt": "hi", "n_predict": 3, "return_tokens": True, "id_slot": 2, "cache_prompt": True}
    answer = post(body, FakeClient("hello"), path).json()
    assert (answer["content"], answer["tokens"], answer["stop"], answer["index"]) == ("hel", [104, 101, 108], True, 0)
    assert (answer["stop_type"], answer["stopping_word"], answer["truncated"]) == ("limit", "", False)
    assert (answer["tokens_predicted"], answer["tokens_evaluated"], answer["tokens_cached"]) == (3, 2, 3)
    assert (answer["prompt"], answer["model"], answer["id_slot"]) == ("hi", "fake", -1)
    assert answer["generation_settings"]["n_predict"] == 3
    assert answer["generation_settings"]["n_ctx"] == 200
    timings = answer["timings"]
    assert (timings["cache_n"], timings["predicted_n"]) == (3, 3)
    for name in ("prompt", "predicted"):
        assert all(timings[f"{name}_{unit}"] >= 0 for unit in ("ms", "per_token_ms", "per_second")) or name == "prompt"
    assert "completion_probabilities" not in answer


def test_why_it_stopped() -> None:
    answer = post({"prompt": "hi", "stop": ["STOP"]}, FakeClient("one STOP two")).json()
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == ("one ", "word", "STOP")
    assert post({"prompt": "hi"}, FakeClient("a", eos=True)).json()["stop_type"] == "eos"
    answer = post({"prompt": "hi", "n_predict": -1}, FakeClient("x" * 500)).json()
    assert (answer["stop_type"], answer["truncated"]) == ("limit", True)


def test_probabilities() -> None:
    answer = post({"prompt": "hi", "n_probs": 2}, FakeClient("é")).json()
    first = answer["completion_probabilities"][0]
    assert (first["id"], first["bytes"], first["logprob"]) == (0xC3, [0xC3], -1.0)
    assert [t["logprob"] for t in first["top_logprobs"]] == [-1.0, -2.0]


def test_stream() -> None:
    body = {"prompt": "hi", "stream": True, "n_probs": 1, "timings_per_token": True}
    events = events_of(post(body, FakeClient("abc")))
    assert [e["stop"] for e in events] == [False] * 3 + [True]
    assert "".join(e["content"] for e in events) == "abc"
    assert [e["tokens"] for e in events] == [[97], [98], [99], []]
    assert [e["tokens_predicted"] for e in events] == [1, 2, 3, 3]
    assert len(events[0]["completion_probabilities"]) == 1
    assert "timings" in events[0]
    assert events[-1]["stop_type"] == "limit"
    assert events[-1]["timings"]["predicted_n"] == 3


def test_several_prompts_and_completions() -> None:
    client = FakeClient(lambda request: bytes(request.tokens).decode() + "!")
    answers = post({"prompt": ["a", [98], [99, "d"], {"prompt_string": "e"}], "n_cmpl": 2}, client).json()
    assert [a["content"] for a in answers] == ["a!", "a!", "b!", "b!", "cd!", "cd!", "e!", "e!"]
    assert [a["index"] for a in answers] == list(range(8))
    assert post({"prompt": [97, "b", 99]}, client).json()["prompt"] == "abc"
    assert [a["prompt"] for a in post({"prompt": ["a"]}, client).json()] == ["a"]


def test_sampling() -> None:
    params = params_of()
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (0.8, 40, 0.95, 0.05)
    assert (params.repetition_penalty, params.max_tokens) == (1.0, 198)
    assert params_of(temperature=-1).temperature == 0
    assert params_of(seed=5).seed == 5
    assert params_of(repeat_penalty=1.2).repetition_penalty == 1.2
    assert params_of(repeat_penalty=1.2, repeat_last_n=0).repetition_penalty == 1.0
    params = params_of(samplers=["top_k", "dry", "temperature"])
    assert (params.top_k, params.top_p, params.min_p, params.temperature) == (40, 1.0, 0.0, 0.8)
    assert params_of(logit_bias=[[7, 1.5], ["ab", False]]).logit_bias == {7: 1.5, 97: -100.0, 98: -100.0}
    assert params_of(logit_bias={"7": 2, "a": 1}).logit_bias == {7: 2, 97: 1}
    assert params_of(mirostat=0, dry_multiplier=0.0, typical_p=1.0, lora=[], n_keep=4, ignore_eos=True).ignore_eos


def test_grammars() -> None:
    structured = params_of(json_schema=SCHEMA).structured
    assert (structured.kind, json.loads(structured.spec)) == ("json_schema", SCHEMA)
    assert params_of(grammar='root ::= "a"').structured.kind == "grammar"
    assert params_of(grammar="").structured is None


def test_no_tokens_and_no_cache() -> None:
    answer = post({"prompt": "hi", "n_predict": 0}).json()
    assert (answer["content"], answer["tokens_predicted"], answer["stop"]) == ("", 0, True)
    client = FakeClient()
    post({"prompt": "hi", "cache_prompt": False}, client)
    post({"prompt": "hi"}, client)
    assert len(client.seen[0].cache_salt) > 20
    assert client.seen[1].cache_salt == ""


def test_chosen_fields() -> None:
    body = {"prompt": "hi", "n_predict": 2, "response_fields": ["content", "generation_settings/n_predict", "x", "a/b"]}
    assert post(body).json() == {"content": "he", "n_predict": 2}


def test_an_error_within_a_stream_is_its_last_event() -> None:
    client = FakeClient()
    client.failure = Update("", finish_reason=FinishReason.ERROR, error="boom", error_kind="engine_dead_error")
    events = events_of(post({"prompt": "hi", "stream": True}, client))
    assert events[-1] == {"error": {"code": 503, "message": "boom", "type": "unavailable_error"}}


def test_props_and_slots() -> None:
    app = app_of()
    props = ask(app, "GET", "/props").json()
    assert (props["total_slots"], props["default_generation_settings"]["n_ctx"]) == (8, 200)
    assert props["model_path"] == "fake"
    slots = ask(app, "GET", "/slots").json()
    assert [s["is_processing"] for s in slots] == [True] * 2 + [False] * 6
    assert ask(app, "GET", "/slots?fail_on_no_slot=1").status_code == 200
    assert ask(app, "GET", "/slots?model=other").json() == []
    assert ask(app, "GET", "/lora-adapters").json() == []
    assert ask(app, "GET", "/v1/health").json() == {"status": "ok"}
    for method, path in (("POST", "/props"), ("POST", "/slots/0?action=erase")):
        refused = ask(app, method, path, json={})
        assert (refused.status_code, refused.json()["error"]["type"]) == (501, "not_supported_error")


def test_tokens() -> None:
    app = app_of()

    def tokenized(**body: Any) -> Any:
        return ask(app, "POST", "/tokenize", json=body).json()["tokens"]

    assert tokenized(content="hi") == [104, 105]
    assert tokenized(content="aé", with_pieces=True) == [
        {"id": 97, "piece": "a"},
        {"id": 0xC3, "piece": [0xC3]},
        {"id": 0xA9, "piece": [0xA9]},
    ]
    assert tokenized(prompt="hi") == [104, 105], "vLLM's is still there"
    assert ask(app, "POST", "/detokenize", json={"tokens": [104, 105]}).json()["content"] == "hi"
    message = {"messages": [{"role": "user", "content": "hi"}]}
    assert ask(app, "POST", "/apply-template", json=message).json() == {"prompt": "[user]hi[assistant]"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt": None}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": 5}, "prompt"),
        ({"prompt": [1.5]}, "prompt"), ({"prompt": [999]}, "prompt"), ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a"] * 200}, "prompt"), ({"prompt": "x" * 500}, "maximum context length"),
        ({"prompt": {"prompt_string": "a", "multimodal_data": ["AA"]}}, "multimodal_data"),
        ({"n_predict": -3}, "n_predict"), ({"n_predict": 2**40}, "n_predict"), ({"n_predict": "9"}, "n_predict"),
        ({"n_cmpl": 0}, "n_cmpl"), ({"n_cmpl": 10**9}, "n_cmpl"), ({"n_probs": 21}, "n_probs"),
        ({"n_probs": -1}, "n_probs"), ({"temperature": 1e308}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_k": -9}, "top_k"), ({"min_p": 2}, "min_p"), ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"presence_penalty": 9}, "presence_penalty"), ({"seed": 2**64}, "seed"), ({"seed": 1.5}, "seed"),
        ({"stop": "x"}, "stop"), ({"stop": ["x"] * 99}, "stop"), ({"stream": 1}, "stream"),
        ({"logit_bias": [[1]]}, "logit_bias"), ({"logit_bias": [[1, "x"]]}, "logit_bias"),
        ({"logit_bias": [[1, 1]] * 2000}, "logit_bias"), ({"logit_bias": [[999, 1]]}, "logit_bias"),
        ({"logit_bias": 5}, "logit_bias"), ({"samplers": ["magic"]}, "'magic'"), ({"mirostat": 2}, "mirostat"),
        ({"dry_multiplier": 0.8}, "DRY"), ({"xtc_probability": 0.5}, "XTC"), ({"typical_p": 0.5}, "typical"),
        ({"dynatemp_range": 1}, "dynamic temperature"), ({"lora": [{"id": 0}]}, "adapters"),
        ({"post_sampling_probs": True}, "post_sampling_probs"), ({"t_max_predict_ms": 5}, "t_max_predict_ms"),
        ({"grammar": 'root ::= "a"', "json_schema": {}}, "both"), ({"json_schema": "x"}, "json_schema"),
        ({"grammar": 5}, "grammar"), ({"response_fields": [5]}, "response_fields"), ({"surprise": 1}, "'surprise'"),
        ({"input_prefix": "a"}, "'input_prefix'"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_named(change: dict[str, Any], words: str, stream: bool) -> None:
    client = FakeClient()
    response = post({"prompt": "hi", "stream": stream, **change}, client)
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"code", "message", "type"}
    assert (error["code"], len(error["message"]) < 600) == (400, True)
    assert words in error["message"]
    assert client.seen == []


@pytest.mark.parametrize("path", [PATH, "/completions", "/tokenize", "/apply-template", "/embedding"])
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b'{"prompt": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"content": "\\ud800"}', "application/json", 400),
        (b"{}", "application/json", 400),
        (b"{}", "text/plain", 415),
    ],
)
def test_bodies_that_are_none(path: str, body: bytes, kind: str, status: int) -> None:
    response = ask(app_of(), "POST", path, content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert "error" in response.json()


def test_lists_of_tokens_and_vectors_are_bounded() -> None:
    assert post({"content": "x" * 200_000, "with_pieces": True}, path="/tokenize").status_code == 400
    assert len(post({"content": "x" * 1000}, path="/tokenize").json()["tokens"]) == 1000
    for body in ({"content": ["a"] * 5000}, {"content": []}, {"content": 5}, {"content": "a", "embd_normalize": 1}):
        assert post(body, path="/embedding").status_code == 400
