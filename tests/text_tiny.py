"""Tiny tokenizers for tests, trained on the spot: byte-level BPE and SentencePiece-like BPE, as GGUF and checkpoint.

Needs tokenizers and gguf, not transformers or torch. `checkpoint` writes what transformers would; `gguf_file` writes
what llama.cpp's converter would.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CORPUS = [
    "the quick brown fox jumps over the lazy dog. The the THE then there; isn't it? I'll go 12345 67 8.",
    "def add(a, b):\n    return a + b\n\n\nclass Foo(Bar):\n\t\tpass  # café naïve über",
    "быстрая лиса, 敏捷的狐狸, 빠른 여우 😀😃 aaa aaaa aaaaa    spaces",
] * 3
CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def byte_level(directory: Path, **config: Any) -> tuple[Path, Path]:
    """-> (checkpoint directory, GGUF file) of the same byte-level BPE, cut as Llama 3 does."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=[*CONTROL], initial_alphabet=alphabet)
    )
    backend.add_tokens(["<tool>"])
    backend.post_processor = processors.TemplateProcessing("<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    described = json.loads(backend.to_str())
    ids = backend.get_vocab()
    tokens = sorted(ids, key=lambda text: ids[text])
    kinds = [3 if text in CONTROL else 4 if text == "<tool>" else 1 for text in tokens]
    merges = [" ".join(merge) for merge in described["model"]["merges"]]
    gguf = gguf_file(
        directory / "byte.gguf",
        "gpt2",
        tokens,
        kinds,
        pre="llama-bpe",
        merges=merges,
        bos=ids["<|im_start|>"],
        eos=ids["<|im_end|>"],
    )
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", **config}
    return checkpoint(directory / "byte", backend.to_str(), settings), gguf


@cache
def sentencepiece_vocabulary(size: int = 420) -> tuple[list[str], list[float], list[int]]:
    """-> (pieces, scores, token types): control, 256 bytes, two that users defined, joins, characters."""
    words = Counter(word for text in CORPUS for word in text.replace(" ", " \u2581").split(" "))
    split = {word: [*word] for word in words}
    ordinary = {character for word in words for character in word if character.isprintable()}
    characters = sorted(character for character in ordinary if character.isascii() or character == "\u2581")
    joins: list[str] = []
    while len(joins) < size - 260 - len(characters):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                if all(character in characters for character in "".join(pair)):
                    pairs[pair] += count
        (left, right), _ = pairs.most_common(1)[0]
        if left + right not in joins:
            joins.append(left + right)
        for pieces in split.values():
            for i in range(len(pieces) - 2, -1, -1):
                if pieces[i : i + 2] == [left, right]:
                    pieces[i : i + 2] = [left + right]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", "\n\n"]
    kinds = [2, 3, 3, *[6] * 256, 4, 4] + [1] * (len(joins) + len(characters))
    scores = [0.0] * len(special) + [float(-i) for i in range(len(joins) + len(characters))]
    return [*special, *joins, *characters], scores, kinds


def sentencepiece_gguf(path: Path, **fields: Any) -> Path:
    pieces, scores, kinds = sentencepiece_vocabulary()
    return gguf_file(path, "llama", pieces, kinds, scores=scores, bos=1, eos=2, **fields)


def gguf_file(path: Path, model: str, tokens: list[str], kinds: list[int], **fields: Any) -> Path:
    """A GGUF file with a tokenizer and no tensors."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if "pre" in fields:
        writer.add_tokenizer_pre(fields["pre"])
    if "merges" in fields:
        writer.add_token_merges(fields["merges"])
    if "scores" in fields:
        writer.add_token_scores(fields["scores"])
    for name in ("bos", "eos", "eot"):
        if name in fields:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", fields[name])
    for name in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if name in fields:
            writer.add_bool(f"tokenizer.ggml.{name}", fields[name])
    if "template" in fields:
        writer.add_chat_template(fields["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def checkpoint(directory: Path, tokenizer_json: str, settings: dict[str, Any], **files: Any) -> Path:
    """A checkpoint directory without weights; `files`: further JSON files by stem."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(tokenizer_json)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **settings}))
    for stem, content in files.items():
        (directory / f"{stem}.json").write_text(json.dumps(content))
    return directory
