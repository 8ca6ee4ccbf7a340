"""Triton's ops on a real GPU: all dtypes, sizes of real models, and under CUDA graph capture.

The checks are those of tests/contract; the oracle is `ReferenceOps` in float32 on the same GPU.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
from contract.op_checks import (
    Inputs,
    check_argmax,
    check_attention,
    check_gumbel,
    check_qkv_write,
    check_simple,
    close,
    make_step,
)

from septet.kernels.ops import LayerKV, Layout
from septet.kernels.reference import ReferenceOps

if TYPE_CHECKING:
    from torch import Tensor

    from septet.kernels.ops import Ops

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="kernels are interpreted in this process"),
]
CUDA = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HEADS = [(32, 8, 64), (9, 3, 64), (32, 32, 80), (16, 2, 96), (32, 8, 128), (28, 4, 128), (4, 1, 256), (40, 1, 64)]
STEPS = {
    "prefill": ([2048], [2048]),
    "chunk": ([512, 300], [4096, 300]),
    "mixed": ([700, 1, 1, 33, 1, 1], [1500, 8000, 17, 33, 4097, 1]),
    "decode 1": ([1], [8191]),
    "decode 64": ([1] * 64, [1 + 97 * i % 4001 for i in range(64)]),
    "verify": ([5, 5, 5], [3000, 77, 5]),
}


class Exact(ReferenceOps):
    """The reference with attention in float32, rounded once."""

    def attention(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        wide = LayerKV(kv.k.float(), kv.v.float())
        return super().attention(q.float(), wide, layout, scale, window, soft_cap).to(q.dtype)


@pytest.fixture
def ops() -> Ops:
    from septet.kernels.triton import TritonOps

    return TritonOps()


@pytest.fixture
def seed() -> int:
    value = int(os.environ.get("SEPTET_TEST_SEED") or int.from_bytes(os.urandom(4), "little"))
    print(f"SEPTET_TEST_SEED={value}")
    return value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 576), (257, 2048), (33, 8192), (3000, 4096)])
def test_norms_activations_lookups(ops: Ops, seed: int, dtype: torch.dtype, n: int, width: int) -> None:
    check_simple(ops, Exact(), Inputs(seed, CUDA, dtype), n, width)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_qkv_write(ops: Ops, seed: int, dtype: torch.dtype, norm: bool, heads: tuple[int, int, int]) -> None:
    check_qkv_write(ops, Exact(), Inputs(seed, CUDA, dtype), heads, norm, n_rows=40)


@pytest.mark.parametrize(
    ("dtype", "heads"),
    [(torch.bfloat16, h) for h in HEADS] + [(d, h) for d in DTYPES[1:] for h in ((9, 3, 64), (4, 1, 256))],
    ids=str,
)
@pytest.mark.parametrize("step", list(STEPS))
def test_attention(ops: Ops, seed: int, dtype: torch.dtype, heads: tuple[int, int, int], step: str) -> None:
    check_attention(ops, Exact(), Inputs(seed, CUDA, dtype), heads, *STEPS[step])


@pytest.mark.parametrize("heads", [(32, 8, 64), (4, 1, 256)], ids=str)
@pytest.mark.parametrize(("window", "soft_cap"), [(512, 0.0), (77, 0.0), (None, 30.0), (1024, 50.0)])
@pytest.mark.parametrize("step", list(STEPS))
def test_attention_window_and_cap(
    ops: Ops, seed: int, heads: tuple[int, int, int], window: int | None, soft_cap: float, step: str
) -> None:
    inputs = Inputs(seed, CUDA, torch.bfloat16)
    check_attention(ops, Exact(), inputs, heads, *STEPS[step], window=window, soft_cap=soft_cap, pad=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [49152, 128256, 262144])
def test_argmax(ops: Ops, seed: int, dtype: torch.dtype, vocab: int) -> None:
    check_argmax(ops, Exact(), Inputs(seed, CUDA, dtype), 33, vocab)


@pytest.mark.parametrize("vocab", [49152, 128256, 262144])
def test_gumbel_argmax(ops: Ops, seed: int, vocab: int) -> None:
    """The same tokens as the reference on the CPU: the noise does not depend on the device."""
    check_gumbel(ops, OnCPU(), Inputs(seed, CUDA, torch.float32), 65, vocab)


class OnCPU(ReferenceOps):
    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        args = [x.cpu() for x in (logits, temperature, seeds, positions)]
        return super().gumbel_argmax(*args).to(logits.device)


def test_gumbel_argmax_follows_the_softmax(ops: Ops, seed: int) -> None:
    """Pearson's chi-square, 100,000 draws of 12 tokens (11 degrees of freedom: 44.7 has a chance of 5 in a million)."""
    inputs = Inputs(seed, CUDA, torch.float32)
    n = 100_000
    logits = inputs.normal(12)
    seeds, positions = inputs.integers(0, 2**62, 1).expand(n).contiguous(), torch.arange(n, device=CUDA)
    drawn = ops.gumbel_argmax(logits.expand(n, 12).contiguous(), torch.full((n,), 0.8, device=CUDA), seeds, positions)
    want = n * torch.softmax(logits.double() / 0.8, -1)
    count = torch.bincount(drawn, minlength=12).double()
    assert float(((count - want) ** 2 / want).sum()) < 44.7


@pytest.mark.parametrize("step", ["decode 1", "decode 64", "mixed"])
def test_a_captured_step_follows_its_inputs(ops: Ops, seed: int, step: str) -> None:
    """Capture the ops of a layer and the sampler once, then replay over other contents of the same buffers."""
    inputs = Inputs(seed, CUDA, torch.bfloat16)
    q_lens, kv_lens = STEPS[step]
    layout, _ = make_step(inputs, q_lens, kv_lens)
    n, dim, n_slots = len(layout.positions), 64, int(layout.slot_of.max()) + 1
    qkv = inputs.normal(n, 48 * dim)
    kv = LayerKV(inputs.normal(n_slots, 8, dim), inputs.normal(n_slots, 8, dim))
    cos_sin = inputs.normal(max(kv_lens), dim, dtype=torch.float32)
    weight = inputs.normal(32 * dim)
    hot, seeds = torch.full((n,), 0.7, device=CUDA), inputs.integers(0, 2**62, n)

    def run() -> tuple[Tensor, Tensor]:
        q = ops.value(ops.qkv_write(qkv, kv, layout, cos_sin))
        normed, total = ops.add_rms_norm(ops.attention(q, kv, layout, 0.125), q.view(n, -1), weight, 1e-5)
        return total, ops.gumbel_argmax(ops.value(normed).float(), hot, seeds, layout.positions)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    shorter, _ = make_step(inputs, q_lens, [max(k - 700, q) for q, k in zip(q_lens, kv_lens, strict=True)])
    for name in ("positions", "slots", "rows", "kv_len"):
        getattr(layout, name).copy_(getattr(shorter, name))
    layout.slot_of[:, : shorter.slot_of.shape[1]] = shorter.slot_of.clamp(max=n_slots - 1)
    qkv.copy_(inputs.normal(n, 48 * dim))
    graph.replay()
    got = [x.clone() for x in captured]
    close(got[0], run()[0], "captured attention", 0)
    assert torch.equal(got[1], run()[1])
