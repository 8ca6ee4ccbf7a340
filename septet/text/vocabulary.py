"""What a tokenizer is made of: the value that `gguf_vocab` and `checkpoint_vocab` make and `tokenizer` reads.

Also the two spellings of bytes in a vocabulary: GPT-2's byte alphabet and SentencePiece's. Knows no file format.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

__all__ = ["SPACE", "Vocabulary", "byte_alphabet", "piece_bytes"]

SPACE = "\u2581"  # SentencePiece spells a space so
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """`backend` turns text into ids; everything else is how to frame a prompt and how to read ids back."""

    backend: Backend
    size: int  # ids are 0 .. size - 1 (some may be unused)
    byte_level: bool  # pieces are spelled in GPT-2's byte alphabet, else SentencePiece's way
    special: frozenset[int]  # control tokens: skipped when decoding
    verbatim: frozenset[int]  # tokens whose text stands for itself: the special ones and those users defined
    prefix: tuple[int, ...] = ()  # put before a prompt on add_special_tokens
    suffix: tuple[int, ...] = ()
    bos: int | None = None
    eos: tuple[int, ...] = ()  # every id that ends a generation, the main one first
    strip_space: bool = False  # encoding puts a space before text, so decoding takes one off
    chat_template: str | None = None
    family: str = ""  # GGUF's general.architecture or the checkpoint's model_type
    extra: dict[str, str] = field(default_factory=dict)  # other special tokens by role: "pad_token", "unk_token", ...


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's 256 characters and the bytes they stand for: printable Latin-1 is itself, the rest follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(rest)}


def piece_bytes(piece: str, byte_level: bool) -> bytes:
    """The exact bytes of an ordinary piece. A character outside the alphabet stands for itself."""
    if byte_level:
        alphabet = byte_alphabet()
        if all(character in alphabet for character in piece):
            return bytes(alphabet[character] for character in piece)
        return piece.encode("utf-8", "replace")
    if match := _BYTE_PIECE.match(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(SPACE, " ").encode("utf-8", "replace")
