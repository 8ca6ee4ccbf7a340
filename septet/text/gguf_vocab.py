"""A tokenizer out of a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece BPE ("llama") vocabularies.

Called by `tokenizer.load_tokenizer`. The metadata comes from `hub.gguf`, bounded but not yet believed: every type,
length and id is checked here. Field names and defaults as docs/gguf.md of ggml and llama.cpp's reading of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from septet.errors import ModelFileError, UnsupportedModel
from septet.text import pretokenizers
from septet.text.spm_merges import cached_merges
from septet.text.vocabulary import SPACE, Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tokenizers import Tokenizer as Backend

__all__ = ["from_gguf"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_PREFIX = "tokenizer.ggml."

# Tokens that end a turn, by their text: files often name only one of them as eos. (llama.cpp's list, without those
# that are ordinary text in some family, like Gemma's </s>, and without fill-in-the-middle markers.)
_END_TEXTS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "[EOT]")
) | {"<|end_of_text|>", "<end_of_utterance>", "<\uff5cend\u2581of\u2581sentence\uff5c>"}


def from_gguf(metadata: Mapping[str, Any], cache: Path | None = None) -> Vocabulary:
    """Build the vocabulary. `cache`: a directory for what is costly to derive.

    ModelFileError: fields missing or inconsistent. UnsupportedModel: another kind of vocabulary or pre-tokenizer.
    """
    fields = _Fields(metadata)
    model = fields.get("model", str)
    if model not in ("gpt2", "llama"):
        raise UnsupportedModel(f"the GGUF file has a {model!r} tokenizer; Septet reads 'gpt2' and 'llama'")
    tokens, kinds = _pieces(fields)
    pre = pretokenizers.named(fields.get("pre", str, None)) if model == "gpt2" else None
    backend = _byte_level(fields, tokens, pre) if pre else _sentencepiece(fields, tokens, kinds, cache)
    special, defined = _add_tokens(backend, tokens, kinds)

    prefixed = model == "llama" and fields.get("add_space_prefix", bool, True)
    add_bos = fields.get("add_bos_token", bool, pre.add_bos if pre else True)
    bos = fields.token("bos_token_id", len(tokens), None if pre else 1)
    ends = _ends(fields, tokens, special, None if pre else 2)
    return Vocabulary(
        backend=backend,
        size=len(tokens),
        byte_level=pre is not None,
        special=special,
        verbatim=special | defined,
        prefix=_framing("bos", add_bos, bos),
        suffix=_framing("eos", fields.get("add_eos_token", bool, False), ends[0] if ends else None),
        bos=bos,
        eos=ends,
        strip_space=prefixed,
        chat_template=_template(metadata),
        family=str(metadata.get("general.architecture", "")),
        extra=_extra(fields, tokens),
    )


class _Fields:
    """Typed access to `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        value = self._metadata.get(_PREFIX + name, default)
        if value is ...:
            raise ModelFileError(f"the GGUF file has no {_PREFIX}{name}: it holds no usable tokenizer")
        if value is not default and not isinstance(value, kind):
            raise ModelFileError(f"{_PREFIX}{name} must be of type {kind.__name__}, not {type(value).__name__}")
        return value

    def items(self, name: str, kind: type, length: int | None = None) -> list[Any]:
        values = self.get(name, list)
        if not all(isinstance(value, kind) for value in values):
            raise ModelFileError(f"{_PREFIX}{name} must hold values of type {kind.__name__}")
        if length is not None and len(values) < length:
            raise ModelFileError(f"{_PREFIX}{name} has {len(values)} values for {length} tokens")
        return values if length is None else values[:length]

    def token(self, name: str, size: int, default: int | None = None) -> int | None:
        """A token id; None (not an error) where the field is missing and the default is outside the vocabulary."""
        value = self.get(name, int, None)
        if value is None:
            return default if default is not None and default < size else None
        if not 0 <= value < size:
            raise ModelFileError(f"{_PREFIX}{name} is {value}, outside the vocabulary of {size} tokens")
        return value

    def has(self, name: str) -> bool:
        return _PREFIX + name in self._metadata


def _pieces(fields: _Fields) -> tuple[list[str], list[int]]:
    """-> (tokens, token types), the types as far as the file has them."""
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(fields.items("tokens", str))]
    if not tokens:
        raise ModelFileError(f"{_PREFIX}tokens is empty")
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        double = next(text for text in tokens if text in seen or seen.add(text))  # type: ignore[func-returns-value]
        raise ModelFileError(f"{_PREFIX}tokens has {double[:80]!r} twice")
    if not fields.has("token_type"):
        return tokens, [_NORMAL] * len(tokens)
    kinds = fields.items("token_type", int, len(tokens))
    # An end-of-turn marker that is not marked as control could be neither written by a template nor stop a turn.
    found = {i for i, text in enumerate(tokens) if text in _END_TEXTS}
    return tokens, [_CONTROL if i in found else kind for i, kind in enumerate(kinds)] if found else kinds


def _byte_level(fields: _Fields, tokens: list[str], pre: pretokenizers.PreTokenizer) -> Backend:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    merges = []
    for text in fields.items("merges", str):
        left, separator, right = text[1:].partition(" ")  # a piece may itself begin with a space
        if not separator:
            raise ModelFileError(f"{_PREFIX}merges has {text[:80]!r}, which is not a pair")
        merges.append((text[0] + left, right))
    vocabulary = {text: i for i, text in enumerate(tokens)}
    try:
        backend = Tokenizer(BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.ignore_merges))
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"{_PREFIX}merges does not fit {_PREFIX}tokens: {error}") from None
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_of])
    if pre.nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: _Fields, tokens: list[str], kinds: list[int], cache: Path | None) -> Backend:
    from tokenizers import Tokenizer, normalizers
    from tokenizers.models import BPE

    scores = fields.items("scores", float, len(tokens))
    if not all(map(math.isfinite, scores)):
        raise ModelFileError(f"{_PREFIX}scores has a value that is not finite")
    mergeable = [i for i, kind in enumerate(kinds) if kind in (_NORMAL, _UNUSED)]
    ids = cached_merges(tokens, scores, mergeable, cache)
    pairs = zip(ids[::2], ids[1::2], strict=True)
    unknown = fields.token("unknown_token_id", len(tokens), 0)
    model = BPE(
        vocab={text: i for i, text in enumerate(tokens)},
        merges=[(tokens[left], tokens[right]) for left, right in pairs],
        byte_fallback=True,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
    )
    backend = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    if fields.get("add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces])
    else:
        backend.normalizer = spaces
    return backend


def _add_tokens(backend: Backend, tokens: list[str], kinds: list[int]) -> tuple[frozenset[int], frozenset[int]]:
    """Make control and user-defined tokens match as wholes. -> ids of each."""
    from tokenizers import AddedToken

    special = [i for i, kind in enumerate(kinds) if kind in (_CONTROL, _UNKNOWN)]
    defined = [i for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special])
    backend.add_tokens([AddedToken(tokens[i], special=False, normalized=False) for i in defined])
    return frozenset(special), frozenset(defined)


def _ends(fields: _Fields, tokens: list[str], special: frozenset[int], default: int | None) -> tuple[int, ...]:
    """Every id that ends a generation: those the file names, then special tokens known by their text."""
    named = [fields.token("eos_token_id", len(tokens), default)]
    named += [fields.token(f"{name}_token_id", len(tokens)) for name in ("eot", "eom")]
    known = [i for i in sorted(special) if tokens[i] in _END_TEXTS]
    return tuple(dict.fromkeys(i for i in [*named, *known] if i is not None))


def _framing(name: str, wanted: bool, token: int | None) -> tuple[int, ...]:
    if not wanted:
        return ()
    if token is None:
        raise ModelFileError(f"{_PREFIX}add_{name}_token is true, but {_PREFIX}{name}_token_id is not set")
    return (token,)


def _template(metadata: Mapping[str, Any]) -> str | None:
    template = metadata.get("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelFileError("tokenizer.chat_template must be a string")
    return template or None


def _extra(fields: _Fields, tokens: list[str]) -> dict[str, str]:
    names = {"unk_token": "unknown_token_id", "pad_token": "padding_token_id", "sep_token": "seperator_token_id"}
    found = {role: fields.token(name, len(tokens)) for role, name in names.items()}
    return {role: tokens[i] for role, i in found.items() if i is not None}
