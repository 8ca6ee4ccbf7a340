"""A tokenizer out of a checkpoint directory: `tokenizer.json` and what the configuration files beside it say.

Called by `tokenizer.load_tokenizer`. Reads JSON only, each file bounded; never runs code of the checkpoint, whatever
its `auto_map` says. Framing (bos, eos), ends of generation and the chat template follow transformers' rules.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from septet.errors import ModelFileError, UnsupportedModel
from septet.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer as Backend

__all__ = ["from_checkpoint"]

MAX_TOKENIZER_BYTES = 256 * 2**20
MAX_CONFIG_BYTES = 32 * 2**20
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def from_checkpoint(directory: Path) -> Vocabulary:
    """Build the vocabulary. ModelFileError: a file is missing or damaged. UnsupportedModel: another kind."""
    backend, description = _backend(directory)
    config = _json(directory, "tokenizer_config.json")
    model = _json(directory, "config.json")
    texts = _special_texts(directory, config)
    added = backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    byte_level, strip_space = _spelling(description)
    bos, eos = (_id(backend, texts.get(role)) for role in ("bos_token", "eos_token"))
    prefix, suffix = _framing(backend)
    ends = _ends(directory, model, eos)
    return Vocabulary(
        backend=backend,
        size=_size(backend, added),
        byte_level=byte_level,
        special=frozenset(special | {i for i in (bos, *ends) if i is not None and i in added}),
        verbatim=frozenset(added),
        prefix=prefix,
        suffix=suffix,
        bos=bos if bos is not None else _first(model.get("bos_token_id")),
        eos=ends,
        strip_space=strip_space,
        chat_template=_template(directory, config),
        family=str(model.get("model_type", "")),
        extra={role: text for role, text in texts.items() if role not in ("bos_token", "eos_token")},
    )


def _read(directory: Path, name: str, limit: int) -> str | None:
    """The file's text, None if there is no such file."""
    path = directory / name
    try:
        if not path.is_file():
            return None
        if path.stat().st_size > limit:
            raise ModelFileError(f"{name} is larger than {limit >> 20} MiB, the most Septet accepts")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"can't read {name}: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def _json(directory: Path, name: str) -> dict[str, Any]:
    """The object in `name`, empty if there is no such file."""
    if (text := _read(directory, name, MAX_CONFIG_BYTES)) is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{name} must hold a JSON object")
    return value


def _backend(directory: Path) -> tuple[Backend, dict[str, Any]]:
    """-> (the tokenizer, its description without vocabulary)."""
    from tokenizers import Tokenizer

    text = _read(directory, "tokenizer.json", MAX_TOKENIZER_BYTES)
    if text is None:
        raise ModelFileError(
            "the checkpoint has no tokenizer.json; Septet needs the fast tokenizer's file (transformers writes it: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    try:
        backend = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ModelFileError(f"tokenizer.json is damaged or of an unknown kind: {str(error)[:200]}") from None
    backend.no_truncation()  # a saved truncation would cut prompts silently
    backend.no_padding()
    decoder = backend.decoder
    return backend, {} if decoder is None else json.loads(decoder.__getstate__())


def _spelling(decoder: dict[str, Any]) -> tuple[bool, bool]:
    """How the decoder reads pieces -> (byte level, strips a leading space)."""
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type"): step for step in steps}
    if "ByteLevel" in kinds:
        return True, False
    if "Metaspace" in kinds:
        return False, kinds["Metaspace"].get("prepend_scheme", "always") != "never"
    if "ByteFallback" in kinds or any(step.get("type") == "Replace" for step in steps):
        strip = kinds.get("Strip", {})
        return False, strip.get("content") == " " and strip.get("start", 0) > 0
    raise UnsupportedModel(
        f"tokenizer.json decodes by {decoder.get('type', 'nothing')!r}; Septet reads byte-level and SentencePiece kinds"
    )


def _text(value: Any) -> str | None:
    """A special token is a string or an AddedToken object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_texts(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    merged = _json(directory, "special_tokens_map.json") | config
    return {role: text for role in _ROLES if (text := _text(merged.get(role)))}


def _id(backend: Backend, text: str | None) -> int | None:
    return None if text is None else backend.token_to_id(text)


def _size(backend: Backend, added: dict[int, Any]) -> int:
    """One past the largest id: ids need not be dense."""
    return max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)


def _framing(backend: Backend) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What tokenizer.json's post-processor puts around a prompt. (add_bos_token of older tokenizer_config.json files
    is not read, as transformers 5 doesn't: it may contradict what the model was trained with.)"""
    plain = backend.encode("a", add_special_tokens=False).ids
    framed = backend.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return tuple(framed[:start]), tuple(framed[start + len(plain) :])
    raise UnsupportedModel("tokenizer.json has a post-processor that rewrites the prompt; Septet can't follow it")


def _first(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ends(directory: Path, model: dict[str, Any], eos: int | None) -> tuple[int, ...]:
    """Ids that end a generation: generation_config.json's, else config.json's; the tokenizer's eos always."""
    stated = _json(directory, "generation_config.json").get("eos_token_id")
    if stated is None:
        stated = model.get("eos_token_id")
    listed = stated if isinstance(stated, list) else [stated]
    ids = [i for i in listed if isinstance(i, int) and not isinstance(i, bool) and i >= 0]
    return tuple(dict.fromkeys(ids if eos is None else [*ids, eos]))


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template in tokenizer_config.json (a string, or a list of named ones)."""
    if text := _read(directory, "chat_template.jinja", MAX_CONFIG_BYTES):
        return text
    template = config.get("chat_template")
    if template is None:
        template = _json(directory, "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ModelFileError("chat_template in tokenizer_config.json must be a string or a list of named templates")
    return template or None
