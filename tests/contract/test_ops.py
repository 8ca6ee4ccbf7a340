"""The contract of every op, for every implementation: small shapes, fresh inputs, an oracle that shares no code.

Triton kernels run on the GPU if there is one, else through Triton's interpreter (see conftest.py), which can't do
products in bfloat16. Larger shapes and all dtypes on the GPU: tests/gpu/test_ops_gpu.py.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from naive import NaiveOps, noise
from op_checks import (
    Inputs,
    check_argmax,
    check_attention,
    check_draw,
    check_gumbel,
    check_place,
    check_qkv_write,
    check_simple,
    close,
    make_step,
    noisy_logits,
)

from septet.kernels.ops import LayerKV, Ops
from septet.kernels.reference import ReferenceOps

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
MIXED = ([7, 1, 20, 1], [7, 50, 61, 1])  # a prompt, a decode, a chunk after a cached prefix, a first token
DECODE = ([1, 1, 1], [1, 70, 33])

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # the interpreter's uint32 products
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),  # idle rows of a tile; NaN
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


@pytest.fixture(params=["reference", "triton"])
def ops(request: pytest.FixtureRequest) -> Ops:
    if request.param == "reference":
        return ReferenceOps()
    return pytest.importorskip("septet.kernels.triton").TritonOps()


@pytest.fixture(params=["reference", "triton-whole", "triton-split"])
def attention_ops(request: pytest.FixtureRequest) -> Ops:
    """On 1 multiprocessor no context is split; on 4,096 each is, as far as its length allows."""
    if request.param == "reference":
        return ReferenceOps()
    return pytest.importorskip("septet.kernels.triton").TritonOps(n_sms=1 if request.param == "triton-whole" else 4096)


def skip_if_interpreted(ops: Ops, dtype: torch.dtype) -> None:
    if ops.name == "triton" and INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16 products")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "width"), [(1, 96), (5, 128), (3, 1536)])
def test_norms_activations_lookups(ops: Ops, seed: int, dtype: torch.dtype, n: int, width: int) -> None:
    check_simple(ops, NaiveOps(), Inputs(seed, DEVICE, dtype), n, width)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear(ops: Ops, seed: int, dtype: torch.dtype) -> None:
    inputs = Inputs(seed, DEVICE, dtype)
    x, weight, bias = inputs.normal(3, 64), inputs.normal(5, 64) / 8, inputs.normal(5)
    close(ops.value(ops.linear(x, weight)), NaiveOps().linear(x, weight), "linear")
    close(ops.value(ops.linear(x, weight, bias)), NaiveOps().linear(x, weight, bias), "linear with bias")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"])
def test_block_ops(ops: Ops, seed: int, kind: str) -> None:
    """Blocks of random bytes with sane scales, against the format's own Python package."""
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(seed)
    rows, width = 5, 512
    if kind.endswith("_K"):  # the package writes no K blocks: random bytes, finite scales
        size, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        packed = rng.integers(0, 256, (rows, width // size, n_bytes), dtype=np.uint8)
        at = {"Q4_K": 0, "Q6_K": 208}[kind]
        half = rng.uniform(1e-3, 1e-2, (rows, width // size, 2)).astype(np.float16).view(np.uint8)
        packed[:, :, at : at + (4 if kind == "Q4_K" else 2)] = half[:, :, : 4 if kind == "Q4_K" else 2]
        packed = packed.reshape(rows, -1)
    else:
        packed = gguf.quants.quantize(
            rng.standard_normal((rows, width), dtype=np.float32), gguf.GGMLQuantizationType[kind]
        )
    dense = torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])).to(DEVICE)
    blocks = torch.from_numpy(packed).to(DEVICE)
    close(ops.dequantize(blocks, kind, torch.float32), dense, kind, 0.1)
    ids = torch.tensor([4, 0, 4], device=DEVICE)
    close(ops.block_embed(ids, blocks, kind, torch.float32, 2.5), dense[ids] * 2.5, "block_embed", 0.1)
    x = torch.from_numpy(rng.standard_normal((3, width), dtype=np.float32)).to(DEVICE)
    want = (x.double() @ dense.double().T).float()
    close(ops.block_linear(x, blocks, kind) / 32, want / 32, "block_linear")
    bias = torch.arange(rows, dtype=torch.float32, device=DEVICE)
    close(ops.block_linear(x, blocks, kind, bias) / 32, (want + bias) / 32, "block_linear with bias")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads", [(3, 1, 64), (4, 4, 80), (8, 2, 96), (8, 1, 128), (2, 1, 256)], ids=str)
def test_qkv_write(ops: Ops, seed: int, dtype: torch.dtype, norm: bool, heads: tuple[int, int, int]) -> None:
    check_qkv_write(ops, NaiveOps(), Inputs(seed, DEVICE, dtype), heads, norm)


def test_qkv_write_rounds_to_the_pools_dtype(ops: Ops, seed: int) -> None:
    check_qkv_write(ops, NaiveOps(), Inputs(seed, DEVICE, torch.float32), (3, 1, 64), False, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 1, 64), (2, 2, 80), (4, 1, 96), (8, 1, 128), (4, 1, 256)], ids=str)
@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
def test_attention(
    attention_ops: Ops, seed: int, dtype: torch.dtype, heads: tuple[int, int, int], step: tuple[list[int], list[int]]
) -> None:
    skip_if_interpreted(attention_ops, dtype)
    check_attention(attention_ops, NaiveOps(), Inputs(seed, DEVICE, dtype), heads, *step)


@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(("window", "soft_cap"), [(1, 0.0), (9, 0.0), (34, 2.0), (1000, 0.0), (None, 2.0)])
def test_attention_window_and_cap(
    attention_ops: Ops, seed: int, window: int | None, soft_cap: float, step: tuple[list[int], list[int]]
) -> None:
    inputs = Inputs(seed, DEVICE, torch.float32)
    check_attention(attention_ops, NaiveOps(), inputs, (3, 1, 64), *step, window=window, soft_cap=soft_cap)


@pytest.mark.parametrize("window", [None, 140])
@pytest.mark.parametrize(("q_lens", "kv_lens"), [([1, 1], [300, 7]), ([2, 1], [290, 5]), ([70], [270])], ids=str)
def test_attention_over_long_contexts(
    attention_ops: Ops, seed: int, q_lens: list[int], kv_lens: list[int], window: int | None
) -> None:
    """Long enough to be split, by more programs than the short row has turns."""
    inputs = Inputs(seed, DEVICE, torch.float32)
    check_attention(attention_ops, NaiveOps(), inputs, (3, 1, 64), q_lens, kv_lens, window=window)


@pytest.mark.parametrize("step", [MIXED, DECODE], ids=["mixed", "decode"])
def test_attention_with_padded_rows_and_loose_bounds(
    attention_ops: Ops, seed: int, step: tuple[list[int], list[int]]
) -> None:
    inputs = Inputs(seed, DEVICE, torch.float32)
    check_attention(attention_ops, NaiveOps(), inputs, (4, 2, 64), *step, pad=3, max_kv=260)
    check_attention(attention_ops, NaiveOps(), inputs, (4, 2, 64), *step, pad=1, max_q=40)


def test_attention_over_many_rows(ops: Ops, seed: int) -> None:
    """More rows than one turn of the search for a q-block's row."""
    inputs = Inputs(seed, DEVICE, torch.float32)
    lens = [int(n) for n in inputs.integers(1, 4, 132)]
    check_attention(ops, NaiveOps(), inputs, (1, 1, 64), [1] * 131 + [lens[-1]], lens, max_q=5)


def test_attention_of_a_poisoned_row_is_its_own_affair(attention_ops: Ops, seed: int) -> None:
    """NaN in one row's context shows in that row, not in its neighbours of the step."""
    inputs = Inputs(seed, DEVICE, torch.float32)
    layout, used = make_step(inputs, [4, 1, 5], [300, 300, 9])
    kv = LayerKV(*(inputs.normal(int(layout.slot_of.max()) + 1, 1, 64) for _ in range(2)))
    kv.k[layout.slot_of[layout.rows[1], 5].long()] = float("nan")
    q = inputs.normal(10, 2, 64)
    out = attention_ops.attention(q, kv, layout, 0.125)
    assert out[4].isnan().all()
    assert not out[:4].isnan().any()
    assert not out[5:].isnan().any()
    assert len(used) == 609


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (5, 300), (4, 5000)])
def test_argmax(ops: Ops, seed: int, dtype: torch.dtype, n: int, vocab: int) -> None:
    check_argmax(ops, NaiveOps(), Inputs(seed, DEVICE, dtype), n, vocab)


@pytest.mark.parametrize(("n", "vocab"), [(1, 1), (7, 300), (6, 5000)])
def test_gumbel_argmax(ops: Ops, seed: int, n: int, vocab: int) -> None:
    check_gumbel(ops, NaiveOps(), Inputs(seed, DEVICE, torch.float32), n, vocab)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "vocab"), [(1, 33), (6, 4100)])
def test_draw_and_place(ops: Ops, seed: int, dtype: torch.dtype, n: int, vocab: int) -> None:
    check_draw(ops, ReferenceOps(), Inputs(seed, DEVICE, dtype), n, vocab)
    check_place(ops, Inputs(seed, DEVICE, dtype), n)


def test_gumbel_argmax_does_not_depend_on_the_batch(ops: Ops, seed: int) -> None:
    logits, temperature, seeds, positions = noisy_logits(Inputs(seed, DEVICE, torch.float32), 8, 3000)
    whole = ops.gumbel_argmax(logits, temperature, seeds, positions)
    order = torch.tensor([5, 0, 7, 2], device=DEVICE)
    part = ops.gumbel_argmax(logits[order], temperature[order], seeds[order], positions[order])
    assert torch.equal(part, whole[order])


def test_gumbel_argmax_follows_the_softmax(ops: Ops, seed: int) -> None:
    """Pearson's chi-square over 4,096 draws of 12 tokens (11 degrees of freedom: 44.7 has a chance of 5 in a million).

    Half of the draws differ in the seed alone, half in the position alone, as do those of one request.
    """
    if ops.name == "triton" and INTERPRETED:
        pytest.skip("4,096 rows take the interpreter minutes; test_gumbel_argmax holds it to the same noise")
    inputs = Inputs(seed, DEVICE, torch.float32)
    n, temperature = 4096, 0.8
    logits = inputs.normal(12, dtype=torch.float32)
    one = int(inputs.integers(0, 2**62, 1))
    seeds = torch.cat((inputs.integers(-(2**63), 2**63 - 1, n // 2), torch.full((n // 2,), one, device=DEVICE)))
    positions = torch.arange(n, device=DEVICE)
    positions[: n // 2] = 17
    probability = torch.softmax(logits.double() / temperature, -1)
    hot = torch.full((n,), temperature, device=DEVICE)
    drawn = ops.gumbel_argmax(logits.expand(n, 12).contiguous(), hot, seeds, positions)
    count = torch.bincount(drawn, minlength=12).double()
    assert float(((count - n * probability) ** 2 / (n * probability)).sum()) < 44.7


def test_noise_is_finite_at_both_ends() -> None:
    """The hash's extremes: a noise of infinity would win over any logit."""
    for h in (0, 2**32 - 1):
        u = torch.tensor((float(h >> 9) + 0.5) * 2.0**-23, dtype=torch.float32)
        assert 0 < float(u) < 1
        assert torch.isfinite(-torch.log(-torch.log(u)))


def test_reference_noise_is_the_documented_one(seed: int) -> None:
    from septet.kernels.reference import gumbel_noise

    inputs = Inputs(seed, torch.device("cpu"), torch.float32)
    seeds, positions = inputs.integers(-(2**63), 2**63 - 1, 4), inputs.integers(0, 2**31, 4)
    got = gumbel_noise(seeds, positions, 50)
    want = [[noise(int(s), int(p), v) for v in range(50)] for s, p in zip(seeds, positions, strict=True)]
    torch.testing.assert_close(got.double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_an_unknown_activation_is_refused(ops: Ops) -> None:
    with pytest.raises(ValueError, match="silu or gelu_tanh"):
        ops.gated_act(torch.zeros(1, 4, device=DEVICE), "relu")


def test_empty_steps(ops: Ops) -> None:
    """No tokens, no rows: shapes without elements, no launch."""
    x = torch.zeros(0, 64, device=DEVICE)
    assert ops.rms_norm(x, torch.ones(64, device=DEVICE), 1e-5).shape == (0, 64)
    assert ops.gated_act(x, "silu").shape == (0, 32)
    assert ops.argmax(x).shape == (0,)
    ids = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert ops.embed(ids, torch.ones(3, 64, device=DEVICE)).shape == (0, 64)


def test_triton_embeds_an_unknown_id_as_nan() -> None:
    triton = pytest.importorskip("septet.kernels.triton")
    ids = torch.tensor([-1, 2, 3, 2**40], device=DEVICE)
    out = triton.TritonOps().embed(ids, torch.ones(3, 70, device=DEVICE))
    assert out.isnan().all(1).tolist() == [True, False, True, True]
    assert (out[1] == 1).all()


@pytest.mark.parametrize(("ratio", "max_q", "n_sms"), list(itertools.product([1, 3, 4, 8, 32], [1, 2, 500], [1, 132])))
def test_tiles_cover_every_token(seed: int, ratio: int, max_q: int, n_sms: int) -> None:
    """The number of q-blocks is an upper bound for any division of the tokens, and each finds its row."""
    tiles = pytest.importorskip("septet.kernels.triton.tiles")
    inputs = Inputs(seed, torch.device("cpu"), torch.float32)
    for _ in range(20):
        q_lens = inputs.integers(1, max_q + 1, int(inputs.integers(1, 40, 1))).tolist()
        t = tiles.choose(sum(q_lens), len(q_lens), 2 * ratio, 2, 64, 2, max_q, 4096, n_sms)
        assert t.block_m >= t.ratio * t.block_q > 0
        start, last = 0, -1
        for row, n in enumerate(q_lens):
            first = row if t.decode else start // t.block_q + row
            assert first > last, "two rows share a block"
            last = first + -(-n // t.block_q) - 1
            start += n
        assert last < t.n_blocks(sum(q_lens), len(q_lens))
