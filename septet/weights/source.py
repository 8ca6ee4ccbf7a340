"""Where a model takes its weights from: the one seam between checkpoints and layers.

A layer's constructor asks the source for each tensor by its canonical name (Hugging Face's names for Llama-like models,
e.g. `model.layers.0.self_attn.q_proj.weight`) and states the shape it needs; the source finds the bytes, checks the
shape, converts the layout (GGUF's permuted q and k, Gemma's norm offset) and puts the result on the device.
Implementations: safetensors, GGUF, dummy. Contract test: the same weights through each give the same tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from septet.quant.scheme import PackedWeight

__all__ = ["Source"]


class Source(Protocol):
    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        """The (N, K) weight `name`. ModelFileError if missing or of another shape."""
        ...

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A norm weight or bias in the compute dtype. ModelFileError if missing or of another shape."""
        ...

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """As `vector`, but float32 on the host; None if the checkpoint has no such tensor (rope factors, say)."""
        ...

    def has(self, name: str) -> bool: ...

    def finish(self) -> None:
        """All layers are built: ModelFileError naming tensors that nobody took (a sign of a wrong architecture)."""
        ...
