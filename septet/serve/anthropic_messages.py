"""Anthropic's conversation as the session takes it: system text, content blocks, tools and the choice among them.

Called by `anthropic_call.py`. Raises `InvalidRequest` naming the block. A block of a kind that the model can't read is
refused, never dropped. Where `cache_control` stands comes along as marks.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.anthropic_cache import TOOLS, Mark, ttl_of
from septet.text.parsers.tools import Tool, ToolChoice

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from septet.serve.fields import Fields

__all__ = ["conversation", "tool_choice", "tool_marks"]

MAX_MESSAGES = 4096
MAX_BLOCKS = 1024  # of one message
MAX_TOOLS = 128
MAX_DESCRIPTION = 2**16
BILLING = "x-anthropic-billing-header"  # a client's note to the billing, in the system text; different in each request
MARKS = "marks"  # of a message while the conversation is put together; templates never see it
_NAME = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,256}")


class _Joined:
    """Texts of one message, joined by line ends, and the marks behind them: (characters so far, ttl)."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.marks: list[tuple[int | None, float]] = []
        self._length = -1

    def add(self, text: str, ttl_s: float | None) -> None:
        self.texts.append(text)
        self._length += len(text) + 1
        if ttl_s is not None:
            self.marks.append((self._length, ttl_s))

    def told(self, role: str) -> dict[str, Any]:
        return {"role": role, "content": "\n".join(self.texts), MARKS: self.marks}


def conversation(fields: Fields) -> tuple[list[dict[str, Any]], list[Mark]]:
    """`system` and `messages` as messages of roles system, user, assistant and tool, each with plain text; marks."""
    given = fields.array("messages")
    if not 0 < len(given) <= MAX_MESSAGES:
        raise InvalidRequest(f"messages must be an array of 1 to {MAX_MESSAGES} messages", param="messages")
    plain: list[dict[str, Any]] = []
    names: dict[str, str] = {}  # of the tools called so far, by the id of the call
    system = _system(fields)
    if system["content"]:
        plain.append(system)
    for i, message in enumerate(given):
        if isinstance(message, dict) and message.get("content") == []:
            where = f"messages[{i}].content"
            raise InvalidRequest(f"{where} must hold at least one block", param=where)
        for told in _message(f"messages[{i}]", message, names):
            _append(plain, told)
    marks = [Mark(i, chars, ttl_s) for i, told in enumerate(plain) for chars, ttl_s in told.pop(MARKS, ())]
    if (ttl_s := ttl_of("the request", fields.raw("cache_control"))) is not None:
        marks.append(Mark(len(plain) - 1, None, ttl_s))
    return plain, marks


def _append(plain: list[dict[str, Any]], told: dict[str, Any]) -> None:
    """Neighbours of one role are one turn: many templates want the roles to alternate."""
    last = plain[-1] if plain else None
    if last is None or last["role"] != told["role"] or told["role"] in ("tool", "system") or "tool_calls" in last:
        plain.append(told)
        return
    texts = [text for text in (last["content"], told["content"]) if text]
    before = len(last["content"]) + 1 if len(texts) > 1 else 0
    moved = [(chars if chars is None else chars + before, ttl_s) for chars, ttl_s in told.get(MARKS, ())]
    last |= told | {"content": "\n".join(texts), MARKS: [*last.get(MARKS, ()), *moved]}


def _system(fields: Fields) -> dict[str, Any]:
    value = fields.raw("system", "")
    if isinstance(value, str):
        return {"role": "system", "content": value}
    joined = _Joined()
    for kind, block, ttl_s in _blocks("system", value):
        text = _text("system", kind, block)
        if not text.startswith(BILLING):
            joined.add(text, ttl_s)
    return joined.told("system")


def _message(where: str, message: Any, names: dict[str, str]) -> Iterator[dict[str, Any]]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("user", "assistant", "system"):
        raise InvalidRequest(f"{where}.role must be user or assistant", param=f"{where}.role")
    for name in message:
        if name not in ("role", "content"):
            raise InvalidRequest(f"{where} has the unknown field {name[:80]!r}", param=where)
    content = message.get("content")
    if isinstance(content, str):
        yield {"role": role, "content": content}
    elif role == "assistant":
        yield _assistant(f"{where}.content", content, names)
    elif role == "user":
        yield from _user(f"{where}.content", content, names)
    else:
        joined = _Joined()
        for kind, block, ttl_s in _blocks(f"{where}.content", content):
            joined.add(_text(f"{where}.content", kind, block), ttl_s)
        yield joined.told(role)


def _user(where: str, content: Any, names: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """A message of role tool for each result; the text between them in messages of its own."""
    joined = _Joined()
    for i, (kind, block, ttl_s) in enumerate(_blocks(where, content)):
        if kind != "tool_result":
            joined.add(_text(f"{where}[{i}]", kind, block), ttl_s)
            continue
        if joined.texts:
            yield joined.told("user")
            joined = _Joined()
        result = _result(f"{where}[{i}]", block, names)
        yield result if ttl_s is None else result | {MARKS: [(None, ttl_s)]}
    if joined.texts:
        yield joined.told("user")


def _result(where: str, block: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    number = _checked_id(f"{where}.tool_use_id", block.get("tool_use_id"))
    if number not in names:
        raise InvalidRequest(f"{where}.tool_use_id names no tool_use block before it", param=f"{where}.tool_use_id")
    failed = block.get("is_error") or False
    if not isinstance(failed, bool):
        raise InvalidRequest(f"{where}.is_error must be true or false", param=f"{where}.is_error")
    content = block.get("content", "")
    if not isinstance(content, str):
        parts = _blocks(f"{where}.content", content)
        content = "\n".join(_text(f"{where}.content", kind, part) for kind, part, _ in parts)
    shown = f"Error: {content}" if failed else content
    return {"role": "tool", "tool_call_id": number, "name": names[number], "content": shown}


def _assistant(where: str, content: Any, names: dict[str, str]) -> dict[str, Any]:
    joined = _Joined()
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, (kind, block, ttl_s) in enumerate(_blocks(where, content)):
        if kind == "tool_use":
            calls.append(_call(f"{where}[{i}]", block, names))
            joined.marks += [] if ttl_s is None else [(None, ttl_s)]
        elif kind == "thinking":
            thoughts.append(_string(f"{where}[{i}].thinking", block.get("thinking")))
        elif kind != "redacted_thinking":  # nobody but its maker can read it
            joined.add(_text(f"{where}[{i}]", kind, block), ttl_s)
    message = joined.told("assistant")
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


def _call(where: str, block: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    number, name = _checked_id(f"{where}.id", block.get("id")), _checked_name(where, block.get("name"))
    if not isinstance(block.get("input"), dict):
        raise InvalidRequest(f"{where}.input must be an object", param=f"{where}.input")
    names[number] = name
    arguments = json.dumps(block["input"], ensure_ascii=False)
    return {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}


# -- blocks -----------------------------------------------------------------------------------------------------------
def _blocks(where: str, content: Any) -> list[tuple[str, dict[str, Any], float | None]]:
    """(type, block, how long all up to it is to be kept)."""
    if not isinstance(content, list) or len(content) > MAX_BLOCKS:
        raise InvalidRequest(f"{where} must be a string or at most {MAX_BLOCKS} blocks", param=where)
    found = []
    for i, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if not isinstance(kind, str):
            raise InvalidRequest(f"{where}[{i}] must be an object with a type", param=f"{where}[{i}]")
        found.append((kind, block, ttl_of(f"{where}[{i}]", block.get("cache_control"))))
    return found


def _text(where: str, kind: str, block: dict[str, Any]) -> str:
    if kind != "text":
        raise InvalidRequest(f"{where} is a block of type {kind[:40]!r}, which this model can't read", param=where)
    return _string(f"{where}.text", block.get("text"))


def _string(where: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{where} must be a string", param=where)
    return value


def _checked_id(where: str, value: Any) -> str:
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise InvalidRequest(f"{where} must be 1 to 256 letters, digits, or any of _ . : -", param=where)
    return value


def _checked_name(where: str, value: Any) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise InvalidRequest(f"{where}.name must be 1 to 128 letters, digits, _ or -", param=f"{where}.name")
    return value


# -- tools ------------------------------------------------------------------------------------------------------------
_HARMLESS = {"cache_control", "eager_input_streaming"}


def tool_choice(fields: Fields) -> ToolChoice:
    """`tools` and `tool_choice` as one value."""
    given = fields.array("tools")
    if len(given) > MAX_TOOLS:
        raise InvalidRequest(f"tools holds {len(given)}, at most {MAX_TOOLS} are taken", param="tools")
    tools = tuple(_tool(f"tools[{i}]", tool) for i, tool in enumerate(given))
    names = [tool.name for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"tools has two named {twice!r}", param="tools")
    choice = fields.object("tool_choice") if fields.given("tool_choice") else {"type": "auto"}
    mode = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}.get(str(choice.get("type")))
    one = choice.get("disable_parallel_tool_use", False)
    if mode is None or not isinstance(one, bool):
        raise InvalidRequest(
            'tool_choice must be {"type": "auto", "any", "tool" or "none"}, disable_parallel_tool_use true or false',
            param="tool_choice",
        )
    if mode in ("required", "named") and not tools:
        raise InvalidRequest(f"tool_choice {choice['type']!r} needs tools", param="tool_choice")
    name = str(choice.get("name", ""))[:200] if mode == "named" else ""
    if mode == "named" and name not in names:
        raise InvalidRequest(f"tool_choice names {name[:80]!r}, which is not among the tools", param="tool_choice")
    return ToolChoice(tools, mode, name, not one)


def tool_marks(fields: Fields) -> list[Mark]:
    """Of tools that `tool_choice` has taken."""
    found = [ttl_of(f"tools[{i}]", tool.get("cache_control")) for i, tool in enumerate(fields.array("tools"))]
    return [Mark(TOOLS, None, ttl_s) for ttl_s in found if ttl_s is not None]


def _tool(where: str, tool: Any) -> Tool:
    if not isinstance(tool, dict):
        raise InvalidRequest(f"{where} must be an object", param=where)
    if (kind := tool.get("type") or "custom") != "custom":
        raise InvalidRequest(f"{where} is of type {str(kind)[:40]!r}; only tools of the client's are run", param=where)
    examples = tool.get("input_examples") or []
    for name, value in tool.items():
        if name in ("name", "description", "input_schema", "strict", "type", "input_examples") or name in _HARMLESS:
            continue
        if value in (None, False, ["direct"]) and name in ("defer_loading", "allowed_callers"):
            continue
        raise InvalidRequest(f"{where}.{name[:80]} is not supported", param=where)
    description = tool.get("description") or ""
    if not isinstance(description, str) or len(description) > MAX_DESCRIPTION:
        raise InvalidRequest(f"{where}.description must be a string, {MAX_DESCRIPTION} at most", param=where)
    schema = tool.get("input_schema")
    if not isinstance(schema, dict) or schema.get("type") != "object":
        raise InvalidRequest(f"{where}.input_schema must be a JSON schema of type object", param=where)
    if not isinstance(strict := tool.get("strict") or False, bool) or not isinstance(examples, list):
        raise InvalidRequest(f"{where}: strict must be true or false, input_examples an array", param=where)
    shown = "".join(f"\nExample of its input: {json.dumps(one, ensure_ascii=False)}" for one in examples)
    return Tool(_checked_name(where, tool.get("name")), description + shown, schema, strict)
