"""How much one key may use, and whose request comes next: rates, requests under way, and fair order between keys.

Asked by `app.Endpoint` (a request begins and ends) and by `generation.py` (tokens). Lives on one loop, holds one small
record per key; time is given to it or the monotonic clock's. Knows no HTTP, no model and no engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from septet.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.serve.keys import Key

__all__ = ["FairOrder", "KeyLimits", "RateLimited"]

MINUTE_S = 60.0


class RateLimited(Overloaded):
    """A limit of the key, not of the server."""

    kind = "rate_limit_error"


class Bucket:
    """Tokens that come back at a steady rate, up to a minute's worth. May be overdrawn: what a request takes is known
    only at its end."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def wait_s(self, need: float, now: float) -> float:
        """Seconds until `need` (at most a full bucket) is there; 0 = now."""
        rate = self.per_minute / MINUTE_S
        self._level = min(self.per_minute, self._level + (now - self._at) * rate)
        self._at = now
        return max(0.0, (min(need, self.per_minute) - self._level) / rate)

    def take(self, amount: float) -> None:
        self._level -= amount


@dataclass(slots=True)
class Account:
    """What one key uses now."""

    key: Key
    requests: Bucket
    tokens: Bucket
    under_way: int = 0


class KeyLimits:
    """Rates and requests under way, per key."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._accounts: dict[str, Account] = {}

    def enter(self, key: Key) -> None:
        """One request of `key` begins. Raises RateLimited; `leave` must follow otherwise."""
        account = self._account(key)
        now = self._clock()  # not before a new account's first moment
        if key.max_concurrent and account.under_way >= key.max_concurrent:
            raise RateLimited(f"this API key has {account.under_way} requests under way, its limit", retry_after_s=1.0)
        if key.requests_per_minute:
            if (wait := account.requests.wait_s(1, now)) > 0:
                raise RateLimited(
                    f"this API key may send {key.requests_per_minute} requests a minute", retry_after_s=wait
                )
            account.requests.take(1)
        account.under_way += 1

    def leave(self, key: Key) -> None:
        self._account(key).under_way -= 1

    def check_tokens(self, key: Key, n_prompt: int) -> None:
        """May a prompt of so many tokens begin? Its output is charged as it comes. Raises RateLimited."""
        if key.tokens_per_minute:
            wait = self._account(key).tokens.wait_s(max(1, n_prompt), self._clock())
            if wait > 0:
                raise RateLimited(f"this API key may use {key.tokens_per_minute} tokens a minute", retry_after_s=wait)

    def charge(self, key: Key, n_tokens: int) -> None:
        if key.tokens_per_minute:
            self._account(key).tokens.take(n_tokens)

    def _account(self, key: Key) -> Account:
        account = self._accounts.get(key.name)
        if account is None or account.key is not key:
            under_way = account.under_way if account is not None else 0  # the key file was read again
            now = self._clock()
            buckets = Bucket(key.requests_per_minute, now), Bucket(key.tokens_per_minute, now)
            account = self._accounts[key.name] = Account(key, *buckets, under_way)
        return account


class FairOrder:
    """Start-time fair queueing over tokens (Goyal, Vin, Cheng 1996): the engine runs lower numbers first.

    A key's next request starts where its last one ended in virtual time, or now; so one key's hundred requests stand
    behind another key's first. Shares follow the keys' weights; an idle key saves nothing up.
    """

    def __init__(self) -> None:
        self._now = 0.0  # start of the latest request that the engine has begun
        self._ends: dict[str, float] = {}

    def place(self, key: Key, tokens: float) -> float:
        """The place of a request that is expected to take so many tokens."""
        start = max(self._now, self._ends.get(key.name, 0.0))
        self._ends[key.name] = start + tokens / key.weight
        return start

    def began(self, place: float) -> None:
        self._now = max(self._now, place)

    def settle(self, key: Key, extra: float) -> None:
        """It took so many more (or fewer) tokens than expected."""
        self._ends[key.name] = max(0.0, self._ends.get(key.name, 0.0) + extra / key.weight)
