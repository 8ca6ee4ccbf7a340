"""A server of OpenAI's streamed chats without an engine, for tests of `septet bench`: any answer, at any pace.

    python -m tests.bench_stub PORT [SERVED_FILE] [--stubborn]

writes the number of chats that it has answered to SERVED_FILE; a stubborn one ignores SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def event(**fields: Any) -> bytes:
    return f"data: {json.dumps(fields)}\n\n".encode()


def text(said: str, ended: str | None = None) -> bytes:
    return event(choices=[{"index": 0, "delta": {"content": said}, "finish_reason": ended}])


def chat(tokens: int) -> bytes:
    usage = event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": tokens})
    return text("a ") * (tokens - 1) + text("b", "length") + usage + b"data: [DONE]\n\n"


def http(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


async def _serve(port: int, answer: Callable[[dict[str, Any]], bytes], ready: Callable[[int], object]) -> None:
    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            if head.startswith("get"):
                told = {"data": [{"id": "stub"}]} if "/models" in head else {"version": "1.2.3"}
                writer.write(http(json.dumps(told).encode()))
            else:
                size = int(head.partition("content-length:")[2].split("\r\n")[0])
                writer.write(answer(json.loads(await reader.readexactly(size))))
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(one, "127.0.0.1", port)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


@contextmanager
def stub(answer: Callable[[dict[str, Any]], bytes]) -> Iterator[str]:
    """-> its URL, with /v1; in a thread of this process."""
    up, ports = threading.Event(), []
    loop = asyncio.new_event_loop()

    def ready(port: int) -> None:
        ports.append(port)
        up.set()

    task = loop.create_task(_serve(0, answer, ready))
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.wait([task])), daemon=True)
    thread.start()
    assert up.wait(20)
    yield f"http://127.0.0.1:{ports[0]}/v1"
    loop.call_soon_threadsafe(task.cancel)
    thread.join(20)


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--stubborn"]
    if len(words) < len(sys.argv) - 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    served, path = 0, Path(words[1])

    def answer(asked: dict[str, Any]) -> bytes:
        nonlocal served
        served += 1
        made = path.with_suffix(".part")
        made.write_text(f"{os.getpid()} {served}")
        made.replace(path)
        return http(chat(asked["max_tokens"]))

    asyncio.run(_serve(int(words[0]), answer, lambda port: None))


if __name__ == "__main__":
    main()
