"""Tools for templates that know none: what the conversation then looks like, in the Hermes format.

Called by the session before rendering. The tools go into the system message between <tools> tags, calls into the
assistant's text between <tool_call> tags, results into a user message between <tool_response> tags (the format of Nous
Hermes 2 Pro, which Qwen's own templates write too). `docs/tools.md` shows the text.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from septet.text.parsers.tools import Tool

__all__ = ["conversation", "system_text"]

_SYSTEM = """You can call functions to help with the user's request. The functions are described within <tools></tools>:
<tools>
{tools}
</tools>

To call a function, answer with a JSON object within <tool_call></tool_call>, one for each call:
<tool_call>
{{"name": <function name>, "arguments": <arguments as a JSON object>}}
</tool_call>

The result then comes within <tool_response></tool_response>. If no function is needed, answer in plain words."""


def system_text(tools: Sequence[Tool]) -> str:
    """What the system message says about the tools."""
    return _SYSTEM.format(tools="\n".join(json.dumps(tool.as_json(), ensure_ascii=False) for tool in tools))


def conversation(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """The same conversation with roles system, user and assistant and plain text only; the input is left as it is."""
    result: list[dict[str, Any]] = []
    for message in messages:
        role = message.get("role")
        if role == "tool":
            _add_result(result, message)
        elif role == "assistant" and message.get("tool_calls"):
            plain = {k: v for k, v in message.items() if k != "tool_calls"}
            calls = "\n".join(_call_text(call) for call in message["tool_calls"])
            result.append(plain | {"content": "\n".join(filter(None, (_text(message), calls)))})
        else:
            result.append(dict(message))
    return _with_system(result, system_text(tools)) if tools else result


def _with_system(messages: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    if messages and messages[0].get("role") == "system":
        first = {**messages[0], "content": "\n\n".join(filter(None, (_text(messages[0]), text)))}
        return [first, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def _add_result(result: list[dict[str, Any]], message: Mapping[str, Any]) -> None:
    """Results that follow each other share one user message: many templates want the roles to alternate."""
    text = f"<tool_response>\n{_text(message)}\n</tool_response>"
    if result and result[-1].get("results"):
        result[-1]["content"] += "\n" + text
    else:
        result.append({"role": "user", "content": text, "results": True})


def _call_text(call: Mapping[str, Any]) -> str:
    function = call["function"]
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(function["name"], ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list | tuple):
        return "\n".join(part["text"] if isinstance(part, dict) else str(part) for part in content)
    return content or ""
