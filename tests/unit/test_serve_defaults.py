"""A created model's PARAMETERs in every dialect: defaults where the client is silent, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from septet.hub.modelfile import Recipe
from septet.hub.store import LocalModel
from septet.serve.app import Service, Settings, create_app
from septet.session.preset import preset
from tests.fakes import FakeClient, session
from tests.unit.test_serve_openai import ask

PARAMETERS = {
    "temperature": 0.3,
    "top_k": 7,
    "top_p": 0.6,
    "min_p": 0.1,
    "repeat_penalty": 1.2,
    "presence_penalty": 0.5,
    "seed": 11,
    "num_predict": 5,
    "stop": ["<end>", "STOP"],
    "num_ctx": 4096,
}
HI = [{"role": "user", "content": "hi"}]
# (path, a silent body, where its sampling fields go, the dialect's names where they are not ours, what it never takes)
CHAT: dict[str, Any] = {"messages": HI}
DIALECTS: list[Any] = [
    ("/v1/chat/completions", CHAT, "", {}, ()),
    ("/v1/chat/completions", CHAT, "", {"max_tokens": "max_completion_tokens"}, ()),
    ("/v1/completions", {"prompt": "hi"}, "", {}, ()),
    ("/v1/responses", {"input": "hi"}, "", {"max_tokens": "max_output_tokens"}, ()),
    (
        "/v1/messages",
        {"model": "mario", "messages": HI, "max_tokens": 5},
        "",
        {"stop": "stop_sequences"},
        ("min_p", "repetition_penalty", "presence_penalty", "seed"),
    ),
    (
        "/generate",
        {"inputs": "hi"},
        "parameters",
        {"max_tokens": "max_new_tokens"},
        ("min_p", "presence_penalty", "seed"),
    ),
    ("/generate", {"text": "hi"}, "sampling_params", {"max_tokens": "max_new_tokens", "seed": "sampling_seed"}, ()),
    ("/completion", {"prompt": "hi"}, "", {"repetition_penalty": "repeat_penalty", "max_tokens": "n_predict"}, ()),
    ("/api/chat", CHAT, "options", {"repetition_penalty": "repeat_penalty", "max_tokens": "num_predict"}, ()),
]
IDS = [f"{path} {into}".strip() + str(i) for i, (path, _, into, _, _) in enumerate(DIALECTS)]
DEFAULTS = {
    "temperature": 0.3,
    "top_k": 7,
    "top_p": 0.6,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "seed": 11,
    "max_tokens": 5,
    "stop": ("<end>", "STOP"),
}
ASKED = {
    "temperature": 0.9,
    "top_k": 3,
    "top_p": 0.8,
    "min_p": 0.2,
    "repetition_penalty": 1.5,
    "presence_penalty": 0.1,
    "seed": 5,
    "max_tokens": 2,
    "stop": ("never",),
}


def got(path: str, body: dict[str, Any], parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """The sampling parameters that the engine saw."""
    client = FakeClient("hello")
    recipe = Recipe(parent="fake", parameters=PARAMETERS if parameters is None else parameters)
    created = preset(session(client), "mario", recipe)  # type: ignore[arg-type]
    created.origin = LocalModel(name="mario", path=Path("x.gguf"), source="local", n_bytes=0, recipe=recipe)
    body = {"model": "mario", "stream": False} | body
    if path == "/v1/responses":
        body["store"] = False
    if path == "/generate":
        del body["model"]
    answer = ask(create_app(Service(created, Settings())), "POST", path, json=body)
    assert answer.status_code == 200, answer.text
    params = client.seen[0].params
    return {name: getattr(params, name) for name in DEFAULTS}


@pytest.mark.parametrize(("path", "body", "into", "names", "never"), DIALECTS, ids=IDS)
def test_where_the_client_is_silent_the_model_speaks(path: str, body: Any, into: str, names: Any, never: Any) -> None:
    seen = got(path, body)
    if path == "/generate" and into == "parameters":  # TGI tells the seed that it drew
        seen["seed"] = 11
    assert seen == DEFAULTS


@pytest.mark.parametrize(("path", "body", "into", "names", "never"), DIALECTS, ids=IDS)
def test_what_the_client_says_comes_first(path: str, body: Any, into: str, names: Any, never: Any) -> None:
    asked = {n: list(v) if isinstance(v, tuple) else v for n, v in ASKED.items() if n not in never}
    given = {names.get(name, name): value for name, value in asked.items()}
    seen = got(path, body | ({into: given} if into else given))
    expected = DEFAULTS | {name: ASKED[name] for name in asked}
    if path == "/generate" and "seed" in never:
        seen["seed"] = expected["seed"]
    assert seen == expected


def test_null_is_silence_and_one_field_is_not_all() -> None:
    seen = got("/v1/chat/completions", CHAT | {"temperature": None, "top_k": 1})
    assert (seen["temperature"], seen["top_k"], seen["max_tokens"]) == (0.3, 1, 5)


@pytest.mark.parametrize("more", [{}, {"parameters": {}}, {"parameters": {"max_new_tokens": 3}}])
def test_a_temperature_of_0_is_what_tgi_calls_not_sampling(more: dict[str, Any]) -> None:
    assert got("/generate", {"inputs": "hi"} | more, {"temperature": 0})["temperature"] == 0


def test_tgi_without_parameters_still_draws() -> None:
    assert got("/generate", {"inputs": "hi"}, {"stop": ["x"]})["temperature"] == 1
    assert got("/generate", {"inputs": "hi", "parameters": {}}, {"stop": ["x"]})["temperature"] == 0


def test_a_model_without_parameters_leaves_each_dialect_its_own() -> None:
    assert got("/completion", {"prompt": "hi"}, {})["temperature"] == 0.8
    assert got("/v1/chat/completions", CHAT, {"num_ctx": 512})["temperature"] == 1
    assert got("/generate", {"text": "hi"}, {"top_k": 4})["max_tokens"] == 128


def test_what_is_odd_is_still_told_by_its_name() -> None:
    with pytest.raises(AssertionError, match="sampling_params must be"):
        got("/generate", {"text": "hi", "sampling_params": ["x"]})
    with pytest.raises(AssertionError, match="temperature"):
        got("/v1/chat/completions", CHAT | {"temperature": -1})
