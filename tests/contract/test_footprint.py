"""What a checkpoint is said to take (`hub/footprint.py`) is what the native library takes for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import gguf
import numpy as np
import pytest
import torch

from septet.geometry import BLOCKS
from septet.hub.footprint import ROW_BYTES, loaded_bytes
from septet.kernels.native.library import FILE, Pool, load
from septet.kernels.native.pack import KINDS, Packer
from tests.unit.test_sizing import LLAMA_8B

if TYPE_CHECKING:
    from pathlib import Path

    from septet.config import ModelConfig

pytestmark = pytest.mark.skipif(not FILE.exists(), reason="the native library is not built here (no C++ compiler)")


def header(path: Path, matrices: list[tuple[str, int, int, str]]) -> None:
    """A GGUF file with these (name, rows, columns, kind); the weights are a hole in the file."""
    writer = gguf.GGUFWriter(path, "llama")
    total = 0
    for name, n, k, kind in matrices:
        elements, size = BLOCKS[kind]
        n_bytes = n * k // elements * size
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor_info(name, (n, k // elements * size), np.dtype("uint8"), n_bytes, raw)
        total += -(-n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.truncate(-(-file.tell() // 32) * 32 + total)


@pytest.mark.parametrize("path", load().paths if FILE.exists() else [])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes_of_each_block_type(kind: str, path: str, tmp_path: Path) -> None:
    n, k = 64, 512
    header(tmp_path / "m.gguf", [("a", n, k, kind)])
    library = load()
    elements, size = BLOCKS[kind]
    packed = Packer(library, Pool(library, 1), path).pack(torch.zeros(n, k // elements * size, dtype=torch.uint8), kind)
    spared = ROW_BYTES.get(kind, 0) * n if path != "avx2" else 0
    assert packed.n_bytes == loaded_bytes(tmp_path / "m.gguf", LLAMA_8B, "float32", native=True) - spared


def eight_billion(config: ModelConfig) -> list[tuple[str, int, int, str]]:
    d, i, e = config.hidden_size, config.intermediate_size, config.head_dim
    kv = config.num_kv_heads * e
    found = [("token_embd.weight", config.vocab_size, d, "Q4_K"), ("output.weight", config.vocab_size, d, "Q6_K")]
    for n in range(config.num_layers):
        shapes = {"attn_q": (d, d), "attn_k": (kv, d), "attn_v": (kv, d), "attn_output": (d, d),
                  "ffn_gate": (i, d), "ffn_up": (i, d), "ffn_down": (d, i)}  # fmt: skip
        found += [(f"blk.{n}.{name}.weight", *shape, "Q4_K") for name, shape in shapes.items()]
    return found


def test_eight_billion_weights_of_four_bits_need_less_than_five_gibibytes(tmp_path: Path) -> None:
    """And not the 30 GiB of float32 that no such machine has."""
    header(tmp_path / "8b.gguf", eight_billion(LLAMA_8B))
    needed = loaded_bytes(tmp_path / "8b.gguf", LLAMA_8B, "float32", native=True)
    assert 4.0 < needed / 2**30 < 5.0
    assert loaded_bytes(tmp_path / "8b.gguf", LLAMA_8B, "float32", native=False) > 28 * 2**30
