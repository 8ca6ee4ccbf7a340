"""JSON schemas before they are compiled: every keyword is enforced, or an annotation, or refused by its name.

Called by `translate.py`. Drafts 7 to 2020-12. What the library behind would ignore must not pass here: an unknown
keyword is as likely a typing error as a custom annotation, so only `x-...` names are left alone. Pure Python.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.regex import ascii_classes, check_regex

__all__ = ["checked_schema"]

WHITESPACE = r"[ \n\t]{1,24}"  # between JSON's tokens: room for indentation, no room for a model to get lost in

# What the library's formats let through and validators refuse: :60 on any day, the year 0, 29 February in any year
_SECOND = "^[^:]*:[0-9]{2}:[0-5]"
_YEAR = "^(000[1-9]|00[1-9]|0[1-9]|[1-9])"
_LEAP = (
    "^[0-9]{4}-(0[13-9]|1|02-([01]|2[0-8]))"
    "|^([0-9]{2}(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29"
)
_STRICTER = {"time": (_SECOND,), "date": (_YEAR, _LEAP), "date-time": (_YEAR, _LEAP, _SECOND)}
_ANNOTATIONS = frozenset(
    (
        "title",
        "description",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "contentMediaType",
        "contentEncoding",
        "contentSchema",
        "discriminator",
        "nullable",
        "xml",
        "externalDocs",
    )
)
_ONE = ("additionalProperties", "additionalItems")  # a schema
_MANY = ("anyOf", "allOf", "oneOf", "prefixItems")  # schemas in a list
_NAMED = ("properties", "patternProperties", "$defs", "definitions")  # schemas by name
_PLAIN = frozenset(
    (
        "type",
        "enum",
        "const",
        "required",
        "format",
        "pattern",
        "$ref",
        "$id",
        "id",
        "$anchor",
        "$schema",
    )
)
_NUMBERS = frozenset(
    (
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
    )
)
_COUNTS = {
    "minLength": limits.MAX_MIN_LENGTH,
    "minItems": limits.MAX_MIN_ITEMS,
    "minProperties": limits.MAX_PROPERTIES,
    "maxLength": None,
    "maxItems": None,
    "maxProperties": None,
}
_TYPES = ("string", "number", "integer", "boolean", "null", "object", "array")
FORMATS = frozenset(
    (
        "date-time",
        "time",
        "date",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uri",
        "uuid",
    )
)
_EMPTY = {"uniqueItems": False, "minContains": None}  # a value that asks for nothing


def checked_schema(text: str) -> dict[str, Any]:
    """The schema without its annotations, ready for the compiler. InvalidRequest names keyword and place."""
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise _refuse("$", f"it is nested deeper than {limits.MAX_DEPTH} levels") from None
    except ValueError as error:
        raise _refuse("$", f"it is no valid JSON: {error}") from None
    if schema is False:
        raise _refuse("$", "false allows no answer")
    walk = _Walk()
    result = {} if schema is True else walk.schema(schema, "$", 0)
    if "$schema" in result:
        result["$schema"] = schema["$schema"]
    return result | {"x-guidance": {"whitespace_pattern": WHITESPACE}}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _refuse(where: str, what: str) -> InvalidRequest:
    shown = where if len(where) <= 120 else where[:117] + "..."
    return InvalidRequest(f"json_schema: at {shown}: {what}", param="structured")


@dataclass(slots=True)
class _Walk:
    """One pass over a schema; counts what it has seen."""

    nodes: int = 0
    values: int = 0  # of enums

    def schema(self, schema: Any, where: str, depth: int) -> Any:
        self.nodes += 1
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise _refuse(where, "a schema must be an object or a boolean")
        if depth > limits.MAX_DEPTH:
            raise _refuse(where, f"it is nested deeper than {limits.MAX_DEPTH} levels")
        if self.nodes > limits.MAX_NODES:
            raise _refuse(where, f"it holds more than {limits.MAX_NODES} schemas")
        result = {}
        for name, value in schema.items():
            if name in _ANNOTATIONS or name.startswith("x-"):
                continue
            result[name] = self.keyword(name, value, f"{where}.{name}", depth + 1)
        if stricter := _STRICTER.get(result.get("format", "")):
            result["allOf"] = [*result.get("allOf", []), *({"pattern": pattern} for pattern in stricter)]
        return {name: value for name, value in result.items() if name not in _EMPTY}

    def keyword(self, name: str, value: Any, where: str, depth: int) -> Any:
        if name in _ONE or (name == "items" and not isinstance(value, list)):
            return self.schema(value, where, depth)
        if name in _MANY or name == "items":
            return self.schemas(value, where, depth)
        if name in _NAMED:
            return self.named(name, value, where, depth)
        if name in _COUNTS:
            return _count(name, value, where)
        if name in _NUMBERS:
            return _number(name, value, where)
        if name in _PLAIN:
            return self.plain(name, value, where)
        if name in _EMPTY and value == _EMPTY[name]:
            return value
        raise _refuse(where, f"the keyword {name[:80]!r} can't be enforced; leave it out and check the answer yourself")

    def schemas(self, value: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(value, list) or (not value and not where.endswith("tems")):
            raise _refuse(where, "must be a list of schemas")
        return [self.schema(one, f"{where}[{i}]", depth) for i, one in enumerate(value)]

    def named(self, name: str, value: Any, where: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise _refuse(where, "must be an object of schemas")
        if name in ("properties", "patternProperties") and len(value) > limits.MAX_PROPERTIES:
            raise _refuse(where, f"{len(value)} entries; at most {limits.MAX_PROPERTIES} are taken")
        if name == "patternProperties":
            for pattern in value:
                check_regex(pattern, f"json_schema: at {where}")
            value = {ascii_classes(pattern): one for pattern, one in value.items()}
        return {key: self.schema(one, f"{where}.{key}", depth) for key, one in value.items()}

    def plain(self, name: str, value: Any, where: str) -> Any:
        if name == "enum":
            if not isinstance(value, list) or not value:
                raise _refuse(where, "must be a list with at least one value")
            self.values += len(value)
            if self.values > limits.MAX_ENUM:
                raise _refuse(where, f"more than {limits.MAX_ENUM} enum values in all")
        elif name == "type":
            _type(value, where)
        elif name == "required":
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                raise _refuse(where, "must be a list of property names")
            if len(value) > limits.MAX_PROPERTIES:
                raise _refuse(where, f"{len(value)} names; at most {limits.MAX_PROPERTIES} are taken")
        elif name != "const" and not isinstance(value, str):
            raise _refuse(where, "must be a string")
        elif name == "pattern":
            check_regex(value, f"json_schema: at {where}")
            return ascii_classes(value)
        elif name == "format" and value not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            raise _refuse(where, f"the format {value[:40]!r} can't be enforced; these can: {known}")
        return value


def _type(value: Any, where: str) -> None:
    for one in value if isinstance(value, list) and value else [value]:
        if not isinstance(one, str) or one not in _TYPES:
            raise _refuse(where, f"{str(one)[:40]!r} is none of {', '.join(_TYPES)}")


def _count(name: str, value: Any, where: str) -> int:
    whole = isinstance(value, int | float) and not isinstance(value, bool) and value == int(value) and value >= 0
    if not whole:
        raise _refuse(where, f"{name} must be an integer of at least 0")
    limit = _COUNTS[name]
    if limit is not None and value > limit:
        raise _refuse(where, f"{name} {value} is more than {limit}, the most that is taken")
    return min(int(value), 2**31 - 1)


def _number(name: str, value: Any, where: str) -> int | float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e308:
        raise _refuse(where, f"{name} must be a finite number")
    if name == "multipleOf" and value <= 0:
        raise _refuse(where, "multipleOf must be above 0")
    return value
