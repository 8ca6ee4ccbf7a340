"""Many streams at once against a real server, for minutes: does every one end, does none starve, is memory flat?

`python -m septet.bench.soak [--streams 256 --seconds 120 --model smollm2 --json FILE]` starts `septet serve MODEL` on a
free loopback port, holds so many streams open until the time is over, and mixes in clients that leave, long prompts,
bad requests and schemas. It exits with 1 if a promise is broken, and prints the figures either way. Its client is bare
sockets: what is measured is the server, so the client must be cheap.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from septet.advisor.summary import percentile
from septet.bench.host import cpu_seconds, head, served, write_results

if TYPE_CHECKING:
    import subprocess

__all__ = ["main"]

TEXT = "the river runs past the old stone bridge while seven engines hum in the valley and the light goes down "
LEAVE, BAD, SCHEMA = 0.05, 0.03, 0.05  # shares of the requests
SETTLE_S = 3.0
SPARE_FDS = 4  # what a server opens with its first request, and our own question at the end
FLAGS = "--kernels native --max-num-seqs 256 --num-kv-slots 8192"  # a pool that is touched whole within a minute
GRACE_S = 240.0  # for the streams that are open when the time is over
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Seen:
    """What became of the requests."""

    complete: int = 0
    left: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)
    tokens: int = 0
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # longest silence within each stream
    answers: Counter[int] = field(default_factory=Counter)  # complete ones by client

    def fairness(self, clients: int) -> float:
        """Jain's index over the clients' answers: 1 = all got as many, 1 / clients = one got them all."""
        counts = [self.answers[number] for number in range(clients)]
        squares = sum(count * count for count in counts)
        return sum(counts) ** 2 / (clients * squares) if squares else 0.0


@dataclass
class Memory:
    """Resident bytes of the server and its engine, sampled; open descriptors of the server."""

    pids: list[int]
    resident: list[tuple[float, int]] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)  # processor seconds of each when the load began
    until: float = float("inf")  # when the load ends: then batches shrink, and steps of other sizes load their share

    def sample(self) -> None:
        pages = 0
        for pid in self.pids:
            with open(f"/proc/{pid}/statm") as file:
                pages += int(file.read().split()[1])
        self.resident.append((time.monotonic(), pages * PAGE))
        self.descriptors.append(len(os.listdir(f"/proc/{self.pids[0]}/fd")))

    def slope(self) -> float:
        """MiB a minute over the load's second half, by least squares: what is filled once is over by then."""
        loaded = [sample for sample in self.resident if sample[0] <= self.until]
        half = loaded[len(loaded) // 2 :]
        if len(half) < 3:
            return 0.0
        minutes = [(at - half[0][0]) / 60 for at, _ in half]
        return statistics.linear_regression(minutes, [size / 2**20 for _, size in half]).slope

    def growth(self) -> float:
        """Of the last third over the middle one: the first fills pools and caches."""
        values = [size for _, size in self.resident]
        third = max(1, len(values) // 3)
        middle, last = values[third : 2 * third] or values, values[-third:]
        return (sum(last) / len(last)) / (sum(middle) / len(middle)) - 1


class Soak:
    def __init__(self, root: str, model: str, seconds: float, seed: int) -> None:
        self.host, _, port = root.removeprefix("http://").partition(":")
        self.port = int(port)
        self.model = model
        self.seconds = seconds
        self.ends_at = 0.0
        self.seen = Seen()
        self.rng = random.Random(seed)

    async def warm(self, streams: int) -> None:
        """All at once, and to their end: steps of every size, the whole pool; what is taken once is taken then."""
        own, self.seen = self.seen, Seen()
        said = {"model": self.model, "stream": True, "max_tokens": 12, "ignore_eos": True}
        bodies = [said | {"messages": [{"role": "user", "content": f"{i} {TEXT}"}]} for i in range(streams)]
        async with asyncio.timeout(GRACE_S):
            await asyncio.gather(*(self._ask(body, "answer") for body in bodies))
        self.seen = own

    async def run(self, streams: int) -> None:
        self.ends_at = time.monotonic() + self.seconds
        async with asyncio.timeout(self.ends_at - time.monotonic() + GRACE_S):
            await asyncio.gather(*(self._client(number) for number in range(streams)))

    async def _client(self, number: int) -> None:
        await asyncio.sleep(self.rng.random() * 2)
        while time.monotonic() < self.ends_at:
            body, expected = self._body()
            try:
                self.seen.answers[number] += await self._ask(body, expected)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self.seen.broken.append(f"client {number}: {type(error).__name__} {error}")
                await asyncio.sleep(0.5)

    def _body(self) -> tuple[dict[str, Any], str]:
        rng = self.rng
        words = TEXT.split()
        said = " ".join(rng.choice(words) for _ in range(rng.choice((4, 12, 40, 120))))
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "system", "content": TEXT * 2}, {"role": "user", "content": said}],
            "stream": True,
            "max_tokens": rng.choice((4, 8, 16, 32)),
            "temperature": rng.choice((0.0, 0.8)),
        }
        drawn = rng.random()
        if drawn < LEAVE:
            return body, "leave"
        if drawn < LEAVE + BAD:
            return body | {"temperature": -1}, "bad"
        if drawn < LEAVE + BAD + SCHEMA:
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"type": "integer"}},
            }
        return body, "answer"

    async def _ask(self, body: dict[str, Any], expected: str) -> bool:
        """Whether a whole answer came."""
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            data = json.dumps(body).encode()
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
            asked = time.monotonic()
            status = int((await reader.readline()).split()[1])
            if expected == "bad" or status == 429:
                wanted = (400,) if expected == "bad" else (429,)
                if status not in wanted:
                    raise ValueError(f"status {status} for a {expected} request")
                self.seen.refused += 1
                await asyncio.sleep(0.05)
            elif status != 200:
                raise ValueError(f"status {status}: {(await reader.read(2000))[-300:]!r}")
            else:
                return await self._read(reader, asked, leave=expected == "leave")
            return False
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, asked: float, *, leave: bool) -> bool:
        last, gap, n = asked, 0.0, 0
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            now = time.monotonic()
            if line.startswith(b"data: [DONE]"):
                self.seen.complete += 1
                self.seen.tokens += n
                self.seen.gaps.append(gap)
                return True
            if b'"error"' in line:
                raise ValueError(line[:300].decode(errors="replace"))
            if b'"content":"' in line and b'"content":""' not in line:
                if n == 0:
                    self.seen.ttft.append(now - asked)
                else:
                    gap = max(gap, now - last)
                last, n = now, n + 1
                if leave and n > 1:
                    self.seen.left += 1
                    return False
        raise ValueError("a stream ended without [DONE]")


def metric(root: str, name: str) -> float:
    import urllib.request

    text = urllib.request.urlopen(root + "/metrics", timeout=30).read().decode()
    found = re.search(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    return float(found[1]) if found else float("nan")


async def soak(root: str, popen: subprocess.Popen[str], options: argparse.Namespace) -> tuple[Seen, Memory]:
    with open(f"/proc/{popen.pid}/task/{popen.pid}/children") as file:
        engine = int(file.read().split()[0])
    memory, work = Memory([popen.pid, engine]), Soak(root, options.model, options.seconds, options.seed)
    await work.warm(options.streams)
    memory.until = time.monotonic() + options.seconds
    memory.worked = [cpu_seconds(pid) for pid in memory.pids]

    async def watch() -> None:
        while True:
            memory.sample()
            await asyncio.sleep(max(0.25, options.seconds / 120))

    watching = asyncio.create_task(watch())
    try:
        await work.run(options.streams)
    except TimeoutError:
        work.seen.broken.append(f"streams were still open {GRACE_S:g} s after the end")
    finally:
        watching.cancel()
    return work.seen, memory


def verdict(seen: Seen, memory: Memory, left: dict[str, float], options: argparse.Namespace) -> list[str]:
    """Which promises are broken."""
    told = [f"{len(seen.broken)} requests broke, the first: {seen.broken[0]}"] if seen.broken else []
    if not seen.complete:
        told.append("no stream was completed")
    if memory.growth() > options.max_growth:
        told.append(f"memory grew by {100 * memory.growth():.1f} % from the middle third to the last")
    if memory.slope() > options.max_slope:
        told.append(f"memory grew by {memory.slope():.1f} MiB a minute over the load's second half")
    if starved := sum(not seen.answers[number] for number in range(options.streams)):
        told.append(f"{starved} of {options.streams} clients got no answer at all")
    told += [f"{name} is {value:g} after the end, not 0" for name, value in left.items() if value != 0]
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--max-growth", type=float, default=0.05)
    parser.add_argument("--max-slope", type=float, default=15.0, help="MiB a minute, second half")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument("--flags", default=FLAGS, help="more flags of septet serve")
    options = parser.parse_args()
    with served(options.model, ["--access-log", "off", *options.flags.split()]) as (root, popen):
        seen, memory = asyncio.run(soak(root, popen, options))
        wall = memory.resident[-1][0] - memory.resident[0][0]
        http, engine = (cpu_seconds(pid) - at for pid, at in zip(memory.pids, memory.worked, strict=True))
        time.sleep(SETTLE_S)
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "septet:kv_slots_leased")
        left = {
            name: metric(root, name) for name in (*names, "septet:audit_failures_total", "septet:failed_steps_total")
        }
        left["descriptors beyond the start"] = max(
            0.0, len(os.listdir(f"/proc/{popen.pid}/fd")) - memory.descriptors[0] - SPARE_FDS
        )
    code = popen.returncode
    broken = verdict(seen, memory, left, options) + ([f"the server exited with {code}"] if code else [])
    figures = {
        "streams": options.streams,
        "wall_s": round(wall, 1),
        "complete": seen.complete,
        "left_early": seen.left,
        "refused": seen.refused,
        "broken": len(seen.broken),
        "tokens_per_s": round(seen.tokens / wall, 1),
        "ttft_s": {f"p{p}": round(percentile(seen.ttft, p / 100), 2) for p in (50, 99, 100)},
        "longest_silence_s": {f"p{p}": round(percentile(seen.gaps, p / 100), 2) for p in (50, 99, 100)},
        "answers_by_client": {
            "least": min(seen.answers[i] for i in range(options.streams)),
            "most": max(seen.answers.values(), default=0),
        },
        "fairness": round(seen.fairness(options.streams), 3),
        "http_process_share": round(http / (http + engine), 3),
        "http_process_s": round(http, 1),
        "resident_mib": [round(size / 2**20) for _, size in memory.resident[:: max(1, len(memory.resident) // 10)]],
        "growth": round(memory.growth(), 4),
        "slope_mib_per_minute": round(memory.slope(), 2),
        "verdict": broken or "every promise held",
    }
    print(json.dumps(figures, indent=1))
    if options.json:
        write_results(options.json, head("soak"), **figures)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
