"""Frames: everything round-trips, garbage is a typed error that ends one connection, sizes are bounded."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import resource
import socket
import threading
import time

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.config import EngineConfig
from septet.engine import wire
from septet.engine.messages import (
    Abort,
    EngineInfo,
    EngineStats,
    Fatal,
    Shutdown,
    StatsReply,
    StatsRequest,
    Submit,
    Update,
)
from septet.engine.wire import (
    AsyncEnd,
    BlockingEnd,
    Disconnected,
    FrameReader,
    FrameTooLarge,
    WireError,
    decode,
    encode,
)
from septet.request import FinishReason, Request, SamplingParams
from septet.step import Logprobs

REQUEST = Request(
    id="r-1",
    tokens=(1, 2, 3),
    params=SamplingParams(
        temperature=0.5, logit_bias={7: -3.5}, stop=("x",), stop_token_ids=(9,), seed=-5, max_tokens=4
    ),
    eos_token_ids=(0,),
    priority=-2,
    arrival=12.5,
    cache_salt="s",
)
MESSAGES = [
    EngineConfig(model="echo:", max_num_seqs=3),
    Submit((REQUEST, REQUEST)),
    Abort(("a", "b")),
    StatsRequest(7),
    Shutdown(),
    EngineInfo("m", 10, 20, 3, 4, 5, 6, 7, "cpu", "float32", "reference", 99, 1.5, (("a", "1", "why"),)),
    Update("r", (1, 2)),
    Update(
        "r",
        (5,),
        logprobs=(Logprobs(5, -0.25, 1, ((5, -0.25), (6, float("-inf")))),),
        prompt_logprobs=(Logprobs(1, -1.0, 2),),
        finish_reason=FinishReason.STOP,
        stop_token=5,
        cached_tokens=3,
        error="e",
        error_kind="k",
    ),
    StatsReply(7, EngineStats(running=2, finished={"stop": 3}, kv_waste=0.25)),
    Fatal("out of luck", "out_of_memory_error"),
]


def frame(payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + payload


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_round_trip(message):
    assert FrameReader().feed(encode([message])) == [message]
    assert type(FrameReader().feed(encode([message]))[0]) is type(message)


def test_many_messages_of_one_class_are_one_frame():
    updates = [Update(f"r{i}", (i,)) for i in range(300)]
    data = encode(updates)
    assert int.from_bytes(data[:4], "big") == len(data) - 4
    assert FrameReader().feed(data) == updates


def test_a_frame_holds_one_class():
    with pytest.raises(ValueError, match="one class"):
        encode([Shutdown(), StatsRequest(1)])


@given(cuts=st.lists(st.integers(0, 3000), max_size=12))
@settings(max_examples=60, deadline=None)
def test_any_cut_of_the_stream_gives_the_same_messages(cuts):
    stream = b"".join(encode([message]) for message in MESSAGES)
    points = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    reader = FrameReader()
    got = [m for a, b in itertools.pairwise(points) for m in reader.feed(stream[a:b])]
    assert got == MESSAGES
    assert not reader.partial


def test_a_value_that_can_not_travel_is_refused_by_the_sender():
    for bad in (Abort((2**70,)), Abort(("\ud800",)), Abort((object(),))):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="Abort"):
            encode([bad])


def test_a_frame_too_large_is_refused_by_the_sender(monkeypatch):
    monkeypatch.setattr(wire, "MAX_FRAME", 1000)
    with pytest.raises(FrameTooLarge, match="at most 1000"):
        encode([Abort(("x" * 1000,))])


HOSTILE = {
    "empty": b"",
    "not an array": msgspec.msgpack.encode({"a": 1}),
    "unknown class": msgspec.msgpack.encode(("EngineLoop", [])),
    "class not a string": msgspec.msgpack.encode((3, [])),
    "too few": msgspec.msgpack.encode(("Abort",)),
    "too many": msgspec.msgpack.encode(("Abort", [], [])),
    "body not a list": msgspec.msgpack.encode(("Abort", {"ids": []})),
    "missing field": msgspec.msgpack.encode(("Abort", [{}])),
    "wrong type": msgspec.msgpack.encode(("Abort", [{"ids": [1]}])),
    "null body": msgspec.msgpack.encode(("Abort", None)),
    "trailing bytes": msgspec.msgpack.encode(("Shutdown", [{}])) + b"\x00",
    "truncated": encode([Submit((REQUEST,))])[4:-1],
    "array of 2**32 - 1": b"\x92\xa5Abort\xdd\xff\xff\xff\xff",
    "ids of 2**32 - 1": b"\x92\xa5Abort\x91\x81\xa3ids\xdd\xff\xff\xff\xff\xa1a",
    "map of 2**32 - 1": b"\x92\xa5Abort\x91\xdf\xff\xff\xff\xff",
    "string of 4 GB": b"\x92\xdb\xff\xff\xff\xffab",
    "deep": b"\x92\xa5Abort" + b"\x91" * 200_000,
    "ext type": b"\x92\xa5Abort\xd4\x63\x00",
    "a parameter out of range": msgspec.msgpack.encode(
        ("Submit", [{"requests": [{"id": "a", "tokens": [1], "params": {"top_p": float("nan")}}]}])
    ),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_payload_is_a_wire_error_in_bounded_time_and_memory(payload):
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    with pytest.raises(WireError) as caught:
        decode(payload)
    assert time.perf_counter() - began < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB
    assert len(str(caught.value)) < 400


def test_an_oversize_length_is_refused_before_its_bytes_arrive():
    with pytest.raises(WireError, match="4294967295 bytes"):
        FrameReader().feed(b"\xff\xff\xff\xff")


def test_random_bytes_never_raise_anything_else():
    rng = random.Random(1)
    sample = encode([Submit((REQUEST,))]) + encode([Update("r", (1, 2), finish_reason=FinishReason.STOP)])
    for _ in range(3000):
        data = bytearray(sample)
        for _ in range(rng.randrange(1, 6)):
            data[rng.randrange(4, len(data))] = rng.randrange(256)
        with contextlib.suppress(WireError):
            FrameReader().feed(bytes(data))
        with contextlib.suppress(WireError):
            FrameReader().feed(rng.randbytes(rng.randrange(60)))


# -- the blocking end -------------------------------------------------------------------------------------------------
@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    end = BlockingEnd(theirs)
    yield ours, end
    end.close()
    ours.close()


def test_receive_gives_what_arrived_and_does_not_wait(pair):
    ours, end = pair
    assert end.receive(0.0) == []
    ours.sendall(encode([StatsRequest(1)]) + encode([StatsRequest(2)]) + b"\x00")
    assert end.receive(None) == [StatsRequest(1), StatsRequest(2)]


def test_receive_waits_as_long_as_told(pair):
    began = time.perf_counter()
    assert pair[1].receive(0.05) == []
    assert 0.04 < time.perf_counter() - began < 1.0


def test_post_wakes_a_receive_that_waits_for_ever(pair):
    timer = threading.Timer(0.05, pair[1].post, [Shutdown()])
    timer.start()
    assert pair[1].receive(None) == [Shutdown()]


def test_the_end_of_the_stream_is_disconnected(pair):
    ours, end = pair
    ours.close()
    with pytest.raises(Disconnected, match=r"end of the stream$"):
        end.receive(None)
    with pytest.raises(Disconnected):
        end.send([Update("r")])


def test_the_end_inside_a_frame_says_so(pair):
    ours, end = pair
    ours.sendall(encode([StatsRequest(1)])[:-1])
    assert end.receive(None) == []
    ours.close()
    with pytest.raises(Disconnected, match="inside a frame"):
        end.receive(None)


def test_garbage_is_a_wire_error(pair):
    ours, end = pair
    ours.sendall(frame(b"garbage"))
    with pytest.raises(WireError):
        end.receive(None)


def test_updates_that_do_not_fit_in_one_frame_are_sent_in_several(pair, monkeypatch):
    ours, end = pair
    monkeypatch.setattr(wire, "MAX_FRAME", 2000)
    updates = [Update(f"r{i}", tuple(range(20))) for i in range(200)]
    end.send(updates)
    reader = FrameReader(2000)
    got = []
    while len(got) < len(updates):
        got += reader.feed(ours.recv(1 << 16))
    assert got == updates


# -- the asyncio end --------------------------------------------------------------------------------------------------
class Ends:
    """An AsyncEnd joined to a plain socket; what it heard."""

    def __init__(self) -> None:
        self.heard = []
        self.lost: asyncio.Future = asyncio.get_running_loop().create_future()
        self.end = AsyncEnd(self.heard.extend, self.lost.set_result)
        self.theirs, self.ours = socket.socketpair()

    async def connect(self) -> Ends:
        await asyncio.get_running_loop().create_unix_connection(lambda: self.end, sock=self.ours)
        self.theirs.setblocking(False)
        return self


def test_async_end_speaks_both_ways():
    async def main():
        ends = await Ends().connect()
        ends.end.send(encode([StatsRequest(5)]))
        reply = await asyncio.get_running_loop().sock_recv(ends.theirs, 1000)
        assert FrameReader().feed(reply) == [StatsRequest(5)]
        await asyncio.get_running_loop().sock_sendall(ends.theirs, encode([Fatal("x")]) * 3)
        ends.theirs.close()
        assert isinstance(await ends.lost, Disconnected)
        assert ends.heard == [Fatal("x")] * 3

    asyncio.run(asyncio.wait_for(main(), 10))


def test_async_end_closes_on_garbage_and_keeps_what_came_before():
    async def main():
        ends = await Ends().connect()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(ends.theirs, encode([Fatal("x")]))
        await asyncio.sleep(0.05)
        await loop.sock_sendall(ends.theirs, frame(b"\xc1\xc1"))
        assert isinstance(await ends.lost, WireError)
        assert ends.heard == [Fatal("x")]
        assert await loop.sock_recv(ends.theirs, 10) == b""  # the other end sees it too

    asyncio.run(asyncio.wait_for(main(), 10))


def test_drain_waits_for_a_reader():
    async def main():
        ends = await Ends().connect()
        big = encode([Abort(("x" * (4 << 20),))])
        ends.end.send(big)
        waiting = asyncio.ensure_future(ends.end.drain())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        reader, got = FrameReader(), []
        while not got:
            got = reader.feed(await asyncio.get_running_loop().sock_recv(ends.theirs, 1 << 20))
        await waiting
        ends.end.close()

    asyncio.run(asyncio.wait_for(main(), 10))
