"""The bytes of every token as a message: what a grammar must know of a tokenizer, and nothing else.

Made by the session from its tokenizer, sent once to the engine before the first constrained request, and from there to
the trial process. Two byte strings rather than a list, so that a quarter of a million tokens travel in an instant.
"""

from __future__ import annotations

import logging
from array import array
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llguidance import LLTokenizer

__all__ = ["Vocabulary"]

MAX_KNOWN = 4096  # texts whose tokens are remembered

# Sets of tokens that a mask takes as a whole where the grammar allows all of them. Strings of bounded length have one
# for every few characters left: with JSON's usual three, a mask within such a string takes five times as long.
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'
SLICES = [
    r"[\x20\x0A\x0D\x09]+",
    *(f"{_CHARACTER}{{1,{n}}}" for n in (5, 8, 10, 12, 14, 20, 30)),
    f"{_CHARACTER}+",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`blob` holds the tokens' bytes one after the other, `lengths` the length of each as a native int32."""

    blob: bytes
    lengths: bytes
    special: tuple[int, ...]  # control tokens: never text, so no grammar allows them but by name
    eos: tuple[int, ...]
    encoder: str = ""  # how text becomes tokens, as the library reads it; empty: no text is ever forced

    @classmethod
    def of(cls, tokens: Iterable[bytes], special: Iterable[int], eos: Iterable[int], encoder: str = "") -> Vocabulary:
        """`tokens[i]` is what token i stands for; empty: never allowed. `encoder`: the JSON of a tokenizer (HF's)."""
        parts = list(tokens)
        lengths = array("i", map(len, parts))
        return cls(b"".join(parts), lengths.tobytes(), tuple(sorted(special)), tuple(eos), encoder)

    def __len__(self) -> int:
        return len(self.lengths) // 4

    def tokens(self) -> list[bytes]:
        result, at = [], 0
        lengths = array("i")
        lengths.frombytes(self.lengths)
        for n in lengths:
            result.append(self.blob[at : at + n])
            at += n
        return result

    def special_ids(self) -> dict[str, int]:
        """Control tokens by their text."""
        tokens = self.tokens()
        return {tokens[i].decode("utf-8", "replace"): i for i in self.special if tokens[i]}

    def without_encoder(self) -> Vocabulary:
        return replace(self, encoder="")

    def tokenizer(self, vocab_size: int) -> tuple[LLTokenizer, bool]:
        """(the library's trie over all tokens, padded to the model's vocabulary; whether it can split forced text as
        the model's tokenizer does). Seconds of work for large ones."""
        from llguidance import LLTokenizer

        tokens = self.tokens()[:vocab_size]
        tokens += [b""] * (vocab_size - len(tokens))
        encoder = _encoder(self.encoder) if self.encoder else None
        source: Any = _Source(tokens, [i for i in self.special if i < vocab_size], self.eos[0], encoder)
        return LLTokenizer(source, eos_token=list(self.eos), slices=SLICES), encoder is not None


def _encoder(text: str) -> LLTokenizer | None:
    """None for a kind of tokenizer that the library can't read."""
    from llguidance import LLTokenizer

    try:
        return LLTokenizer(text, slices=[])
    except ValueError as error:
        log.info("forced text will be sampled token by token: %s", error)
        return None


class _Source:
    """What the library asks of a tokenizer. Text is encoded for forced tokens only."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int, encoder: LLTokenizer | None) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos
        self._encoder = encoder
        self._known: dict[str, list[int]] = {}  # keys of objects and the like come again and again

    def __call__(self, text: str) -> list[int]:
        """Called by threads of the library, between which only the interpreter's lock stands: a race costs a second
        look-up."""
        known = self._known.get(text)
        if known is None:
            if self._encoder is None:
                raise RuntimeError("nothing is forced without an encoder")
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            known = self._known[text] = self._encode(self._encoder, text)
        return known

    def _encode(self, encoder: LLTokenizer, text: str) -> list[int]:
        """Where the encoder changes the text (a space put before it, say), the longest tokens in order do."""
        ids = encoder.tokenize_str(text)
        if all(i < len(self.tokens) for i in ids) and b"".join([self.tokens[i] for i in ids]) == text.encode():
            return ids
        return encoder.greedy_tokenize(text)
