"""What Triton's ops fuse in small steps gives what the reference gives: a layer, chained as the models chain it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from op_checks import TOLERANCE, Inputs, make_step

from septet.kernels.ops import LayerKV, Ops
from septet.kernels.reference import ReferenceOps

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
H, G, D, F, V = 8, 2, 512, 512, 192
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
LENGTHS = [[1], [300, 5, 129]]
if ON_GPU:
    LENGTHS += [[200], [33] * 17, [700] * 64, [1 + 97 * i % 2003 for i in range(80)]]
KINDS = [("silu", 4096), ("gelu", 1)] + ([("silu", 1), ("gelu", 4096), ("gelu", 40), ("silu", 132)] if ON_GPU else [])
CASES = [(lengths, *kind, 64) for lengths in LENGTHS for kind in KINDS] + [([300, 5, 129], "silu", 3, 80)]

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def layer(
    ops: Ops, inputs: Inputs, lengths: list[int], kind: str, dim: int, shared: int = 0
) -> dict[str, torch.Tensor]:
    """Random weights of one layer and a head, and a decode step over contexts of these lengths, of which the first
    `shared` positions lie in the same slots."""
    norms = kind == "gelu"  # and per-head norms, a window, biases and a soft cap
    x, residual = inputs.normal(len(lengths), D), inputs.normal(len(lengths), D)
    w1, w2, w3 = (1 + inputs.normal(D) / 4 for _ in range(3))
    q_norm, k_norm = (1 + inputs.normal(dim) / 4 for _ in range(2))
    qkv_w, out_w = inputs.normal((H + 2 * G) * dim, D) / 16, inputs.normal(D, H * dim) / 16
    gate_up, down, head = inputs.normal(2 * F, D) / 16, inputs.normal(D, F) / 16, inputs.normal(V, D) / 16
    bias = [inputs.normal(n) if norms else None for n in ((H + 2 * G) * dim, D, 2 * F)]
    layout, _ = make_step(inputs, [1] * len(lengths), lengths)
    if shared:
        for row, length in zip(layout.rows.tolist()[1:], lengths[1:], strict=True):
            if length > shared:
                layout.slot_of[row, :shared] = layout.slot_of[layout.rows[0], :shared]
        layout = replace(layout, shared=torch.tensor([shared], device=DEVICE))
    n_slots = int(layout.slot_of.max()) + 1
    kv = LayerKV(inputs.normal(n_slots, G, dim), inputs.normal(n_slots, G, dim))
    angles = torch.arange(max(lengths) + 1)[:, None] * torch.linspace(1, 0.01, dim // 2)
    cos_sin = torch.cat((angles.cos(), angles.sin()), 1).to(DEVICE)

    x, residual = ops.add_rms_norm(x, residual, w1, 1e-5)
    per_head = (q_norm, k_norm, 1e-6) if norms else ()
    q = ops.qkv_write(ops.linear(x, qkv_w, bias[0]), kv, layout, cos_sin, *per_head)
    attended = ops.attention(q, kv, layout, dim**-0.5, 40 if norms else None, 30.0 if norms else 0.0)
    x, residual = ops.add_rms_norm(ops.linear(attended, out_w, bias[1]), residual, w2, 1e-5)
    x = ops.linear(ops.gated_act(ops.linear(x, gate_up, bias[2]), "gelu_tanh" if norms else "silu"), down)
    after = ops.rms_norm(x, w3, 1e-5)  # Gemma norms a block's output before it is added
    x, residual = ops.add_rms_norm(x, residual, w3, 1e-5)
    logits = ops.value(ops.linear(x, head))
    return {
        "attended": ops.value(attended),
        "residual": ops.value(residual),
        "after": ops.value(after),
        "normed": ops.value(x),
        "logits": logits,
        "k": kv.k[layout.slots],
        "v": kv.v[layout.slots],
    }


def _short(value: object) -> str:
    return f"{len(value)} rows" if isinstance(value, list) else str(value)


def _says(name: str, message: str) -> str:
    return f"{name}: {message}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("lengths", "kind", "n_sms", "dim"), CASES, ids=_short)
def test_a_layer_in_a_decode_step(
    seed: int, dtype: torch.dtype, kind: str, lengths: list[int], n_sms: int, dim: int
) -> None:
    """n_sms 1: no context is split; 4,096: each is, as far as its length allows; 3: those of more than 256 tokens."""
    ops = pytest.importorskip("septet.kernels.triton").TritonOps(n_sms=n_sms)
    got = layer(ops, Inputs(seed, DEVICE, dtype), lengths, kind, dim)
    want = layer(ReferenceOps(), Inputs(seed, DEVICE, dtype), lengths, kind, dim)
    for name in want:
        assert got[name].dtype == want[name].dtype
        limit = TOLERANCE[dtype] * 4
        torch.testing.assert_close(
            got[name].double(), want[name].double(), rtol=limit, atol=limit, msg=partial(_says, name)
        )
    assert ops._arrived is None or not ops._arrived.any(), "counters are left as they were found"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "n_sms", "dim"), [("plain", 4, 64), ("plain", 64, 64), ("plain", 132, 80), ("gelu", 1, 64)]
)
@pytest.mark.parametrize("shared", [256, 129] + [1024] * ON_GPU)
def test_a_decode_step_of_rows_with_one_beginning(
    seed: int, dtype: torch.dtype, kind: str, n_sms: int, dim: int, shared: int
) -> None:
    """What all rows share is read once for many of them; a row that ends before it, as padding does, is not touched;
    one with a window reads its own. 0 is what a step says whose rows share nothing."""
    lengths = [shared + 90, shared + 1, 1, shared, shared + 301, *([shared + 2] * 17 if shared < 256 or ON_GPU else [])]
    if ON_GPU:
        lengths += [shared + 7 * i for i in range(1, 40)]
    ops = pytest.importorskip("septet.kernels.triton").TritonOps(n_sms=n_sms)
    want = layer(ReferenceOps(), Inputs(seed, DEVICE, dtype), lengths, kind, dim, shared)
    got = layer(ops, Inputs(seed, DEVICE, dtype), lengths, kind, dim, shared)
    limit = TOLERANCE[dtype] * 4
    for name in want:
        torch.testing.assert_close(
            got[name].double(), want[name].double(), rtol=limit, atol=limit, msg=partial(_says, name)
        )


def test_small_steps_are_fused_and_large_ones_are_not(seed: int) -> None:
    ops = pytest.importorskip("septet.kernels.triton").TritonOps()
    inputs = Inputs(seed, DEVICE, torch.float32)
    weight = inputs.normal(64, D)
    assert not isinstance(ops.linear(inputs.normal(1, D), weight), torch.Tensor)
    assert not isinstance(ops.linear(inputs.normal(128, D), weight), torch.Tensor)
    assert isinstance(ops.linear(inputs.normal(129, D), weight), torch.Tensor)
    assert isinstance(ops.linear(inputs.normal(5, 24), inputs.normal(3, 24)), torch.Tensor), "uneven: cuBLAS"
