"""Text to token ids and back, for one model: `load_tokenizer(path) -> Tokenizer`.

Called by the session and the command line, never by the engine. Stands on the `tokenizers` library (imported when a
tokenizer is loaded), not on transformers. Decoding is ours: the bytes of each id, joined, read as UTF-8, so that the
whole and its pieces always agree (`detokenize`).
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Condition
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest, ModelFileError, ModelNotFound
from septet.text.vocabulary import Vocabulary, piece_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

    from tokenizers import Tokenizer as Backend

__all__ = ["ChatPrompt", "Tokenizer", "load_tokenizer"]


class ChatPrompt(str):
    """A rendered prompt that remembers which parts users wrote: there, text that spells a special token stays text.

    `literal`: (start, end) character ranges, in order; an empty range is a seam that no special token may cross. Only
    this very object carries them: slices and concatenations are plain strings.
    """

    literal: tuple[tuple[int, int], ...] = ()

    def __new__(cls, text: str, literal: Iterable[tuple[int, int]] = ()) -> ChatPrompt:
        prompt = super().__new__(cls, text)
        prompt.literal = tuple(literal)
        return prompt


class _Modes:
    """The backend has one flag, whether special tokens are parsed. Any number of threads may encode in one mode; a
    change waits until they are out, and those who come later wait for it.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._changed = Condition()
        self._parsing = True
        self._inside = 0
        self._waiting = 0  # for the other mode

    @contextmanager
    def enter(self, parsing: bool) -> Iterator[None]:
        with self._changed:
            while self._inside and (self._parsing != parsing or self._waiting):
                other = self._parsing != parsing
                self._waiting += other
                self._changed.wait()
                self._waiting -= other
            if not self._inside:
                self._parsing = parsing
                self._backend.encode_special_tokens = not parsing
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()


class Tokenizer:
    """One model's vocabulary. Safe to share between threads.

    `encode` of text from a template should pass `add_special_tokens=False`: templates write their own bos.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._backend = vocabulary.backend
        self._modes = _Modes(self._backend)
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = vocabulary.size
        self.bos_token_id = vocabulary.bos
        self.eos_token_ids = vocabulary.eos
        self.special_ids = vocabulary.special
        self.chat_template = vocabulary.chat_template
        self.family = vocabulary.family
        self.strip_space = vocabulary.strip_space

    # -- text to ids
    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = True, *, max_tokens: int | None = None
    ) -> list[int]:
        """Ids of `text`. `add_special_tokens`: frame it (bos, eos) as the model was trained.

        `parse_special=False`: text that spells a special token is encoded as ordinary text. A `ChatPrompt` does so in
        its literal ranges whatever the flag says. `max_tokens`: InvalidRequest if there are more, early where the
        length of the text alone decides. InvalidRequest too for text that is not Unicode (lone surrogates).
        """
        self._check_length(len(text), max_tokens)
        try:
            if parse_special and isinstance(text, ChatPrompt) and text.literal:
                ids = self._encode_chat(text)
            else:
                ids = self._encode(str(text), parse_special)
        except (UnicodeEncodeError, TypeError):
            raise InvalidRequest("the prompt has a lone surrogate: it is not Unicode text", param="prompt") from None
        if add_special_tokens:
            ids = [*self._vocabulary.prefix, *ids, *self._vocabulary.suffix]
        if max_tokens is not None and len(ids) > max_tokens:
            raise InvalidRequest(f"the prompt has {len(ids)} tokens; at most {max_tokens} fit", param="prompt")
        return ids

    def as_json(self) -> str:
        """How text becomes ids, in the format of tokenizer.json: for the engine's grammars."""
        return self._backend.to_str()

    def _encode(self, text: str, parse_special: bool) -> list[int]:
        with self._modes.enter(parse_special):
            # the batched call lets other threads run meanwhile, the plain one does not
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def _encode_chat(self, prompt: ChatPrompt) -> list[int]:
        """Special tokens that overlap a literal range are undone: their stretch is encoded again as text.

        A stretch reaches from one genuine special token to the next, so each is encoded exactly as if the forged
        marker had been ordinary text from the start.
        """
        with self._modes.enter(True):
            encoding = self._backend.encode_batch([str(prompt)], add_special_tokens=False)[0]
        ids: list[int] = []
        stretch: list[int] = []
        begin, seen, forged = 0, 0, False
        close = (-1, (len(prompt), len(prompt)))  # ends the last stretch
        for token, (start, end) in [*zip(encoding.ids, encoding.offsets, strict=True), close]:
            if token >= 0 and token not in self.special_ids:
                stretch.append(token)
                continue
            while seen < len(prompt.literal) and prompt.literal[seen][1] <= start:
                seen += 1
            if seen < len(prompt.literal) and prompt.literal[seen][0] < end:
                forged = True
                continue
            ids += self._encode(prompt[begin:start], False) if forged else stretch
            ids += [token] if token >= 0 else []
            stretch, begin, forged = [], end, False
        return ids

    def _check_length(self, n_characters: int, max_tokens: int | None) -> None:
        """Refuse text that can't fit, before the work of tokenising it (a normaliser may join up to 4 characters)."""
        if max_tokens is not None and n_characters > 4 * max_tokens * self._longest:
            raise InvalidRequest(
                f"the prompt has {n_characters} characters, more than {max_tokens} tokens can hold", param="prompt"
            )

    @cached_property
    def _longest(self) -> int:
        """Characters of the longest piece: an upper bound of characters per token."""
        return max((len(piece) for piece in self._backend.get_vocab()), default=1)

    # -- ids to text
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. InvalidRequest for an id outside the vocabulary."""
        skipped = self.special_ids if skip_special_tokens else ()
        text = b"".join(self.token_bytes(i) for i in ids if i not in skipped).decode("utf-8", "replace")
        return text[1:] if self.strip_space and text.startswith(" ") else text

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes that `token` stands for; empty for an id without a piece. InvalidRequest if out of range."""
        if (known := self._bytes.get(token)) is not None:
            return known
        self.check_ids((token,))
        piece = self._backend.id_to_token(token)
        if piece is None:
            found = b""
        elif token in self._vocabulary.verbatim:
            found = piece.encode()
        else:
            found = piece_bytes(piece, self._vocabulary.byte_level)
        self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, U+FFFD for what is not UTF-8 by itself."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def check_ids(self, ids: Iterable[int], param: str = "prompt") -> None:
        """InvalidRequest naming the first id that is not one of this vocabulary's."""
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < self.vocab_size:
                shown = repr(i)[:40]
                raise InvalidRequest(
                    f"token id {shown} is not in the vocabulary of {self.vocab_size} tokens", param=param
                )

    # -- names of special tokens
    @cached_property
    def special_texts(self) -> dict[str, str]:
        """What templates call them: bos_token, eos_token, unk_token, pad_token ... as far as the model has them."""
        named = {"bos_token": self.bos_token_id, "eos_token": self.eos_token_ids[0] if self.eos_token_ids else None}
        own = {name: self.token_text(i) for name, i in named.items() if i is not None and i < self.vocab_size}
        return self._vocabulary.extra | own

    @cached_property
    def control_texts(self) -> frozenset[str]:
        """The text of every special token: what user content must not be able to forge."""
        return frozenset(filter(None, map(self.token_text, self.special_ids)))


def load_tokenizer(path: str | os.PathLike[str], *, home: Path | None = None) -> Tokenizer:
    """The tokenizer of a .gguf file or of a checkpoint directory (with tokenizer.json).

    `home`: Septet's directory (SEPTET_HOME, else ~/.septet), for the cache of derived merges. ModelNotFound,
    ModelFileError, UnsupportedModel as their names say.
    """
    path = Path(path)
    if path.is_dir():
        from septet.text.checkpoint_vocab import from_checkpoint

        return Tokenizer(from_checkpoint(path))
    if not path.exists():
        raise ModelNotFound(f"no such model file: {path.name}")
    if path.suffix.lower() != ".gguf" and not _is_gguf(path):
        raise ModelFileError(f"{path.name} is neither a .gguf file nor a checkpoint directory")
    from septet.hub.gguf import GGUFFile
    from septet.text.gguf_vocab import from_gguf

    with GGUFFile.open(path) as file:
        return Tokenizer(from_gguf(file.metadata, _cache(home)))


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _cache(home: Path | None) -> Path:
    from septet.hub.store import home_directory

    return home_directory(home) / "cache" / "tokenizers"
