"""Linear layers over packed weights: one matrix, or several stacked by output features.

Built by the layers and models of this house; the weight's scheme multiplies, so nothing here names a format. Weights
are pulled from `Build.source` by canonical name in the constructor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from septet.layers.build import Build
    from septet.quant.scheme import PackedWeight

__all__ = ["Linear", "MergedLinear"]


class Linear:
    """y = x W^T + b. Pulls `{name}.weight` (n_out, n_in) and, with `bias`, `{name}.bias` (n_out,)."""

    def __init__(self, build: Build, name: str, n_in: int, n_out: int, *, bias: bool = False) -> None:
        self.ops = build.ops
        self.weight = build.source.matrix(f"{name}.weight", (n_out, n_in))
        self.bias = build.source.vector(f"{name}.bias", (n_out,)) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, n_in) -> (T, n_out)."""
        return self.weight.linear(self.ops, x, self.bias)


class MergedLinear:
    """Several matrices over the same input, their outputs side by side: [q | k | v], [gate | up].

    Neighbours of one format become one weight and one multiplication; where formats differ (GGUF's K mixes give v more
    bits than q and k) each run of equal formats multiplies by itself and the outputs are joined.
    """

    def __init__(
        self, build: Build, names: Sequence[str], n_in: int, n_outs: Sequence[int], *, bias: bool = False
    ) -> None:
        self.ops = build.ops
        parts = list(zip(names, n_outs, strict=True))
        stacks = _stack([build.source.matrix(f"{name}.weight", (n_out, n_in)) for name, n_out in parts])
        self.weights = [weight for weight, _ in stacks]
        self.biases: list[Tensor | None] = [None] * len(stacks)
        if bias:
            own = iter([build.source.vector(f"{name}.bias", (n_out,)) for name, n_out in parts])
            each = [[next(own) for _ in range(n)] for _, n in stacks]
            self.biases = [some[0] if len(some) == 1 else build.ops.join(some) for some in each]

    def __call__(self, x: Tensor) -> Tensor:
        """x (T, n_in) -> (T, sum of n_outs)."""
        outs = [weight.linear(self.ops, x, bias) for weight, bias in zip(self.weights, self.biases, strict=True)]
        return outs[0] if len(outs) == 1 else self.ops.join(outs)


def _stack(weights: list[PackedWeight]) -> list[tuple[PackedWeight, int]]:
    """The fewest weights that hold `weights` in order, and how many of them each holds: the longest prefix that one
    format can hold, then the rest."""
    for n in range(len(weights), 1, -1):
        merged = weights[0].scheme.concat(weights[:n])
        if merged is not None:
            return [(merged, n), *_stack(weights[n:])]
    return [(weights[0], 1), *_stack(weights[1:])] if weights else []
