"""The soak's verdict: a leak, a starved client and a broken stream are told; what is filled once is not."""

from __future__ import annotations

import argparse
import random
from collections import Counter

import pytest

from septet.bench.soak import Memory, Seen, verdict

MIB = 2**20
OPTIONS = argparse.Namespace(streams=4, max_growth=0.05, max_slope=15.0)


def memory(*sizes: float) -> Memory:
    """Samples a second apart, in MiB."""
    return Memory([], [(float(i), round(size * MIB)) for i, size in enumerate(sizes)])


def seen(*answers: int) -> Seen:
    return Seen(complete=sum(answers), answers=Counter(dict(enumerate(answers))))


FILLED = [400 + min(i, 30) * 13 + random.Random(i).random() for i in range(120)]
LEAKING = [800 + 0.3 * i for i in range(120)]  # 18 MiB a minute


def test_a_pool_that_is_filled_once_is_flat_and_a_leak_is_not() -> None:
    assert verdict(seen(3, 3, 3, 3), memory(*FILLED), {}, OPTIONS) == []
    assert memory(*LEAKING).slope() == pytest.approx(18.0)
    assert memory(*LEAKING).growth() < OPTIONS.max_growth, "too slow for the thirds to tell"
    [told] = verdict(seen(3, 3, 3, 3), memory(*LEAKING), {}, OPTIONS)
    assert "18.0 MiB a minute" in told


def test_a_starved_client_is_told_and_fairness_is_a_figure() -> None:
    assert seen(3, 3, 3, 3).fairness(4) == 1.0
    assert seen(12, 0, 0, 0).fairness(4) == 0.25
    [told] = verdict(seen(4, 4, 4, 0), memory(*FILLED), {}, OPTIONS)
    assert told == "1 of 4 clients got no answer at all"


def test_what_is_left_over_and_what_broke_is_told() -> None:
    broken = Seen(complete=1, broken=["client 3: ValueError"], answers=Counter(dict.fromkeys(range(4), 1)))
    told = verdict(broken, memory(*FILLED), {"septet:kv_slots_leased": 7.0}, OPTIONS)
    assert len(told) == 2
    assert "client 3" in told[0]
    assert "kv_slots_leased is 7" in told[1]
