"""Hostile and wrong grammars: each is refused by name, in bounded time, and the next one compiles as if nothing was."""

from __future__ import annotations

import json
import queue
import time
from typing import TYPE_CHECKING, Any

import pytest

from septet.engine.grammars import GrammarReady, Grammars
from septet.errors import InvalidRequest, Overloaded
from septet.grammar import limits
from septet.grammar.compiler import Compiler
from septet.grammar.regex import ascii_classes, regex_size
from septet.grammar.schema import checked_schema
from septet.grammar.translate import translate
from septet.grammar.vocabulary import Vocabulary
from septet.request import Request, SamplingParams
from septet.structured import Structured

if TYPE_CHECKING:
    from collections.abc import Iterator

TOKENS = [b"<eos>", *(bytes([i]) for i in range(256)), b"<tool>"]
GOOD = Structured.json_schema({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})


def deep(n: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED_SCHEMAS = [
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"not": {"type": "string"}}, "not"),
    ({"if": {"type": "string"}, "then": {"minLength": 3}}, "if"),
    ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
    ({"propertyNames": {"maxLength": 2}}, "propertyNames"),
    ({"contains": {"type": "string"}}, "contains"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"$dynamicRef": "#a"}, "$dynamicRef"),
    ({"type": "string", "minLenght": 3}, "minLenght"),
    ({"type": "string", "format": "idn-email"}, "idn-email"),
    ({"type": "wurst"}, "wurst"),
    ({"type": "integer", "exclusiveMinimum": True}, "exclusiveMinimum"),
    ({"type": "string", "minLength": 10**9}, "minLength"),
    ({"type": "array", "minItems": 10**9}, "minItems"),
    ({"type": "string", "pattern": "(a{1000}){1000}"}, "pattern"),
    ({"properties": {f"p{i}": {} for i in range(10_000)}}, "10000 entries"),
    ({"enum": list(range(10_000))}, "enum"),
    ({"properties": {"x": {"items": {"anyOf": []}}}}, "$.properties.x.items.anyOf"),
    (deep(70), "nested"),
    (False, "false"),
]


@pytest.mark.parametrize(("schema", "named"), REFUSED_SCHEMAS, ids=[named for _, named in REFUSED_SCHEMAS])
def test_what_can_not_be_enforced_is_named(schema: Any, named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        checked_schema(json.dumps(schema))
    assert named in caught.value.message


def test_annotations_are_left_out_and_properties_of_their_names_stay() -> None:
    schema = {"title": "T", "type": "object", "x-guidance": {"lenient": True}, "properties": {"title": {"default": 1}}}
    checked = checked_schema(json.dumps(schema))
    assert checked.pop("x-guidance").keys() == {"whitespace_pattern"}
    assert checked == {"type": "object", "properties": {"title": {}}}


def test_brackets_and_no_json() -> None:
    for text in ("[" * 100_000, "{", '{"type": NaN}', "3"):
        with pytest.raises(InvalidRequest):
            checked_schema(text)


def test_regex_sizes() -> None:
    assert regex_size("abc") == 3
    assert regex_size("(ab){3}[c-e]{2,5}") == 11
    assert regex_size(r"\(\{3}a") == 5  # an escaped brace opens nothing
    assert regex_size("(a{100}){100}") == 10_000
    assert regex_size("(" * 100 + ")" * 100) is None
    assert ascii_classes(r"\d[\w-]\\d\D") == r"[0-9][0-9A-Za-z_-]\\d\D"


def test_structured_checks_its_shape() -> None:
    for make in (
        lambda: Structured("xml", "a"),
        lambda: Structured("regex", ""),
        lambda: Structured("json_object", "{}"),
        lambda: Structured("regex", "a" * (1 << 19)),
        lambda: Structured("regex", "\ud800"),
        lambda: Structured.choice([]),
        lambda: Structured.choice("yes"),
        lambda: Structured.choice([1]),
        lambda: Structured.of(3),
        lambda: Structured.json_schema({"a": {1, 2}}),
        lambda: Structured("regex", "a", ""),
    ):
        with pytest.raises(InvalidRequest) as caught:
            make()
        assert caught.value.param == "structured"


class Model:
    """As pydantic's classes look from outside."""

    @staticmethod
    def model_json_schema() -> dict[str, Any]:
        return {"type": "integer"}


def test_python_values() -> None:
    assert (
        Structured.of(Model) == Structured("json_schema", '{"type": "integer"}') == Structured.of({"type": "integer"})
    )


# -- the compiler -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    made = Compiler(Vocabulary.of(TOKENS, [0, 257], [0]), 300, deadline_s=3.0, max_lanes=3)
    yield made
    made.close()


def takes(compiler: Compiler, structured: Structured, text: bytes) -> bool:
    """Whether the grammar accepts `text` as a whole, byte by byte."""
    matcher = compiler.request(structured).result(60).matcher()
    return matcher.consume_tokens([byte + 1 for byte in text]) and (matcher.is_accepting() or matcher.is_stopped())


@pytest.mark.parametrize(
    ("structured", "good", "bad"),
    [
        (GOOD, b'{"a": 1}', b'{"a": "1"}'),
        (Structured.json_object(), b'{"x":[1,{}]}', b"[1]"),
        (Structured.choice(["yes", "no", 'q"\n']), b'q"\n', b"maybe"),
        (Structured.regex(r"^[a-c]/\d{2}$"), b"b/07", b"b/7x"),
        (Structured.grammar('root ::= "a" ("b" | "c")+'), b"abcb", b"a"),
        (Structured.grammar('start: "a" NUMBER\nNUMBER: /[0-9]+/'), b"a12", b"a"),
        (Structured.choice(["x"], after="END"), b"free E text ENDx", b"ENDy"),
    ],
    ids=lambda value: value.kind + "-after" * bool(value.after) if isinstance(value, Structured) else "",
)
def test_each_kind(compiler: Compiler, structured: Structured, good: bytes, bad: bytes) -> None:
    assert takes(compiler, structured, good)
    assert not takes(compiler, structured, bad)


def test_structural_tags(compiler: Compiler) -> None:
    value = {
        "structures": [
            {"begin": "<f>", "schema": {"type": "integer"}, "end": "</f>"},
            {"begin": "<g>", "grammar": 'start: "x"'},
        ],
        "triggers": ["<"],
    }
    free = Structured.structural_tag(value)
    assert takes(compiler, free, b"some text <f>12</f> more <g>x end")
    assert takes(compiler, free, b"no island")
    assert not takes(compiler, free, b"text <f>x")
    forced = Structured.structural_tag({**value, "at_least_one": True, "stop_after_first": True})
    assert takes(compiler, forced, b"<f>12</f>")
    assert not takes(compiler, forced, b"text")
    matcher = compiler.request(forced).result(60).matcher()
    assert matcher.consume_tokens([byte + 1 for byte in b"<f>12</f>"])
    assert matcher.is_stopped()


def test_a_special_token_is_written_as_itself(compiler: Compiler) -> None:
    value = {"structures": [{"begin": "<tool>", "schema": {"type": "null"}, "end": ""}], "triggers": ["<tool>"]}
    matcher = compiler.request(Structured.structural_tag(value)).result(60).matcher()
    assert matcher.consume_tokens([*(byte + 1 for byte in b"hm "), 257, *(byte + 1 for byte in b"null")])
    other = compiler.request(Structured.structural_tag(value)).result(60).matcher()
    assert not other.consume_tokens([257, *(byte + 1 for byte in b"true")])


HOSTILE = {
    "intersections": Structured.json_schema({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(14)]}),
    "self": Structured.json_schema({"$ref": "#"}),
    "cycle": Structured.json_schema(
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
    ),
    "elsewhere": Structured.json_schema({"$ref": "http://127.0.0.1:1/x"}),
    "overlap": Structured.json_schema({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}),
    "bad pattern": Structured.json_schema({"type": "string", "pattern": "("}),
    "lookahead": Structured.regex("(?=a)b"),
    "backreference": Structured.regex(r"(a)\1"),
    "parentheses": Structured.regex("(" * 4000 + ")" * 4000),
    "brackets": Structured.grammar("start: " + "(" * 30_000),
    "endless": Structured.grammar("start: start"),
    "unclosed": Structured.grammar('start: "abc'),
    "no rule": Structured.grammar("root ::= missing"),
    "options": Structured.grammar('%llguidance {}\nstart: "a"'),
    "choice": Structured("choice", '{"a": 1}'),
    "tag": Structured.structural_tag({"structures": [{"begin": "<a>", "schema": {"not": {}}}], "triggers": ["<"]}),
    "trigger": Structured.structural_tag({"structures": [{"begin": "<a>", "schema": {}}], "triggers": ["!"]}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_end_alone(compiler: Compiler, name: str) -> None:
    began = time.monotonic()
    future = compiler.request(HOSTILE[name])
    with pytest.raises(InvalidRequest) as caught:
        future.result(60)
    assert time.monotonic() - began < 20
    assert caught.value.message.startswith(HOSTILE[name].kind + ":")
    assert takes(compiler, GOOD, b'{"a":1}')


def test_harmless_in_a_linear_engine(compiler: Compiler) -> None:
    assert takes(compiler, Structured.regex("((a*)*)*b"), b"aaaab")
    assert takes(compiler, Structured.json_schema({"type": "string", "maxLength": 10**9}), b'"x"')


def test_the_cache_is_bounded_and_shares(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CACHE_ENTRIES", 8)
    assert compiler.request(GOOD) is compiler.request(GOOD)
    for i in range(40):
        compiler.request(Structured.choice([f"option {i}"])).result(60)
    assert len(compiler) <= 8
    assert takes(compiler, GOOD, b'{"a":1}')


def test_a_flood_of_grammars_waits_within_bounds(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unique ones without end: so many wait, the next is told to come later, and nothing of those that left is kept."""
    monkeypatch.setattr(limits, "CACHE_ENTRIES", 4)
    grammars, told = Grammars(300, max_waiting=6), queue.SimpleQueue[GrammarReady]()
    grammars._compiler, grammars.notify = compiler, told.put

    def ask(i: int) -> None:
        bound = Structured.choice([f"flood {i}"]) if i % 5 else Structured.regex(f"(flood {i}")
        grammars.wait(Request(id=str(i), tokens=(1,), params=SamplingParams(structured=bound)))

    for i in range(6):
        ask(i)
    with pytest.raises(Overloaded):
        ask(6)
    assert grammars.leave("1")
    ask(7)
    refused = 0
    for _ in range(7):  # six that wait and one that has left
        ready = told.get(timeout=60).request
        try:
            entered = grammars.ready(ready)
            assert (entered is None) == (ready == "1")
        except InvalidRequest:
            refused += 1
        grammars.release(ready)
    assert refused == 2
    assert (len(grammars), grammars.held, len(grammars._users)) == (0, 0, 0)
    ask(8)
    assert grammars.leave_all() == ["8"]
    assert len(grammars._users) == 0
    told.get(timeout=60)
    compiler.request(GOOD).result(60)
    assert len(compiler) <= 4 + limits.WORKERS


def test_many_answers_are_spread_over_lanes(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many lexers as answers at once, up to a limit; those that nobody uses go when there are too many in all."""
    users = 1
    wanted = Structured.choice(["of lanes"])
    grammar = compiler.request(wanted, lambda: users).result(60)
    assert len(grammar.lanes) == 1
    users = 2
    assert compiler.request(wanted, lambda: users).result(60) is grammar
    assert len(grammar.lanes) == 2
    users = 9
    compiler.request(wanted, lambda: users).result(60)
    assert len({lane.number for lane in grammar.lanes}) == 3
    entered = [grammar.enter() for _ in range(6)]
    assert [lane.users for lane in grammar.lanes] == [2, 2, 2]
    for lane in grammar.lanes:
        assert lane.matcher().consume_tokens([byte + 1 for byte in b"of lanes"])
    for lane in entered[1:]:
        grammar.leave(lane)
    monkeypatch.setattr(limits, "LANES", 1)
    compiler.request(Structured.choice(["another"]), lambda: 1).result(60)
    compiler.request(Structured.choice(["another"]), lambda: 9).result(60)
    assert grammar.lanes == [entered[0]]
    first = compiler.request(Structured.choice(["at once"]), lambda: 9).result(60)
    assert len(first.lanes) == 3


def test_translation_takes_no_options_from_a_schema() -> None:
    text = translate(Structured.json_schema({"x-guidance": {"lenient": True}, "type": "string"}), {})
    assert "lenient" not in text
