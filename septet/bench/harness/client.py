"""One streamed chat over HTTP, timed: any server that speaks OpenAI's API.

Used by `drive.py`. Knows no engine: what one needs beyond the common fields comes with the target. The client shares a
process, and often a machine, with other clients, so while an answer comes its bytes are only kept with the time at
which they came; `settle` reads them afterwards. Each request has a connection of its own, opened before it is sent: no
connection can be found closed in the middle of a run.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools
import msgspec

__all__ = ["Address", "Sample", "ask", "settle"]

MAX_ANSWER, MAX_LINE = 64 << 20, 4 << 20
CONNECT_S, AHEAD_S, PAUSES_S = 20.0, 0.5, (0.1, 0.5)


@dataclass(slots=True)
class Sample:
    """One answer. Times in seconds of one clock (`time.perf_counter`)."""

    sent: float = 0.0  # where requests come at their own times: the moment at which it was due
    late: float = 0.0  # seconds after that, by this client's fault
    asked: int = 0  # tokens
    first: float = 0.0  # the first text; 0: none came
    last: float = 0.0
    prompt_tokens: int = 0  # as the server counts; 0: it did not say
    tokens: int = 0
    counted: bool = False  # by the server; False: pieces of text were counted
    text: str = ""
    ended: str = ""  # the finish reason
    error: str = ""
    broken: bool = False  # no connection, or it broke: the server may be gone
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)  # of the body, until `settle`
    settled: bool = False

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


class Address:
    """Where chats of a server are asked for; `url` ends with /v1."""

    def __init__(self, url: str, api_key: str | None) -> None:
        parts = urlsplit(url)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host, self.port = parts.hostname or "", parts.port or (443 if self.tls else 80)
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self.head = (
            f"POST {parts.path}/chat/completions HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n{key}"
            "Content-Type: application/json\r\nAccept: text/event-stream\r\nUser-Agent: septet-bench\r\n"
            "Connection: close\r\n"
        )

    async def connect(self) -> _Exchange:
        """OSError or TimeoutError where that fails three times."""
        loop = asyncio.get_running_loop()
        for pause in (*PAUSES_S, None):
            try:
                async with asyncio.timeout(CONNECT_S):
                    made = await loop.create_connection(_Exchange, self.host, self.port, ssl=self.tls)
                return made[1]
            except (OSError, TimeoutError):
                if pause is None:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError

    def request(self, body: bytes) -> bytes:
        return f"{self.head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class _Exchange(asyncio.Protocol):
    """One answer as it comes: status, and pieces of the body with their times."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pieces: list[tuple[float, bytes]] = []
        self.heard, self.size, self.status, self.whole, self.error = time.perf_counter(), 0, 0, False, ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.heard = time.perf_counter()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"no answer in HTTP: {error}"[:200])

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.pieces.append((self.heard, body))
        self.size += len(body)
        if self.size > MAX_ANSWER:
            self._end("the answer has no end")

    def on_message_complete(self) -> None:
        if self.status >= 200:
            self.whole = True
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self, error: str = "") -> None:
        self.error = self.error or error
        if not self.over.done():
            self.over.set_result(None)

    async def finished(self, silence_s: float) -> None:
        """TimeoutError after so many seconds without a byte."""
        while not self.over.done():
            left = self.heard + silence_s - time.perf_counter()
            if left <= 0:
                raise TimeoutError
            await asyncio.wait((self.over,), timeout=left)


async def ask(address: Address, body: dict[str, Any], *, due: float | None, timeout_s: float) -> Sample:
    """Never raises for what the server does: the sample says what went wrong. `due`: when to send; None: now."""
    raw, sample = address.request(msgspec.json.encode(body)), Sample(asked=int(body["max_tokens"]))
    exchange: _Exchange | None = None
    began = time.perf_counter()
    try:
        if due is not None:
            await asyncio.sleep(due - AHEAD_S - began)
        exchange = await address.connect()
        if due is not None:
            await asyncio.sleep(due - time.perf_counter())
            if exchange.over.done():  # closed while it waited
                exchange = await address.connect()
        now = exchange.heard = time.perf_counter()
        sample.sent = now if due is None else due
        sample.late = now - sample.sent
        exchange.transport.write(raw)
        await exchange.finished(timeout_s)
    except TimeoutError:
        what = f"no byte for {timeout_s:g} s" if exchange else f"no connection within {CONNECT_S:g} s"
        sample.error, sample.broken = what, exchange is None
    except OSError as error:
        sample.error, sample.broken = f"no connection: {error.strerror or error}"[:200], True
    finally:
        if exchange is not None:
            exchange.transport.abort()
    sample.sent = sample.sent or due or began
    if exchange is not None and not sample.error:
        sample.status, sample.pieces, sample.error = exchange.status, exchange.pieces, exchange.error
        if not exchange.status:
            sample.error = sample.error or "the connection was closed without an answer"
            sample.broken = True
        elif exchange.status != 200 or not exchange.whole:
            settle(sample)
    return sample


# -- what the bytes say -----------------------------------------------------------------------------------------------
class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode


def settle(sample: Sample) -> None:
    """Reads the bytes that were kept, once."""
    if sample.error or sample.settled:
        return
    pieces, sample.pieces, sample.settled = sample.pieces, [], True
    if sample.status != 200:
        sample.error = f"HTTP {sample.status}: {_message(b''.join(piece for _, piece in pieces)[:2000])}"
        return
    try:
        done = _read(sample, pieces)
    except (ValueError, msgspec.MsgspecError) as error:
        sample.error = f"no stream of OpenAI's form: {error}"[:200]
        return
    if not (sample.error or done or sample.ended):
        sample.error, sample.broken = "the stream ended before the answer did", True
    elif not (sample.error or sample.first):
        sample.error = "the answer is empty"


def _read(sample: Sample, pieces: list[tuple[float, bytes]]) -> bool:
    """-> whether the end was said. An endless line is a ValueError."""
    kept, texts = b"", []
    done = False
    for now, piece in pieces:
        *lines, kept = (kept + piece).split(b"\n")
        if len(kept) > MAX_LINE:
            raise ValueError("a line has no end")
        for line in lines:
            if not line.startswith(b"data:") or done:
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                done = True
            elif text := _take(sample, _decode(data)):
                texts.append(text)
                sample.first, sample.last = sample.first or now, now
    sample.text = "".join(texts)
    if not sample.counted:
        sample.tokens = len(texts)
    return done


def _take(sample: Sample, event: _Event) -> str:
    """-> the text that the event carries."""
    said = ""
    if event.error:
        sample.error = _words_of(event.error)[:200]
    for choice in event.choices or ():
        if d := choice.delta:
            said += d.content or d.reasoning_content or d.reasoning or ""
        sample.ended = choice.finish_reason or sample.ended
    if event.usage:
        sample.prompt_tokens = event.usage.prompt_tokens or 0
        sample.tokens, sample.counted = event.usage.completion_tokens or 0, True
    return said


def _message(said: bytes) -> str:
    try:
        found = msgspec.json.decode(said)
        text = _words_of(found.get("error", found.get("detail", found)))
    except (ValueError, AttributeError, msgspec.MsgspecError):
        text = said.decode(errors="replace")
    return " ".join(text.split())[:200]


def _words_of(error: Any) -> str:
    return str(error.get("message", error) if isinstance(error, dict) else error)
