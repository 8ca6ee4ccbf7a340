"""Several hundred schemas, each answered by tokens drawn at random from the masks: every answer must validate.

The oracle is `jsonschema`, formats included. No model: a token's weight is random, closing ones win more often the
longer an answer grows, so that answers end.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest

from septet.grammar import limits
from septet.grammar.translate import translate
from septet.grammar.vocabulary import Vocabulary
from septet.structured import Structured
from tests import schemas

if TYPE_CHECKING:
    from llguidance import LLTokenizer

N_SCHEMAS = 400
MAX_TOKENS = 500
EOS = 0
PIECES = ['{"', '":', '", "', '"}', "[]", "{}", "null", "true", "false", "  ", "\n", "12", "-0.", "ab", "é", "日", "🙂"]
PIECES += ['"\\']


def vocabulary() -> Vocabulary:
    """An end token, every byte, and some longer pieces."""
    pieces = [piece.encode() for piece in PIECES]
    return Vocabulary.of([b"<eos>", *(bytes([i]) for i in range(256)), *pieces, b"<tool>"], [EOS, 275], [EOS])


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return vocabulary().tokenizer(vocab_size=300)[0]


def answer(structured: Structured, tokenizer: LLTokenizer, seed: int) -> str | None:
    """What random weights say under the masks; None if it does not end within MAX_TOKENS."""
    from llguidance import LLMatcher

    tokens = vocabulary().tokens()
    matcher = LLMatcher(tokenizer, translate(structured, {}), limits=limits.parser_limits(), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    rng = np.random.default_rng(seed)
    closing = np.array([1.0 if piece and chr(piece[0]) in '"}],:' else 0.0 for piece in tokens])
    out = b""
    for step in range(MAX_TOKENS):
        mask = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")[: len(tokens)]
        assert mask.any(), f"nothing is allowed after {out!r}"
        weights = rng.gumbel(size=len(tokens)) + closing * step / 12
        weights[EOS] += 3
        token = int(np.argmax(np.where(mask == 1, weights, -np.inf)))
        assert matcher.consume_token(token), matcher.get_error()
        if token != EOS:
            out += tokens[token]
        if matcher.is_stopped():
            return out.decode()
    return None


def validate(text: str, schema: Any) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))


@pytest.mark.parametrize("block", range(8))
def test_answers_validate(block: int, tokenizer: LLTokenizer) -> None:
    ended = 0
    for seed in range(block, N_SCHEMAS, 8):
        schema = schemas.schema(seed)
        try:
            text = answer(Structured.json_schema(schema), tokenizer, seed)
        except AssertionError as error:
            if "oneOf" in str(error) or "nsatisfiable" in str(error):
                continue  # refused by name, or nothing to say: no answer is no wrong answer
            raise AssertionError(f"seed {seed}: {json.dumps(schema)}") from error
        if text is not None:
            ended += 1
            try:
                validate(text, schema)
            except (jsonschema.ValidationError, ValueError) as error:
                raise AssertionError(f"seed {seed}: {json.dumps(schema)} got {text!r}") from error
    assert ended >= 35, f"only {ended} of 50 answers ended: the test shows little"
