"""A model stepped by hand: layouts, slots and rows without scheduler or runner.

For tests of models and kernels. Slots are handed out in a random order, memory that nobody wrote holds large values,
and lines of the slot table hold stale numbers beyond their context: whatever reads too far shows.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import torch

from septet.errors import ModelFileError
from septet.kernels.ops import LayerKV, Layout
from septet.layers.batch import ForwardBatch
from septet.quant.none import Dense
from septet.quant.scheme import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from septet.config import ModelConfig
    from septet.models.registry import Model

__all__ = ["Harness", "StateSource"]


class StateSource:
    """A Source over a state dict with Hugging Face's names; norms are given as they multiply (Gemma's + 1 included)."""

    def __init__(self, state: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
        self.state = dict(state)
        self.dtype = dtype
        self.taken: set[str] = set()

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        return PackedWeight(Dense(), {"weight": self.vector(name, shape)}, shape)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name not in self.state or tuple(self.state[name].shape) != shape:
            raise ModelFileError(f"no tensor {name} of shape {shape}")
        self.taken.add(name)
        return self.state[name].to(self.dtype)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return self.vector(name, shape).float() if name in self.state else None

    def has(self, name: str) -> bool:
        return name in self.state

    def finish(self) -> None:
        left = sorted(set(self.state) - self.taken)
        if left:
            raise ModelFileError(f"tensors that no layer took: {', '.join(left)}")


class Harness:
    """Lines (sequences) 0 .. max_rows - 1 over one KV pool."""

    def __init__(
        self,
        model: Model,
        config: ModelConfig,
        *,
        n_slots: int = 2048,
        max_rows: int = 8,
        max_len: int = 256,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        seed: int = 0,
    ) -> None:
        self.model, self.device = model, device
        shape = (n_slots, config.num_kv_heads, config.head_dim)
        self.kv = [
            LayerKV(*(torch.full(shape, 1e4, dtype=dtype, device=device) for _ in "kv"))
            for _ in range(config.num_layers)
        ]
        self.free = list(range(1, n_slots))
        random.Random(seed).shuffle(self.free)
        self.slots: list[list[int]] = [[] for _ in range(max_rows)]
        self.slot_of = torch.randint(0, n_slots, (max_rows, max_len), dtype=torch.int32, device=device)

    def share(self, line: int, other: int, n: int) -> None:
        """`line` starts anew with the first n positions of `other`: the same slots, nothing computed."""
        self.slots[line] = self.slots[other][:n]
        self.slot_of[line, :n] = self.slot_of[other, :n]

    def batch(self, rows: Mapping[int, Sequence[int]]) -> ForwardBatch:
        """Give slots to the next tokens of each line and lay the step out; logits are wanted everywhere."""
        ids, positions, slots, q_start, kv_len = [], [], [], [0], []
        for line, tokens in rows.items():
            start = len(self.slots[line])
            new = [self.free.pop() for _ in tokens]
            self.slots[line] += new
            self.slot_of[line, start : start + len(new)] = torch.tensor(new, dtype=torch.int32)
            ids += tokens
            positions += range(start, start + len(new))
            slots += new
            q_start.append(len(ids))
            kv_len.append(start + len(new))

        def tensor(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=self.device)

        layout = Layout(
            positions=tensor(positions),
            slots=tensor(slots),
            rows=tensor(list(rows)),
            q_start=tensor(q_start, torch.int32),
            kv_len=tensor(kv_len, torch.int32),
            slot_of=self.slot_of,
            max_q=max(len(tokens) for tokens in rows.values()),
            max_kv=max(kv_len),
        )
        return ForwardBatch(tensor(ids), layout, self.kv, tensor(range(len(ids))))

    @torch.inference_mode()
    def step(self, rows: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Compute the given next tokens of each line, all in one step -> logits (n, V) after each of them."""
        logits = self.model.forward(self.batch(rows))
        return dict(zip(rows, logits.split([len(tokens) for tokens in rows.values()]), strict=True))

    def greedy(self, line: int, ids: Sequence[int], n: int) -> list[int]:
        """Compute `ids`, then n tokens by argmax, one a step -> these n."""
        out = [int(self.step({line: ids})[line][-1].argmax())]
        while len(out) < n:
            out.append(int(self.step({line: out[-1:]})[line][-1].argmax()))
        return out
