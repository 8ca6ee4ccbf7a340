"""Tile sizes of attention: a pure function of shapes and host integers, so that captured steps can use it.

Called by `attention.py` and `decode.py`. Standard library only; the figures are for Hopper (228 KB of shared memory,
wgmma on tiles of 64 rows) and are the one place to tune.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["DecodeTile", "Tiles", "choose", "decode_splits", "decode_tile"]

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
    return 128 if wanted >= 512 and block_d <= 128 else 64


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
    # 128 rows of heads of 128 in 4 warps spill registers: at 3 stages these still were faster than 8 warps (369 against
    # 337 TFLOP/s on an H100), which waited for each turn's loads; with the loads ahead they do not.
    num_warps = 8 if block_m == 128 or (block_m == 64 and block_d > 128) else 4
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
    """Few programs live on latency, many on bandwidth: then registers are better spent on more of them at once.
    n_pairs: rows x KV heads; row_bytes: of one key of one head, padded to a power of two.

    The first line was measured on an H100, for contexts of one turn. The others hold contexts of many turns, and load
    ahead: a program that waits for each turn takes so long for a long row that the others are done before it.
    """

    def tokens(n_bytes: int, most: int) -> int:
        """Of which K and V alone are n_bytes."""
        return max(min(n_bytes // row_bytes, most), 32)

    few, many = tokens(1 << 15, 128), tokens(1 << 13, 64)
    if 4 * n_pairs <= n_sms:
        return DecodeTile(few, 2, 4, True, few)
    ahead = STAGES if 3 * 2 * many * row_bytes <= PIPELINE_BYTES else 3  # what is ahead lies in three buffers
    if n_pairs <= 2 * n_sms:
        return DecodeTile(tokens(1 << 14, 64), ahead, 4, True, 128 if n_pairs <= n_sms else 256)
    if n_pairs <= WAVE * n_sms:
        small = row_bytes <= 128  # larger heads have no registers left for a turn of their own, four programs wanted
        return DecodeTile(many, ahead, 4, small, 512)
    return DecodeTile(many, ahead, 2, False, 512)


def decode_splits(n_rows: int, n_kv: int, max_context: int, n_sms: int) -> int:
    """A power of two that fills one wave of programs. How many of them get a share of a row, its length decides."""
    wanted = min(WAVE * n_sms // max(n_rows * n_kv, 1), -(-max_context // SPLIT_TOKENS), MAX_SHARES)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1
