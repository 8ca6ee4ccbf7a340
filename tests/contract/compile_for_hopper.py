"""Compile every Triton kernel for Hopper, which needs no GPU, and print what matters of the result as JSON.

Run as a script by test_compile.py, in a process of its own: the contract tests' process interprets its kernels. What
the interpreter can't show is seen here: that bfloat16 compiles, shared memory suffices, loads are 16 bytes wide and
asynchronous, products use wgmma.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from septet.kernels.triton import act, attention, decode, embed, gemv, norm, prefix, qkv, sample, skinny
from septet.kernels.triton.tiles import choose, decode_splits, decode_tile, prefix_tile

HOPPER = GPUTarget("cuda", 90, 32)
BF16, F32, I64, I32 = "*bf16", "*fp32", "*i64", "*i32"
KINDS = {"top_ptr": F32, "total_ptr": F32, "acc_ptr": F32, "value_ptr": F32, "temperature_ptr": F32}
KINDS |= {"cos_sin_ptr": F32, "logits_ptr": F32, "index_ptr": I32, "q_start_ptr": I32, "kv_len_ptr": I32}
KINDS |= {"arrived_ptr": I32, "line_ptr": I64, "shared_ptr": I64}
KINDS |= {"pre_acc_ptr": F32, "pre_top_ptr": F32, "pre_total_ptr": F32}
KINDS |= {"slot_of_ptr": I32, "ids_ptr": I64, "slots_ptr": I64, "positions_ptr": I64, "rows_ptr": I64, "seeds_ptr": I64}
FLOATS = {"eps", "scale", "cap"}
ALIGNED = {
    "D",
    "F",
    "V",
    "N",
    "stride",
    "k_stride",
    "v_stride",
    "slot_of_stride",
    "part_stride",
}  # multiples of 16 in every real model


def compile_one(fn: Any, const: dict[str, Any], num_warps: int, num_stages: int = 3, **kinds: str) -> dict[str, Any]:
    signature, hints = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in const:
            signature[name] = "constexpr"
            continue
        pointer = name.endswith("_ptr")
        default = KINDS.get(name, BF16) if pointer else "fp32" if name in FLOATS else "i32"
        signature[name] = kinds.get(name, default)
        if pointer or name in ALIGNED:
            hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=const, attrs=hints)
    kernel = triton.compile(source, target=HOPPER, options={"num_warps": num_warps, "num_stages": num_stages})
    ptx = kernel.asm["ptx"]
    return {
        "shared_bytes": kernel.metadata.shared,
        **usage_of(kernel.asm["cubin"]),
        "turns_ahead": any(int(n, 0) > 0 for n in re.findall(r"cp\.async\.wait_group\s+(\w+)", ptx)),
        "async_copies": len(re.findall(r"cp\.async\.cg\.shared\.global[^;]*, 0x10", ptx)),
        "wide_loads": ptx.count("ld.global.v4.b32"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
    }


def usage_of(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of them that had to go to memory."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found, said
    return {"registers": int(found[1]), "spilled_bytes": int(found[2])}


def attention_of(n_tokens: int, n_rows: int, dim: int, window: bool = False, cap: bool = False) -> dict[str, Any]:
    n_heads, n_kv, max_q = 32, 8, 1 if n_tokens == n_rows else n_tokens
    t = choose(n_tokens, n_rows, n_heads, n_kv, dim, 2, max_q, 8192, 132)
    const = {"G": n_kv, "E": dim, "RATIO": t.ratio, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n, "BLOCK_D": t.block_d}
    const |= {"BLOCK_Q": t.block_q, "DECODE": t.decode, "SPLIT": t.splits > 1, "WINDOW": window, "CAP": cap}
    out = F32 if t.splits > 1 else BF16
    return compile_one(attention._attention_kernel, const, t.num_warps, t.num_stages, out_ptr=out)


def gemv_of(n_out: int, n_in: int, act: bool = False) -> dict[str, Any]:
    s = gemv.shape_of(n_out, n_in, act)
    const = {"K": n_in, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k}
    const |= {"EVEN_N": n_out % s.block_n == 0, "NORM": act, "ACT": act, "GELU": False, "RESIDUAL": not act}
    return compile_one(gemv._gemv_kernel, {**const, "BIAS": False, "PDL": True}, s.num_warps)


def skinny_of(n_out: int, n_in: int, rows: int, act: bool = False) -> dict[str, Any]:
    s = skinny.shape_of(n_out, n_in, rows, act)
    const = {"K": n_in, "SPLITS": s.splits, "BLOCK_M": rows, "BLOCK_N": s.block_n, "BLOCK_K": s.block_k}
    const |= {"STAGES": s.num_stages, "AHEAD": s.ahead, "ACT": act, "GELU": False, "BIAS": False, "PDL": True}
    return compile_one(skinny._skinny_kernel, const, s.num_warps, out_ptr=BF16 if s.splits == 1 else F32)


def prefix_of(rows: int, dim: int, parts: int) -> dict[str, Any]:
    t = prefix_tile(rows, 8, 4, 2 * dim, 132)
    const = {"G": 8, "E": dim, "RATIO": 4, "HEADS": 4, "SHARES": t.shares, "PARTS": parts, "BLOCK_M": t.block_m}
    const |= {"BLOCK_N": t.block_n, "BLOCK_E": dim, "STAGES": t.num_stages, "KIND": tl.bfloat16, "NORM": False}
    kind = BF16 if parts == 1 else F32
    const |= {"CAP": False, "PDL": True}
    return compile_one(prefix._prefix_kernel, const, t.num_warps, qkv_ptr=kind, acc_ptr=F32, shared_ptr=I64)


def decode_of(rows: int, dim: int, parts: int, extras: bool = False, shared: bool = False) -> dict[str, Any]:
    splits = decode_splits(rows, 8, 8192, 132)
    t = decode_tile(8 * rows, 2 * dim, 132)
    const = {"G": 8, "E": dim, "RATIO": 4, "SPLITS": splits, "PARTS": parts, "BLOCK_M": 16, "BLOCK_N": t.block_n}
    const |= {
        "BLOCK_E": dim,
        "STAGES": t.num_stages,
        "LEAST": t.least,
        "PRELOAD": t.preload,
        "AHEAD": rows == 1,
        "SHARES": prefix_tile(rows, 8, 4, 2 * dim, 132).shares if shared else 0,
        "HEADS": 4,
        "SHARED_BLOCK": 64,
        "NORM": extras,
        "WINDOW": extras,
    }
    kind = BF16 if parts == 1 else F32
    return compile_one(decode._decode_kernel, {**const, "CAP": extras, "PDL": True}, t.num_warps, qkv_ptr=kind)


def main() -> None:
    heads = {"H": 32, "G": 8, "E": 128, "BLOCK_H": 8, "BLOCK_E": 64}
    print(
        json.dumps(
            {
                "norm": compile_one(norm._norm_kernel, {"PARTS": 1, "ADD": True, "BLOCK": 2048, "PDL": True}, 8),
                "act": compile_one(act._gated_act_kernel, {"GELU": True, "BLOCK": 1024}, 4),
                "embed": compile_one(embed._embed_kernel, {"BLOCK": 1024}, 4),
                "qkv": compile_one(qkv._qkv_kernel, {**heads, "NORM": True}, 2),
                "gumbel": compile_one(
                    sample._block_kernel,
                    {"NOISE": True, "MASK": True, "ROWS": True, "BLOCK": 2048, "PDL": True},
                    4,
                    mask_ptr="*i32",
                ),
                "best": compile_one(
                    sample._merge_kernel,
                    {"BLOCK": 64, "WRITE": True, "PDL": True},
                    1,
                    out_ptr=I64,
                    tokens_ptr=I32,
                ),
                "merge": compile_one(attention._merge_kernel, {"E": 64, "SPLITS": 32, "BLOCK_D": 64}, 4),
                "norm of parts": compile_one(
                    norm._norm_kernel, {"PARTS": 4, "ADD": True, "BLOCK": 4096, "PDL": True}, 16, x_ptr=F32
                ),
                "gemv": gemv_of(4096, 14336),
                "gemv, pair": gemv_of(8192, 2048, act=True),
                "skinny 32 rows": skinny_of(4096, 14336, 32),
                "skinny 64 rows, pair": skinny_of(8192, 2048, 64, act=True),
                "decode 1 row": decode_of(1, 64, 1),
                "decode 32 rows of parts": decode_of(32, 128, 4),
                "decode 64 rows": decode_of(64, 128, 1),
                "decode 64 rows after a prefix": decode_of(64, 128, 1, shared=True),
                "prefix of 64 rows": prefix_of(64, 128, 1),
                "prefix of 16 rows of parts": prefix_of(16, 64, 4),
                "decode 128 rows, norms, window, cap": decode_of(128, 128, 1, extras=True),
                "attention decode, 1 row": attention_of(1, 1, 64),
                "attention decode, 64 rows": attention_of(64, 64, 128),
                "attention prefill": attention_of(2048, 1, 128),
                "attention prefill, wide, window, cap": attention_of(2048, 1, 256, window=True, cap=True),
                "attention mixed": attention_of(256, 33, 64),
            }
        )
    )


if __name__ == "__main__":
    main()
