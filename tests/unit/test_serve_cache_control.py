"""`cache_control` from the request down to the KV pool: what is marked stays, and the usage tells the truth."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from anthropic.types import Message

from septet.engine.client import InlineClient
from septet.engine.echo import EchoExecutor
from septet.engine.scheduler import Scheduler, SchedulerLimits
from septet.kv.cache import KVCache
from septet.request import Pin
from septet.serve.anthropic_call import parse_messages
from septet.serve.app import Service, Settings, create_app
from septet.serve.keys import Key, Keys, digest_of
from septet.session.session import Limits, Session
from tests import fakes
from tests.scheduling import Engine, prompt, request

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

SLOTS = 400
RULES = "You are a clerk. " * 5  # 85 tokens of a byte each
MARK: Any = {"type": "ephemeral"}


def marked(text: str, **mark: Any) -> list[Any]:
    return [{"type": "text", "text": text, "cache_control": MARK | mark}]


class Office:
    """A small engine behind the server, and a client for each key."""

    def __init__(self, engine: InlineClient, keys: Keys) -> None:
        session = Session(engine, fakes.ByteTokenizer(), fakes.PlainTemplate(), "echo", Limits(200, 256))  # type: ignore[arg-type]
        self.app = create_app(Service(session, Settings(), keys))
        self.engine = engine

    async def ask(self, text: str, *, key: str = "none", **more: Any) -> Any:
        body = {"model": "echo", "max_tokens": 2, "messages": [{"role": "user", "content": text}]} | more
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
            answer = await http.post("/v1/messages", json=body, headers={"x-api-key": key})
        assert answer.status_code == 200, answer.text
        usage = Message.model_validate(answer.json()).usage
        assert usage.cache_creation is not None
        parts = usage.cache_creation.ephemeral_5m_input_tokens, usage.cache_creation.ephemeral_1h_input_tokens
        assert sum(parts) == usage.cache_creation_input_tokens
        return usage

    async def rush(self) -> None:
        """Four pools of other prompts, one after the other."""
        for i in range(16):
            await self.ask(f"{i:02}" * 50)


def office(work: Callable[[Office], Awaitable[None]], *keys: str, prefix: bool = True) -> None:
    async def go() -> None:
        limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=200)
        scheduler = Scheduler(limits, KVCache(SLOTS + 1, prefix), 256)
        engine = InlineClient(scheduler, EchoExecutor(vocab_size=256), fakes.info(), strict=True)
        try:
            await work(Office(engine, Keys([Key(name=key, digest=digest_of(key)) for key in keys])))
        finally:
            await engine.close()

    asyncio.run(go())


def test_a_marked_prefix_outlives_a_rush_and_an_unmarked_one_does_not() -> None:
    async def work(desk: Office) -> None:
        plain = await desk.ask("one?", system=RULES)
        assert (plain.cache_creation_input_tokens, plain.cache_read_input_tokens) == (0, 0)
        await desk.rush()
        again = await desk.ask("two?", system=RULES)
        assert again.cache_read_input_tokens < len("[system]"), "the rush has evicted it"
        await desk.rush()

        first = await desk.ask("three?", system=marked(RULES))
        held = len("[system]" + RULES)
        assert first.cache_creation_input_tokens == held - first.cache_read_input_tokens
        total = first.input_tokens + first.cache_creation_input_tokens + first.cache_read_input_tokens
        assert total == len(f"[system]{RULES}[user]three?[assistant]")
        assert (await desk.engine.stats()).slots_pinned == held
        await desk.rush()
        kept = await desk.ask("four?", system=marked(RULES))
        assert kept.cache_creation_input_tokens == 0
        assert held <= kept.cache_read_input_tokens < held + len("[user]three?")

    office(work)


def test_each_mark_keeps_its_own_time_and_the_top_level_one_is_the_whole_conversation() -> None:
    async def work(desk: Office) -> None:
        usage = await desk.ask("hello", system=marked(RULES, ttl="1h"), cache_control=MARK)
        system, all_of_it = len("[system]" + RULES), len(f"[system]{RULES}[user]hello")
        assert usage.cache_creation.ephemeral_1h_input_tokens == system
        assert usage.cache_creation.ephemeral_5m_input_tokens == all_of_it - system
        assert usage.input_tokens == len("[assistant]")

    office(work)


def test_a_mark_on_more_than_the_share_pins_nothing_and_says_so() -> None:
    async def work(desk: Office) -> None:
        usage = await desk.ask("x" * 20 + "?", system=marked(RULES), key="alice-has-a-long-key", cache_control=MARK)
        assert usage.cache_creation_input_tokens == len("[system]" + RULES), "the whole is over a quarter of the pool"
        assert usage.input_tokens == len(f"[user]{'x' * 20}?[assistant]")

    office(work, "alice-has-a-long-key")


def test_without_a_prefix_cache_nothing_is_said_to_be_held() -> None:
    async def work(desk: Office) -> None:
        usage = await desk.ask("one?", system=marked(RULES))
        assert (usage.cache_creation_input_tokens, usage.cache_read_input_tokens) == (0, 0)
        assert (await desk.engine.stats()).slots_pinned == 0

    office(work, prefix=False)


def test_marks_of_blocks_become_ends_of_messages() -> None:
    body: Any = {
        "model": "m",
        "max_tokens": 1,
        "system": [{"type": "text", "text": "ab"}, *marked("cd", ttl="1h"), {"type": "text", "text": "ef"}],
        "tools": [{"name": "t", "input_schema": {"type": "object"}, "cache_control": MARK}],
        "messages": [
            {"role": "user", "content": "question"},
            {"role": "user", "content": marked("more")},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "t", "input": {}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "r"}, *marked("last")]},
        ],
    }
    call = parse_messages(body)
    assert all("marks" not in message for message in call.messages)
    ends = [(mark.message, mark.chars, mark.ttl_s) for mark in call.marks]
    assert ends == [(-1, None, 300), (0, 5, 3600), (1, len("question\nmore"), 300), (4, 4, 300)]
    body["cache_control"] = MARK
    with pytest.raises(Exception, match="at most 4"):
        parse_messages(body)


@pytest.mark.parametrize("mark", [{"type": "for ever"}, {"type": "ephemeral", "ttl": "1d"}, {"ttl": "5m"}, "yes", 1])
def test_an_odd_mark_is_refused(mark: Any) -> None:
    block = {"type": "text", "text": "a", "cache_control": mark}
    with pytest.raises(Exception, match="cache_control must be"):
        parse_messages({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [block]}]})


@pytest.mark.parametrize("budget", [64, 16])
def test_a_request_pins_its_prompt_in_one_chunk_or_many(budget: int) -> None:
    engine = Engine(budget=budget, capacity=200)
    pins = (Pin(length=30, ttl_s=300.0), Pin(length=99, ttl_s=300.0), Pin(length=40, ttl_s=300.0, owner="a"))
    engine.submit(request("a", prompt(40), pins=pins))
    engine.run()
    assert engine.got["a"].pinned == [(30, 40, 40)], "told once, and no pin goes beyond the prompt"
    assert engine.cache.pinned == 40
    for i in range(8):
        engine.submit(request(f"b{i}", prompt(150, start=i + 1)))
        engine.run()
    engine.submit(request("c", prompt(42)))
    engine.run()
    assert engine.got["c"].cached[0] >= 40


def test_running_requests_take_what_pins_hold_where_nothing_else_is_left() -> None:
    engine = Engine(capacity=100)
    engine.submit(request("a", prompt(50), pins=(Pin(length=50, ttl_s=300.0),)))
    engine.run()
    assert engine.cache.pinned == 50
    engine.submit(request("b", prompt(80, start=1), max_tokens=16))
    engine.run()
    assert engine.cache.pinned == 0
    assert len(engine.got["b"].tokens) == 16
