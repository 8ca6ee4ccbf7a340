"""Tile sizes of attention: a pure function of shapes and host integers, so that captured steps can use it.

Called by `attention.py` and `decode.py`. Standard library only; the figures are for Hopper (228 KB of shared memory,
wgmma on tiles of 64 rows) and are the one place to tune.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["DecodeTile", "PrefixTile", "Tiles", "choose", "decode_splits", "decode_tile", "prefix_tile"]

SMALL_M = 16  # rows of the smallest matrix instruction
MAX_SPLITS = 64
SPLIT_TOKENS = 128  # a split reads at least this much context
PIPELINE_BYTES = 160 * 1024  # of shared memory for K and V in flight
STAGES = 5  # see attention.py: fewer do not load ahead
MAX_SHARES = 32  # of one row's context in a decode step
WAVE = 4  # programs of a decode step that one multiprocessor holds at a time


@dataclass(frozen=True, slots=True)
class Tiles:
    """block_m rows of a tile = query tokens x query heads of one KV head; block_n context tokens per turn of the loop.

    decode: one token per row, program = row, nothing to search. splits: programs that share one tile's context.
    """

    decode: bool
    block_m: int
    block_n: int
    block_d: int
    splits: int
    num_warps: int
    num_stages: int
    ratio: int  # query heads per KV head

    @property
    def block_q(self) -> int:
        """Query tokens per tile; rows block_q * ratio .. block_m - 1 of the tile are idle."""
        return self.block_m // self.ratio

    def n_blocks(self, n_tokens: int, n_rows: int) -> int:
        """Upper bound of the q-blocks of any division of n_tokens tokens among n_rows rows."""
        return n_rows if self.decode else n_tokens // self.block_q + n_rows


def _pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _query_rows(wanted: int, block_d: int, item_size: int) -> int:
    """Tile rows for `wanted` (tokens x ratio of an average row): small for decode-like rows, large for prompts."""
    if wanted <= SMALL_M:
        return SMALL_M
    if item_size == 4:
        return 32
    if block_d == 128 and wanted >= 256:
        return 256
    return 128 if wanted >= 512 and block_d < 128 else 64


def choose(
    n_tokens: int,
    n_rows: int,
    n_heads: int,
    n_kv: int,
    head_dim: int,
    item_size: int,
    max_q: int,
    max_context: int,
    n_sms: int,
) -> Tiles:
    """The tiles of one launch. max_context: tokens that a query may read (the longest context or the window)."""
    ratio, block_d = n_heads // n_kv, max(_pow2(head_dim), 16)
    decode = max_q == 1 and n_tokens == n_rows
    average = ratio * -(-n_tokens // max(n_rows, 1))
    block_m = max(_query_rows(average, block_d, item_size), _pow2(ratio))
    block_n = 64 if block_d * item_size <= 256 else 32
    turn = 2 * block_n * block_d * item_size  # bytes of K and V in one turn
    num_stages = max(min(PIPELINE_BYTES // turn, STAGES), 2)
    # One warp group for 64 rows. H100, two prompts of 4,096, heads of 128: 435 TFLOP/s with 256 rows, 376 with 128 (and
    # 128 tokens a turn), 362 with 64; heads of 64: 382 with 128 rows, 351 with 64, 342 with 256.
    num_warps = max(block_m // 16, 4) if block_d <= 128 else 8
    tiles = Tiles(decode, block_m, block_n, block_d, 1, num_warps, num_stages, ratio)
    return replace(tiles, splits=_splits(tiles.n_blocks(n_tokens, n_rows) * n_kv, max_context, n_sms))


def _splits(n_programs: int, max_context: int, n_sms: int) -> int:
    """A power of two (few versions of the merge) that gives each multiprocessor two programs, if half would idle."""
    if 2 * n_programs > n_sms:
        return 1
    splits = min(2 * n_sms // max(n_programs, 1), max_context // SPLIT_TOKENS, MAX_SPLITS)
    return 1 << (splits.bit_length() - 1) if splits > 1 else 1


# -- decode steps ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class DecodeTile:
    """block_n tokens of context a turn; preload: the first turn's are loaded before the predecessor has ended.

    num_stages: 5 keep two turns on their way, fewer than that one (see attention.py). least: tokens of context that
    are worth a program of their own, a multiple of block_n.
    """

    block_n: int
    num_stages: int
    num_warps: int
    preload: bool
    least: int


def decode_tile(n_pairs: int, row_bytes: int, n_sms: int) -> DecodeTile:
    """n_pairs: rows x KV heads; row_bytes: of one key of one head, padded to a power of two.

    A turn as long as registers hold, its first one loaded before the predecessor has ended, is best for few programs
    and for small heads; many rows of large heads want shared memory, two turns ahead. H100, heads of 128, microseconds
    of a layer for 8, 32, 64 and 140 rows: 7.9, 18.5, 109 and 188 the first way, 10.9, 21.7, 115 and 185 the second.
    """

    def tokens(n_bytes: int, most: int) -> int:
        """Of which K and V alone are n_bytes."""
        return max(min(n_bytes // row_bytes, most), 32)

    first, ahead = tokens(1 << 15, 128), tokens(1 << 14, 64)
    if n_pairs <= WAVE * n_sms or row_bytes <= 128:
        return DecodeTile(first, 2, 4, True, first if n_pairs <= n_sms else 512)
    stages = STAGES if 3 * 2 * ahead * row_bytes <= PIPELINE_BYTES else 3  # what is ahead lies in three buffers
    return DecodeTile(ahead, stages, 2, False, 512)


def decode_splits(n_rows: int, n_kv: int, max_context: int, n_sms: int) -> int:
    """A power of two that fills one wave of programs. How many of them get a share of a row, its length decides."""
    wanted = min(WAVE * n_sms // max(n_rows * n_kv, 1), -(-max_context // SPLIT_TOKENS), MAX_SHARES)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


# -- the shared context of a decode step -------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class PrefixTile:
    """block_m query heads of a group of rows, block_n tokens of context a turn, shares of the context."""

    block_m: int
    block_n: int
    shares: int
    num_warps: int
    num_stages: int


def prefix_tile(n_rows: int, n_kv: int, heads: int, row_bytes: int, n_sms: int) -> PrefixTile:
    """heads: query heads of a KV head, padded to a power of two; row_bytes as in `decode_tile`. Two programs for each
    multiprocessor, as far as the context is long enough."""
    block_m = max(min(64, _pow2(n_rows * heads)), SMALL_M, heads)
    programs = -(-n_rows * heads // block_m) * n_kv
    shares = min(max(2 * n_sms // programs, 1), MAX_SHARES)
    block_n = max(min((1 << 14) // row_bytes, 64), 32)
    return PrefixTile(block_m, block_n, 1 << (shares.bit_length() - 1), 4, 3)
