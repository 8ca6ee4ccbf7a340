"""What the HTTP server costs: streaming clients against `septet serve`, beside the same chats through `AsyncLLM`.

    python -m septet.bench.http_load [MODEL] [--clients 1,8,32] [--tokens 64] [--rounds 5] [--json PATH]

Both sides have an engine process of their own with the same settings and stay up; rounds alternate who goes first.
Medians count; the cost is the median of the rounds' own ratios, as a shared machine's speed changes between rounds. The
clients are bare sockets (they share the machine with what they measure) that check the status, the number of tokens in
the usage and the end of the stream. Beside the rates stands the CPU time per token of the serving process and of the
process that runs the session (which is also the clients').
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from septet.bench.host import cpu_seconds, head, served, write_results
from septet.request import SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from septet.session.llm import AsyncLLM

__all__ = ["main"]

REQUEST_S, MAX_LINE = 300, 1 << 20


@dataclass
class Side:
    """Figures of one side at one number of clients, a value per round."""

    tokens_s: list[float] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)  # of all clients
    cpu_us: list[float] = field(default_factory=list)  # per token: of the process between engine and client

    def medians(self) -> dict[str, float]:
        return {name: round(statistics.median(values), 2) for name, values in vars(self).items()}


def messages(number: int, turn: int) -> list[dict[str, str]]:
    """A short chat that no other client or round has: nothing comes from the prefix cache but the template."""
    return [{"role": "user", "content": f"{turn * 1000 + number}: tell me about rivers, then about the sea."}]


# -- the server's side ------------------------------------------------------------------------------------------------
@asynccontextmanager
async def serving(model: str, flags: list[str]) -> AsyncIterator[tuple[str, int]]:
    """A `septet serve` process -> (its address, its pid)."""
    with served(model, flags) as (url, process):
        yield url, process.pid


async def ask_server(url: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> tuple[float, int]:
    """One streamed chat -> (time of the first text, tokens)."""
    address = urlsplit(url)
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=MAX_LINE)
    try:
        writer.write(f"{head}Content-Length: {len(raw)}\r\nConnection: close\r\n\r\n".encode() + raw)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(2000)).decode(errors='replace')}")
        first, last = 0.0, b""
        while not (line := await reader.readline()).startswith(b"data: [DONE]"):
            if not line:
                raise RuntimeError("the stream ended early")
            if line.startswith(b"data: "):
                last = line
                if not first and b'"content":"' in line and b'"content":""' not in line:
                    first = time.perf_counter()
        return first, json.loads(last[6:])["usage"]["completion_tokens"]
    finally:
        writer.close()


async def through_server(url: str, clients: int, tokens: int, turn: int) -> tuple[float, list[float]]:
    """(tokens a second of all, time to first text of each)."""
    fixed: dict[str, Any] = {"stream": True, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    fixed |= {"stream_options": {"include_usage": True}}
    began = time.perf_counter()
    async with asyncio.timeout(REQUEST_S):
        told = await asyncio.gather(
            *(ask_server(url, {**fixed, "messages": messages(number, turn)}) for number in range(clients))
        )
    spent = time.perf_counter() - began
    return _rate(clients, tokens, sum(n for _, n in told), spent), [first - began for first, _ in told]


# -- in this process --------------------------------------------------------------------------------------------------
async def through_session(llm: AsyncLLM, clients: int, tokens: int, turn: int) -> tuple[float, list[float]]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)

    async def ask(number: int) -> tuple[float, int]:
        first, made = 0.0, 0
        async for output in llm.chat(messages(number, turn), params):
            if not first and output.outputs[0].text:
                first = time.perf_counter()
            made = len(output.outputs[0].token_ids)
        return first, made

    began = time.perf_counter()
    async with asyncio.timeout(REQUEST_S):
        told = await asyncio.gather(*(ask(number) for number in range(clients)))
    spent = time.perf_counter() - began
    return _rate(clients, tokens, sum(n for _, n in told), spent), [first - began for first, _ in told]


def _rate(clients: int, tokens: int, made: int, seconds: float) -> float:
    if made != clients * tokens:
        raise RuntimeError(f"{made} tokens where {clients * tokens} were asked for: the rates can't be compared")
    return made / seconds


# -- both -------------------------------------------------------------------------------------------------------------
async def run(model: str, counts: list[int], tokens: int, rounds: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    from septet.session.llm import AsyncLLM

    rows, turn = [], 0
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    async with serving(model, flags) as (url, pid), AsyncLLM(model, **options) as llm:
        await through_server(url, 1, 8, 999_000)
        await through_session(llm, 1, 8, 999_000)
        for clients in counts:
            sides = {"http": Side(), "session": Side()}
            for number in range(rounds):
                turn += 1
                for name in ("http", "session") if number % 2 else ("session", "http"):
                    before = cpu_seconds(pid if name == "http" else os.getpid())
                    if name == "http":
                        rate, waits = await through_server(url, clients, tokens, turn)
                    else:
                        rate, waits = await through_session(llm, clients, tokens, turn)
                    spent = cpu_seconds(pid if name == "http" else os.getpid()) - before
                    sides[name].tokens_s.append(rate)
                    sides[name].ttft_ms.append(statistics.median(waits) * 1000)
                    sides[name].cpu_us.append(spent * 1e6 / (clients * tokens))
            rows.append(row_of(clients, sides))
            print(line(rows[-1]), flush=True)
    return rows


def row_of(clients: int, sides: dict[str, Side]) -> dict[str, Any]:
    http, session = sides["http"].medians(), sides["session"].medians()
    pairs = zip(sides["http"].tokens_s, sides["session"].tokens_s, strict=True)
    cost = 1 - statistics.median(one / other for one, other in pairs)
    return {"clients": clients, "http": http, "session": session, "cost": round(cost, 4)}


def line(row: dict[str, Any]) -> str:
    def side(name: str) -> str:
        found = row[name]
        figures = f"{found['tokens_s']:7.1f} tokens/s, first text {found['ttft_ms']:6.0f} ms"
        return f"{name} {figures}, {found['cpu_us']:4.0f} us of CPU a token"

    return f"{row['clients']:3d} clients: {side('http')}; {side('session')}; the server costs {row['cost']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients, with commas")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernels", default="native")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    counts = [int(part) for part in args.clients.split(",")]
    options = {"kernels": args.kernels, "max_num_seqs": max(counts), "max_model_len": 1024}
    rows = asyncio.run(run(args.model, counts, args.tokens, args.rounds, options))
    if args.json:
        write_results(args.json, head("http_load"), rows=rows)


if __name__ == "__main__":
    main()
