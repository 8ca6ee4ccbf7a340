"""Ids to text while they arrive: `Detokenizer.push(ids)` gives what is certain, `finish()` the rest.

Called by the session, one per sequence. Text that was given out never changes and never ends within a character:
bytes of an unfinished UTF-8 sequence (at most three) wait for the rest. Time is linear in the bytes of all ids.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.text.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """All pushes and `finish`, joined, are what `Tokenizer.decode` says of all ids at once, however they are cut.

    `at_start=False`, the default, is for ids that continue a prompt: a leading space is text then. With True the ids
    are a whole text, and the space that SentencePiece vocabularies put in front is taken off as `decode` does.
    `keep`: special tokens that are text all the same (markers that a parser of the output reads).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        *,
        at_start: bool = False,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids - keep if skip_special_tokens else frozenset[int]()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = at_start and tokenizer.strip_space

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` make certain, possibly none.

        Ids past the vocabulary (rows that pad an embedding) have no text; InvalidRequest for a negative one.
        """
        return self._text(b"".join(map(self._bytes, ids)), final=False)

    def finish(self) -> str:
        """What still waited: U+FFFD for a character that never ended. The object is then at its start again."""
        return self._text(b"", final=True)

    def _bytes(self, token: int) -> bytes:
        if token in self._skipped or token >= self._tokenizer.vocab_size:
            return b""
        if token < 0:
            raise InvalidRequest(f"token id {token} is negative")
        return self._tokenizer.token_bytes(token)

    def _text(self, data: bytes, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if self._strip and text:
            self._strip = False
            return text[1:] if text.startswith(" ") else text
        return text
