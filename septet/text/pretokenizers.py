"""Pre-tokenizers of GGUF byte-level vocabularies: the name in `tokenizer.ggml.pre` -> how text is cut before merging.

Read by `gguf_vocab` alone; data, no code that loads anything. A pattern cuts every piece the pattern before it left
into matches and the text between them. Sources: the `tokenizer.json` of each family, and the names llama.cpp writes.
"""

from __future__ import annotations

from dataclasses import dataclass

from septet.errors import UnsupportedModel

__all__ = ["PreTokenizer", "named"]

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _word(digits: str) -> str:
    """The cl100k-like pattern of Llama 3 and Qwen: contractions, words, digits in groups, punctuation, white space."""
    return rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"


def _cased(contraction: str, digits: str) -> str:
    """The o200k-like pattern: a word is upper case then lower case."""
    lead, upper = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
    lower = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    words = rf"{lead}{upper}*{lower}+{contraction}|{lead}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


# DeepSeek lists the cased letters of an older Unicode one by one; the classes say the same for all but rare additions.
_DEEPSEEK_LETTERS = r"\s?[\p{Lu}\p{Ll}\p{Lt}]+"
_DEEPSEEK_MARKS = r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+"
_DEEPSEEK_CJK = r"[\x{4E00}-\x{9FA5}\x{0800}-\x{4E00}\x{AC00}-\x{D7FF}]+"
_DEEPSEEK3_CJK = r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+"
_DEEPSEEK3_MAIN = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    patterns: tuple[str, ...]  # Oniguruma syntax, applied in order
    ignore_merges: bool = False  # a piece that is a token as a whole is taken without merging
    nfc: bool = False  # text is normalised to NFC first, as the family's own tokenizer does (llama.cpp does not)
    add_bos: bool = False  # when the file doesn't say


_LLAMA3 = PreTokenizer((_word(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True)
_QWEN2 = PreTokenizer((_word(r"\p{N}"),), nfc=True)
_PLAIN = PreTokenizer((_GPT2,))
_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_GPT4O = PreTokenizer((_cased(_CONTRACTION + "?", r"\p{N}{1,3}"),))
_DEEPSEEK3 = PreTokenizer((r"\p{N}{1,3}", _DEEPSEEK3_CJK, _DEEPSEEK3_MAIN))

_TABLE: dict[str, PreTokenizer] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "mellum"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "command-r", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"), PreTokenizer(_LLAMA3.patterns)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "stablelm2": PreTokenizer(_QWEN2.patterns),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), ignore_merges=True, add_bos=True),
    "deepseek-llm": PreTokenizer((r"[\r\n]", _DEEPSEEK_LETTERS, _DEEPSEEK_MARKS, r"\s+$", _DEEPSEEK_CJK, r"\p{N}+")),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense"), _DEEPSEEK3),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


def named(name: str | None) -> PreTokenizer:
    """The pre-tokenizer `name`. UnsupportedModel if there is none of that name, or the file names none."""
    if name is None:
        raise UnsupportedModel(
            "the GGUF file has no tokenizer.ggml.pre, so it isn't known how to split text: convert the model again "
            "with a current converter"
        )
    if not isinstance(name, str) or name not in _TABLE:
        known = ", ".join(sorted(_TABLE))
        raise UnsupportedModel(
            f"the GGUF file uses the pre-tokenizer {name!r}, which Septet doesn't know; known: {known}"
        )
    return _TABLE[name]
