"""`LLM` and `AsyncLLM` over a scripted engine: forms of prompts, outputs in vLLM's terms, errors, interrupts."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

from septet import LLM, AsyncLLM, SamplingParams
from septet.errors import InvalidRequest, SeptetError
from septet.session.start import engine_config
from tests.fakes import FakeClient, session

if TYPE_CHECKING:
    from collections.abc import Iterator

    from septet.session.session import Session


def llm_of(client: FakeClient) -> LLM:
    async def make() -> Session:
        return session(client)

    return LLM.over(make())


@pytest.fixture
def client() -> FakeClient:
    return FakeClient(lambda r: "<" + bytes(r.tokens).decode() + ">", eos=True)


@pytest.fixture
def llm(client: FakeClient) -> Iterator[LLM]:
    with llm_of(client) as llm:
        yield llm


@pytest.mark.parametrize(
    ("prompts", "texts"),
    [
        ("a", ["<a>"]),
        (["a", "b"], ["<a>", "<b>"]),
        ([97, 98], ["<ab>"]),
        ([[97], [98]], ["<a>", "<b>"]),
        ({"prompt": "a"}, ["<a>"]),
        ([{"prompt_token_ids": [97]}, "b"], ["<a>", "<b>"]),
        ([], []),
    ],
)
def test_forms_of_prompts(llm: LLM, prompts: Any, texts: list[str]) -> None:
    outputs = llm.generate(prompts, use_tqdm=False)
    assert [o.outputs[0].text for o in outputs] == texts


def test_output_in_vllms_terms(llm: LLM) -> None:
    (output,) = llm.generate("ab", SamplingParams(n=2, logprobs=1, prompt_logprobs=0, stop_token_ids=(62,)))
    assert (output.prompt, output.prompt_token_ids, output.num_cached_tokens) == ("ab", [97, 98], 3)
    assert output.finished
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] is not None
    assert output.prompt_logprobs[1][98].decoded_token == "b"
    assert [o.index for o in output.outputs] == [0, 1]
    first = output.outputs[0]
    assert first.token_ids == [*list(b"<ab>"), 256]
    assert (first.text, first.finish_reason, first.stop_reason) == ("<ab>", "stop", None)
    assert first.cumulative_logprob == -5.0
    assert first.logprobs is not None
    assert len(first.logprobs) == 5
    assert first.logprobs[0][ord("<")].rank == 1


def test_params_for_each(llm: LLM) -> None:
    outputs = llm.generate(["aaa", "bbb"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=3)])
    assert [o.outputs[0].text for o in outputs] == ["<", "<bb"]
    with pytest.raises(InvalidRequest, match="1 sampling params for 2 prompts"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_chat_one_or_many(llm: LLM) -> None:
    one = [{"role": "user", "content": "x"}]
    assert llm.chat(one)[0].outputs[0].text == "<[user]x[assistant]>"
    assert len(llm.chat([one, one, one])) == 3


def test_order_is_kept_whatever_finishes_first(client: FakeClient, llm: LLM) -> None:
    delays = iter([0.02, 0.0, 0.01] * 500)
    client.pause = lambda: asyncio.sleep(next(delays))
    prompts = [f"prompt {i}" for i in range(50)]
    assert [o.outputs[0].text for o in llm.generate(prompts)] == [f"<{p}>" for p in prompts]


def test_a_bad_prompt_is_named_before_any_work(client: FakeClient, llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match=r"prompt 1: .*maximum context length"):
        llm.generate(["a", "x" * 500])
    with pytest.raises(InvalidRequest, match="prompt_token_ids"):
        llm.generate([{"text": "a"}])
    with pytest.raises(InvalidRequest, match=r"prompt 0: .*300"):
        llm.generate([[300]])
    assert client.seen == []
    assert llm.generate("a")[0].outputs[0].text == "<a>"


@pytest.mark.parametrize("prompt", [5, b"ab", ["a", 5], [1, "a"], [["a"]], [None]])
def test_what_is_no_prompt_is_refused_as_such(llm: LLM, prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"prompts? (is|holds) "):
        llm.generate(prompt)


def test_choices_count_against_the_queue(client: FakeClient, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("septet.session.llm.MAX_IN_FLIGHT", 16)
    most = 0

    async def pause() -> None:
        nonlocal most
        most = max(most, len(client.seen) - len(ended))
        await asyncio.sleep(0)

    ended: list[str] = []
    reply = client.generate

    async def generate(request: Any) -> Any:
        try:
            async for update in reply(request):
                yield update
        finally:
            ended.append(request.id)

    client.pause, client.generate = pause, generate  # type: ignore[method-assign]
    outputs = llm.generate(["a"] * 30, SamplingParams(n=4))
    assert len(outputs) == 30
    assert len(ended) == 120
    assert 4 < most <= 16


def test_an_engine_error_ends_the_call_and_the_others(client: FakeClient, llm: LLM) -> None:
    client._updates = lambda request: [1 / 0]  # type: ignore[method-assign, list-item, return-value]
    with pytest.raises(ZeroDivisionError):
        llm.generate(["a", "b"])


def test_priority_reaches_the_engine(client: FakeClient, llm: LLM) -> None:
    llm.generate(["a", "b"], priority=[3, 4])
    assert sorted(r.priority for r in client.seen) == [3, 4]
    with pytest.raises(InvalidRequest):
        llm.generate(["a"], priority=[1, 2])


def test_close_twice(client: FakeClient) -> None:
    llm = llm_of(client)
    llm.close()
    llm.close()
    assert client.dead


def test_unknown_engine_option_is_named() -> None:
    with pytest.raises(InvalidRequest, match=r"'max_modellen'.*max_model_len"):
        engine_config("x", {"max_modellen": 5})
    assert engine_config("x", {"gpu_memory_utilization": 0.5}).memory_utilization == 0.5


def test_a_model_that_is_not_there_leaves_no_thread(tmp_path: Any) -> None:
    import threading

    before = threading.active_count()
    with pytest.raises(SeptetError):
        LLM(str(tmp_path / "missing.gguf"))
    assert threading.active_count() <= before + 1  # the pool's thread may linger


def test_async_twin_streams_and_aborts(client: FakeClient) -> None:
    async def go() -> None:
        llm = AsyncLLM("unused")

        async def ready() -> Session:
            return session(client)

        llm._starting = asyncio.create_task(ready())
        texts = [o.outputs[0].text async for o in llm.generate("ab", SamplingParams(temperature=0))]
        assert texts == ["<", "<a", "<ab", "<ab>", "<ab>", "<ab>"]
        last = [o async for o in llm.chat([{"role": "user", "content": "x"}])][-1]
        assert last.finished
        generation = llm.generate("abcdef")
        await anext(generation)
        await generation.aclose()
        assert client.aborted == [client.seen[-1].id]
        await llm.close()
        assert client.dead

    asyncio.run(go())


def test_import_is_light() -> None:
    code = "import sys, septet; septet.SamplingParams; septet.LLM; print('torch' in sys.modules, 'rich' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]


def test_progress_bar_counts_prompts_and_tokens(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    llm.generate(["a"] * 7)
    assert capsys.readouterr().err == ""  # no terminal, no bar
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    llm.generate(["a"] * 7)
    shown = capsys.readouterr().err
    assert "7/7" in shown
    assert "tok/s" in shown
    llm.generate(["a"] * 7, use_tqdm=False)
    assert capsys.readouterr().err == ""
