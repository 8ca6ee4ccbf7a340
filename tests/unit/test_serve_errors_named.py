"""Errors in the words of the API that was asked: fields are renamed, what the user wrote is not."""

from __future__ import annotations

import pytest

from septet.errors import InvalidRequest
from septet.serve.openai_responses_call import parse_responses

NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "structured": "output_config.format"}


@pytest.mark.parametrize(
    ("message", "param", "told", "at"),
    [
        ("messages[3].content is empty", "messages[3].content", "input[3].content is empty", "input[3].content"),
        ("names 'my messages', which", "tool_choice", "names 'my messages', which", "tool_choice"),
        ("my_messages can't be, max_tokens don't", None, "my_messages can't be, max_output_tokens don't", None),
        ('structured: "max_tokens" is \'messages\'', "structured", 'output_config.format: "max_tokens" is \'messages\'',
         "output_config.format"),
    ],
)  # fmt: skip
def test_only_fields_are_renamed(message: str, param: str | None, told: str, at: str | None) -> None:
    error = InvalidRequest(message, param=param).renamed(NAMES)
    assert (error.message, error.param) == (told, at)


def test_a_tool_of_the_users_keeps_its_name() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}}
    body = {"model": "m", "input": "x", "tools": [tool], "tool_choice": {"type": "function", "name": "my_messages"}}
    with pytest.raises(InvalidRequest, match="my_messages"):
        parse_responses(body)
