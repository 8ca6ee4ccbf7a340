"""Packed weights and the native matrix kernels, each path this CPU has, against torch in float64.

Quantised weights: the reference quantises the activations by the same rule, so that integer products are exact on both
sides and only the order of float additions differs. Dense weights: float64 products. Shapes are awkward on purpose.

SEPTET_TEST_LIBRARY names another build of the library: the avx512 path on a CPU without it is tested by
`python csrc/build.py --emulate-avx512 FILE`, then that file as SEPTET_TEST_LIBRARY and SEPTET_CPU_PATH=avx512
(and again with SEPTET_EMULATE_BF16=1). Compiling that takes a few minutes.
"""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from septet.errors import InvalidRequest, UnsupportedModel
from septet.geometry import BLOCKS
from septet.kernels import ggml
from septet.kernels.native.library import FILE, Library, NativeUnavailable, Pool, choose_path, load
from septet.kernels.native.pack import KINDS, PackedMatrix, Packer
from septet.machine import usable_cpus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

BUILT = Path(os.environ.get("SEPTET_TEST_LIBRARY", FILE))
pytestmark = pytest.mark.skipif(not BUILT.exists(), reason="the native library is not built here (no C++ compiler)")

LIBRARY = load(BUILT) if BUILT.exists() else None
PATHS = LIBRARY.paths if LIBRARY else []
DENSE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
QUANTISED = [kind for kind in KINDS if kind not in DENSE]
TOKENS = (1, 2, 3, 7, 8, 33, 130)
HALVES = {  # bytes at which a block has float16 numbers
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip


@pytest.fixture(scope="module")
def library() -> Library:
    return load(BUILT)


@pytest.fixture(scope="module")
def pool(library: Library) -> Pool:
    return Pool(library, 2)


def random_blocks(kind: str, n: int, k: int, generator: torch.Generator) -> Tensor:
    """Any bytes are valid blocks, but for the float16 numbers, which are made ordinary: (n, row bytes) uint8."""
    elements, size = BLOCKS[kind]
    blocks = torch.randint(0, 256, (n * k // elements, size), dtype=torch.uint8, generator=generator)
    for at in HALVES[kind]:
        blocks[:, at : at + 2] = (torch.randn(len(blocks), 1, generator=generator) * 0.05).half().view(torch.uint8)
    return blocks.view(n, -1)


def quantised(x: Tensor) -> Tensor:
    """x (T, K) as the kernels see it: int8 with a float32 scale for each 64 (the last ones: 32), in float64."""
    n, k = x.shape
    blocks = torch.nn.functional.pad(x, (0, -k % 64)).view(n, -1, 64)
    most = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, torch.full_like(most, 127.0) / most, 0.0)
    return (torch.round(blocks * inverse).double() * (most / 127.0).double()).view(n, -1)[:, :k]


def make(packer: Packer, kind: str, n: int, k: int, generator: torch.Generator) -> tuple[PackedMatrix, Tensor]:
    """-> (packed, the same weight in float32)."""
    if kind in DENSE:
        weight = torch.randn(n, k, generator=generator).to(DENSE[kind])
        return packer.pack_dense(weight), weight.float()
    blocks = random_blocks(kind, n, k, generator)
    return packer.pack(blocks, kind), ggml.dequantize(blocks, kind, torch.float32)


def shapes(kind: str) -> list[tuple[int, int]]:
    if kind in DENSE:
        return [(48, 576), (37, 45), (1, 1), (113, 256)]
    return [(48, 512), (37, 256), (1, 256), (113, 768)] + ([(33, 96), (80, 32)] if BLOCKS[kind][0] == 32 else [])


def tolerance(library: Library, path: str, kind: str) -> float:
    """Error over the sum of |x w|. VDPBF16PS rounds its input to 8 bits of mantissa, all others work in float32."""
    return 2.0**-8 if kind == "BF16" and path == "avx512" and library.septet_has_bf16() else 1e-6


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("path", PATHS)
def test_product(library: Library, pool: Pool, path: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(len(kind) * 31 + KINDS[kind])
    packer = Packer(library, pool, path)
    for n, k in shapes(kind):
        packed, weight = make(packer, kind, n, k, generator)
        for tokens in TOKENS:
            x = torch.randn(tokens, k, generator=generator) * torch.logspace(-3, 3, tokens)[:, None]
            bias = torch.randn(n, generator=generator) if tokens % 2 else None
            seen = x.double() if kind in DENSE else quantised(x)
            want = seen @ weight.double().T + (0.0 if bias is None else bias.double())
            size = seen.abs() @ weight.double().abs().T + (0.0 if bias is None else bias.double().abs())
            error = ((packed.linear(pool, x, bias).double() - want).abs() / size.clamp(min=1e-30)).max()
            assert error < tolerance(library, path, kind), (n, k, tokens)


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("path", PATHS)
def test_token_does_not_see_its_batch(library: Library, path: str, kind: str) -> None:
    """One token's outputs are the same bits in any batch, at any place of it, on any number of threads."""
    generator = torch.Generator().manual_seed(7)
    one, three = Pool(library, 1), Pool(library, 3)
    packed, _ = make(Packer(library, one, path), kind, 117, 256, generator)
    x = torch.randn(130, 256, generator=generator)
    whole = packed.linear(three, x)
    for tokens in (1, 2, 3, 8, 17, 64):
        assert torch.equal(packed.linear(one, x[:tokens]), whole[:tokens]), tokens
    for start, end in ((129, 130), (5, 7), (11, 14), (20, 27), (40, 73), *((i, i + 1) for i in range(0, 129, 5))):
        assert torch.equal(packed.linear(one, x[start:end]), whole[start:end]), (start, end)


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_are_ggufs_numbers(library: Library, pool: Pool, kind: str) -> None:
    generator = torch.Generator().manual_seed(11)
    for n, k in shapes(kind):
        packed, weight = make(Packer(library, pool), kind, n, k, generator)
        ids = torch.randint(0, n, (9,), generator=generator)
        assert torch.equal(packed.rows(ids), weight[ids])
    with pytest.raises(IndexError):
        packed.rows(torch.tensor([0, n]))
    with pytest.raises(IndexError):
        packed.rows(torch.tensor([-1]))


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("path", PATHS)
def test_extremes_are_exact(library: Library, pool: Pool, path: str, kind: str) -> None:
    """Largest codes against largest inputs, all signs alike: int16 sums must neither saturate nor wrap."""
    generator = torch.Generator().manual_seed(3)
    packer = Packer(library, pool, path)
    for fill in (0x00, 0xFF, 0x80, 0x7F):
        blocks = torch.full((16, BLOCKS[kind][1]), fill, dtype=torch.uint8)
        for at in HALVES[kind]:
            blocks[:, at : at + 2] = torch.full((16, 1), 0.25).half().view(torch.uint8)
        packed, weight = packer.pack(blocks, kind), ggml.dequantize(blocks, kind, torch.float32)
        sign = torch.where(torch.rand(9, weight.shape[1], generator=generator) < 0.5, -1.0, 1.0)
        sign[0], sign[1] = 1.0, -1.0
        x = sign * 127.0
        want = x.double() @ weight.double().T
        size = x.double().abs() @ weight.double().abs().T
        assert ((packed.linear(pool, x).double() - want).abs() <= 1e-6 * size).all(), hex(fill)


def near_scales(n: int, k: int, far: Sequence[int], generator: torch.Generator) -> Tensor:
    """Q4_0 blocks whose scales are all within a factor of 8; in rows `far` one is 2**-20 of another."""
    blocks = random_blocks("Q4_0", n, k, generator).view(n, k // 32, 18)
    sign = torch.where(torch.rand(n, k // 32, 1, generator=generator) < 0.5, -1.0, 1.0)
    blocks[..., :2] = (sign * (0.005 + 0.035 * torch.rand(sign.shape, generator=generator))).half().view(torch.uint8)
    for row in far:
        blocks[row, 0, :2] = torch.tensor([8.0 + 1 / 128]).half().view(torch.uint8)
        blocks[row, 1, :2] = torch.tensor([2.0**-17]).half().view(torch.uint8)
    return blocks.view(n, -1)


@pytest.mark.parametrize("k", [32, 96, 576, 800, 1632])
@pytest.mark.parametrize("path", PATHS)
def test_scales_as_whole_numbers(library: Library, path: str, k: int) -> None:
    """Scales that are whole multiples of one power of two in each row, groups with a row where not, zeros."""
    generator = torch.Generator().manual_seed(k)
    one, three = Pool(library, 1), Pool(library, 3)
    blocks = near_scales(75, k, [20, 70] if k > 32 else [], generator)
    blocks[3] = 0
    packed, weight = Packer(library, one, path).pack(blocks, "Q4_0"), ggml.dequantize(blocks, "Q4_0", torch.float32)
    assert torch.equal(packed.rows(torch.arange(75)), weight)
    x = torch.randn(70, k, generator=generator)
    whole, seen = packed.linear(three, x), quantised(x)
    assert ((whole.double() - seen @ weight.double().T).abs() <= 1e-6 * (seen.abs() @ weight.double().abs().T)).all()
    for start, end in ((0, 1), (1, 3), (2, 5), (4, 8), (5, 10), (9, 40)):
        assert torch.equal(packed.linear(one, x[start:end]), whole[start:end]), (start, end)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["Q4_0", "Q6_K", "Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("path", PATHS)
def test_bad_numbers_stay_with_their_token(library: Library, pool: Pool, path: str, kind: str, bad: float) -> None:
    generator = torch.Generator().manual_seed(5)
    packed, _ = make(Packer(library, pool, path), kind, 20, 256, generator)
    x = torch.randn(6, 256, generator=generator)
    clean = packed.linear(pool, x)
    x[3, 77] = bad
    y = packed.linear(pool, x)
    assert (y[3].isnan() | y[3].isinf()).all()
    assert torch.equal(y[[0, 1, 2, 4, 5]], clean[[0, 1, 2, 4, 5]])


@pytest.mark.parametrize("path", PATHS)
def test_zeros_and_tiny_inputs(library: Library, pool: Pool, path: str) -> None:
    packed, _ = make(Packer(library, pool, path), "Q4_1", 20, 64, torch.Generator().manual_seed(1))
    for value in (0.0, 1e-38, 1e-45):
        assert (packed.linear(pool, torch.full((2, 64), value)).abs() < 1e-30).all()


@pytest.mark.parametrize("path", PATHS)
def test_strided_input_is_read_where_it_lies(library: Library, pool: Pool, path: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for kind in ("Q4_K", "BF16"):
        packed, _ = make(Packer(library, pool, path), kind, 40, 256, generator)
        wide = torch.randn(5, 300, generator=generator)
        assert torch.equal(packed.linear(pool, wide[:, 7:263]), packed.linear(pool, wide[:, 7:263].contiguous()))


def test_paths_agree_to_the_bit_where_they_promise(library: Library, pool: Pool) -> None:
    if "avx512" not in PATHS:
        pytest.skip("this CPU has no AVX-512 VNNI")
    for kind in set(QUANTISED) - {"Q4_0"}:  # AVX2 adds two of its blocks as one whole number
        results = []
        for path in ("avx2", "avx512"):
            generator = torch.Generator().manual_seed(9)
            packed, _ = make(Packer(library, pool, path), kind, 50, 512, generator)
            results.append(packed.linear(pool, torch.randn(20, 512, generator=generator)))
        assert torch.equal(results[0], results[1]), kind


def test_memory_lives_as_long_as_a_weight(library: Library, pool: Pool) -> None:
    generator = torch.Generator().manual_seed(4)
    packer = Packer(library, pool)
    packed, weight = make(packer, "Q8_0", 64, 64, generator)
    others = [make(packer, "Q4_0", 64, 64, generator)[0] for _ in range(20)]
    assert packed.n_bytes == 4 * 2 * 544
    del packer, others
    assert torch.equal(packed.rows(torch.arange(64)), weight)


def test_refusals_name_the_thing(library: Library, pool: Pool, tmp_path: Path) -> None:
    packer = Packer(library, pool)
    with pytest.raises(UnsupportedModel, match="IQ2_XS"):
        packer.pack(torch.zeros(16, 74, dtype=torch.uint8), "IQ2_XS")
    with pytest.raises(ValueError, match="Q4_0 needs"):
        packer.pack(torch.zeros(16, 19, dtype=torch.uint8), "Q4_0")
    with pytest.raises(ValueError, match="Q4_0 needs"):
        packer.pack(torch.zeros(16, 36, dtype=torch.uint8)[:, ::2], "Q4_0")
    with pytest.raises(ValueError, match="can't pack"):
        packer.pack(torch.zeros(0, 18, dtype=torch.uint8), "Q4_0")
    packed = packer.pack(torch.zeros(16, 18, dtype=torch.uint8), "Q4_0")
    with pytest.raises(ValueError, match=r"x: needs \(T, 32\)"):
        packed.linear(pool, torch.zeros(2, 33))
    with pytest.raises(ValueError, match="bias"):
        packed.linear(pool, torch.zeros(2, 32), torch.zeros(15))
    assert packed.linear(pool, torch.zeros(0, 32)).shape == (0, 16)
    with pytest.raises(NativeUnavailable, match="not built"):
        load(tmp_path / "absent.so")
    (tmp_path / "broken.so").write_bytes(b"not a library")
    with pytest.raises(NativeUnavailable, match="can't be loaded"):
        load(tmp_path / "broken.so")


def test_path_is_chosen_or_forced(library: Library) -> None:
    assert choose_path(library, environ={})[0] == library.paths[-1]
    assert choose_path(library, environ={"SEPTET_CPU_PATH": "portable"}) == ("portable", "SEPTET_CPU_PATH")
    assert choose_path(library, "portable", environ={"SEPTET_CPU_PATH": "avx2"})[0] == "portable"
    with pytest.raises(InvalidRequest, match="none of portable"):
        choose_path(library, environ={"SEPTET_CPU_PATH": "sse"})
    missing = next((p for p in ("avx512", "avx2") if p not in library.paths), None)
    if missing:
        with pytest.raises(InvalidRequest, match="lacks path"):
            choose_path(library, missing)


@pytest.mark.parametrize("threads", [1, 2, 5, 9])
def test_pool_with_more_threads_than_cpus(library: Library, threads: int) -> None:
    """Runs with sleeping, spinning and too many workers, from different calling threads, end and give the result."""
    pool = Pool(library, threads)
    packed, _ = make(Packer(library, pool), "Q4_0", 100, 64, torch.Generator().manual_seed(8))
    x = torch.randn(5, 64)
    want = packed.linear(pool, x)
    results: list[bool] = []

    def run() -> None:
        results.append(all(torch.equal(packed.linear(pool, x), want) for _ in range(50)))

    for _ in range(3):
        caller = threading.Thread(target=run)
        caller.start()
        caller.join(60)
        assert not caller.is_alive()
    pool.close()
    assert results == [True] * 3


def test_threads_without_a_cpu_are_left_out(library: Library) -> None:
    """More threads than CPUs stand in each other's way: the pool goes on with fewer, and the result stays."""
    threads = 3 * usable_cpus() + 2
    pool = Pool(library, threads)
    packed, _ = make(Packer(library, pool), "Q4_0", 2000, 256, torch.Generator().manual_seed(8))
    x = torch.randn(3, 256)
    want = packed.linear(Pool(library, 1), x)
    fewest, until = threads, time.monotonic() + 20
    while fewest > threads // 2 and time.monotonic() < until:
        assert torch.equal(packed.linear(pool, x), want)
        fewest = min(fewest, pool.active)
    assert fewest <= threads // 2
    pool.close()


def test_self_check_ends_with_its_verdict(
    library: Library, pool: Pool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from septet.bench import native_linear

    assert native_linear.check_all(library, pool, ["Q4_0", "BF16"]) == 0
    assert capsys.readouterr().out.count(" ok") == 2 * len(PATHS)
    monkeypatch.setattr(native_linear, "check", lambda *_: 0.5)
    assert native_linear.check_all(library, pool, ["Q4_0"]) == 1
