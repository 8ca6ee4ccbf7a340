"""Calls under their constraint: tokens drawn at random from the masks, read back by the same dialect's parser.

Whatever is drawn, a call that has begun ends as one whose arguments `jsonschema` accepts. Markers are control tokens in
one half of the cases, text in the other, as vocabularies have it.
"""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import numpy as np
import pytest

from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.translate import translate
from septet.grammar.trial import _tried
from septet.grammar.vocabulary import Vocabulary
from septet.text.parsers.constraint import constraint
from septet.text.parsers.dialects import DIALECTS, Dialect
from septet.text.parsers.events import CallArguments, CallEnd, CallStart, Content
from septet.text.parsers.machine import OutputParser
from septet.text.parsers.tools import Tool, ToolChoice

EOS = 256
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "exact": {"type": "boolean"},
        "places": {
            "type": "array",
            "items": {"type": "object", "properties": {"x": {"type": "number"}}},
            "maxItems": 2,
        },
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS = (Tool("get_weather", "", SCHEMA), Tool("now", "", {}))
BOUND = [name for name, row in DIALECTS.items() if row.bound]


CLOSING = ("</parameter>", "\n</parameter>\n", "</arg_value>", "<escape>", '<|"|>')  # what ends a string's text


def vocabulary(markers: tuple[str, ...]) -> tuple[Vocabulary, dict[str, int]]:
    special = {marker: EOS + 1 + i for i, marker in enumerate(markers)}
    texts = [text.encode() for text in (*markers, *CLOSING)]
    return Vocabulary.of(
        [*(bytes([i]) for i in range(256)), b"<eos>", *texts], [EOS, *special.values()], [EOS]
    ), special


def drawn(dialect: Dialect, choice: ToolChoice, seed: int, special: bool, **how: Any) -> tuple[str, bool]:
    """An answer and whether it came to its end, from weights that like to close what is open and to begin calls."""
    from llguidance import LLMatcher

    quotes = ("<escape>",) if "gemma" in dialect.name else ()
    markers = tuple(sorted({*dialect.markers(), *quotes}, key=len, reverse=True)) if special else ()
    known, ids = vocabulary(markers)
    tokens = known.tokens()
    bound = constraint(dialect, choice, Tool.schema, **how)
    assert bound is not None
    matcher = LLMatcher(
        known.tokenizer(len(tokens))[0], translate(bound, ids), limits=limits.parser_limits(), log_level=0
    )
    assert not matcher.is_error(), matcher.get_error()
    marked = any(bound.form is not None and "marks" in bound.form for bound in dialect.bound)
    rng, out = np.random.default_rng(seed), b""
    plain = np.array([1.0 if len(t) > 1 or 0x20 <= t[0] < 0x7F else -9.0 for t in tokens])
    ended = False
    for step in range(600):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[: len(tokens)]
        assert mask.any(), f"nothing is allowed after {out!r}"
        weights = rng.gumbel(size=len(tokens)) + plain
        for byte in b'"}])<|[{/>':
            weights[byte] += step / 12
        weights[-len(CLOSING) :] += step / 5 if marked else -9.0
        weights[EOS] += step / 100
        token = int(np.argmax(np.where(mask == 1, weights, -np.inf)))
        assert matcher.consume_token(token), matcher.get_error()
        ended = token == EOS
        if ended:
            break
        out += tokens[token]
        if matcher.is_stopped():
            ended = True
            break
    return out.decode("utf-8", "replace"), ended


def read(dialect: Dialect, text: str) -> tuple[list[tuple[str, str]], str]:
    """Whole calls, and what is told as content."""
    parser = OutputParser(dialect, None, TOOLS, thinking=False)
    found: list[tuple[str, str]] = []
    name = arguments = content = ""
    for event in (*parser.push(text), *parser.finish()):
        if isinstance(event, CallStart):
            name, arguments = event.name, ""
        elif isinstance(event, CallArguments):
            arguments += event.text
        elif isinstance(event, CallEnd):
            found.append((name, arguments))
        elif isinstance(event, Content):
            content += event.text
    return found, content


@pytest.mark.parametrize("special", [True, False], ids=["control", "text"])
@pytest.mark.parametrize("name", BOUND)
def test_forced_calls_parse_and_validate(name: str, special: bool) -> None:
    dialect, seen = DIALECTS[name], 0
    for seed in range(6):
        choice = ToolChoice(TOOLS, *(("named", "get_weather") if seed % 2 else ("required",)))
        text, ended = drawn(dialect, choice, seed, special)
        made, content = read(dialect, text)
        assert not content.strip() or not ended, f"text beside calls: {text!r}"
        if not made:
            continue  # cut within its first call
        seen += 1
        for function, arguments in made:
            schema = SCHEMA if function == "get_weather" else {"type": "object"}
            assert function in ("get_weather", "now"), text
            jsonschema.validate(json.loads(arguments), schema)
        if seed % 2:
            assert [function for function, _ in made] == ["get_weather"], text
    assert seen >= 3, "too few calls came to their end for this to say something"


def test_a_schema_that_cant_be_enforced_leaves_any_object_unless_strict() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    known, ids = vocabulary(())
    tokenizer = known.tokenizer(EOS + 1 + len(CLOSING))[0]
    for name in ("hermes", "qwen3_coder", "pythonic"):
        for strict in (False, True):
            bound = constraint(DIALECTS[name], ToolChoice((Tool("f", "", odd, strict),)), Tool.schema)
            assert bound is not None
            if strict:
                with pytest.raises(InvalidRequest, match="uniqueItems"):
                    _tried(bound, tokenizer, ids)
            else:
                assert "uniqueItems" not in _tried(bound, tokenizer, ids)


def test_what_only_the_compiler_refuses_falls_back_too() -> None:
    """Two alternatives of a oneOf that may both hold: known when it is compiled."""
    odd = {"type": "object", "properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}
    known, ids = vocabulary(())
    tokenizer = known.tokenizer(EOS + 1 + len(CLOSING))[0]
    tools = (Tool("f", "", odd), Tool("g", "", SCHEMA))
    bound = constraint(DIALECTS["hermes"], ToolChoice(tools), Tool.schema)
    assert bound is not None
    assert "oneOf" not in _tried(bound, tokenizer, ids)
    strict = constraint(DIALECTS["hermes"], ToolChoice((Tool("f", "", odd, True),)), Tool.schema)
    assert strict is not None
    with pytest.raises(InvalidRequest, match="oneOf"):
        _tried(strict, tokenizer, ids)


def test_a_forced_call_may_come_after_thoughts_that_nobody_opened() -> None:
    from llguidance import LLMatcher

    known, ids = vocabulary(("<think>", "</think>"))
    bound = constraint(
        DIALECTS["hermes"], ToolChoice(TOOLS, "required"), Tool.schema, after="</think>", opening="<think>"
    )
    assert bound is not None
    call = b'<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for text, taken in (
        ([*call], True),
        ([ids["<think>"], *b"hm, <tool_call>?", ids["</think>"], *b"\n\n", *call], True),
        ([ids["<think>"], *b"hm", ids["</think>"], *b"no"], False),
        ([*b"hm"], False),
    ):
        matcher = LLMatcher(known.tokenizer(300)[0], translate(bound, ids), log_level=0)
        assert matcher.consume_tokens(text) == taken, text
        if taken:
            assert matcher.is_accepting()


@pytest.mark.parametrize("special", [True, False], ids=["control", "text"])
@pytest.mark.parametrize("name", BOUND)
def test_after_a_forced_call_comes_another_or_the_end(name: str, special: bool) -> None:
    from llguidance import LLMatcher

    dialect = DIALECTS[name]
    known, ids = vocabulary(dialect.markers() if special else ())
    tokenizer = known.tokenizer(len(known.tokens()))[0]
    required = ToolChoice(TOOLS, "required")

    def tokens(text: str) -> list[int]:
        for marker in sorted(ids, key=len, reverse=True):
            if marker in text:
                before, _, rest = text.partition(marker)
                return [*tokens(before), ids[marker], *tokens(rest)]
        return [*text.encode()]

    def taken(text: str) -> bool:
        bound = constraint(dialect, required, Tool.schema, thoughts=("<think>",))
        assert bound is not None
        matcher = LLMatcher(tokenizer, translate(bound, ids), log_level=0)
        return bool(matcher.consume_tokens(tokens(text))) and bool(matcher.is_accepting())

    way = dialect.bound[-1]
    one = dialect.around[0] + (way.listed[0] if way.listed else "") + way.begin.format(name="now")
    one += ("" if way.form is not None else "{}") + way.end + (way.listed[2] if way.listed else "")
    assert taken(one), one
    assert not taken(one + "\nThe result is 4.")
    assert not taken(one + "<tool_response>")
    if not dialect.harmony:  # whose call is the end
        assert taken(one + "\n")
        two = one + (dialect.between or "\n") + one
        assert taken(two), two
        assert [function for function, _ in read(dialect, two)[0]] == ["now", "now"], two
