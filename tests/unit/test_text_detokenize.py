"""Text while it streams: any cutting of the ids gives what decoding them at once gives."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
import text_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.errors import InvalidRequest
from septet.text.detokenize import Detokenizer
from septet.text.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def tokenizers_(tmp_path_factory: pytest.TempPathFactory) -> list[Tokenizer]:
    home: Path = tmp_path_factory.mktemp("detokenize")
    files = [
        text_tiny.byte_level(home)[1],
        text_tiny.sentencepiece_gguf(home / "prefix.gguf", add_space_prefix=True),
        text_tiny.sentencepiece_gguf(home / "plain.gguf", add_space_prefix=False),
    ]
    return [load_tokenizer(file, home=home) for file in files]


@pytest.mark.parametrize("which", [0, 1, 2])
@settings(deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_cutting_is_decode_of_the_whole(
    tokenizers_: list[Tokenizer], which: int, data: st.DataObject, skip: bool
) -> None:
    tokenizer = tokenizers_[which]
    chunk = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=6)
    chunks = data.draw(st.lists(chunk, max_size=12))
    detokenizer = Detokenizer(tokenizer, skip, at_start=True)
    text = "".join(map(detokenizer.push, chunks)) + detokenizer.finish()
    assert text == tokenizer.decode([i for chunk in chunks for i in chunk], skip)


@pytest.mark.parametrize("which", [0, 1, 2])
@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_valid_text_never_shows_a_replacement_on_the_way(tokenizers_: list[Tokenizer], which: int, text: str) -> None:
    tokenizer = tokenizers_[which]
    text = text.replace("\ufffd", "").replace("\u2581", "")
    detokenizer = Detokenizer(tokenizer, at_start=True)
    shown = ""
    for i in tokenizer.encode(text, False, False):
        shown += detokenizer.push([i])
        assert text.startswith(shown)
    assert shown + detokenizer.finish() == text


def test_a_leading_space_is_text_when_ids_continue_a_prompt(tokenizers_: list[Tokenizer]) -> None:
    tokenizer = tokenizers_[1]
    ids = tokenizer.encode("the fox", False)
    assert tokenizer.decode(ids) == "the fox"
    assert Detokenizer(tokenizer).push(ids) == " the fox"
    assert Detokenizer(tokenizer, at_start=True).push(ids) == "the fox"


def test_an_unfinished_character_waits_and_ends_as_a_replacement(tokenizers_: list[Tokenizer]) -> None:
    tokenizer = tokenizers_[1]
    smile = [3 + byte for byte in "\U0001f600".encode()]
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in smile] == ["", "", "", "\U0001f600"]
    assert detokenizer.push(smile[:3]) == ""
    assert detokenizer.finish() == "\ufffd"


def test_ids_past_the_vocabulary_have_no_text_and_negative_ones_are_refused(tokenizers_: list[Tokenizer]) -> None:
    detokenizer = Detokenizer(tokenizers_[0])
    assert detokenizer.push([10**6]) == ""
    with pytest.raises(InvalidRequest):
        detokenizer.push([-1])


def test_time_is_linear(tokenizers_: list[Tokenizer]) -> None:
    detokenizer = Detokenizer(tokenizers_[0])
    ids = tokenizers_[0].encode("word " * 20_000)
    start = time.process_time()
    length = sum(len(detokenizer.push([i])) for i in ids)
    assert length == 100_000
    assert time.process_time() - start < 2.0
