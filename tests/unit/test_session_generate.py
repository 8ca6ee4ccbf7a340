"""Sessions against a scripted engine: text, stops, n, logprobs, limits, cancellation."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from typing import Any

import pytest

from septet.engine.messages import Update
from septet.errors import EngineDead, InvalidRequest, Overloaded, SeptetError
from septet.request import FinishReason, SamplingParams
from septet.session.choice import Choice
from septet.session.events import Event, Finished, PromptLogprobs, TextDelta
from septet.session.merge import merge
from septet.session.session import SHARE_FROM, Limits
from tests.fakes import EOS, MAX_LEN, ByteTokenizer, FakeClient, session


def gather(made: Any, prompt: Any = "hi", **params: Any) -> list[Event]:
    async def go() -> list[Event]:
        return [event async for event in made.generate(prompt, SamplingParams(**params))]

    return asyncio.run(go())


def text_of(events: list[Event], index: int = 0) -> str:
    return "".join(e.text for e in events if isinstance(e, TextDelta) and e.index == index)


def end_of(events: list[Event], index: int = 0) -> Finished:
    ends = [e for e in events if isinstance(e, Finished) and e.index == index]
    assert len(ends) == 1
    return ends[0]


def test_text_ids_and_usage() -> None:
    events = gather(session(FakeClient("hello")))
    assert text_of(events) == "hello"
    assert [i for e in events if isinstance(e, TextDelta) for i in e.token_ids] == list(b"hello")
    usage = end_of(events).usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (2, 5, 3)
    assert end_of(events).reason is FinishReason.LENGTH


def test_eos_is_counted_but_not_text() -> None:
    events = gather(session(FakeClient("hey", eos=True)), skip_special_tokens=False)
    assert text_of(events) == "hey"
    assert end_of(events).usage.completion_tokens == 4
    assert (end_of(events).reason, end_of(events).stop_reason) == (FinishReason.STOP, None)


def test_ends_that_the_model_has_no_row_for_stay_away_from_the_sampler() -> None:
    for vocab_size, ends in ((257, (EOS,)), (256, ())):
        client = FakeClient("hello")
        gather(session(client, limits=Limits(MAX_LEN, vocab_size)), min_tokens=2)
        assert client.seen[0].eos_token_ids == ends


def test_stop_id_is_named_and_shown_only_when_asked() -> None:
    client = FakeClient("ab!")
    assert text_of(gather(session(client), stop_token_ids=(33,))) == "ab"
    events = gather(session(client), stop_token_ids=(33,), include_stop_str_in_output=True)
    assert text_of(events) == "ab!"
    assert end_of(events).stop_reason == 33


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
def test_stop_string_ends_text_and_engine_request(chunk: int) -> None:
    client = FakeClient("one two STOP three")
    client.chunk = chunk
    events = gather(session(client), stop=("STOP", "never"))
    assert text_of(events) == "one two "
    assert (end_of(events).reason, end_of(events).stop_reason) == (FinishReason.STOP, "STOP")
    assert end_of(events).usage.completion_tokens == len("one two STOP")
    assert bytes(i for e in events if isinstance(e, TextDelta) for i in e.token_ids) == b"one two STOP"
    if chunk < 18:
        assert client.aborted == [client.seen[0].id]


def test_stop_string_included_when_asked() -> None:
    events = gather(session(FakeClient("abc END def")), stop=("END",), include_stop_str_in_output=True)
    assert text_of(events) == "abc END"


def test_held_back_start_of_a_stop_string_comes_at_the_end() -> None:
    events = gather(session(FakeClient("abc EN")), stop=("END",))
    assert text_of(events) == "abc EN"
    assert end_of(events).reason is FinishReason.LENGTH


def test_min_tokens_shields_from_stop_strings() -> None:
    events = gather(session(FakeClient("xx aa xx bb")), stop=("xx",), min_tokens=4)
    assert text_of(events) == "xx aa "


def test_half_characters_are_never_shown() -> None:
    events = gather(session(FakeClient("a€b")))
    texts = [e.text for e in events if isinstance(e, TextDelta)]
    assert "".join(texts) == "a€b"
    assert not any("�" in text for text in texts)


def test_broken_character_at_the_end_is_shown_as_replacement() -> None:
    events = gather(session(FakeClient("a€")), max_tokens=2)
    assert text_of(events) == "a�"


def test_logprobs_carry_text_and_bytes() -> None:
    events = gather(session(FakeClient("é")), logprobs=2)
    positions = [p for e in events if isinstance(e, TextDelta) for p in e.logprobs]
    assert [p.chosen.raw for p in positions] == [b"\xc3", b"\xa9"]
    assert [t.logprob for t in positions[0].top] == [-1.0, -2.0]
    assert [t.rank for t in positions[0].top] == [1, 2]


def test_prompt_logprobs_come_once_and_first() -> None:
    events = gather(session(FakeClient("xyz")), "abcd", prompt_logprobs=1, n=2)
    assert isinstance(events[0], PromptLogprobs)
    assert sum(isinstance(e, PromptLogprobs) for e in events) == 1
    assert events[0].positions[0] is None
    assert [p.chosen.token_id for p in events[0].positions[1:] if p] == list(b"bcd")


def test_choices_differ_in_seed_and_each_ends_once() -> None:
    client = FakeClient(lambda r: f"seed {r.params.seed}")
    events = gather(session(client), n=3, seed=2**63 - 2)
    assert [text_of(events, i) for i in range(3)] == [f"seed {2**63 - 2}", f"seed {2**63 - 1}", f"seed {-(2**63)}"]
    assert len({r.id for r in client.seen}) == 3
    assert all(r.params.n == 1 for r in client.seen)
    assert [end_of(events, i).reason for i in range(3)] == [FinishReason.LENGTH] * 3


def test_choices_of_a_long_prompt_wait_for_the_first_prefill() -> None:
    client = FakeClient("abc")
    order: list[int] = []

    async def pause() -> None:
        order.append(len(client.seen))
        await asyncio.sleep(0)

    client.pause = pause
    gather(session(client), "x" * SHARE_FROM, n=4)
    assert order[0] == 1  # alone until its first token
    assert len(client.seen) == 4


def test_seed_is_drawn_when_not_given() -> None:
    client = FakeClient()
    made = session(client, rng=random.Random(1))
    gather(made)
    gather(made)
    first, second = (r.params.seed for r in client.seen)
    assert first != second


def test_max_tokens_is_cut_to_the_context() -> None:
    client = FakeClient("a" * 500)
    assert end_of(gather(session(client), "x" * 150)).usage.completion_tokens == MAX_LEN - 150
    gather(session(client), "x" * 150, max_tokens=10_000)
    assert [r.params.max_tokens for r in client.seen] == [MAX_LEN - 150] * 2


@pytest.mark.parametrize(
    ("prompt", "params", "words", "param"),
    [
        ("x" * MAX_LEN, {}, f"{MAX_LEN} tokens, but the maximum context length is {MAX_LEN}", "prompt"),
        ("x" * 100_000, {}, "100000 tokens; at most 199 fit (maximum context length 200", "prompt"),
        ("", {}, "empty", "prompt"),
        ([], {}, "empty", "prompt"),
        ([1, 257], {}, "257", "prompt"),
        ([-1], {}, "-1", "prompt"),
        ([1, True], {}, "True", "prompt"),
        ([1.5], {}, "1.5", "prompt"),
        ("x" * 190, {"min_tokens": 11}, "only 10 tokens fit", "min_tokens"),
        ("x", {"stop_token_ids": (257,)}, "257", "stop_token_ids"),
        ("x", {"logit_bias": {999: 1.0}}, "999", "logit_bias"),
    ],
)
def test_what_cannot_run_is_refused_before_the_engine(prompt: Any, params: Any, words: str, param: str) -> None:
    client = FakeClient()
    with pytest.raises(InvalidRequest) as caught:
        gather(session(client), prompt, **params)
    assert words in caught.value.message
    assert caught.value.param == param
    assert client.seen == []


@pytest.mark.parametrize("extra", [{"cache_salt": "x" * 300}, {"priority": 2**40}, {"priority": True}])
def test_salt_and_priority_are_bounded(extra: dict[str, Any]) -> None:
    async def go() -> None:
        async for _ in session().generate("hi", SamplingParams(), **extra):
            pass

    with pytest.raises(InvalidRequest) as caught:
        asyncio.run(go())
    assert caught.value.param in extra


def test_salt_and_priority_reach_the_engine() -> None:
    client = FakeClient()

    async def go() -> None:
        async for _ in session(client).generate("hi", SamplingParams(), cache_salt="me", priority=-3):
            pass

    asyncio.run(go())
    assert (client.seen[0].cache_salt, client.seen[0].priority) == ("me", -3)


@pytest.mark.parametrize(
    ("kind", "error"), [("overloaded_error", Overloaded), ("engine_dead_error", EngineDead), ("what?", SeptetError)]
)
def test_an_engine_error_is_raised_with_its_type(kind: str, error: type[Exception]) -> None:
    client = FakeClient("hello")
    client.failure = Update("x", finish_reason=FinishReason.ERROR, error="broken row", error_kind=kind)
    with pytest.raises(error, match="broken row"):
        gather(session(client), n=2)


def test_leaving_early_aborts_every_choice() -> None:
    client = FakeClient("a" * 100)

    async def go() -> None:
        async with aclosing(session(client).generate("hi", SamplingParams(n=3))) as events:
            async for _ in events:
                break

    asyncio.run(go())
    assert sorted(client.aborted) == sorted(r.id for r in client.seen)
    assert client.seen


def test_cancelling_the_task_aborts() -> None:
    client = FakeClient("a" * 100)

    async def forever() -> None:
        await asyncio.sleep(3600)

    client.pause = forever

    async def consume() -> None:
        async for _ in session(client).generate("hi", SamplingParams(n=2)):
            pass

    async def go() -> None:
        task = asyncio.create_task(consume())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert len(client.aborted) == 2


def test_chat_renders_and_reports_a_missing_template() -> None:
    client = FakeClient("ok")

    async def ask(made: Any) -> None:
        async for _ in made.chat([{"role": "user", "content": "hi"}], SamplingParams()):
            pass

    asyncio.run(ask(session(client)))
    assert bytes(client.seen[0].tokens) == b"[user]hi[assistant]"
    with pytest.raises(InvalidRequest, match="no chat template"):
        asyncio.run(ask(session(client, template=None)))


def test_merge_is_bounded_by_its_reader() -> None:
    made: list[int] = []

    async def source() -> Any:
        for i in range(1000):
            made.append(i)
            yield i

    async def go() -> None:
        async with aclosing(merge([source(), source()])) as items:
            async for _ in items:
                await asyncio.sleep(0.01)
                break

    asyncio.run(go())
    assert len(made) <= 8


def test_any_cutting_into_updates_gives_the_same_text() -> None:
    rng = random.Random(7)
    ids = tuple("naïve €uro ¿ stop here 🙂 and more".encode())
    params = SamplingParams(stop=("🙂 an",), logprobs=None)
    wanted = "naïve €uro ¿ stop here "
    for _ in range(200):
        choice, at, text = Choice(0, ByteTokenizer(), params, 1), 0, ""  # type: ignore[arg-type]
        while at < len(ids) and not choice.finished:
            n = rng.randint(1, 9)
            reason = FinishReason.LENGTH if at + n >= len(ids) else None
            events = choice.feed(Update("r", tokens=ids[at : at + n], finish_reason=reason))
            text += text_of(events)
            at += n
        assert text == wanted


def test_eos_constant_is_special() -> None:
    assert ByteTokenizer().decode([72, EOS]) == "H"
