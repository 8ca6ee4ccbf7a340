"""Stop strings: any cutting of the text gives what a search of the whole text gives."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.text.stops import StopMatcher


def search_whole(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop that ends first, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def feed(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    matcher = StopMatcher(stops, include)
    shown = ""
    for piece in pieces:
        text, stop = matcher.push(piece)
        shown += text
        if stop is not None:
            return shown, stop
    return shown + matcher.finish(), None


ALPHABET = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@settings(deadline=None)
@given(st.lists(ALPHABET, max_size=8), STOPS, st.booleans())
def test_any_cutting_is_a_search_of_the_whole(pieces: list[str], stops: list[str], include: bool) -> None:
    assert feed(pieces, stops, include) == search_whole("".join(pieces), stops, include)


@settings(deadline=None)
@given(ALPHABET, STOPS)
def test_holds_back_only_what_could_become_a_stop(text: str, stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    shown, stop = matcher.push(text)
    if stop is None:
        held = text[len(shown) :]
        assert text.startswith(shown)
        could = [n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])]
        assert len(held) == max(could, default=0)


def test_nothing_comes_after_a_match() -> None:
    matcher = StopMatcher(["</s>"])
    assert matcher.push("hi </") == ("hi ", None)
    assert matcher.push("s> more") == ("", "</s>")
    assert matcher.push("again") == ("", "</s>")
    assert matcher.finish() == ""


def test_an_overlapping_suffix_is_not_forgotten() -> None:
    assert feed(["aa", "ab"], ["aab"], False) == ("a", "aab")


def test_time_is_linear_in_the_text() -> None:
    stops = ["a" * 1000 + "b", *("a" * n + "c" for n in range(1, 60))]
    matcher = StopMatcher(stops)
    start = time.process_time()
    for _ in range(200):
        assert matcher.push("a" * 1000)[1] is None
    assert time.process_time() - start < 2.0  # a search for each stop at each place takes minutes
    assert matcher.push("b")[1] == stops[0]


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
