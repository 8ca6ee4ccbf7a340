"""SGLang's API over a scripted engine, spoken to as ASGI: shapes, streams, the path it shares with TGI, bad input."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.messages import Update
from septet.request import FinishReason
from septet.serve.app import Service, Settings, create_app
from septet.serve.models import FixedModels
from tests.fakes import EOS, FakeClient, session
from tests.unit.test_parsers_chat import SCHEMA, Teachable
from tests.unit.test_serve_openai import app_of, ask, events_of

if TYPE_CHECKING:
    import httpx

    from septet.serve.models import ModelCard
    from septet.session.session import Session

PATH = "/generate"


def post(body: Any, client: FakeClient | None = None) -> httpx.Response:
    return ask(app_of(client), "POST", PATH, json=body)


def params_of(**sampling: Any) -> Any:
    client = Teachable("ab", eos=True)
    response = post({"text": "hi", "sampling_params": sampling}, client)
    assert response.status_code == 200, response.text
    return client.seen[0].params


def test_generate() -> None:
    answer = post({"text": "hi", "sampling_params": {"max_new_tokens": 3}, "rid": "mine"}, FakeClient("hello")).json()
    meta = answer["meta_info"]
    assert (answer["text"], answer["output_ids"]) == ("hel", [104, 101, 108])
    assert (meta["id"], meta["finish_reason"]) == ("mine", {"type": "length", "length": 3})
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (2, 3, 3)
    assert meta["e2e_latency"] >= 0
    assert "output_token_logprobs" not in meta


def test_what_matched() -> None:
    answer = post({"text": "hi", "sampling_params": {"stop": "STOP"}}, FakeClient("one STOP two")).json()
    assert (answer["text"], answer["meta_info"]["finish_reason"]) == ("one ", {"type": "stop", "matched": "STOP"})
    sampling = {"stop": ["STOP"], "no_stop_trim": True}
    assert post({"text": "hi", "sampling_params": sampling}, FakeClient("one STOP two")).json()["text"] == "one STOP"
    reason = post({"text": "hi"}, FakeClient("a", eos=True)).json()["meta_info"]["finish_reason"]
    assert reason == {"type": "stop", "matched": EOS}
    answer = post({"input_ids": [1], "sampling_params": {"stop_token_ids": [98]}}, FakeClient("ab")).json()
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 98}


def test_logprobs() -> None:
    body = {"text": "hi", "return_logprob": True, "top_logprobs_num": 2, "logprob_start_len": 0}
    meta = post(body | {"return_text_in_logprobs": True}, FakeClient("a")).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-1.0, 97, "a"]]
    assert meta["output_top_logprobs"] == [[[-1.0, 97, "a"], [-2.0, 98, "b"]]]
    assert meta["input_token_logprobs"] == [[None, 104, None], [-1.0, 105, "i"]]
    assert meta["input_top_logprobs"][0] is None
    meta = post({"text": "hi", "return_logprob": True}, FakeClient("a")).json()["meta_info"]
    assert meta["output_token_logprobs"] == [[-1.0, 97, None]]
    assert meta["input_token_logprobs"] == []
    answer = post(body | {"sampling_params": {"max_new_tokens": 0}, "logprob_start_len": 1}).json()
    assert (answer["text"], answer["output_ids"], answer["meta_info"]["completion_tokens"]) == ("", [], 0)
    assert answer["meta_info"]["input_token_logprobs"] == [[-1.0, 105, None]]


def test_stream_tells_all_so_far() -> None:
    parts = events_of(post({"text": "hi", "stream": True, "return_logprob": True}, FakeClient("abc")))
    assert [p["text"] for p in parts] == ["a", "ab", "abc", "abc"]
    assert [p["output_ids"] for p in parts][1] == [97, 98]
    assert [p["meta_info"]["completion_tokens"] for p in parts] == [1, 2, 3, 3]
    assert [len(p["meta_info"]["output_token_logprobs"]) for p in parts] == [1, 2, 3, 3]
    assert [p["meta_info"]["finish_reason"] is None for p in parts] == [True] * 3 + [False]
    assert len({p["meta_info"]["id"] for p in parts}) == 1


def test_a_batch_and_choices() -> None:
    client = FakeClient(lambda request: bytes(request.tokens).decode() + "!")
    body = {"text": ["a", "b"], "sampling_params": [{"n": 2, "seed": 1}] * 2, "rid": ["x", "y"]}
    answers = post(body, client).json()
    assert [a["text"] for a in answers] == ["a!", "a!", "b!", "b!"]
    assert [a["meta_info"]["id"] for a in answers] == ["x", "x", "y", "y"]
    parts = events_of(post({"input_ids": [[97], [98]], "stream": True}, client))
    assert {p["index"]: p["text"] for p in parts} == {0: "a!", 1: "b!"}
    assert isinstance(post({"text": ["a"]}, client).json(), list)


def test_sampling() -> None:
    assert params_of().max_tokens == 128
    params = params_of(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, sampling_seed=5, min_new_tokens=1, frequency_penalty=0.5,
        presence_penalty=-0.5, repetition_penalty=1.1, ignore_eos=True, logit_bias={"7": -3},
    )  # fmt: skip
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.5, 0.9, 7, 0.1, 5)
    assert (params.min_tokens, params.frequency_penalty, params.presence_penalty) == (1, 0.5, -0.5)
    assert (params.repetition_penalty, params.ignore_eos, params.logit_bias) == (1.1, True, {7: -3})


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [
        ({"json_schema": json.dumps(SCHEMA)}, "json_schema"),
        ({"regex": "[a-z]+"}, "regex"),
        ({"ebnf": 'root ::= "a"'}, "grammar"),
        (
            {"structural_tag": json.dumps({"type": "structural_tag", "structures": [], "triggers": []})},
            "structural_tag",
        ),
    ],
)
def test_grammars(sampling: Any, kind: str) -> None:
    assert params_of(**sampling).structured.kind == kind


def test_info() -> None:
    app = app_of()
    for path in ("/get_model_info", "/model_info"):
        assert ask(app, "GET", path).json()["model_path"] == "fake"
    for path in ("/get_server_info", "/server_info"):
        assert ask(app, "GET", path).json()["max_total_num_tokens"] == 1000
    client = FakeClient()
    assert ask(app_of(client), "GET", "/health_generate").status_code == 200
    assert client.seen[0].params.max_tokens == 1
    client.dead = True
    assert ask(app_of(client), "GET", "/health_generate").status_code == 503
    for method, path in (("GET", "/flush_cache"), ("POST", "/flush_cache"), ("POST", "/abort_request")):
        refused = ask(app, method, path)
        assert refused.status_code == 501
        assert path[1:] in refused.json()["error"]["message"]


def test_a_server_without_a_model_says_so() -> None:
    class NoModels(FixedModels):
        def cards(self) -> list[ModelCard]:
            return []

        def loaded(self) -> list[Session]:
            return []

    app = create_app(Service(NoModels(session()), Settings()))
    for path in ("/get_model_info", "/get_server_info", "/info"):
        refused = ask(app, "GET", path)
        assert (refused.status_code, "septet pull" in refused.text) == (404, True)
    assert ask(app, "GET", "/slots").json() == []


def test_a_body_of_nobody_is_told_what_there_is() -> None:
    response = post({"prompt": "hi"})
    assert response.status_code == 422
    assert "inputs (TGI)" in response.json()["error"]
    assert "text or input_ids" in response.json()["error"]


def test_an_error_within_a_stream_is_its_last_event() -> None:
    client = FakeClient()
    client.failure = Update("", finish_reason=FinishReason.ERROR, error="boom", error_kind="engine_dead_error")
    assert events_of(post({"text": "hi", "stream": True}, client))[-1]["error"]["message"] == "boom"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": None}, "text or input_ids"), ({"input_ids": [1]}, "either text or input_ids"),
        ({"text": ""}, "prompt"),
        ({"text": 5}, "text"), ({"text": []}, "text"), ({"text": ["a", 5]}, "text"), ({"text": ["a"] * 2000}, "text"),
        ({"text": "x" * 500}, "maximum context length"), ({"text": None, "input_ids": [999]}, "prompt"),
        ({"text": None, "input_ids": [-1]}, "prompt"), ({"text": None, "input_ids": [[1], "a"]}, "input_ids"),
        ({"input_embeds": [[1.0]]}, "tensors"), ({"image_data": "http://127.0.0.1/x.png"}, "text only"),
        ({"custom_logit_processor": "x"}, "never run"), ({"lora_path": "a"}, "adapters"),
        ({"surprise": 1}, "'surprise'"),
        ({"return_hidden_states": True}, "hidden states"), ({"token_ids_logprob": [1]}, "token_ids_logprob"),
        ({"rid": ["a", "b"]}, "rid"), ({"rid": "x" * 999}, "rid"), ({"rid": 5}, "rid"), ({"stream": "a"}, "stream"),
        ({"extra_key": "x" * 999}, "cache_salt"), ({"priority": 2**40}, "priority"),
        ({"sampling_params": 5}, "sampling"),
        ({"sampling_params": [{"n": 1}, {"n": 2}]}, "the same for every prompt"),
        ({"return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num"),
        ({"logprob_start_len": -2}, "logprob_start_len"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input_is_named(change: dict[str, Any], words: str, stream: bool) -> None:
    check({"text": "hi", "stream": stream, **change}, words)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"temperature": -1}, "temperature"), ({"temperature": 1e308}, "temperature"), ({"top_p": 0}, "top_p"),
        ({"top_k": -9}, "top_k"), ({"min_p": 2}, "min_p"), ({"n": 0}, "n must"), ({"n": 10**9}, "n must"),
        ({"max_new_tokens": -1}, "max_new_tokens"), ({"max_new_tokens": 2**40}, "max_new_tokens"),
        ({"min_new_tokens": 999}, "min_new_tokens"), ({"stop": [""]}, "stop"), ({"stop": 5}, "stop"),
        ({"stop": ["x"] * 99}, "stop"), ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_regex": "a"}, "stop_regex"),
        ({"stop_token_ids": [999]}, "stop_token_ids"), ({"sampling_seed": 2**64}, "sampling_seed"),
        ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"1": 999}}, "logit_bias"),
        ({"regex": "a", "ebnf": "b"}, "both"), ({"regex": ""}, "regex"), ({"json_schema": 5}, "json_schema"),
        ({"structural_tag": "{"}, "structural_tag"), ({"custom_params": {"a": 1}}, "never run"),
        ({"spaces_between_special_tokens": False}, "spaces_between"), ({"surprise": 1}, "'surprise'"),
        ({"ignore_eos": 1}, "ignore_eos"),
    ],
)  # fmt: skip
def test_bad_sampling_is_named(sampling: dict[str, Any], words: str) -> None:
    check({"text": "hi", "sampling_params": sampling}, words)


def check(body: Any, words: str) -> None:
    client = FakeClient()
    response = post(body, client)
    assert response.status_code == 400, response.text[:300]
    message = response.json()["error"]["message"]
    assert words in message
    assert len(message) < 600
    assert client.seen == []


@pytest.mark.parametrize("path", [PATH, "/encode"])
@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "application/json", 400),
        (b'{"text": NaN}', "application/json", 400),
        (b"[" * 100_000, "application/json", 400),
        (b'{"text": "\\ud800"}', "application/json", 400),
        (b'{"text": "a", "text": "b"}', "application/json", 400),
        (b"{}", "text/plain", 415),
    ],
)
def test_bodies_that_are_none(path: str, body: bytes, kind: str, status: int) -> None:
    response = ask(app_of(), "POST", path, content=body, headers={"content-type": kind})
    assert response.status_code == status
    assert "error" in response.json()
