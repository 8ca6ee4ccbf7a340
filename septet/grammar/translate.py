"""From a `Structured` to the text that llguidance compiles: a list of grammars, JSON schemas and Lark.

Called in the trial process (`trial.py`), so that a spec that takes for ever here is killed like one that takes for ever
in the compiler. Raises InvalidRequest naming the part. https://github.com/guidance-ai/llguidance (docs/syntax.md).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.regex import ascii_classes, check_regex
from septet.grammar.schema import checked_schema

if TYPE_CHECKING:
    from collections.abc import Mapping

    from septet.structured import Structured

__all__ = ["forcing", "translate"]

Grammar = dict[str, Any]  # {"json_schema": ...} or {"lark_grammar": ...}
ANY_TEXT = r"/(.|\n)*/"
NO_FORCING = '%llguidance {"no_forcing": true}\n'  # each token of a fixed text is the model's choice, not the library's
MAX_GRAMMAR_DEPTH = 256  # open brackets in an EBNF text


def translate(structured: Structured, special: Mapping[str, int]) -> str:
    """The library's JSON for a constraint. `special`: ids of control tokens by their text."""
    body, named = _body(structured, special)
    start = "start: @body\n" if structured.after is None else _after(structured.after, special)
    return json.dumps({"grammars": [{"lark_grammar": NO_FORCING + start}, {"name": "body", **body}, *named]})


def forcing(text: str) -> str:
    """What `translate` gave, with fixed text forced: split by the library into the tokens that the tokenizer gives."""
    value = json.loads(text)
    value["grammars"][0]["lark_grammar"] = value["grammars"][0]["lark_grammar"].removeprefix(NO_FORCING)
    return json.dumps(value)


def _body(structured: Structured, special: Mapping[str, int]) -> tuple[Grammar, list[Grammar]]:
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
            return _structural_tag(spec, special)


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


def _after(text: str, special: Mapping[str, int]) -> str:
    """Free text up to and including `text`, then the grammar named body."""
    if text in special:
        return f"start: TEXT <[{special[text]}]> @body\nTEXT: {ANY_TEXT}\n"
    return f"start: free @body\nfree[lazy]: TEXT {_text(text)}\nTEXT: {ANY_TEXT}\n"


# -- structural tags --------------------------------------------------------------------------------------------------
def _structural_tag(spec: str, special: Mapping[str, int]) -> tuple[Grammar, list[Grammar]]:
    """Free text; from a trigger on one of the structures that begin with it is binding, up to its end."""
    value = _json("structural_tag", spec)
    known = {"type", "structures", "triggers", "at_least_one", "stop_after_first"}
    if not isinstance(value, dict) or not {"structures", "triggers"} <= set(value):
        raise _refuse("structural_tag: must be an object with structures and triggers")
    for name in set(value) - known:
        raise _refuse(f"structural_tag: unknown field {name[:80]!r}")
    structures, triggers = value["structures"], value["triggers"]
    for name, given in (("structures", structures), ("triggers", triggers)):
        if not isinstance(given, list) or not 0 < len(given) <= limits.MAX_STRUCTURES:
            raise _refuse(f"structural_tag: {name} must be a list of 1 to {limits.MAX_STRUCTURES}")
    if not all(isinstance(t, str) and t for t in triggers):
        raise _refuse("structural_tag: triggers must be non-empty strings")
    islands: dict[str, list[str]] = {trigger: [] for trigger in triggers}
    named = []
    for i, structure in enumerate(structures):
        trigger, rest, inner, end = _structure(structure, triggers, f"structural_tag: structures[{i}]")
        named.append({"name": f"inner_{i}", **inner})
        islands[trigger].append(f"{_piece(rest, special)} @inner_{i} {_piece(end, special)}")
    flags = [value.get(name) is True for name in ("at_least_one", "stop_after_first")]
    return {"lark_grammar": _islands(islands, special, *flags)}, named


def _structure(structure: Any, triggers: list[str], where: str) -> tuple[str, str, Grammar, str]:
    """(its trigger, what of `begin` follows it, the grammar, `end`)."""
    if not isinstance(structure, dict) or set(structure) - {"begin", "schema", "grammar", "end"}:
        raise _refuse(f"{where}: must be an object of begin, schema or grammar, and end")
    begin, end = structure.get("begin"), structure.get("end", "")
    if not isinstance(begin, str) or not isinstance(end, str):
        raise _refuse(f"{where}: begin and end must be strings")
    trigger = next((t for t in sorted(triggers, key=len, reverse=True) if begin.startswith(t)), None)
    if trigger is None:
        raise _refuse(f"{where}: begin starts with none of the triggers")
    if ("schema" in structure) == ("grammar" in structure):
        raise _refuse(f"{where}: give a schema or a grammar")
    if "schema" in structure:
        try:
            schema = checked_schema(json.dumps(structure["schema"]))
        except InvalidRequest as error:
            raise _refuse(f"{where}: {error.message}") from None
        return trigger, begin[len(trigger) :], {"json_schema": schema}, end
    if not isinstance(structure["grammar"], str):
        raise _refuse(f"{where}: grammar must be text")
    return trigger, begin[len(trigger) :], {"lark_grammar": _ebnf(structure["grammar"])}, end


def _islands(islands: dict[str, list[str]], special: Mapping[str, int], at_least_one: bool, only_one: bool) -> str:
    """Lark: islands in free text. With `at_least_one` the first begins at once; with `only_one` it is the end."""
    used = {trigger: bodies for trigger, bodies in islands.items() if bodies}
    later = "(" + " | ".join(f"later_{i}" for i in range(len(used))) + ")"
    first = "(" + " | ".join(f"first_{i}" for i in range(len(used))) + ")"
    if only_one:
        start = first if at_least_one else f"{later} | tail"
    else:
        start = f"{first} {later}* tail" if at_least_one else f"{later}* tail"
    lines = [f"start: {start}", "tail: TEXT", f"TEXT: {ANY_TEXT}"]
    for i, (trigger, bodies) in enumerate(used.items()):
        lines.append(f"body_{i}: " + " | ".join(bodies))
        lines.append(f"first_{i}: {_piece(trigger, special)} body_{i}")
        if trigger in special:
            lines.append(f"later_{i}: TEXT <[{special[trigger]}]> body_{i}")
        else:
            lines += [f"trigger_{i}[lazy]: TEXT {_text(trigger)}", f"later_{i}: trigger_{i} body_{i}"]
    return "\n".join(lines) + "\n"


def _piece(text: str, special: Mapping[str, int]) -> str:
    """Literal text as Lark, control tokens in it by their ids."""
    if not text:
        return ""
    for token in sorted(special, key=len, reverse=True):
        if token and token in text:
            before, _, rest = text.partition(token)
            return f"{_piece(before, special)} <[{special[token]}]> {_piece(rest, special)}"
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
