"""Which class computes which architecture: names to import paths, so that nothing is imported before it is needed.

Called by `engine/build.py`. A new family is one line here and one file beside this one: docs/adding-a-model.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Protocol

from septet.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from septet.layers.batch import ForwardBatch
    from septet.layers.build import Build

__all__ = ["MODELS", "Model", "load_model"]

MODELS: Mapping[str, str] = {
    "gemma3": "septet.models.gemma:Gemma3",
    "llama": "septet.models.llama:Llama",
    "mistral": "septet.models.llama:Llama",
    "qwen2": "septet.models.qwen:Qwen2",
    "qwen3": "septet.models.qwen:Qwen3",
}
"""`ModelConfig.architecture` -> "module:Class"."""


class Model(Protocol):
    """What the engine needs of a model."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """(S, V) next-token logits of `batch.logits_at`, in the compute dtype; writes the step's keys and values."""
        ...

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """(T, D) final hidden states, normed; writes the step's keys and values."""
        ...

    def decode(self, batch: ForwardBatch) -> Tensor:
        """(T, V) next-token logits of every token of the step; writes the step's keys and values."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (S, D) -> (S, V): the head by itself, for rows of `hidden`."""
        ...


def load_model(build: Build, models: Mapping[str, str] = MODELS) -> Model:
    """Build the model of `build.config.architecture` with the weights of `build.source`, all of them.

    Raises UnsupportedModel for an unknown architecture; ModelFileError (from the source) for a tensor that is missing,
    misshapen or left over.
    """
    name = build.config.architecture
    if name not in models:
        raise UnsupportedModel(f"architecture {name!r} is not supported; supported: {', '.join(sorted(models))}")
    module, _, cls = models[name].partition(":")
    model: Model = getattr(import_module(module), cls)(build)
    build.source.finish()
    return model
