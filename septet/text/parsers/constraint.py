"""Tool calls as a constraint: free text until a call begins, then a known name and arguments of its schema.

Called by the session; the value is a `Structured` of kind structural_tag, which the engine enforces. How a dialect's
calls are bound is its `Dialect.bound`; one without is bound only when a call is forced, which is then written in the
plain way of `json`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.structured import Structured
from septet.text.parsers.dialects import DIALECTS

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.text.parsers.dialects import Bound, Dialect
    from septet.text.parsers.tools import Tool, ToolChoice

__all__ = ["bindable", "constraint"]

Schema = dict[str, Any]


def bindable(dialect: Dialect, choice: ToolChoice) -> Dialect:
    """The dialect in which this answer's calls are written: a forced call needs one that can be bound."""
    return DIALECTS["json"] if choice.forced and not dialect.bound else dialect


def constraint(
    dialect: Dialect,
    choice: ToolChoice,
    schema_of: Callable[[Tool], Schema],
    *,
    after: str | None = None,
    opening: str | None = None,
    thoughts: tuple[str, ...] = (),
) -> Structured | None:
    """None where there is nothing to bind or the dialect can't be. `after`, `opening`: as `Structured`'s, where an
    answer begins or may begin with thoughts. `thoughts`: markers that may stand in free text. A forced answer has none:
    after a call comes another, or the end."""
    allowed = choice.allowed()
    if not allowed or not dialect.bound or (dialect.harmony and not choice.forced):
        return None
    one = choice.mode == "named" or not choice.parallel or (dialect.harmony and choice.forced)
    structures: list[dict[str, Any]] = []
    triggers: list[str] = []
    for bound in dialect.bound:
        before = dialect.around[0] if choice.forced else ""
        calls = [_call(bound, tool, schema_of(tool)) for tool in allowed]
        if bound.listed is None:
            structures += [{**call, "begin": before + call["begin"]} for call in calls]
        else:
            opened, separator, closed = bound.listed
            block = {"begin": before + opened, "calls": calls, "separator": separator, "end": closed, "one": one}
            structures.append(block)
        triggers.append(before or bound.trigger)
    value: dict[str, Any] = {"structures": structures, "triggers": list(dict.fromkeys(triggers))}
    marks = (*dialect.noise, *filter(None, dialect.around), *dialect.close, *(() if choice.forced else thoughts))
    if marks:
        value["marks"] = list(dict.fromkeys(marks))
    if choice.forced:
        value |= {"at_least_one": True, "stop_after_first": one, "no_text": True, "between": dialect.between}
    return Structured.structural_tag(value, after=after, opening=opening, source="tools")


def _call(bound: Bound, tool: Tool, schema: Schema) -> dict[str, Any]:
    """Where a function is not strict, a schema that can't be enforced leaves its arguments any object."""
    call: dict[str, Any] = {"begin": bound.begin.format(name=tool.name), "schema": schema, "end": bound.end}
    if bound.form is not None:
        call["form"] = bound.form
    if not tool.strict:
        call["fallback"] = True
    return call
