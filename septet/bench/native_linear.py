"""The native matrix kernels by themselves: `python -m septet.bench.native_linear [--check] [--kinds Q4_0,Q6_K]`.

Times one pass over weights that no cache holds, with inputs quantised beforehand and a barrier after each weight, as in
a model's step, and puts beside it a probe of the read bandwidth taken before and after. `--check` instead compares each
block type on each path that this CPU has with a float64 product and ends with status 1 if one is wrong: the self-test
for a machine that Septet has not met. Medians; other work on the machine shows, so look at the ratios.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from septet.bench.host import head, write_results
from septet.geometry import BLOCKS
from septet.kernels.native.library import Library, Pool, choose_path, load
from septet.kernels.native.pack import KINDS, PackedMatrix, Packer

if TYPE_CHECKING:
    import torch

__all__ = ["Figure", "check", "main", "measure"]

N, K = 3072, 1536
TOKENS = (1, 2, 4, 8, 32, 512)
WORKING_SET = 128 << 20  # bytes of weights: more than the caches hold
PROBE = 128 << 20


@dataclass(frozen=True, slots=True)
class Figure:
    """One block type at T tokens: weight bytes read and multiply-adds (times two) a second."""

    kind: str
    path: str
    threads: int
    tokens: int
    gb_s: float
    gop_s: float
    of_probe: float  # share of the read bandwidth probed beside it


def random_weight(
    packer: Packer, kind: str, n: int, k: int, generator: torch.Generator
) -> tuple[PackedMatrix, torch.Tensor]:
    """-> (packed, its bytes as uint8 (n, row bytes)). Small codes, float16 numbers below one."""
    import torch

    elements, size = BLOCKS[kind]
    blocks = torch.randint(0, 56, (n, k // elements * size), dtype=torch.uint8, generator=generator)
    return packer.pack(blocks, kind), blocks


def probe(library: Library, pool: Pool) -> float:
    """Read bandwidth of all threads, bytes a second."""
    return float(library.septet_probe_bandwidth(pool.handle, PROBE, 5))


def measure(library: Library, pool: Pool, kind: str, path: str, tokens: tuple[int, ...] = TOKENS) -> list[Figure]:
    """Times `kind` at each number of tokens."""
    import torch

    generator = torch.Generator().manual_seed(0)
    packer = Packer(library, pool, path)
    first, blocks = random_weight(packer, kind, N, K, generator)
    weights = [first, *(packer.pack(blocks, kind) for _ in range(WORKING_SET // first.n_bytes))]
    figures = []
    for t in tokens:
        count = max(1, min(len(weights), 12_000_000_000 // (2 * N * K * t)))  # a pass of a fraction of a second
        handles = (ctypes.c_void_p * count)(*(w.handle for w in weights[:count]))
        x, y = torch.randn(t, K, generator=generator), torch.empty(t, N)
        where = ctypes.cast(x.data_ptr(), ctypes.POINTER(ctypes.c_float))
        before = probe(library, pool)
        seconds = library.septet_bench_linear(pool.handle, handles, count, where, t, y.data_ptr(), 7)
        bandwidth = (before + probe(library, pool)) / 2
        rate = first.n_bytes * count / seconds
        figures.append(
            Figure(
                kind=kind,
                path=path,
                threads=pool.threads,
                tokens=t,
                gb_s=rate / 1e9,
                gop_s=2 * N * K * t * count / seconds / 1e9,
                of_probe=rate / bandwidth,
            )
        )
    return figures


def check(library: Library, pool: Pool, kind: str, path: str) -> float:
    """Largest error of a product over the sum of |x w|, inputs quantised by the same rule on both sides.

    Below 1e-6 is right; bfloat16 through VDPBF16PS rounds its input: below 4e-3.
    """
    import torch

    from septet.kernels import ggml

    generator = torch.Generator().manual_seed(1)
    worst = 0.0
    for n, k in ((37, 512), (96, 768)):
        packed, blocks = random_weight(Packer(library, pool, path), kind, n, k, generator)
        weight = ggml.dequantize(blocks, kind, torch.float32).double()
        for t in (1, 3, 7, 8, 33):
            x = torch.randn(t, k, generator=generator)
            seen = x.double()
            if kind not in ("F32", "F16", "BF16"):
                parts = x.view(t, -1, 64)
                most = parts.abs().amax(-1, keepdim=True)
                codes = torch.round(parts * (torch.full_like(most, 127.0) / most))
                seen = (codes.double() * (most / 127.0).double()).view(t, k)
            error = (packed.linear(pool, x).double() - seen @ weight.T).abs() / (seen.abs() @ weight.abs().T)
            worst = max(worst, float(error.max()))
    return worst


def check_all(library: Library, pool: Pool, kinds: list[str]) -> int:
    """Prints a line for each path and type; 1 if one is wrong."""
    status = 0
    for path in library.paths:
        for kind in kinds:
            error = check(library, pool, kind, path)
            rounded = kind == "BF16" and path == "avx512" and library.septet_has_bf16()
            right = error < (4e-3 if rounded else 1e-6)
            status |= not right
            print(f"{path:<9}{kind:<7} error {error:.1e}  {'ok' if right else 'WRONG'}")
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare all paths with a float64 product")
    parser.add_argument("--kinds", default="", help="block types, separated by commas (all)")
    parser.add_argument("--threads", type=int, default=0, help="0 = as many as affinity and quota give")
    parser.add_argument("--path", default="", help="portable, avx2 or avx512 (the best)")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args(argv)
    library = load()
    pool = Pool(library, options.threads)
    kinds = options.kinds.split(",") if options.kinds else list(KINDS)
    if options.check:
        return check_all(library, pool, kinds)
    path, reason = choose_path(library, options.path)
    print(f"path {path} ({reason}), {pool.threads} threads, {N} x {K}, probe {probe(library, pool) / 1e9:.1f} GB/s")
    figures = []
    for kind in kinds:
        for figure in measure(library, pool, kind, path):
            figures.append(figure)
            print(
                f"{kind:<7} T {figure.tokens:>4}  {figure.gb_s:7.1f} GB/s ({figure.of_probe:4.0%} of the probe)"
                f"  {figure.gop_s:7.0f} GOP/s"
            )
    if options.json:
        write_results(options.json, head("native_linear"), figures=[asdict(f) for f in figures])
    return 0


if __name__ == "__main__":
    sys.exit(main())
