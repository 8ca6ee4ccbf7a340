"""The tape against the model it was recorded from: every family, every path of this CPU, any mix of rows.

The engine's greedy ids on the tape are held against transformers in test_engine_parity.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch

from septet.config import ModelConfig
from septet.engine.forward import record
from septet.errors import InvalidRequest, UnsupportedModel
from septet.geometry import BLOCKS
from septet.kernels import ggml
from septet.kernels.native.library import PATHS, Pool
from septet.kernels.native.record import Sym, TapeOps
from septet.kernels.reference import ReferenceOps
from septet.layers.build import Build
from septet.models.registry import load_model
from septet.quant.gguf import GGUFBlocks
from septet.quant.none import Dense
from septet.quant.scheme import PackedWeight
from septet.weights.separate import SeparateSource
from tests import families
from tests.forward import Harness, StateSource
from tests.native import TapeModel, native_library

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from septet.kernels.native.library import Library
    from septet.kernels.native.pack import PackedMatrix

torch.set_num_threads(1)
STEPS: tuple[Mapping[int, int], ...] = (  # line -> new tokens: prompts, chunks, decode, few rows and many
    {0: 70, 1: 3},
    {0: 1},
    {0: 1, 1: 7, 2: 90},
    {0: 1, 1: 1, 2: 1},
    {3: 1},
    {3: 70, 0: 1, 2: 2},
    {0: 1, 1: 1, 2: 1, 3: 1, 4: 1},
    {4: 66, 5: 2, 6: 1},
    {6: 2},
    {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1},
)


@pytest.fixture(scope="module")
def library() -> Library:
    return native_library()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, library: Library) -> str:
    if not library.has_path(request.param):
        pytest.skip(f"this CPU lacks {request.param}")
    return request.param


def tape_harness(
    pair: families.Pair,
    pool: Pool,
    path: str,
    make_source: Callable[[], Any],
    *,
    kv_dtype: torch.dtype = torch.float32,
    table: type[TapeOps] = TapeOps,
) -> Harness:
    ops = table(pool.library, pool, path)
    build = Build(pair.config, ops, make_source(), torch.device("cpu"), torch.float32, families.MAX_LEN)
    model = load_model(build)
    taped = TapeModel()
    harness = Harness(taped, pair.config, max_len=families.MAX_LEN, dtype=kv_dtype)  # type: ignore[arg-type]
    taped.tape = record(model, ops, harness.kv)
    return harness


def dense_source(pair: families.Pair, dtype: torch.dtype = torch.float32) -> StateSource:
    return StateSource(families._state(pair.hf, pair.config.architecture), dtype)


def steps(harness: Harness, plan: Sequence[Mapping[int, int]] = STEPS, seed: int = 0) -> list[Tensor]:
    """Logits of each step, all lines under each other; the same tokens for the same seed."""
    dice = random.Random(seed)
    results = []
    for step in plan:
        rows = {line: [dice.randrange(families.VOCAB) for _ in range(n)] for line, n in step.items()}
        results.append(torch.cat(list(harness.step(rows).values())))
    return results


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_are_those_of_the_reference(family: str, path: str, library: Library) -> None:
    pair = families.make(family)
    taped = tape_harness(pair, Pool(library, 2), path, lambda: dense_source(pair))
    for got, want, step in zip(steps(taped), steps(pair.harness()), STEPS, strict=True):
        error = (got - want).abs().max() / want.abs().max()
        limit = 2e-5 if family == "gemma3" else 1e-5  # twice the norms, and embeddings times 8
        assert error < limit, f"{step}: {error}"  # also false for NaN


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_threads_and_neighbours_change_no_bit(family: str, path: str, library: Library) -> None:
    """A line's logits depend on its own tokens alone: not on threads, not on what else the step computes."""
    pair = families.make(family)
    plan = [{0: 40}, *[{0: 1}] * 3]
    alone = steps(tape_harness(pair, Pool(library, 1), path, lambda: dense_source(pair)), plan)
    for threads in (2, 3):
        crowd = tape_harness(pair, Pool(library, threads), path, lambda: dense_source(pair))
        dice, others = random.Random(0), random.Random(1)
        for step, want in zip(plan, alone, strict=True):
            rows = {line: [others.randrange(families.VOCAB)] * line for line in (3, 5, 1, 2)}
            rows = dict(list(rows.items())[:2]) | {
                0: [dice.randrange(families.VOCAB) for _ in range(step[0])],
                **dict(list(rows.items())[2:]),
            }
            assert torch.equal(crowd.step(rows)[0], want)


class RandomSource(StateSource):
    """Any tensor of any name, in Q8_0 where the width allows: eight-bit inputs turn a last bit into a visible step."""

    def __init__(self) -> None:
        super().__init__({})

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        dice = torch.Generator().manual_seed(sum(name.encode()))
        spread = 0.3 if len(shape) == 1 else 1.6 * shape[1] ** -0.5
        return float(len(shape) == 1) + spread * torch.randn(shape, generator=dice)

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        values = self.vector(name, shape)
        if shape[1] % 32:
            return PackedWeight(Dense(), {"weight": values}, shape)
        blocks = torch.from_numpy(gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0))
        return GGUFBlocks("Q8_0").pack(blocks.view(torch.uint8))

    def has(self, name: str) -> bool:
        return "bias" not in name and "norm" not in name


LONG = 1100  # past the parts of 64 positions, into those of 256
CUTS = (7, 64, 1, 1, 130, 1, 300, 1, 2, 1, 200, 1, 1, 1)  # sizes of the steps, over and over
SHAPES = [  # heads, kv heads, head dim, length
    (3, 1, 16, LONG),
    (4, 2, 20, 150),
    (5, 1, 40, 150),
    (8, 1, 64, 150),
]


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "length"), SHAPES)
def test_one_order_of_addition(
    heads: int, kv_heads: int, dim: int, length: int, kv_dtype: torch.dtype, path: str, library: Library
) -> None:
    """The same bits for a prompt's tokens in one step, in any chunks, decoded one by one, or after a cached prefix."""
    windows = (None, 100, 9, 650)
    config = ModelConfig(
        architecture="mistral",
        vocab_size=families.VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_layers=4,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        norm_eps=1e-5,
        max_position=LONG,
        layer_windows=windows,
        attention_softcap=5.0 if dim == 40 else 0.0,
    )
    ops = TapeOps(library, Pool(library, 2), path)
    model = load_model(Build(config, ops, RandomSource(), torch.device("cpu"), torch.float32, LONG))
    taped = TapeModel()
    harness = Harness(
        taped,  # type: ignore[arg-type]
        config,
        n_slots=6 * LONG,
        max_len=LONG,
        dtype=kv_dtype,
    )
    taped.tape = record(model, ops, harness.kv)
    dice = random.Random(length)
    prompt = [dice.randrange(families.VOCAB) for _ in range(length)]
    whole = harness.step({0: prompt})[0]
    assert whole.isfinite().all()
    at, sizes = 0, itertools.cycle(CUTS)
    while at < length:
        end = min(length, at + next(sizes))
        assert torch.equal(harness.step({1: prompt[at:end]})[1], whole[at:end]), (at, end)
        at = end
    for cached, beside in ((100, {3: [1]}), (64, {3: [2, 3]}), (97, {})):
        harness.share(2, 0, cached)
        assert torch.equal(harness.step({2: prompt[cached:], **beside})[2], whole[cached:]), cached


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.bfloat16])
def test_small_pools(kv_dtype: torch.dtype, path: str, library: Library) -> None:
    """Keys and values rounded to the pool's type, by the tape as by torch."""
    pair = families.make("qwen3")
    taped = tape_harness(pair, Pool(library, 2), path, lambda: dense_source(pair), kv_dtype=kv_dtype)
    oracle = Harness(pair.model, pair.config, max_len=families.MAX_LEN, dtype=kv_dtype)
    for got, want in zip(steps(taped), steps(oracle), strict=True):
        assert (got - want).abs().max() / want.abs().max() < (3e-3 if kv_dtype == torch.float16 else 2e-2)


class BlockSource(StateSource):
    """Matrices as GGUF blocks, cycling through `kinds`; F16 where the width is no multiple of 32."""

    def __init__(self, state: Mapping[str, Tensor], kinds: Sequence[str]) -> None:
        super().__init__(state)
        self.kinds = list(kinds)

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        self.kinds.append(self.kinds.pop(0))
        kind = self.kinds[-1] if shape[1] % 32 == 0 else "F16"
        values = self.vector(name, shape).numpy()
        blocks = torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]))
        return GGUFBlocks(kind).pack(blocks.view(torch.uint8))


class EightBitOps(ReferenceOps):
    """The reference with inputs of block products rounded to int8, 64 a scale, as the native kernels do."""

    block_kinds = frozenset(BLOCKS)

    def block_linear(self, x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
        if kind in ("F16", "F32"):
            return super().block_linear(x, blocks, kind, bias)
        n, k = x.shape
        parts = torch.nn.functional.pad(x, (0, -k % 64)).view(n, -1, 64)
        scale = parts.abs().amax(-1, keepdim=True) / 127
        codes = (parts / scale.clamp(min=1e-30)).round()
        x = (codes * scale).view(n, -1)[:, :k]
        return torch.nn.functional.linear(x, ggml.dequantize(blocks, kind, torch.float32), bias)


@pytest.mark.parametrize("kinds", [["Q8_0"], ["Q4_0", "Q8_0", "Q5_1"], ["Q4_1", "Q4_1", "Q5_0"]])
def test_quantised_models(kinds: list[str], path: str, library: Library) -> None:
    """Mixed kinds split q, k, v and gate, up into several products whose outputs lie side by side."""
    pair = families.make("llama")
    state = families._state(pair.hf, pair.config.architecture)
    taped = tape_harness(pair, Pool(library, 2), path, lambda: BlockSource(state, kinds))
    build = Build(
        pair.config, EightBitOps(), BlockSource(state, kinds), torch.device("cpu"), torch.float32, families.MAX_LEN
    )
    oracle = dataclasses.replace(pair, model=load_model(build)).harness()

    # A value half way between two codes may round either way, by a 127th of its block: rarely, but what a line has once
    # in its cache stays there. So: most short lines agree to float32, and no long one strays.
    def errors(plan: Sequence[Mapping[int, int]]) -> list[float]:
        pairs = zip(steps(taped, plan), steps(oracle, plan), strict=True)
        return sorted(e for got, want in pairs for e in ((got - want).norm(dim=-1) / want.norm(dim=-1)).tolist())

    short = errors([{line: 1 + line % 2} for line in range(4)] + [dict.fromkeys(range(4, 8), 3)])
    assert short[len(short) * 3 // 4] < 5e-6
    long = errors([{0: 100, 2: 3}, {0: 1}, {0: 1, 1: 1, 2: 1}])
    assert long[0] < 5e-6
    assert long[-1] < 8e-2


def test_matrices_are_packed_where_they_lie(path: str, library: Library) -> None:
    """From a source whose matrices stay apart nothing is stacked, and the answers are the same bits."""
    pair = families.make("llama-bias-tied")
    state = families._state(pair.hf, pair.config.architecture)
    source = BlockSource(state, ["Q8_0"])
    lent: set[int] = set()

    class Lender(SeparateSource):
        def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
            weight = super().matrix(name, shape)
            lent.update(tensor.data_ptr() for tensor in weight.tensors.values())
            held.append(weight)
            return weight

    held: list[PackedWeight] = []
    packed: set[int] = set()

    class WatchedOps(TapeOps):
        def weight(self, tensor: Tensor, kind: str) -> PackedMatrix:
            packed.add(tensor.data_ptr())
            return super().weight(tensor, kind)

    plan: list[dict[int, int]] = [{0: 20, 1: 3}, {0: 1, 1: 1}]
    stacked = tape_harness(pair, Pool(library, 2), path, lambda: BlockSource(state, ["Q8_0"]))
    apart = tape_harness(pair, Pool(library, 3), path, lambda: Lender(source), table=WatchedOps)
    assert packed == lent
    assert len(lent) > 6 * pair.config.num_layers
    for got, want in zip(steps(apart, plan), steps(stacked, plan), strict=True):
        assert torch.equal(got, want)


def test_unknown_ids_are_refused(library: Library) -> None:
    pair = families.make("llama")
    taped = tape_harness(pair, Pool(library, 2), "portable", lambda: dense_source(pair))
    for bad in (-1, families.VOCAB):
        with pytest.raises(InvalidRequest, match="vocabulary"):
            taped.step({0: [1, bad]})


def test_what_cannot_be_recorded_is_said(library: Library) -> None:
    ops = TapeOps(library, Pool(library, 1), "portable")
    with pytest.raises(UnsupportedModel, match="reference"):
        ops.rms_norm(torch.zeros(1, 4), torch.ones(4), 1e-5)
    value = Sym("tokens", 4)
    for unknown in (lambda: torch.tanh(value), lambda: value.float(), lambda: 2 * value, lambda: value[0]):
        with pytest.raises(UnsupportedModel, match="has no node"):
            unknown()
