"""Tool calls as a constraint: free text until a call begins, then a known name and arguments of its schema.

Called by the session; the value is a `Structured` of kind structural_tag, which the engine enforces. Dialects that
write arguments as JSON can be bound (`Dialect.begin`); the others are bound only when a call is forced, which is then
written in the plain way of `json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.structured import Structured
from septet.text.parsers.dialects import DIALECTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.text.parsers.dialects import Dialect
    from septet.text.parsers.tools import Tool, ToolChoice

__all__ = ["bindable", "constraint"]

Schema = dict[str, Any]


def bindable(dialect: Dialect, choice: ToolChoice) -> Dialect:
    """The dialect in which this answer's calls are written: a forced call needs one that can be bound."""
    return DIALECTS["json"] if choice.forced and not dialect.begin else dialect


def constraint(
    dialect: Dialect, choice: ToolChoice, schema_of: Callable[[Tool], Schema], *, after: str | None = None
) -> Structured | None:
    """None where there is nothing to bind or the dialect can't be. `after`: as `Structured.after` (end of thoughts)."""
    allowed = choice.allowed()
    if not allowed or not dialect.begin:
        return None
    before = dialect.around[0] if choice.forced else ""
    begins = [before + dialect.begin.format(name=tool.name) for tool in allowed]
    structures = [
        {"begin": begin, "schema": schema_of(tool), "end": dialect.end}
        for begin, tool in zip(begins, allowed, strict=True)
    ]
    value: dict[str, Any] = {"structures": structures, "triggers": [_trigger(dialect, before)]}
    if choice.forced:
        value["at_least_one"] = True
        value["stop_after_first"] = choice.mode == "named" or not choice.parallel
    return Structured.structural_tag(value, after=after)


def _trigger(dialect: Dialect, before: str) -> str:
    """From here on an answer is bound: the marker that begins a call, or what all bare calls have in common."""
    if before:
        return before
    own = next((trigger for trigger in dialect.triggers if dialect.begin.startswith(trigger)), None)
    return own or dialect.begin.format(name="\0").partition("\0")[0]
