"""The fields that bind an answer: what each becomes, and what is refused by its name."""

from __future__ import annotations

from typing import Any

import pytest

from septet.errors import InvalidRequest
from septet.serve.calls import parse_chat, parse_completion
from septet.structured import Structured

SCHEMA = {"type": "integer"}
CHOICE = Structured.choice(["a", "b"])


def chat(**fields: Any) -> Structured | None:
    return parse_chat({"messages": [{"role": "user", "content": "x"}], **fields}).params.structured


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Structured.json_object()),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "strict": True, "schema": SCHEMA},
                }
            },
            Structured.json_schema(SCHEMA),
        ),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, Structured.json_schema(SCHEMA)),
        ({"structured_outputs": {"regex": "a+"}}, Structured.regex("a+")),
        ({"structured_outputs": {"json_object": True}}, Structured.json_object()),
        ({"guided_json": '{"type": "integer"}'}, Structured.json_schema(SCHEMA)),
        ({"guided_choice": ["a", "b"], "guided_decoding_backend": "auto"}, CHOICE),
        ({"guided_grammar": "root ::= [a-z]", "guided_regex": None}, Structured.grammar("root ::= [a-z]")),
    ],
)
def test_fields(fields: dict[str, Any], expected: Structured | None) -> None:
    assert chat(**fields) == expected
    assert parse_completion({"prompt": "x", **fields}).params.structured == expected


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}, "shema": 1}}}, "response_format"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": 3}, "guided_regex"),
        ({"guided_choice": "ab"}, "guided_choice"),
        ({"guided_json": 3}, "guided_json"),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ],
)
def test_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param in caught.value.message
