"""OpenAI's fields of function calling: tools, tool_choice, calls and results among the messages.

Used by `calls.py`. Raises `InvalidRequest` naming the field. Knows their JSON, not how a model writes a call.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.text.parsers.tools import Tool, ToolChoice

if TYPE_CHECKING:
    from septet.serve.fields import Fields

__all__ = ["MAX_CALLS", "checked_calls", "checked_id", "tool_choice"]

MAX_TOOLS = 128
MAX_CALLS = 128  # of one message
MAX_ID = 256
MAX_DESCRIPTION = 2**16
_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")


def tool_choice(fields: Fields) -> ToolChoice:
    """`tools`, `tool_choice` and `parallel_tool_calls` as one value."""
    tools = tuple(_tool(f"tools[{i}]", tool) for i, tool in enumerate(_tools(fields)))
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"tools has two functions named {twice!r}", param="tools")
    mode, name = _mode(fields)
    if mode in ("required", "named") and not tools:
        raise InvalidRequest(f"tool_choice {mode!r} needs tools", param="tool_choice")
    if mode == "named" and name not in names:
        raise InvalidRequest(f"tool_choice names {name[:80]!r}, which is not among the tools", param="tool_choice")
    return ToolChoice(tools, mode, name, fields.boolean("parallel_tool_calls", True))


def _tools(fields: Fields) -> list[Any]:
    tools = fields.array("tools")
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds {len(tools)}, at most {MAX_TOOLS} are taken", param="tools")
    return tools


def _tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, dict) or tool.get("type") != "function" or not isinstance(tool.get("function"), dict):
        raise InvalidRequest(f'{where} must be {{"type": "function", "function": {{...}}}}', param=where)
    function = tool["function"]
    for name in function:
        if name not in ("name", "description", "parameters", "strict"):
            raise InvalidRequest(f"{where}.function has the unknown field {name[:80]!r}", param=where)
    description = function.get("description") or ""
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
        raise InvalidRequest(f"{where}.function.description must be a string, {MAX_DESCRIPTION} at most", param=where)
    parameters = function.get("parameters") or {}
    if not isinstance(parameters, dict) or (parameters and parameters.get("type") != "object"):
        raise InvalidRequest(f"{where}.function.parameters must be a JSON schema of type object", param=where)
    if not isinstance(strict := function.get("strict") or False, bool):
        raise InvalidRequest(f"{where}.function.strict must be true or false", param=where)
    return Tool(_name(f"{where}.function", function.get("name")), description, parameters, strict)


def _name(where: str, name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidRequest(f"{where}.name must be 1 to 64 letters, digits, or any of _ . -", param=f"{where}.name")
    return name


def _mode(fields: Fields) -> tuple[str, str]:
    choice = fields.raw("tool_choice", "auto")
    if choice in ("none", "auto", "required"):
        return choice, ""
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise InvalidRequest(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    return "named", name


# -- in messages ------------------------------------------------------------------------------------------------------
def checked_id(where: str, value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_ID:
        raise InvalidRequest(f"{where} must be a string of 1 to {MAX_ID} characters", param=where)
    return value


def checked_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """The `tool_calls` of an assistant's message: ids, names, and arguments that are a JSON object."""
    if not isinstance(calls, list) or not 0 < len(calls) <= MAX_CALLS:
        raise InvalidRequest(f"{where} must be an array of 1 to {MAX_CALLS} calls", param=where)
    return [_call(f"{where}[{i}]", call) for i, call in enumerate(calls)]


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise InvalidRequest(f'{where} must be {{"id", "type": "function", "function": {{...}}}}', param=where)
    arguments = function.get("arguments") or "{}"
    try:
        is_object = isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise InvalidRequest(
            f"{where}.function.arguments must be a string that holds a JSON object", param=f"{where}.function.arguments"
        )
    return {
        "id": checked_id(f"{where}.id", call.get("id")),
        "type": "function",
        "function": {"name": _name(f"{where}.function", function.get("name")), "arguments": arguments},
    }
