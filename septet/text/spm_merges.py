"""The merges of a SentencePiece BPE vocabulary, derived from its scores, and a cache of them on disk.

Called by `gguf_vocab`. SentencePiece (and llama.cpp) join the two neighbours whose concatenation is the best-scored
piece, the leftmost on a tie; a merge list in order of score does the same in the `tokenizers` library. Deriving it
costs seconds for 262,144 tokens, so the pairs are kept. A cache file is: digest of the rest | int32 pairs of ids.
A damaged, foreign or unreadable file is ignored and rebuilt; a cache that can't be written is no error.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import tempfile
from array import array
from typing import TYPE_CHECKING

from septet.errors import ModelFileError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

__all__ = ["cached_merges", "derive_merges"]

MAX_CHARACTERS = 2**25  # of all pieces together: Gemma's 262,144 have 1.7 million
MAX_PIECE = 4096  # characters; the work for a piece grows with the square
KEPT_FILES = 16
_VERSION = b"septet spm merges 1\n"


def derive_merges(tokens: Sequence[str], scores: Sequence[float], mergeable: Collection[int]) -> array[int]:
    """-> left, right, left, right ... as ids, best first. Only ids in `mergeable` take part."""
    ids = {tokens[i]: i for i in mergeable}
    if sum(map(len, ids)) > MAX_CHARACTERS or any(len(piece) > MAX_PIECE for piece in ids):
        raise ModelFileError("the vocabulary's pieces are longer than any real one's: the file is damaged or hostile")
    found: list[tuple[float, int, int]] = []
    for piece, i in ids.items():
        score = -scores[i]
        for cut in range(1, len(piece)):
            left = ids.get(piece[:cut])
            if left is not None and (right := ids.get(piece[cut:])) is not None:
                found.append((score, left, right))
    found.sort(key=lambda merge: merge[0])  # stable: pairs of one piece stay in the order of the cut
    return array("i", [i for _, left, right in found for i in (left, right)])


def cached_merges(
    tokens: Sequence[str], scores: Sequence[float], mergeable: Collection[int], cache: Path | None
) -> array[int]:
    """`derive_merges` through the directory `cache` (None: no cache)."""
    if cache is None:
        return derive_merges(tokens, scores, mergeable)
    path = cache / f"{_key(tokens, scores, mergeable)}.merges"
    if (merges := _read(path, len(tokens))) is None:
        merges = derive_merges(tokens, scores, mergeable)
        with contextlib.suppress(OSError):
            _write(path, merges)
    return merges


def _key(tokens: Sequence[str], scores: Sequence[float], mergeable: Collection[int]) -> str:
    digest = hashlib.sha256(_VERSION + sys.byteorder.encode())
    text = "\0".join(tokens).encode()
    for part in (text, array("d", scores).tobytes(), array("i", sorted(mergeable)).tobytes()):
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _read(path: Path, n_tokens: int) -> array[int] | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, body = content[:32], content[32:]
    if len(body) % 8 or hashlib.sha256(body).digest() != digest:
        return None
    merges = array("i")
    merges.frombytes(body)
    if merges and not (min(merges) >= 0 and max(merges) < n_tokens):
        return None
    return merges


def _write(path: Path, merges: array[int]) -> None:
    """Whole or not at all; the oldest files beyond `KEPT_FILES` go."""
    path.parent.mkdir(parents=True, exist_ok=True)
    body = merges.tobytes()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".merges-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(body).digest() + body)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    files = sorted(path.parent.glob("*.merges"), key=lambda file: file.stat().st_mtime, reverse=True)
    for old in files[KEPT_FILES:]:
        old.unlink(missing_ok=True)
