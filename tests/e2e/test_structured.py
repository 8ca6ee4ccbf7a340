"""Constrained answers from the real model through the real server: valid at temperature 1, hostile schemas a 400."""

from __future__ import annotations

import concurrent.futures
import json
from typing import TYPE_CHECKING, Any

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
