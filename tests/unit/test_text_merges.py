"""SentencePiece merges: derived as defined, and a cache that can only make it faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from septet.errors import ModelFileError, UnsupportedModel
from septet.text import pretokenizers, spm_merges
from septet.text.spm_merges import cached_merges, derive_merges

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = ["a", "b", "ab", "abb", "ba", "x"]
SCORES = [-9.0, -9.0, -2.0, -1.0, -3.0, -9.0]


def pairs(merges: object) -> list[tuple[str, str]]:
    ids = list(merges)  # type: ignore[call-overload]
    return [(TOKENS[left], TOKENS[right]) for left, right in zip(ids[::2], ids[1::2], strict=True)]


def test_every_way_to_join_two_pieces_best_score_first() -> None:
    assert pairs(derive_merges(TOKENS, SCORES, range(6))) == [("ab", "b"), ("a", "b"), ("b", "a")]
    assert pairs(derive_merges(TOKENS, SCORES, [0, 1, 4])) == [("b", "a")]  # only what may merge


def test_the_cache_gives_the_same(tmp_path: Path) -> None:
    first = cached_merges(TOKENS, SCORES, range(6), tmp_path)
    (file,) = tmp_path.iterdir()
    assert cached_merges(TOKENS, SCORES, range(6), tmp_path) == first
    assert [*tmp_path.iterdir()] == [file]


def test_the_cache_is_read_and_keyed_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached_merges(TOKENS, SCORES, range(6), tmp_path)
    calls = []
    monkeypatch.setattr(spm_merges, "derive_merges", lambda *a: calls.append(a) or derive_merges(*a))
    cached_merges(TOKENS, SCORES, range(6), tmp_path)
    assert calls == []
    other = [*SCORES[:2], -3.0, *SCORES[3:]]
    cached_merges(TOKENS, other, range(6), tmp_path)
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage", "directory"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    good = cached_merges(TOKENS, SCORES, range(6), tmp_path)
    (file,) = tmp_path.iterdir()
    content = file.read_bytes()
    changed = {
        "truncate": content[:-3],
        "flip": content[:-1] + bytes([content[-1] ^ 1]),
        "empty": b"",
        "garbage": b"\xff" * 100,
    }
    if damage == "directory":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes(changed[damage])
    assert cached_merges(TOKENS, SCORES, range(6), tmp_path) == good
    if damage != "directory":
        assert file.read_bytes() == content
    assert [entry.name for entry in tmp_path.iterdir()] == [file.name]  # nothing half-written stays


def test_ids_out_of_range_in_a_cache_are_not_believed(tmp_path: Path) -> None:
    import hashlib
    from array import array

    good = cached_merges(TOKENS, SCORES, range(6), tmp_path)
    (file,) = tmp_path.iterdir()
    body = array("i", [0, 99]).tobytes()
    file.write_bytes(hashlib.sha256(body).digest() + body)
    assert cached_merges(TOKENS, SCORES, range(6), tmp_path) == good


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("x")
    assert pairs(cached_merges(TOKENS, SCORES, range(6), blocker / "cache"))[0] == ("ab", "b")


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    for i in range(spm_merges.KEPT_FILES + 3):
        cached_merges(TOKENS, [*SCORES[:5], float(-i)], range(6), tmp_path)
    assert len([*tmp_path.iterdir()]) == spm_merges.KEPT_FILES


def test_a_hostile_vocabulary_is_refused_before_the_work() -> None:
    with pytest.raises(ModelFileError, match="hostile"):
        derive_merges(["a" * 100_000], [0.0], [0])


def test_an_unknown_pre_tokenizer_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="quux"):
        pretokenizers.named("quux")
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.ggml\.pre"):
        pretokenizers.named(None)
