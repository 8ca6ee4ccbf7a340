"""A source whose matrices stay apart (`quant/separate.py`). Made by `engine/build.py` for the native tape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from septet.quant.separate import Separate

if TYPE_CHECKING:
    from torch import Tensor

    from septet.quant.scheme import PackedWeight
    from septet.weights.source import Source

__all__ = ["SeparateSource"]


class SeparateSource:
    """`weights.source.Source` over another one."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        return Separate.of(self.source.matrix(name, shape))

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.source.vector(name, shape)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self.source.optional(name, shape)

    def has(self, name: str) -> bool:
        return self.source.has(name)

    def finish(self) -> None:
        self.source.finish()
