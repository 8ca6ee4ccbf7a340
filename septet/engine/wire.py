"""Frames between a client and its engine: a 4-byte big-endian length, then msgpack `[class name, [message, ...]]`.

Owns the format, its limits and the two ends of a socket: blocking (`BlockingEnd`, the engine's inbox and outbox) and
asyncio (`AsyncEnd`, the client's). Bytes that are not a frame raise `WireError`, which ends this connection and nothing
else: a stream that lost its framing can't be trusted again. Never pickle; knows no scheduler and no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any

import msgspec

from septet.config import EngineConfig
from septet.engine.messages import Abort, EngineInfo, Fatal, Shutdown, StatsReply, StatsRequest, Submit, Teach, Update
from septet.errors import SeptetError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "AsyncEnd",
    "BlockingEnd",
    "Disconnected",
    "FrameReader",
    "FrameTooLarge",
    "Message",
    "WireError",
    "decode",
    "encode",
]

MAX_FRAME = 128 << 20  # bytes: the log-probabilities of a long prompt fit; nothing sane is larger
READ_SIZE = 1 << 20  # bytes per read
BURST_S = 0.002  # seconds that the engine waits for the rest of a frame
SEND_BUFFER = 4 << 20  # bytes the kernel may hold while the other end is busy

Message = EngineConfig | Submit | Teach | Abort | StatsRequest | Shutdown | EngineInfo | Update | StatsReply | Fatal

log = logging.getLogger(__name__)


class WireError(SeptetError):
    """The bytes on the connection are not Septet's frames. The connection must be closed."""

    kind = "engine_dead_error"


class FrameTooLarge(WireError):
    """A message that does not fit into one frame. Nothing was sent; the connection is sound."""


class Disconnected(SeptetError):
    """The other end is gone."""

    kind = "engine_dead_error"


# -- frames -----------------------------------------------------------------------------------------------------------
_ENCODER = msgspec.msgpack.Encoder()
_ENVELOPE = msgspec.msgpack.Decoder(tuple[str, msgspec.Raw])
_BODIES: dict[str, msgspec.msgpack.Decoder[Any]] = {
    cls.__name__: msgspec.msgpack.Decoder(list[cls])  # type: ignore[valid-type]
    for cls in (EngineConfig, Submit, Teach, Abort, StatsRequest, Shutdown, EngineInfo, Update, StatsReply, Fatal)
}


def encode(messages: Sequence[Message]) -> bytes:
    """One frame of one or more messages of one class. Raises FrameTooLarge, or ValueError for odd values."""
    tag = type(messages[0]).__name__
    if any(type(message).__name__ != tag for message in messages):
        raise ValueError("a frame holds messages of one class")
    try:
        payload = _ENCODER.encode((tag, messages))
    except (OverflowError, TypeError, UnicodeError) as error:
        raise ValueError(f"{tag} can't be encoded: {error}") from error
    if len(payload) > MAX_FRAME:
        raise FrameTooLarge(f"{tag} of {len(payload)} bytes: a frame holds at most {MAX_FRAME}")
    return len(payload).to_bytes(4, "big") + payload


def decode(payload: bytes | bytearray) -> list[Message]:
    """The messages of one frame, its length removed; every value is checked against its type. Raises WireError."""
    try:
        tag, bodies = _ENVELOPE.decode(payload)
        return _BODIES[tag].decode(bodies)
    except KeyError as error:
        raise WireError(f"a frame of unknown class {str(error)[:80]}") from error
    except Exception as error:  # malformed, wrong types, too deep, or refused by a class's own checks
        raise WireError(f"a frame that is not valid: {type(error).__name__}: {str(error)[:200]}") from error


class FrameReader:
    """Cuts a byte stream into frames; holds at most one incomplete frame."""

    def __init__(self, max_frame: int = MAX_FRAME) -> None:
        self._max_frame = max_frame
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Message]:
        """Messages of the frames that `data` completes, in order. Raises WireError; the stream is then lost."""
        buffer = self._buffer
        buffer += data
        messages: list[Message] = []
        at = 0
        while len(buffer) - at >= 4:
            size = int.from_bytes(buffer[at : at + 4], "big")
            if size > self._max_frame:
                raise WireError(f"a frame of {size} bytes: at most {self._max_frame} are allowed")
            if len(buffer) - at - 4 < size:
                break
            messages += decode(buffer[at + 4 : at + 4 + size])
            at += 4 + size
        del buffer[:at]
        return messages

    @property
    def partial(self) -> bool:
        """Whether the stream stands in the middle of a frame."""
        return bool(self._buffer)


# -- the engine's end -------------------------------------------------------------------------------------------------
class BlockingEnd:
    """A connected stream socket as inbox and outbox of one thread; `post` may be called from anywhere."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self._sock = sock
        self._reader = FrameReader()
        self._posted: list[Any] = []
        self._closed = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._poll = select.poll()
        self._poll.register(sock.fileno(), select.POLLIN)
        self._poll.register(self._wake_read, select.POLLIN)

    def receive(self, timeout: float | None = 0.0) -> list[Message]:
        """What has arrived; waits at most `timeout` seconds for something (None: as long as it takes).

        Raises Disconnected at the end of the stream, WireError for bytes that are not frames.
        """
        events = self._poll.poll(None if timeout is None else timeout * 1000)
        messages: list[Message] = []
        for fd, _ in events:
            messages += self._take_posted() if fd == self._wake_read else self._read()
        return messages

    def send(self, messages: Sequence[Message]) -> None:
        """Send messages of one class, in one frame if they fit; blocks while the other end does not read."""
        try:
            frame = encode(messages)
        except FrameTooLarge:
            if len(messages) == 1:
                raise
            half = len(messages) // 2
            self.send(messages[:half])
            self.send(messages[half:])
            return
        try:
            self._sock.sendall(frame)
        except OSError as error:
            raise Disconnected(f"the client is gone: {error.strerror}") from error

    def post(self, message: Any) -> None:
        """Put a message, or a note of the engine to itself, into the inbox from another thread or a signal handler."""
        self._posted.append(message)
        if not self._closed:
            with contextlib.suppress(BlockingIOError):  # a full pipe wakes the reader all the same
                os.write(self._wake_write, b"!")

    def close(self) -> None:
        self._closed = True
        self._sock.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _read(self) -> list[Message]:
        """All that lies in the socket's buffer, up to one `READ_SIZE` of it; then the rest of a frame under way, if it
        comes within BURST_S: requests that were sent together should start together."""
        messages = self._read_once()
        end = time.monotonic() + BURST_S
        while self._reader.partial and (left := end - time.monotonic()) > 0:
            if any(fd != self._wake_read for fd, _ in self._poll.poll(1000 * left)):
                messages += self._read_once()
            else:
                break
        return messages

    def _read_once(self) -> list[Message]:
        try:
            data = self._sock.recv(READ_SIZE, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Disconnected(f"the client is gone: {error.strerror}") from error
        if not data:
            raise Disconnected("the client is gone: end of the stream" + " inside a frame" * self._reader.partial)
        return self._reader.feed(data)

    def _take_posted(self) -> list[Any]:
        os.read(self._wake_read, 4096)
        taken, self._posted = self._posted, []
        return taken


# -- the client's end -------------------------------------------------------------------------------------------------
class AsyncEnd(asyncio.Protocol):
    """The client's end on an event loop. `on_messages` gets each read's messages; `on_lost` is called once, at the end.

    The argument of `on_lost` is a WireError if the stream was garbage, otherwise a Disconnected.
    """

    def __init__(self, on_messages: Callable[[list[Message]], None], on_lost: Callable[[SeptetError], None]) -> None:
        self._on_messages = on_messages
        self._on_lost = on_lost
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._error: SeptetError | None = None
        self._gathered: list[bytes] = []

    def send(self, frames: bytes) -> None:
        """Queue whole frames (of `encode`). Dropped if the connection is lost: `on_lost` has told or will tell.

        What is queued in one pass of the event loop travels at once, so that requests made together arrive together.
        """
        if self._transport is not None and not self._transport.is_closing():
            if not self._gathered:
                asyncio.get_running_loop().call_soon(self._flush)
            self._gathered.append(frames)

    def _flush(self) -> None:
        frames, self._gathered = b"".join(self._gathered), []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames)

    async def drain(self) -> None:
        """Wait until the other end has read enough for more to be queued."""
        if self._gathered:
            await asyncio.sleep(0)
        await self._writable.wait()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # asyncio calls these
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        if self._error is not None:
            return
        try:
            messages = self._reader.feed(data)
        except WireError as error:
            log.error("garbage from the engine: %s", error)
            self._error = error
            self.close()
            return
        if messages:
            self._on_messages(messages)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        self._transport = None
        self._on_lost(self._error or Disconnected(f"the connection ended: {exc}" if exc else "the connection ended"))
