"""One streamed chat over HTTP, timed: any server that speaks OpenAI's API.

Used by `drive.py`. Knows no engine: what one needs beyond the common fields comes with the target.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

__all__ = ["Sample", "ask", "connect"]

MAX_ANSWER, MAX_LINE = 64 << 20, 4 << 20


@dataclass(slots=True)
class Sample:
    """One answer. Times in seconds of one clock (`time.perf_counter`)."""

    sent: float
    first: float = 0.0  # the first text; 0: none came
    last: float = 0.0
    prompt_tokens: int = 0  # as the server counts; 0: it did not say
    tokens: int = 0
    counted: bool = False  # by the server; False: pieces of text were counted
    text: str = ""
    ended: str = ""  # the finish reason
    error: str = ""
    lost: bool = False  # no connection, or it broke: the server may be gone

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_ms(self) -> float:
        return (self.first - self.sent) * 1e3

    @property
    def tpot_ms(self) -> float | None:
        """Between tokens after the first; None where there is no second."""
        return (self.last - self.first) * 1e3 / (self.tokens - 1) if self.tokens > 1 else None

    @property
    def e2e_ms(self) -> float:
        return (self.last - self.sent) * 1e3


def connect(url: str, api_key: str | None, timeout_s: float) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(timeout_s, connect=20.0)
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=timeout, limits=limits, trust_env=False)


async def ask(http: httpx.AsyncClient, body: dict[str, Any]) -> Sample:
    """Never raises for what the server does: the sample says what went wrong."""
    sample, pieces = Sample(time.perf_counter()), 0
    try:
        async with http.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                said = (await response.aread())[:2000]
                sample.error = f"HTTP {response.status_code}: {_message(said)}"
                return sample
            done = False
            async for data in _events(response):
                if data == "[DONE]":
                    done = True
                    break
                pieces += _take(sample, json.loads(data))
                if sample.error:
                    return sample
            if not (done or sample.ended):
                sample.error, sample.lost = "the stream ended before the answer did", True
    except httpx.TransportError as error:
        sample.error, sample.lost = f"{type(error).__name__}: {error}"[:200], not isinstance(error, httpx.ReadTimeout)
    except (ValueError, KeyError, TypeError, AttributeError, httpx.HTTPError) as error:
        sample.error = f"no stream of OpenAI's form: {type(error).__name__}: {error}"[:200]
    if sample.ok and not sample.first:
        sample.error = "the answer is empty"
    if not sample.counted:
        sample.tokens = pieces
    return sample


async def _events(response: httpx.Response) -> AsyncIterator[str]:
    """The data of each event, bounded: an endless line or answer is a ValueError."""
    kept, total = b"", 0
    async for chunk in response.aiter_bytes():
        total += len(chunk)
        if total > MAX_ANSWER or len(kept) > MAX_LINE:
            raise ValueError("the answer has no end")
        *lines, kept = (kept + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip().decode()


def _take(sample: Sample, event: dict[str, Any]) -> int:
    """-> 1 if the event carries text."""
    now, carries = time.perf_counter(), 0
    if error := event.get("error"):
        sample.error = str(error.get("message", error) if isinstance(error, dict) else error)[:200]
        return 0
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        if text:
            carries = 1
            sample.text += text
            sample.first = sample.first or now
            sample.last = now
        sample.ended = choice.get("finish_reason") or sample.ended
    if usage := event.get("usage"):
        sample.prompt_tokens = int(usage.get("prompt_tokens") or 0)
        sample.tokens, sample.counted = int(usage.get("completion_tokens") or 0), True
    return carries


def _message(said: bytes) -> str:
    text = said.decode(errors="replace")
    try:
        found = json.loads(text)
        error = found.get("error", found.get("detail", found))
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:200]
