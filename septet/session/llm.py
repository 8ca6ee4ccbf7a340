"""The Python API in the field's terms: `LLM(model).generate(...)`, `.chat(...)`, and the streaming `AsyncLLM`.

`LLM` runs a session on an event loop in a thread of its own, so it works in scripts (no `__main__` guard: the engine is
a process started by itself), notebooks and inside other loops. Knows no HTTP and no engine internals.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from septet.errors import InvalidRequest
from septet.request import SamplingParams
from septet.session.outputs import RequestOutput
from septet.session.progress import progress
from septet.session.reading import PLAIN, Reading
from septet.text.parsers.tools import ToolChoice

if TYPE_CHECKING:
    from types import TracebackType

    from septet.session.session import Prompt, Session

__all__ = ["LLM", "AsyncLLM"]

T = TypeVar("T")
TextOrIds = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]
MakePrompt = Callable[[], Coroutine[Any, Any, "Prompt"]]

MAX_IN_FLIGHT = 1024
"""Choices of one call that are with the engine at a time: enough for any batch, below the queue's limit."""


class LLM:
    """A model for offline use. `options` are the fields of `EngineConfig` (max_model_len, device, dtype, ...).

    Use as a context manager, or call `close()`; an interpreter that exits takes the engine with it.
    """

    def __init__(self, model: str, **options: Any) -> None:
        from septet.session.start import start_session

        self._begin(start_session(model, **options))

    @classmethod
    def over(cls, session: Coroutine[Any, Any, Session]) -> LLM:
        """An `LLM` over the session that this coroutine makes (another client than a process); it runs on our loop."""
        self = cls.__new__(cls)
        self._begin(session)
        return self

    def _begin(self, session: Coroutine[Any, Any, Session]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="septet-llm", daemon=True)
        self._thread.start()
        try:
            self._session: Session = self._run(session)
        except BaseException:
            self._stop_loop()
            raise

    def generate(
        self,
        prompts: TextOrIds | Sequence[TextOrIds],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; outputs come in the order of the prompts.

        A prompt is text, a list of token ids, or {"prompt": text} / {"prompt_token_ids": ids}. One `SamplingParams`
        goes for all; a list gives one each. Raises `InvalidRequest` (which prompt, which field) before any work is lost
        on the others. `use_tqdm=False` hides the progress bar.
        """
        session = self._session
        makers = [_prompt_maker(session, prompt) for prompt in _as_batch(prompts)]
        return self._run_batch(makers, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        reasoning: bool = False,
        **template_options: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of a list of conversations. Other options go to the chat template.

        With `tools` (OpenAI's shape) the calls of an answer are in `tool_calls` of its output, with `reasoning` its
        thoughts in `reasoning`; both are left in `text` otherwise.
        """
        reading = _reading(tools, tool_choice, parallel_tool_calls, reasoning)
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        session = self._session
        makers = [
            lambda c=conversation: session.chat_prompt(c, tools=tools, **template_options)  # type: ignore[misc]
            for conversation in conversations
        ]
        return self._run_batch(makers, sampling_params, use_tqdm, None, reading)

    def close(self) -> None:
        """End the engine. Idempotent."""
        if self._thread.is_alive():
            try:
                self._run(self._session.close())
            finally:
                self._stop_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _run_batch(
        self,
        makers: Sequence[MakePrompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None,
        reading: Reading = PLAIN,
    ) -> list[RequestOutput]:
        each = _each(params, len(makers))
        priorities = list(priority) if priority is not None else [0] * len(makers)
        if len(priorities) != len(makers):
            raise InvalidRequest(f"{len(priorities)} priorities for {len(makers)} prompts", param="priority")
        with progress(len(makers), use_tqdm) as advance:
            return self._run(_batch(self._session, makers, each, priorities, advance, reading))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run on the loop's thread and wait; Ctrl-C cancels the work there, which aborts its requests."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5)


class AsyncLLM:
    """The streaming twin of `LLM` for code that runs in an event loop. Starts its engine at the first use."""

    def __init__(self, model: str, **options: Any) -> None:
        self._model = model
        self._options = options
        self._starting: asyncio.Task[Session] | None = None

    async def generate(
        self, prompt: TextOrIds, sampling_params: SamplingParams | None = None, *, priority: int = 0
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the growing `RequestOutput` of one prompt after each event; the last has `finished` set.

        It is one object that grows, not a copy each time. Leaving the loop (break, cancel, aclose) aborts the request.
        """
        session = await self.session()
        ready = await _prompt_maker(session, prompt)()
        async with aclosing(_stream(session, ready, sampling_params or SamplingParams(), priority)) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        parallel_tool_calls: bool = True,
        reasoning: bool = False,
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """`generate` on a conversation; tools and reasoning as in `LLM.chat`."""
        session = await self.session()
        reading = _reading(tools, tool_choice, parallel_tool_calls, reasoning)
        ready = await session.chat_prompt(messages, tools=tools, **template_options)
        params = sampling_params or SamplingParams()
        async with aclosing(_stream(session, ready, params, 0, reading=reading)) as outputs:
            async for output in outputs:
                yield output

    async def session(self) -> Session:
        """The running session; starts it once, whoever asks first."""
        from septet.session.start import start_session

        if self._starting is None:
            self._starting = asyncio.create_task(start_session(self._model, **self._options))
        return await asyncio.shield(self._starting)

    async def close(self) -> None:
        if self._starting is not None:
            starting, self._starting = self._starting, None
            await (await starting).close()

    async def __aenter__(self) -> AsyncLLM:
        await self.session()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()


# -- pieces -----------------------------------------------------------------------------------------------------------
def _as_batch(prompts: TextOrIds | Sequence[TextOrIds]) -> list[TextOrIds]:
    """One prompt or many: a string, a mapping or a list of integers is one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise InvalidRequest(f"prompts is {repr(prompts)[:40]}, neither text nor a list", param="prompt")
    batch: list[Any] = list(prompts)
    if batch and all(not isinstance(p, str | Mapping | Sequence) for p in batch):
        return [batch]
    return batch


def _prompt_maker(session: Session, prompt: TextOrIds) -> MakePrompt:
    if isinstance(prompt, Mapping):
        keys = set(prompt)
        if keys != {"prompt"} and keys != {"prompt_token_ids"}:
            raise InvalidRequest(
                f"a prompt mapping holds either 'prompt' or 'prompt_token_ids', not {sorted(map(str, keys))}",
                param="prompt",
            )
        prompt = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
    ready = prompt
    return lambda: session.prompt(ready)  # type: ignore[arg-type]


def _reading(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any], parallel: bool, reasoning: bool
) -> Reading:
    if not tools and not reasoning and choice in ("auto", "none"):
        return PLAIN
    return Reading(tools=ToolChoice.of(tools, choice, parallel), reasoning=reasoning)


def _each(params: SamplingParams | Sequence[SamplingParams] | None, n: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * n
    if len(params) != n:
        raise InvalidRequest(f"{len(params)} sampling params for {n} prompts", param="sampling_params")
    return list(params)


async def _stream(
    session: Session,
    prompt: Prompt,
    params: SamplingParams,
    priority: int,
    request_id: str = "0",
    reading: Reading = PLAIN,
) -> AsyncGenerator[RequestOutput, None]:
    output = RequestOutput.empty(request_id, prompt, params.n)
    async with aclosing(session.generate(prompt, params, priority=priority, reading=reading)) as events:
        async for event in events:
            output.add(event)
            yield output


def _workers(params: Sequence[SamplingParams]) -> int:
    """Prompts at a time: each is as many engine requests as it has choices."""
    return max(1, MAX_IN_FLIGHT // max((p.n for p in params), default=1))


async def _batch(
    session: Session,
    makers: Sequence[MakePrompt],
    params: Sequence[SamplingParams],
    priorities: Sequence[int],
    advance: Callable[[int, int, bool], None],
    reading: Reading = PLAIN,
) -> list[RequestOutput]:
    """Every prompt is checked first; then a bounded number of workers takes them in order."""
    prompts = []
    for number, (make, param) in enumerate(zip(makers, params, strict=True)):
        try:
            prompts.append(await make())
            session.resolve(param, len(prompts[-1].tokens))
        except InvalidRequest as error:
            raise InvalidRequest(f"prompt {number}: {error.message}", param=error.param) from error
    outputs: list[RequestOutput | None] = [None] * len(prompts)
    todo = iter(range(len(prompts)))

    async def work() -> None:
        for i in todo:
            n_before = 0
            async with aclosing(_stream(session, prompts[i], params[i], priorities[i], str(i), reading)) as stream:
                async for output in stream:
                    n_now = sum(len(o.token_ids) for o in output.outputs)
                    advance(len(prompts[i].tokens) if outputs[i] is None else 0, n_now - n_before, output.finished)
                    outputs[i], n_before = output, n_now

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(_workers(params), len(prompts))):
                group.create_task(work())
    except BaseExceptionGroup as failed:  # the first error has cancelled the others
        raise failed.exceptions[0] from None
    return [output for output in outputs if output is not None]
