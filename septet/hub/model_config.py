"""What a model says of its shape, as one `ModelConfig`: read from a GGUF file or a checkpoint directory, then checked.

Called by whoever builds an engine or shows a model. Remote code is never run: a model is an architecture that Septet
implements, by name, or it is refused. The two dialects live in `gguf_config.py` and `hf_config.py`; the checks that
hold for both live here. Knows no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from septet.errors import ModelFileError, ModelNotFound
from septet.hub.gguf import GGUFFile

if TYPE_CHECKING:
    import os

    from septet.config import ModelConfig, RopeConfig

__all__ = ["check_config", "config_from_file", "read_model_config"]

MAX_QUERY_FEATURES = 2**20  # heads times head_dim


def read_model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The shape of the model at `path`, a .gguf file or a checkpoint directory with a config.json.

    Raises ModelNotFound (nothing there), ModelFileError (damaged or contradictory), UnsupportedModel (sound, but not
    implemented; says what is).
    """
    path = Path(path)
    if path.is_dir():
        from septet.hub.hf_config import config_from_directory

        return check_config(config_from_directory(path), f"{path.name}/config.json")
    if not path.exists():
        raise ModelNotFound(f"no model at that path: {path.name}")
    if path.suffix == ".safetensors":
        raise ModelFileError(f"{path.name} has no description of the model; give its directory (with config.json)")
    with GGUFFile.open(path) as file:
        return config_from_file(file)


def config_from_file(file: GGUFFile) -> ModelConfig:
    """As `read_model_config`, from a GGUF file that is already open."""
    from septet.hub.gguf_config import config_from_gguf

    return check_config(config_from_gguf(file), file.name)


def check_config(config: ModelConfig, where: str) -> ModelConfig:
    """What must hold between the numbers, whoever wrote them; each alone was checked when it was read."""
    if config.num_heads % config.num_kv_heads:
        raise ModelFileError(
            f"{where}: {config.num_heads} attention heads can't share {config.num_kv_heads} key/value heads evenly"
        )
    if config.head_dim % 2:
        raise ModelFileError(f"{where}: head_dim must be even for rotary embedding, not {config.head_dim}")
    if config.num_heads * config.head_dim > MAX_QUERY_FEATURES:
        raise ModelFileError(f"{where}: {config.num_heads} heads of {config.head_dim} are more than any model has")
    if len(config.windows) != config.num_layers:
        raise ModelFileError(f"{where}: {len(config.windows)} layer types for {config.num_layers} layers")
    for name, ids in (("bos_token_id", (config.bos_token_id,)), ("eos_token_id", config.eos_token_ids)):
        for token in ids:
            if token is not None and not 0 <= token < config.vocab_size:
                raise ModelFileError(f"{where}: {name} {token} lies outside the vocabulary of {config.vocab_size}")
    for rope in (config.rope, config.rope_local):
        if rope is not None:
            _check_rope(rope, where)
    return config


def _check_rope(rope: RopeConfig, where: str) -> None:
    if rope.kind == "llama3" and not rope.low_freq_factor < rope.high_freq_factor:
        raise ModelFileError(f"{where}: rope's low_freq_factor must be below its high_freq_factor")
