"""The bytes of every token as a message: what a grammar must know of a tokenizer, and nothing else.

Made by the session from its tokenizer, sent once to the engine before the first constrained request, and from there to
the trial process. Two byte strings rather than a list, so that a quarter of a million tokens travel in an instant.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from llguidance import LLTokenizer

__all__ = ["Vocabulary"]


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """`blob` holds the tokens' bytes one after the other, `lengths` the length of each as a native int32."""

    blob: bytes
    lengths: bytes
    special: tuple[int, ...]  # control tokens: never text, so no grammar allows them but by name
    eos: tuple[int, ...]

    @classmethod
    def of(cls, tokens: Iterable[bytes], special: Iterable[int], eos: Iterable[int]) -> Vocabulary:
        """`tokens[i]` is what token i stands for; empty: never allowed."""
        parts = list(tokens)
        lengths = array("i", map(len, parts))
        return cls(b"".join(parts), lengths.tobytes(), tuple(sorted(special)), tuple(eos))

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

    def tokenizer(self, vocab_size: int) -> LLTokenizer:
        """The library's trie over all tokens, padded to the model's vocabulary. Seconds of work for large ones."""
        from llguidance import LLTokenizer

        tokens = self.tokens()[:vocab_size]
        tokens += [b""] * (vocab_size - len(tokens))
        source: Any = _Source(tokens, [i for i in self.special if i < vocab_size], self.eos[0])
        return LLTokenizer(source, eos_token=list(self.eos), slices=LLTokenizer.json_slices())


class _Source:
    """What the library asks of a tokenizer. It would encode text for forced tokens only, which are not used."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], eos: int) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("the grammar room has tokens' bytes, not a tokenizer")
