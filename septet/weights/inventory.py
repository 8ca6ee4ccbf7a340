"""What a checkpoint holds, and in which order: shared by every source of tensors. No torch.

Used by the sources in `load.py` and `mapped.py`. Which tensors there are by canonical name, which of them were asked
for, and how GGUF's rows of q and k lie. Knows no tensor's bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from septet.errors import ModelFileError
from septet.weights.names import is_harmless

if TYPE_CHECKING:
    from collections.abc import Iterable

    from septet.config import ModelConfig

__all__ = ["Inventory", "row_order"]

INTERLEAVED = ("llama", "mistral")  # GGUF stores their q and k for rotation of neighbours (2i, 2i + 1)


class Inventory:
    """Which tensors a checkpoint has, by canonical name, and which of them were asked for."""

    def __init__(self, where: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
        """`where`: the file's name, for messages. `tensors`: (canonical name, name in the file, shape)."""
        self.where = where
        self.known: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.taken: set[str] = set()
        for name, own, shape in tensors:
            if name in self.known:
                raise ModelFileError(f"{where}: tensors {_shown(self.known[name][0])} and {_shown(own)} are the same")
            self.known[name] = (own, shape)

    def take(self, name: str, shape: tuple[int, ...]) -> str:
        """-> the name in the file. ModelFileError if there is none or its shape is another one."""
        if name not in self.known:
            raise ModelFileError(f"{self.where}: the tensor {name} is missing; expected it with shape {list(shape)}")
        own, found = self.known[name]
        if found != tuple(shape):
            alias = "" if own == name else f" ({name})"
            raise ModelFileError(
                f"{self.where}: tensor {own}{alias} has shape {list(found)}; the model's config asks for {list(shape)}"
            )
        self.taken.add(name)
        return own

    def check_all_taken(self, tied: bool) -> None:
        """ModelFileError naming what nobody asked for, harmless extras aside."""
        left = [own for name, (own, _) in self.known.items() if name not in self.taken and not is_harmless(name, tied)]
        if left:
            names = ", ".join(map(_shown, sorted(left)[:8])) + (", ..." if len(left) > 8 else "")
            raise ModelFileError(
                f"{self.where}: {len(left)} tensors belong to no layer of this architecture, so its answers would be "
                f"wrong: {names}"
            )


def row_order(config: ModelConfig, name: str, n: int) -> np.ndarray | None:
    """Which row of a GGUF file is row i of the canonical layout, (n,) int64; None where they agree.

    llama.cpp's converter interleaves the halves of each head of q and k (row 2i + j of a head is row j * E/2 + i of the
    checkpoint), since it rotates neighbours; Septet rotates halves. Rows are whole blocks.
    """
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
    if heads is None or config.architecture not in INTERLEAVED:
        return None
    return np.arange(n, dtype=np.int64).reshape(heads, n // heads // 2, 2).transpose(0, 2, 1).reshape(n)


def _shown(name: str) -> str:
    """A name out of a file, safe to print."""
    return repr(name if len(name) <= 80 else name[:77] + "...")
