"""What a model file says of itself, for people and clients: family, size, quantisation, template, metadata.

Called by the Ollama dialect. Reads headers only and remembers them by file, size and time. A file that can't be read
or run is still described as far as that goes. Knows no torch and no API.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from septet.errors import SeptetError
from septet.geometry import parameter_count
from septet.hub.facts import read_json
from septet.hub.gguf import GGUFFile
from septet.hub.model_config import config_from_file, read_model_config

if TYPE_CHECKING:
    from pathlib import Path

    from septet.config import ModelConfig

__all__ = ["Description", "describe"]

MAX_TEXT = 2**16  # characters of one value; longer ones (vocabularies, templates) are left out of `metadata`
MAX_JSON = 16 * 2**20

_FILE_TYPES = {
    **dict(enumerate(("F32", "F16", "Q4_0", "Q4_1"))),
    **dict(enumerate(("Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L"), start=7)),
    **dict(enumerate(("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"), start=14)),
    25: "IQ4_NL",
    30: "IQ4_XS",
    32: "BF16",
}
"""general.file_type, as llama.h lists it: what most of the file was quantised as."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    format: str = ""  # "gguf" | "safetensors"
    family: str = ""
    parameters: int = 0  # 0 = not known
    quantization: str = ""  # of most of the weights: "Q4_1", "BF16"
    context_length: int = 0
    embedding_length: int = 0
    template: str | None = None  # the file's own chat template, in Jinja
    metadata: dict[str, Any] = field(default_factory=dict)  # scalars of the header; None for what is long


def describe(path: Path) -> Description:
    """Never raises: what can't be read is left out."""
    try:
        info = path.stat()
    except OSError:
        return Description()
    return _describe(path, info.st_size, info.st_mtime_ns)


@lru_cache(maxsize=256)
def _describe(path: Path, size: int, mtime_ns: int) -> Description:
    try:
        return _directory(path) if path.is_dir() else _file(path)
    except (SeptetError, OSError):
        return Description(format="safetensors" if path.is_dir() else "gguf")


def _file(path: Path) -> Description:
    with GGUFFile.open(path) as file:
        weights: Counter[str] = Counter()
        for tensor in file.tensors.values():
            weights[tensor.kind] += tensor.n_bytes
        template = file.metadata.get("tokenizer.chat_template")
        known: dict[str, Any] = {
            "format": "gguf",
            "family": str(file.metadata.get("general.architecture", ""))[:64],
            "quantization": _FILE_TYPES.get(_integer(file.metadata.get("general.file_type")), "")
            or next((kind for kind, _ in weights.most_common(1)), ""),
            "template": template if isinstance(template, str) else None,
            "metadata": {key: _short(value) for key, value in file.metadata.items() if len(key) < 256},
        }
        with suppress(SeptetError):  # sound, but not one that can be run
            known |= _shape(config_from_file(file))
        return Description(**known)


def _directory(path: Path) -> Description:
    config = read_model_config(path)
    facts = {key: _short(value) for key, value in read_json(path / "config.json", MAX_JSON).items()}
    return Description(
        format="safetensors",
        family=config.architecture,
        quantization={"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[config.dtype],
        template=_template(path),
        metadata=facts,
        **_shape(config),
    )


def _shape(config: ModelConfig) -> dict[str, int]:
    return {
        "parameters": parameter_count(config),
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
    }


def _template(path: Path) -> str | None:
    with suppress(OSError, UnicodeDecodeError):
        return (path / "chat_template.jinja").read_text(encoding="utf-8")[: 2**18]
    try:
        found = read_json(path / "tokenizer_config.json", MAX_JSON).get("chat_template")
    except SeptetError:
        return None
    return found if isinstance(found, str) else None


def _integer(value: Any) -> int:
    return value if isinstance(value, int) else -1


def _short(value: Any) -> Any:
    """Scalars as they are; of lists and long texts only that they are there, as Ollama tells them."""
    if isinstance(value, bool | int | float):
        return value
    return value if isinstance(value, str) and len(value) <= MAX_TEXT else None
