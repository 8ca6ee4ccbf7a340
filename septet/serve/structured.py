"""The fields that bind an answer to a grammar: OpenAI's `response_format`, vLLM's `structured_outputs` and `guided_*`.

Called by `calls.py`. Turns whichever is given into one `Structured`; more than one is an error, and so is a part that
nobody knows. What the schema or grammar itself says is judged by the engine.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.serve.fields import Fields

__all__ = ["STRUCTURED_FIELDS", "structured_of"]

STRUCTURED_FIELDS = "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar"


def structured_of(fields: Fields) -> Structured | None:
    """What the answer is bound to, if anything. InvalidRequest names the field."""
    found: dict[str, Structured] = {}
    for name in STRUCTURED_FIELDS.split():
        if fields.given(name):
            try:
                value = _READERS[name](fields.raw(name))
            except InvalidRequest as error:
                message = error.message.replace("structured:", f"{name}:", 1)
                raise InvalidRequest(message if name in message else f"{name} {message}", param=name) from None
            if value is not None:
                found[name] = value
    if len(found) > 1:
        raise InvalidRequest(f"{' and '.join(found)} can't both bind the answer; give one", param=list(found)[1])
    return next((replace(value, source=name) for name, value in found.items()), None)


def _response_format(value: Any) -> Structured | None:
    kind = value.get("type") if isinstance(value, dict) else None
    match kind:
        case "text":
            return None
        case "json_object":
            return Structured.json_object()
        case "json_schema":
            return _named_schema(value.get("json_schema"))
        case "structural_tag":
            return Structured.structural_tag({name: part for name, part in value.items() if name != "type"})
    raise InvalidRequest("response_format.type must be one of text, json_object, json_schema, structural_tag")


def _named_schema(value: Any) -> Structured:
    if not isinstance(value, dict) or not isinstance(value.get("schema"), dict | bool):
        raise InvalidRequest("response_format.json_schema must be an object with a schema")
    for name in value:
        if name not in ("name", "schema", "strict", "description"):
            raise InvalidRequest(f"unknown field 'response_format.json_schema.{name[:80]}'")
    return Structured.json_schema(value["schema"])  # strict or not: it is always kept


def _json(value: Any) -> Structured:
    if not isinstance(value, dict | bool | str):
        raise InvalidRequest("must be a JSON schema, as an object or as text")
    return Structured.json_schema(value)


def _structured_outputs(value: Any) -> Structured | None:
    if not isinstance(value, dict):
        raise InvalidRequest("structured_outputs must be an object")
    given = {name: part for name, part in value.items() if part is not None and part is not False}
    found = [name for name in given if name in _OUTPUTS]
    for name in given:
        if name not in _OUTPUTS:
            raise InvalidRequest(f"structured_outputs.{name[:80]} is not supported")
    if len(found) != 1:
        raise InvalidRequest(f"structured_outputs must hold exactly one of {', '.join(_OUTPUTS)}")
    return _OUTPUTS[found[0]](given[found[0]])


_OUTPUTS: dict[str, Callable[[Any], Structured]] = {
    "json": _json,
    "regex": Structured.regex,
    "choice": Structured.choice,
    "grammar": Structured.grammar,
    "json_object": lambda _: Structured.json_object(),
    "structural_tag": Structured.structural_tag,
}
_READERS: dict[str, Callable[[Any], Structured | None]] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": Structured.regex,
    "guided_choice": Structured.choice,
    "guided_grammar": Structured.grammar,
}
