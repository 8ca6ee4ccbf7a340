"""Arguments of a call that are not written as JSON: keyword arguments, tags, bare keys. As Lark, from a schema.

Called by `translate.py` for structures with a `form`. Values are JSON of their own schemas, except where a form has
marks around strings: text up to the closing mark. Known parameters only, in the schema's order, required ones always.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import msgspec

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["CallForm", "lark_of_form"]

Schema = dict[str, Any]
ANY_TEXT = r"/(.|\n)*/"
KEY = r"[A-Za-z_][A-Za-z0-9_]{0,63}"
_SHAPES = ("type", "properties", "required", "additionalProperties", "$defs", "definitions", "$schema", "x-guidance")
_TEXT_RULES = ("pattern", "format", "minLength", "maxLength")


class CallForm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Between the name and the end of a call: `key_open` KEY `key_close` VALUE `value_close` `rest`, and `separator`
    between two. `marks`: around a string's text; None: it is a JSON string. Where they are empty, `value_close` ends
    the text, and a line end before it belongs to nothing."""

    key_open: str = ""
    key_close: str = ""
    value_close: str = ""
    rest: str = ""
    separator: str = ""
    marks: tuple[str, str] | None = None

    @classmethod
    def of(cls, value: Any) -> CallForm:
        try:
            return msgspec.convert(value, cls)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"form: {error}", param="structured") from None


def lark_of_form(form: CallForm, schema: Schema | None, piece: Callable[[str], str], *, lenient: bool) -> str:
    """`schema` None: any parameters with any values. `piece`: text as Lark, control tokens by their ids. `lenient`:
    what can't be asked of marked text is left out, otherwise refused by its name."""
    lines = ["TEXT: " + ANY_TEXT, r"NL: /\n?/"]
    if schema is None:
        lines += _open(form, piece)
        return "\n".join(lines) + "\n"
    for name in schema:
        if name not in _SHAPES:
            raise _refuse(f"{name} can't be enforced beside properties in this model's way of calling")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if missing := [name for name in required if name not in properties]:
        raise _refuse(f"{missing[0][:80]!r} is required, but not among the properties")
    shared: Schema = {name: schema[name] for name in ("$defs", "definitions", "x-guidance") if name in schema}
    names = list(properties)
    if odd := [name for name in names if not re.fullmatch(KEY if form.separator else r"[^<>\n]{1,64}", name)]:
        raise _refuse(f"a parameter named {odd[0][:80]!r} can't be written in this model's way of calling")
    for i, name in enumerate(names):
        key = piece(form.key_open + name + form.key_close)
        lines.append(f"p{i}: {key} {_value(form, i, properties[name], shared, piece, lines, lenient)}")
        for state, before in (("first", ""), ("later", piece(form.separator))):
            skip = "" if name in required else f" | {'first' if state == 'first' else 'later'}{i + 1}"
            lines.append(f"{state}{i}: {before} p{i} later{i + 1}{skip}")
    lines += [f'first{len(names)}: ""', f'later{len(names)}: ""', "start: first0"]
    return "\n".join(lines) + "\n"


def _value(
    form: CallForm, i: int, schema: Any, shared: Schema, piece: Callable[[str], str], lines: list[str], lenient: bool
) -> str:
    """The rule of one value and what closes it; more lines where it needs them."""
    line_end = "NL" if form.marks == ("", "") else ""
    close = f"{line_end} {piece(form.value_close)} {piece(form.rest)}"
    if form.marks is not None and _is_text(schema):
        opened, closed = form.marks
        options = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if options is not None:
            return f"{piece(opened)} (" + " | ".join(json.dumps(o) for o in options) + f") {piece(closed)} {close}"
        if (rule := next((r for r in _TEXT_RULES if r in schema), None)) and not lenient:
            raise _refuse(f"{rule} of a string can't be enforced in this model's way of calling")
        return (
            f"{piece(opened)} {_text_until(f't{i}', closed or form.value_close, piece, lines)} {_behind(form, piece)}"
        )
    inner = schema if isinstance(schema, dict) else {}
    lines.append(f"v{i}: %json {json.dumps(inner | shared)}")
    return f"v{i} {close}"


def _open(form: CallForm, piece: Callable[[str], str]) -> list[str]:
    """Any pairs."""
    lines = [f"KEY: /{KEY}/", "any: %json {}"]
    value = f"any {piece(form.value_close)} {piece(form.rest)}"
    if form.marks is not None:
        opened, closed = form.marks
        text = f"{piece(opened)} {_text_until('text', closed or form.value_close, piece, lines)} {_behind(form, piece)}"
        value = f"({text} | {value})" if opened else text
    pair = f"pair: {piece(form.key_open)} KEY {piece(form.key_close)} {value}"
    return [*lines, pair, f'start: "" | pair ({piece(form.separator)} pair)*']


def _behind(form: CallForm, piece: Callable[[str], str]) -> str:
    """What follows a text and its mark."""
    closed = form.marks[1] if form.marks else ""
    return piece((form.value_close if closed else "") + form.rest)


def _text_until(name: str, end: str, piece: Callable[[str], str], lines: list[str]) -> str:
    """Free text and the `end` behind it."""
    written = piece(end)
    if (at := written.find("<[")) >= 0:  # a control token ends the text by itself; what stands before it is text
        return f"TEXT {written[at:]}"
    lines.append(f"{name}[lazy]: TEXT {written}")
    return name


def _is_text(schema: Any) -> bool:
    """As `kind_of` of the parsers says "string", so that reader and writer agree."""
    if not isinstance(schema, dict):
        return False
    if "type" in schema:
        return bool(schema["type"] == "string")
    options = schema.get("enum")
    return isinstance(options, list) and bool(options) and all(isinstance(o, str) for o in options)


def _refuse(what: str) -> InvalidRequest:
    return InvalidRequest(what, param="structured")
