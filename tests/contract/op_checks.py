"""What it takes to satisfy the contract of each op, for any implementation, device, dtype and size.

`check_*(ops, oracle, ...)` makes fresh inputs from a seed, runs both and compares. Called by tests/contract (small
shapes against `NaiveOps`, everywhere) and tests/gpu (large shapes against `ReferenceOps`, on the GPU).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from septet.kernels.ops import LayerKV, Layout, Ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = [
    "Inputs",
    "check_argmax",
    "check_attention",
    "check_draw",
    "check_gumbel",
    "check_place",
    "check_qkv_write",
    "check_simple",
    "close",
    "make_step",
    "noisy_logits",
    "same",
]

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
NAN = float("nan")


def close(got: Tensor, want: Tensor, what: str, factor: float = 1.0) -> None:
    """Equal within the dtype's tolerance, absolute for values up to 1 and relative beyond; NaN only where wanted."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"{what}: {got.dtype}, not {want.dtype}"
    if not want.is_floating_point():
        assert torch.equal(got, want), f"{what}: {got.tolist()}, not {want.tolist()}"
        return
    limit = TOLERANCE[want.dtype] * factor
    torch.testing.assert_close(
        got.double(), want.double(), rtol=limit, atol=limit, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


def same(ops: Ops, got: Tensor, want: Tensor, what: str) -> None:
    """Equal to the bit. Triton's interpreter cuts instead of rounding to bfloat16: one unit in the last place there."""
    interpreted = ops.name == "triton" and got.device.type == "cpu" and got.dtype == torch.bfloat16
    close(got, want, what, 0.3 if interpreted else 0)


@dataclass(slots=True)
class Inputs:
    """Fresh random tensors of one seed."""

    seed: int
    device: torch.device
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    generator: torch.Generator = None  # type: ignore[assignment]

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype or self.dtype)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def permutation(self, n: int) -> Tensor:
        return torch.randperm(n, generator=self.generator)


def make_step(
    inputs: Inputs, q_lens: Sequence[int], kv_lens: Sequence[int], pad: int = 0, max_q: int = 0, max_kv: int = 0
) -> tuple[Layout, Tensor]:
    """A step over shuffled rows and scattered slots, then `pad` padded rows -> layout, slots in use (n,).

    The last slot belongs to nobody; the slot table names it wherever nothing was written. max_q, max_kv: upper bounds
    that a caller may overstate (0 = exact).
    """
    n_rows, n_slots = len(q_lens) + 2, sum(kv_lens) + 9
    max_len = max(*kv_lens, max_kv) + 3
    free = (inputs.permutation(n_slots - 2) + 1).tolist()  # never slot 0
    rows = inputs.permutation(n_rows - 1)[: len(q_lens)].tolist()
    slot_of = torch.full((n_rows, max_len), n_slots - 1, dtype=torch.int32)
    positions, slots, used = [], [], []
    for row, q_len, kv_len in zip(rows, q_lens, kv_lens, strict=True):
        mine, free = free[:kv_len], free[kv_len:]
        slot_of[row, :kv_len] = torch.tensor(mine, dtype=torch.int32)
        positions += range(kv_len - q_len, kv_len)
        slots += mine[kv_len - q_len :]
        used += mine
    slot_of[n_rows - 1] = 0  # the row of padding
    lens = [*q_lens, *[1] * pad]
    layout = Layout(
        positions=torch.tensor(positions + [0] * pad),
        slots=torch.tensor(slots + [0] * pad),
        rows=torch.tensor(rows + [n_rows - 1] * pad),
        q_start=torch.tensor([0, *lens]).cumsum(0).int(),
        kv_len=torch.tensor([*kv_lens, *[1] * pad], dtype=torch.int32),
        slot_of=slot_of,
        max_q=max(max_q, *lens, 1),
        max_kv=max(max_kv, *kv_lens),
    )
    for name in ("positions", "slots", "rows", "q_start", "kv_len", "slot_of"):
        setattr(layout, name, getattr(layout, name).to(inputs.device))
    return layout, torch.tensor(used, device=inputs.device)


def _pool(inputs: Inputs, layout: Layout, used: Tensor, n_kv: int, dim: int) -> LayerKV:
    """A pool whose slots are NaN except `used`; v and k of a slot lie together, so slots are 2 G E apart.

    v first: a key written one head too far changes the next slot instead of being covered up by the value's own write.
    """
    n_slots = int(layout.slot_of.max()) + 1
    both = torch.full((n_slots, 2, n_kv, dim), NAN, dtype=inputs.dtype, device=inputs.device)
    both[used] = inputs.normal(len(used), 2, n_kv, dim)
    return LayerKV(both[:, 1], both[:, 0])


def check_attention(
    ops: Ops,
    oracle: Ops,
    inputs: Inputs,
    heads: tuple[int, int, int],
    q_lens: Sequence[int],
    kv_lens: Sequence[int],
    window: int | None = None,
    soft_cap: float = 0.0,
    **bounds: int,
) -> None:
    """heads = (H, G, E). Unused slots hold NaN, padded rows read slot 0, which holds NaN too: neither may leak."""
    n_heads, n_kv, dim = heads
    layout, used = make_step(inputs, q_lens, kv_lens, **bounds)
    kv = _pool(inputs, layout, used, n_kv, dim)
    q = inputs.normal(len(layout.positions), n_heads, dim)
    scale = 1.7 * dim**-0.5  # not the usual one
    got = ops.attention(q, kv, layout, scale, window, soft_cap)
    clean = LayerKV(kv.k.nan_to_num(0.0), kv.v.nan_to_num(0.0))
    want = oracle.attention(q, clean, layout, scale, window, soft_cap)
    real = sum(q_lens)
    close(got[:real], want[:real], "attention")


def check_qkv_write(
    ops: Ops,
    oracle: Ops,
    inputs: Inputs,
    heads: tuple[int, int, int],
    norm: bool,
    kv_dtype: torch.dtype | None = None,
    n_rows: int = 3,
) -> None:
    """q, the slots written, and that no other slot was touched; the input too must stay as it was."""
    n_heads, n_kv, dim = heads
    kv_lens = [int(n) for n in inputs.integers(3, 12, n_rows)]
    layout, used = make_step(inputs, [1, *[int(n) - 2 for n in kv_lens[1:]]], kv_lens)
    pool = replace(inputs, dtype=kv_dtype or inputs.dtype)
    kv = _pool(pool, layout, used, n_kv, dim)
    expected = LayerKV(kv.k.clone(), kv.v.clone())
    qkv = inputs.normal(len(layout.positions), (n_heads + 2 * n_kv) * dim)
    before = qkv.clone()
    angle = inputs.normal(max(kv_lens), dim // 2, dtype=torch.float32) * 9
    cos_sin = torch.cat((angle.cos(), angle.sin()), -1)
    norms = (inputs.normal(dim) + 1, inputs.normal(dim) + 1, 1e-5) if norm else (None, None, 0.0)
    got = ops.value(ops.qkv_write(qkv, kv, layout, cos_sin, *norms))
    want = oracle.qkv_write(qkv, expected, layout, cos_sin, *norms)
    close(got, want, "q", 3)  # values of several units after the norm's weight
    close(kv.k, expected.k, "keys", 3)
    same(ops, kv.v, expected.v, "values")
    assert torch.equal(qkv, before), "the input was written to"


def check_simple(ops: Ops, oracle: Ops, inputs: Inputs, n: int, width: int) -> None:
    """The ops on (T, D) alone: norms, activations, lookups, cap."""
    x, residual, weight = inputs.normal(n, width) * 3, inputs.normal(n, width), inputs.normal(width)
    x[0] *= 1e-3  # eps matters here
    close(ops.value(ops.rms_norm(x, weight, 1e-5)), oracle.rms_norm(x, weight, 1e-5), "rms_norm", 2)
    for got, want, what in zip(
        ops.add_rms_norm(x, residual, weight, 1e-6),
        oracle.add_rms_norm(x, residual, weight, 1e-6),
        ("normed", "sum"),
        strict=True,
    ):
        close(ops.value(got), want, what, 2) if what == "normed" else same(ops, got, want, what)
    gate_up = inputs.normal(n, 2 * width) * 4
    gate_up[0, :2] = torch.tensor([1e4, -1e4])  # exp of these overflows
    for kind in ("silu", "gelu_tanh"):
        close(ops.gated_act(gate_up, kind), oracle.gated_act(gate_up, kind), kind)
    ids = inputs.integers(0, n, 2 * n + 1)
    for scale in (1.0, 25.298221281347036):  # sqrt(640), which no small dtype holds
        same(ops, ops.embed(ids, x, scale), oracle.embed(ids, x, scale), "embed")
    close(ops.soft_cap(x * 20, 30.0), oracle.soft_cap(x * 20, 30.0), "soft_cap")
    same(ops, ops.take_rows(x, ids), oracle.take_rows(x, ids), "take_rows")
    fresh = torch.Generator().manual_seed(inputs.seed)
    again = torch.randn(n, width, generator=fresh).to(inputs.device, inputs.dtype) * 3
    assert torch.equal(x[1:], again[1:]), "an input was written to"


def noisy_logits(inputs: Inputs, n: int, vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits, temperature (every third row greedy), seeds over all of int64, positions."""
    logits = inputs.normal(n, vocab, dtype=torch.float32) * 3
    logits[inputs.normal(n, vocab, dtype=torch.float32) > 1.5] = float("-inf")
    temperature = inputs.normal(n, dtype=torch.float32).abs() + 0.3
    temperature[::3] = 0.0
    seeds = inputs.integers(-(2**63), 2**63 - 1, n)
    return logits, temperature, seeds, inputs.integers(0, 2**20, n)


def check_gumbel(ops: Ops, oracle: Ops, inputs: Inputs, n: int, vocab: int) -> None:
    logits, temperature, seeds, positions = noisy_logits(inputs, n, vocab)
    if n > 2:
        logits[1, vocab // 2] = NAN
        logits[0, vocab - 1] = NAN  # a greedy row
    got = ops.gumbel_argmax(logits, temperature, seeds, positions)
    close(got, oracle.gumbel_argmax(logits, temperature, seeds, positions), "token")
    picked = logits.gather(1, got.clamp(min=0)[:, None])[:, 0]
    choice = (got >= 0) & ~torch.isneginf(logits).all(1)  # where there was one
    assert not torch.isneginf(picked[choice]).any(), "an excluded token was drawn"


def check_argmax(ops: Ops, oracle: Ops, inputs: Inputs, n: int, vocab: int) -> None:
    logits = (inputs.normal(n, vocab) * 2).round()  # full of ties
    logits[0] = float("-inf")
    logits[-1, vocab - 1] = 99.0
    if n > 3:
        logits[1, 0] = NAN
        logits[2, vocab - 1], logits[2, 0] = NAN, float("inf")
        logits[3, vocab // 2], logits[3, vocab // 3] = float("inf"), float("inf")
    close(ops.argmax(logits), oracle.argmax(logits), "argmax")


def check_draw(ops: Ops, oracle: Ops, inputs: Inputs, n: int, vocab: int) -> None:
    """Masked, drawn and written back as the ops one by one would; what nobody drew stays."""
    logits = inputs.normal(n, vocab) * 3
    logits[0, vocab // 2] = NAN
    words = inputs.integers(-(2**31), 2**31, n + 2, -(-vocab // 32)).int()
    line = torch.where(inputs.integers(0, 2, n) > 0, inputs.integers(0, n + 2, n), -1)
    row = inputs.permutation(n + 3)[:n].to(inputs.device)
    temperature = inputs.integers(0, 3, n + 3).float() / 2
    seeds, positions = inputs.integers(-(2**62), 2**62, n + 3), inputs.integers(1, 9, n)
    tokens, drawn = inputs.integers(0, vocab, n + 3, 10).int(), inputs.integers(0, vocab, n + 1)
    want, want_drawn = tokens.clone(), drawn.clone()
    chosen = oracle.gumbel_argmax(oracle.apply_mask(logits, words, line), temperature[row], seeds[row], positions)
    want[row, positions], want_drawn[:n] = chosen.clamp(min=0).int(), chosen
    at = positions.int() if n % 2 else positions
    ops.draw_write(logits, words, line, temperature, seeds, tokens, row, at, drawn)
    close(drawn, want_drawn, "drawn")
    close(tokens, want, "tokens")


def check_place(ops: Ops, inputs: Inputs, n: int) -> None:
    tokens, slot_of = inputs.integers(0, 99, n + 3, 50).int(), inputs.integers(0, 99, n + 3, 60).int()
    row, start = inputs.permutation(n + 3)[:n].to(inputs.device), inputs.integers(0, 50, n)
    slots, want = inputs.integers(0, 99, n), slot_of.clone()
    want[row, start] = slots.int()
    ids, length = ops.place_write(tokens, slot_of, row, start, slots)
    close(slot_of, want, "slot_of")
    close(ids, tokens[row, start].long(), "ids")
    close(length, (start + 1).int(), "length")
