"""Every numeric operation of a forward pass, once: its contract.

`Ops` is the table that layers hold (`Build.ops`) and call; a model's forward touches tensors through it alone, so that
one forward can be run eagerly, captured as a CUDA graph, or recorded as a tape. Implementations: `ReferenceOps`
(torch, the oracle, correct before fast), `TritonOps`, later the native library. A subclass overrides what it speeds up
and inherits the rest. This room knows no layers, requests or models: plain tensors and numbers only.

Common notation: T tokens in the step, R rows (sequences) in the step, S sampled positions, D hidden, H query heads,
G key/value heads, E head dim, V vocabulary, N/K output/input features. Activations are contiguous, in the compute dtype
(float32, bfloat16 or float16); reductions (norm, softmax, dot products) accumulate in float32. An op never writes to
its inputs, except where its name says so (`*_write`). Wrong shapes raise ValueError naming the argument (checked by the
reference; the fast versions rely on the layers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerKV", "Layout", "Ops"]


@dataclass(slots=True)
class Layout:
    """Where the T tokens of a step lie. Built on the device once a step, read by every layer.

    Row r of the step owns tokens q_start[r] .. q_start[r + 1] - 1; its context, these tokens included, is kv_len[r]
    long; position p of it lives in KV slot `slot_of[rows[r], p]`. Causal: the token at position p attends to 0 .. p.
    Padded rows of a captured step have q_len 1, kv_len 1 and slot 0.
    """

    positions: Tensor  # (T,) int64
    slots: Tensor  # (T,) int64, KV slot each token writes
    rows: Tensor  # (R,) int64, line of slot_of
    q_start: Tensor  # (R + 1,) int32
    kv_len: Tensor  # (R,) int32
    slot_of: Tensor  # (max_rows, max_len) int32
    max_q: int  # longest q_len; 1 = a pure decode step. Host integer, an upper bound
    max_kv: int  # host integer, an upper bound of kv_len
    shared: Tensor | None = (
        None  # (1,) int64: positions 0 .. shared - 1 of all rows that are so long lie in the same slots
    )


@dataclass(slots=True)
class LayerKV:
    """One layer's share of the KV pool. `page size` is one token: any slot may hold any token."""

    k: Tensor  # (n_slots, G, E)
    v: Tensor  # (n_slots, G, E)


class Ops:
    """The contract. See the module's notation."""

    name = "abstract"
    block_kinds: frozenset[str] = frozenset()
    """GGUF block types that `block_linear` multiplies without inflating the weight (others are made dense at load)."""

    def value(self, x: Tensor) -> Tensor:
        """The tensor of an op's result. An implementation may hand out results that it has not computed yet, for its
        own ops to fuse; what leaves the ops' hands (hidden states, logits) must pass through here."""
        return x

    # -- weights ------------------------------------------------------------------------------------------------------
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (T, K), weight (N, K) -> (T, N) = x @ weight.T + bias."""
        raise NotImplementedError

    def block_linear(self, x: Tensor, blocks: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
        """x (T, K), blocks (N, bytes of K weights) uint8 in GGUF block type `kind` ("Q4_0", ...) -> (T, N)."""
        raise NotImplementedError

    def embed(self, ids: Tensor, table: Tensor, scale: float = 1.0) -> Tensor:
        """ids (T,) int64, table (V, D) -> (T, D), times `scale` (rounded to the table's dtype first, as Gemma does)."""
        raise NotImplementedError

    def block_embed(self, ids: Tensor, blocks: Tensor, kind: str, dtype: object, scale: float = 1.0) -> Tensor:
        """As `embed`, from GGUF blocks (V, bytes of D weights) uint8; `dtype` is the torch dtype of the result."""
        raise NotImplementedError

    def dequantize(self, blocks: Tensor, kind: str, dtype: object) -> Tensor:
        """blocks (N, bytes of K weights) uint8 -> (N, K) in `dtype`. Exact per GGUF's definition, in float32 first."""
        raise NotImplementedError

    # -- elementwise and norms ----------------------------------------------------------------------------------------
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (T, D), weight (D,) -> (T, D) = x / rms(x) * weight, in float32, rounded once (arXiv 1910.07467)."""
        raise NotImplementedError

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """-> (rms_norm(x + residual), x + residual), both (T, D); the sum is rounded to the compute dtype first."""
        raise NotImplementedError

    def gated_act(self, gate_up: Tensor, kind: str) -> Tensor:
        """gate_up (T, 2F) = [gate | up] -> (T, F) = act(gate) * up; kind "silu" or "gelu_tanh"."""
        raise NotImplementedError

    def soft_cap(self, x: Tensor, cap: float) -> Tensor:
        """-> cap * tanh(x / cap) (Gemma 2)."""
        raise NotImplementedError

    def take_rows(self, x: Tensor, index: Tensor) -> Tensor:
        """x (T, D), index (S,) int64 -> (S, D)."""
        raise NotImplementedError

    def join(self, parts: list[Tensor]) -> Tensor:
        """parts (T, D_i) -> (T, sum of D_i): side by side in the last dimension."""
        raise NotImplementedError

    # -- attention ----------------------------------------------------------------------------------------------------
    def qkv_write(
        self,
        qkv: Tensor,
        kv: LayerKV,
        layout: Layout,
        cos_sin: Tensor,
        q_norm: Tensor | None = None,
        k_norm: Tensor | None = None,
        eps: float = 0.0,
    ) -> Tensor:
        """The prologue of attention: split, norm, rotate, store.

        qkv (T, (H + 2G) E) = [q heads | k heads | v heads]; q_norm, k_norm (E,) or None: RMS norm per head before the
        rotation. cos_sin (max_position, E) float32 = [cos of E/2 angles | sin of E/2 angles] for each position;
        rotation in halves ("neox": pairs are (i, i + E/2)). k and v go to `kv` at `layout.slots`. -> q (T, H, E).
        """
        raise NotImplementedError

    def attention(
        self, q: Tensor, kv: LayerKV, layout: Layout, scale: float, window: int | None = None, soft_cap: float = 0.0
    ) -> Tensor:
        """Paged causal attention for any mix of prefill, chunk and decode rows, after `qkv_write`.

        q (T, H, E) -> (T, H * E). Query head h reads key/value head h // (H / G). With `window` w, position p attends
        to p - w + 1 .. p only. With `soft_cap` c, scores become c * tanh(score / c) before the mask.
        """
        raise NotImplementedError

    # -- choosing tokens ----------------------------------------------------------------------------------------------
    def argmax(self, logits: Tensor) -> Tensor:
        """logits (S, V) -> (S,) int64; the lowest index on ties. A row with a NaN gives -1."""
        raise NotImplementedError

    def apply_mask(self, logits: Tensor, mask: Tensor, line: Tensor) -> Tensor:
        """logits (S, V) -> (S, V) float32, -inf where a mask forbids the token: row s follows line[s] of `mask`, or
        none where that is negative; bit v % 32 of mask[line[s], v // 32] allows token v. mask (C, at least V / 32)
        int32; line (S,) int64."""
        raise NotImplementedError

    def filter_logits(
        self, logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, width: int
    ) -> Tensor:
        """logits (S, V) float32 with -inf for what top-k, then top-p, then min-p exclude at each row's temperature.

        temperature (S,) float32 > 0; top_k (S,) int64, 0 = off; top_p, min_p (S,) float32, 1 and 0 = off. A token stays
        if it is among the k likeliest, if those before it (likelier ones among these k) have less than top_p of their
        mass, and if it has at least min_p of the likeliest's probability; the likeliest always stays. `width`: host
        integer, no row keeps more than so many (V: unknown). A row with a NaN keeps one.
        """
        raise NotImplementedError

    def gumbel_argmax(self, logits: Tensor, temperature: Tensor, seeds: Tensor, positions: Tensor) -> Tensor:
        """Sample from softmax(logits / temperature) by the Gumbel-max trick with counter-based noise.

        logits (S, V) float32 (reference and Triton: any float type), -inf = excluded; temperature (S,) float32, 0 =
        argmax of that row; seeds (S,) int64; positions (S,) int64 -> (S,) int64, -1 for a row with a NaN. Noise of
        token v: u = ((h >> 9) + 0.5) / 2**23, g = -log(-log(u)) with h = mix(mix(lo(seed) ^ mix(hi(seed) + position *
        0x9E3779B9)) + v * 0x85EBCA6B) and `mix` the 32-bit finaliser of MurmurHash3, all modulo 2**32: the same request
        gives the same token in any batch, on any device.
        """
        raise NotImplementedError

    # -- state of the rows between steps ------------------------------------------------------------------------------
    def place_write(
        self, tokens: Tensor, slot_of: Tensor, row: Tensor, start: Tensor, slots: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One token a row: note its slot, look up its id. tokens, slot_of (max_rows, max_len) int32; row, start, slots
        (R,) int64. slot_of[row, start] = slots -> ids (R,) int64 = tokens[row, start], and start + 1 (R,) int32."""
        raise NotImplementedError

    def draw_write(
        self,
        logits: Tensor,
        mask: Tensor,
        line: Tensor,
        temperature: Tensor,
        seeds: Tensor,
        tokens: Tensor,
        row: Tensor,
        positions: Tensor,
        drawn: Tensor,
    ) -> None:
        """`apply_mask`, then `gumbel_argmax` with what stands for each row, then the write-back, as one op.

        logits (S, V) in the compute dtype; mask, line as in `apply_mask`; temperature (max_rows,) float32 and seeds
        (max_rows,) int64, of which row[s] counts; row (S,) int64, positions (S,) int32 or int64. Token s goes to
        tokens[row[s], positions[s]] (max_rows, max_len) int32, 0 for a row with a NaN, and to drawn[s] (at least S,)
        int64, -1 there.
        """
        raise NotImplementedError
