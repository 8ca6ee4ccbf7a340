"""From a `Structured` to the text that llguidance compiles: a list of grammars, JSON schemas and Lark.

Called in the trial process (`trial.py`), so that a spec that takes for ever here is killed like one that takes for ever
in the compiler. Raises InvalidRequest naming the part. https://github.com/guidance-ai/llguidance (docs/syntax.md).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.forms import CallForm, lark_of_form
from septet.grammar.regex import ascii_classes, check_regex
from septet.grammar.schema import checked_schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from septet.structured import Structured

__all__ = ["forcing", "translate"]

Grammar = dict[str, Any]  # {"json_schema": ...} or {"lark_grammar": ...}
ANY_TEXT = r"/(.|\n)*/"
_STRUCTURE = frozenset(("begin", "schema", "grammar", "end", "fallback", "form", "calls", "separator", "one"))
ANY_OBJECT: Grammar = {"json_schema": {"type": "object"}}
NO_FORCING = '%llguidance {"no_forcing": true}\n'  # each token of a fixed text is the model's choice, not the library's
MAX_GRAMMAR_DEPTH = 256  # open brackets in an EBNF text


def translate(structured: Structured, special: Mapping[str, int], *, relaxed: bool = False) -> str:
    """The library's JSON for a constraint. `special`: ids of control tokens by their text. `relaxed`: structures with a
    `fallback` are any JSON object."""
    body, named = _body(structured, special, relaxed)
    start = "start: @body\n" if structured.after is None else _after(structured, structured.after, special)
    return json.dumps({"grammars": [{"lark_grammar": NO_FORCING + start}, {"name": "body", **body}, *named]})


def forcing(text: str) -> str:
    """What `translate` gave, with fixed text forced: split by the library into the tokens that the tokenizer gives."""
    value = json.loads(text)
    value["grammars"][0]["lark_grammar"] = value["grammars"][0]["lark_grammar"].removeprefix(NO_FORCING)
    return json.dumps(value)


def _body(structured: Structured, special: Mapping[str, int], relaxed: bool) -> tuple[Grammar, list[Grammar]]:
    spec = structured.spec
    match structured.kind:
        case "json_schema":
            return {"json_schema": checked_schema(spec)}, []
        case "json_object":
            return {"json_schema": checked_schema('{"type": "object"}')}, []
        case "regex":
            return {"lark_grammar": _regex(spec)}, []
        case "choice":
            return {"lark_grammar": _choice(spec)}, []
        case "grammar":
            return {"lark_grammar": _ebnf(spec)}, []
        case _:
            return _structural_tag(spec, special, relaxed)


def _refuse(what: str) -> InvalidRequest:
    return InvalidRequest(what, param="structured")


def _regex(pattern: str) -> str:
    """The whole answer matches anyway, so anchors at the ends say nothing new."""
    check_regex(pattern, "regex")
    inner = ascii_classes(pattern).removeprefix("^")
    if inner.endswith("$") and not inner.endswith("\\$"):
        inner = inner[:-1]
    # Lark's own quoting knows no newline and ends at a slash
    quoted = inner.replace("\\/", "/").replace("/", "\\/").replace("\n", "\\n").replace("\r", "\\r")
    return f"start: TEXT\nTEXT: /{quoted}/\n" if inner else 'start: ""\n'


def _choice(spec: str) -> str:
    options = _json("choice", spec)
    if not isinstance(options, list) or not options or not all(isinstance(o, str) and o for o in options):
        raise _refuse("choice: must be a list of non-empty strings")
    if len(options) > limits.MAX_ENUM:
        raise _refuse(f"choice: {len(options)} options; at most {limits.MAX_ENUM} are taken")
    return "start: CHOICE\nCHOICE: " + " | ".join(_text(option) for option in dict.fromkeys(options)) + "\n"


def _ebnf(text: str) -> str:
    depth = deepest = 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        deepest = max(deepest, depth)
    if deepest > MAX_GRAMMAR_DEPTH:
        raise _refuse(f"grammar: brackets nested deeper than {MAX_GRAMMAR_DEPTH}")
    if "%llguidance" in text:
        raise _refuse("grammar: the directive %llguidance is not taken")
    if "::=" not in text:
        return text
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return any_to_lark(text)
    except Exception as error:  # the converter raises whatever its parser meets
        raise _refuse(f"grammar: this GBNF can't be read: {str(error)[:300]}") from None


def _after(structured: Structured, text: str, special: Mapping[str, int]) -> str:
    """Free text up to and including `text`, then the grammar named body; bound at once where it has an opening that
    does not come."""
    written = _piece(text, special)
    lexeme = not written.startswith("<[")  # else a control token ends the text by itself
    free = "free" if lexeme else f"TEXT {written}"
    start = f"start: {free} @body\n"
    if structured.opening is not None:
        start = f"start: @body | {_piece(structured.opening, special)} {free} SPACE @body\nSPACE: /[ \\n]{{0,3}}/\n"
    return start + (f"free[lazy]: TEXT {written}\n" if lexeme else "") + f"TEXT: {ANY_TEXT}\n"


# -- structural tags --------------------------------------------------------------------------------------------------
def _structural_tag(spec: str, special: Mapping[str, int], relaxed: bool) -> tuple[Grammar, list[Grammar]]:
    """Free text; from a trigger on one of the structures that begin with it is binding, up to its end."""
    value = _json("structural_tag", spec)
    known = {"type", "structures", "triggers", "at_least_one", "stop_after_first", "no_text", "between", "marks"}
    if not isinstance(value, dict) or not {"structures", "triggers"} <= set(value):
        raise _refuse("structural_tag: must be an object with structures and triggers")
    for name in set(value) - known:
        raise _refuse(f"structural_tag: unknown field {name[:80]!r}")
    structures, triggers, marks = value["structures"], value["triggers"], value.get("marks", [""])
    for name, given in (("structures", structures), ("triggers", triggers), ("marks", marks)):
        if not isinstance(given, list) or not 0 < len(given) <= limits.MAX_STRUCTURES:
            raise _refuse(f"structural_tag: {name} must be a list of 1 to {limits.MAX_STRUCTURES}")
    if not all(isinstance(t, str) and t for t in triggers) or not all(isinstance(m, str) for m in marks):
        raise _refuse("structural_tag: triggers must be non-empty strings, marks strings")
    islands: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    named: list[Grammar] = []
    for i, structure in enumerate(structures):
        where = f"structural_tag: structures[{i}]"
        trigger, rest, body, end = _structure(structure, triggers, where, special, relaxed, named)
        islands[trigger].append(f"{_piece(rest, special)} {body} {_piece(end, special)}")
    at_least_one, only_one = (value.get(name) is True for name in ("at_least_one", "stop_after_first"))
    between = value.get("between", "") if value.get("no_text") is True else None
    if not isinstance(between, str | None):
        raise _refuse("structural_tag: between must be text")
    allowed = [special[mark] for mark in dict.fromkeys(marks) if mark in special and mark not in triggers]
    return {"lark_grammar": _islands(islands, special, allowed, at_least_one, only_one, between)}, named


def _structure(
    structure: Any, triggers: list[str], where: str, special: Mapping[str, int], relaxed: bool, named: list[Grammar]
) -> tuple[str, str, str, str]:
    """(its trigger, what of `begin` follows it, the rule of its inside, `end`); grammars of it go to `named`."""
    if not isinstance(structure, dict) or set(structure) - _STRUCTURE:
        raise _refuse(f"{where}: must be an object of begin, schema or grammar, and end")
    begin, end = structure.get("begin"), structure.get("end", "")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise _refuse(f"{where}: begin and end must be strings")
    trigger = next((t for t in sorted(triggers, key=len, reverse=True) if begin.startswith(t)), None)
    if trigger is None:
        raise _refuse(f"{where}: begin starts with none of the triggers")
    if sum(name in structure for name in ("schema", "grammar", "calls")) != 1:
        raise _refuse(f"{where}: give a schema or a grammar")
    if "calls" in structure:
        return trigger, begin[len(trigger) :], _calls(structure, where, special, relaxed, named), end
    if "schema" in structure:
        body = _named(named, _inner(structure, where, special, relaxed))
        return trigger, begin[len(trigger) :], body, end
    if not isinstance(structure["grammar"], str):
        raise _refuse(f"{where}: grammar must be text")
    return trigger, begin[len(trigger) :], _named(named, {"lark_grammar": _ebnf(structure["grammar"])}), end


def _named(named: list[Grammar], grammar: Grammar) -> str:
    named.append({"name": f"inner_{len(named)}", **grammar})
    return f"@inner_{len(named) - 1}"


def _calls(
    structure: dict[str, Any], where: str, special: Mapping[str, int], relaxed: bool, named: list[Grammar]
) -> str:
    """One or more of `calls`, each with a begin and an end of its own, and `separator` between two."""
    calls, separator = structure["calls"], structure.get("separator", "")
    if not isinstance(calls, list) or not 0 < len(calls) <= limits.MAX_STRUCTURES or not isinstance(separator, str):
        raise _refuse(f"{where}: calls must be a list of 1 to {limits.MAX_STRUCTURES}, separator a string")
    bodies = []
    for call in calls:
        if not isinstance(call, dict) or set(call) - _STRUCTURE or "schema" not in call:
            raise _refuse(f"{where}: each of calls must be an object of begin, schema and end")
        begin, end = call.get("begin"), call.get("end", "")
        if not isinstance(begin, str) or not isinstance(end, str):
            raise _refuse(f"{where}: begin and end of a call must be strings")
        inner = _named(named, _inner(call, where, special, relaxed))
        bodies.append(f"{_piece(begin, special)} {inner} {_piece(end, special)}")
    one = "(" + " | ".join(bodies) + ")"
    return one if structure.get("one") is True else f"{one} ({_piece(separator, special)} {one})*"


def _inner(structure: dict[str, Any], where: str, special: Mapping[str, int], relaxed: bool) -> Grammar:
    """A schema, as JSON or as its `form` writes it; with `fallback`, any object where it can't be enforced."""
    lenient = structure.get("fallback") is True
    form = CallForm.of(structure["form"]) if structure.get("form") is not None else None

    def piece(text: str) -> str:
        return _piece(text, special)

    if lenient and relaxed:
        return ANY_OBJECT if form is None else {"lark_grammar": lark_of_form(form, None, piece, lenient=True)}
    try:
        schema = checked_schema(json.dumps(structure["schema"]))
        if form is None:
            return {"json_schema": schema}
        return {"lark_grammar": lark_of_form(form, schema, piece, lenient=lenient)}
    except InvalidRequest as error:
        if lenient:
            return _inner(structure, where, special, True)
        raise _refuse(f"{where}: {error.message}") from None


def _islands(
    islands: dict[str, list[str]],
    special: Mapping[str, int],
    marks: list[int],
    at_least_one: bool,
    only_one: bool,
    between: str | None,
) -> str:
    """Lark: islands in free text. With `at_least_one` the first begins at once; with `only_one` it is the end; with
    `at_least_one` and `between` only more islands follow, this text before each. `marks`: control tokens that may stand
    in free text."""
    used = {trigger: bodies for trigger, bodies in islands.items() if bodies}
    later = "(" + " | ".join(f"later_{i}" for i in range(len(used))) + ")"
    first = "(" + " | ".join(f"first_{i}" for i in range(len(used))) + ")"
    if only_one:
        start = first if at_least_one else f"{later} | tail"
    elif at_least_one and between is not None:
        start = f"{first} (gap {_piece(between, special)} {first})* gap"
    else:
        start = f"{first} {later}* tail" if at_least_one else f"{later}* tail"
    free = "(TEXT mark)* " if marks else ""
    lines = [f"start: {start}", f"tail: {free}TEXT", f"TEXT: {ANY_TEXT}"]
    if at_least_one and between is not None:
        lines += ["gap: SPACE?" + (" (mark SPACE? (mark SPACE?)?)?" if marks else ""), "SPACE: /[ \\n]{1,3}/"]
    if marks:
        lines.append("mark: " + " | ".join(f"<[{mark}]>" for mark in marks))
    for i, (trigger, bodies) in enumerate(used.items()):
        lines.append(f"body_{i}: " + " | ".join(bodies))
        written = _piece(trigger, special)
        lines.append(f"first_{i}: {written} body_{i}")
        if written.startswith("<["):
            lines.append(f"later_{i}: {free}TEXT {written} body_{i}")
        else:
            lines += [f"trigger_{i}[lazy]: TEXT {written}", f"later_{i}: {free}trigger_{i} body_{i}"]
    return "\n".join(lines) + "\n"


def _piece(text: str, special: Mapping[str, int]) -> str:
    """Literal text as Lark, control tokens in it by their ids."""
    if not text:
        return ""
    for token in sorted(special, key=len, reverse=True):
        if token and token in text:
            before, _, rest = text.partition(token)
            return f"{_piece(before, special)} <[{special[token]}]> {_piece(rest, special)}".strip()
    return _text(text)


# -- words ------------------------------------------------------------------------------------------------------------
def _text(text: str) -> str:
    """A Lark string literal: JSON's quoting."""
    return json.dumps(text)


def _json(kind: str, spec: str) -> Any:
    try:
        return json.loads(spec)
    except (ValueError, RecursionError) as error:
        raise _refuse(f"{kind}: no valid JSON: {str(error)[:200]}") from None
