"""Constrained answers from the real model through the real server: valid at temperature 1, hostile schemas a 400."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import TYPE_CHECKING, Any

import httpx
import jsonschema
import openai
import pytest

from tests import schemas

if TYPE_CHECKING:
    from tests.e2e.serving import Server

ASK: Any = [{"role": "user", "content": "Give me a short JSON value."}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url, api_key="none", timeout=280, max_retries=0)


def ask(client: openai.OpenAI, schema: Any, **options: Any) -> Any:
    bound = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
    wanted: Any = {"max_tokens": 48, "temperature": 1.0, "seed": 7, "response_format": bound, **options}
    return client.chat.completions.create(model="smollm2", messages=ASK, **wanted).choices[0]


def test_schemas_at_temperature_1(client: openai.OpenAI) -> None:
    wanted = [schemas.schema(seed) for seed in range(500, 512)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda schema: ask(client, schema), wanted))
    complete = 0
    for schema, choice in zip(wanted, answers, strict=True):
        if choice.finish_reason == "stop":
            complete += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(choice.message.content))
    assert complete >= 5, "too few answers came to their end for this to say something"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "minLength": 10**9}, "minLength"),
        ({"$ref": "#"}, "json_schema"),
        ({"properties": {f"p{i}": {} for i in range(10_000)}}, "10000 entries"),
    ],
    ids=["uniqueItems", "minLength", "cycle", "properties"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_schema_is_a_400_that_names_it(client: openai.OpenAI, schema: Any, named: str, stream: bool) -> None:
    bound: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="smollm2", messages=ASK, response_format=bound, stream=stream, max_tokens=4
        )
    assert named in str(caught.value)


def test_choices_of_a_completion(client: openai.OpenAI) -> None:
    extra = {"guided_choice": ["red", "green", "blue"]}
    answer = client.completions.create(model="smollm2", prompt="My favourite colour is ", n=3, extra_body=extra)
    assert {choice.text for choice in answer.choices} <= {"red", "green", "blue"}
    assert all(choice.finish_reason == "stop" for choice in answer.choices)


CYCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
UNIQUE = {"type": "array", "uniqueItems": True}
CHAT = {"model": "smollm2", "messages": ASK, "max_tokens": 4}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string", "minLength": 10**9}}}}
HOSTILE: list[tuple[str, dict[str, Any], str]] = [  # route, body, what the refusal names
    ("/v1/chat/completions", {**CHAT, "guided_regex": "((a{1000}){1000}){1000}"}, "guided_regex"),
    ("/v1/chat/completions", {**CHAT, "structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs"),
    ("/v1/chat/completions", {**CHAT, "guided_regex": "(" * 8000}, "guided_regex"),
    ("/v1/chat/completions", {**CHAT, "guided_grammar": "start: " + "(" * 30_000}, "guided_grammar"),
    ("/v1/chat/completions", {**CHAT, "guided_grammar": 'root ::= "a'}, "guided_grammar"),
    ("/v1/chat/completions", {**CHAT, "guided_grammar": "start: start"}, "guided_grammar"),
    ("/v1/chat/completions", {**CHAT, "guided_json": {"$ref": "http://example.com/x"}}, "guided_json"),
    ("/v1/chat/completions", {**CHAT, "guided_json": CYCLE}, "guided_json"),
    ("/v1/chat/completions", {**CHAT, "guided_json": {"type": "text"}}, "guided_json"),
    ("/v1/chat/completions", {**CHAT, "guided_json": {"enum": list(range(9000))}}, "guided_json"),
    (
        "/v1/chat/completions",
        {**CHAT, "tools": [{"type": "function", "function": {**TOOL, "strict": True}}]},
        "minLength",
    ),
    ("/v1/completions", {"model": "smollm2", "prompt": "x", "guided_choice": [""]}, "guided_choice"),
    ("/v1/completions", {"model": "smollm2", "prompt": "x", "guided_regex": "["}, "guided_regex"),
    ("/api/chat", {"model": "smollm2", "messages": ASK, "format": UNIQUE, "stream": False}, "uniqueItems"),
    ("/completion", {"prompt": "x", "grammar": 'root ::= "a'}, "grammar"),
    ("/completion", {"prompt": "x", "json_schema": {"type": "string", "minLength": 10**9}}, "minLength"),
    (
        "/generate",
        {"inputs": "x", "parameters": {"grammar": {"type": "regex", "value": "(a{1000}){1000}"}}},
        "regex",
    ),
    ("/generate", {"text": "x", "sampling_params": {"regex": "(a{1000}){1000}"}}, "regex"),
    (
        "/v1/messages",
        {**CHAT, "output_config": {"format": {"type": "json_schema", "schema": UNIQUE}}},
        "uniqueItems",
    ),
]  # fmt: skip


def test_hostile_grammars_from_every_route_beside_a_stream(server: Server, client: openai.OpenAI) -> None:
    """Each is a 4xx that names the part, in bounded time; an answer under way goes on, and comes to its end."""
    stream = client.completions.create(
        model="smollm2", prompt="Once upon a time", max_tokens=400, stream=True, seed=1, extra_body={"ignore_eos": True}
    )
    pieces = iter(stream)
    next(pieces)

    def post(row: tuple[str, dict[str, Any], str]) -> tuple[httpx.Response, float]:
        began = time.monotonic()
        answer = httpx.post(server.root + row[0], json=row[1], timeout=200)
        return answer, time.monotonic() - began

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        told = list(pool.map(post, HOSTILE))
    for (route, _, named), (answer, seconds) in zip(HOSTILE, told, strict=True):
        assert answer.status_code in (400, 422), (route, answer.text[:300])
        assert named in answer.text, (route, answer.text[:300])
        assert seconds < 120  # alone each takes at most the compiler's ten seconds
    last = [piece.choices[0].finish_reason for piece in pieces if piece.choices][-1]
    assert last == "length"


def test_a_compile_error_tells_its_field(client: openai.OpenAI) -> None:
    for field, value in (("guided_grammar", 'root ::= "a'), ("guided_json", {"type": "array", "uniqueItems": True})):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="smollm2", prompt="x", extra_body={field: value})
        assert caught.value.param == field
