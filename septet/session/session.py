"""One generation as text: template, tokens, engine requests, text again. Whoever asks, asks here.

The Python API, the HTTP dialects and the terminal all call `Session`; it owns no engine state and knows neither JSON
nor the scheduler nor torch. A closed or cancelled stream aborts its engine requests.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from septet.errors import EngineDead, InvalidRequest
from septet.machine import give_back_memory
from septet.request import FinishReason, Pin, Request, SamplingParams
from septet.session.choice import Choice, error_of
from septet.session.merge import merge
from septet.session.reading import PLAIN, Reading
from septet.session.thoughts import end_of_thoughts
from septet.text.parsers.tools import Tool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from septet.engine.client import EngineClient
    from septet.engine.messages import EngineInfo, Update
    from septet.grammar.vocabulary import Vocabulary
    from septet.hub.store import LocalModel
    from septet.session.events import Event
    from septet.session.reading import ReplyFormat, ReplyReader
    from septet.text.template import ChatTemplate
    from septet.text.tokenizer import Tokenizer

__all__ = ["Limits", "Prompt", "Session"]

MAX_SALT_CHARS = 256
LONG_TEXT = 16_384
"""Characters from which a text is tokenised in a thread, so that it does not hold up everybody else's tokens."""
SANE_CHARS_PER_TOKEN = 4
HUGE_TEXT = 2**18
"""Up to this many characters per token of the context a text is tokenised first, so that the error has its length."""
SHARE_FROM = 32
"""Prompt tokens from which the choices of one prompt wait for the first one's prefill and share it by the cache."""


@dataclass(frozen=True, slots=True)
class Limits:
    max_model_len: int  # tokens, prompt and output together
    vocab_size: int

    @classmethod
    def of(cls, info: EngineInfo) -> Limits:
        return cls(info.max_model_len, info.vocab_size)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt that is checked and ready: at least one token, in the vocabulary, with room for one more."""

    tokens: tuple[int, ...]
    text: str | None = None  # what was tokenised, if it was text


class Session:
    """Generations over one engine client. Methods raise `InvalidRequest` before anything reaches the engine."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        model_name: str,
        limits: Limits,
        rng: random.Random | None = None,
        reply_format: ReplyFormat | None = None,
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self.template = template
        self.model_name = model_name
        self.limits = limits
        self.origin: LocalModel | None = None  # what it was started from, where that is known
        self.reply_format = reply_format  # None: answers are plain text whatever the reading says
        # A tokenizer may name ends that the model has no row for: they can't be sampled, and must not be masked.
        self._ends = tuple(token for token in tokenizer.eos_token_ids if token < limits.vocab_size)
        self._rng = rng or random.Random(secrets.randbits(64))
        self._prefix = secrets.token_hex(4)
        self._numbers = count()
        self._taught = False  # the engine has the vocabulary
        self._teaching = asyncio.Lock()
        self._long_texts = 0  # being tokenised in threads; the tokenizer is theirs meanwhile

    # -- prompts ------------------------------------------------------------------------------------------------------
    async def prompt(self, prompt: str | Sequence[int], *, add_special_tokens: bool = True) -> Prompt:
        """Tokenise (or take) a prompt and check that it fits."""
        if isinstance(prompt, str):
            return Prompt(self._fitting(await self._encode(prompt, add_special_tokens)), str(prompt))
        ids: Sequence[int] = prompt
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence):
            raise InvalidRequest(f"prompt is {repr(prompt)[:40]}, neither text nor a list of token ids", param="prompt")
        return Prompt(self._checked_ids(self._fitting(ids)))

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Prompt:
        """Render the model's chat template (`options`: add_generation_prompt, continue_final_message, ...).

        `tools`: in OpenAI's shape. A template that knows none gets them, and earlier calls and results, as text
        (`text/parsers/fallback.py`).
        """
        if self.template is None:
            raise InvalidRequest(
                f"{self.model_name} has no chat template; use a plain prompt (/v1/completions, LLM.generate)",
                param="messages",
            )
        variables: frozenset[str] = getattr(self.template, "variables", frozenset())
        options = {k: v for k, v in options.items() if k in variables or not _asks_nothing(k, v)}
        if self.reply_format is not None:
            known = [Tool.of(tool) for tool in tools or ()]
            messages = self.reply_format.conversation(messages, known)
            if written := self.reply_format.template_tools(known):
                options["tools"] = written
        elif tools:
            options["tools"] = list(tools)
        text = await asyncio.to_thread(self.template.render, list(messages), **options)
        return Prompt(self._fitting(await self._encode(text, False)), str(text))

    async def token_ids(self, text: str, *, add_special_tokens: bool = True) -> Sequence[int]:
        """A text of any length as tokens: to be counted or shown, it need not fit the context."""
        return await self._encode(text, add_special_tokens, must_fit=False)

    async def _encode(self, text: str, add_special_tokens: bool, *, must_fit: bool = True) -> Sequence[int]:
        if len(text) < LONG_TEXT and not self._long_texts:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self._long_texts += 1
        try:
            return await asyncio.to_thread(self._encode_long, text, add_special_tokens, must_fit)
        finally:
            self._long_texts -= 1
            if len(text) > HUGE_TEXT and not self._long_texts:  # a hundred bytes a character were held meanwhile
                await asyncio.to_thread(give_back_memory)

    def _encode_long(self, text: str, add_special_tokens: bool, must_fit: bool) -> Sequence[int]:
        """Refuses a hopeless length before the work."""
        limit = self.limits.max_model_len
        if not must_fit or len(text) <= SANE_CHARS_PER_TOKEN * limit:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        try:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens, max_tokens=limit - 1)
        except InvalidRequest as error:
            raise InvalidRequest(
                f"prompt is too long: {error.message} (maximum context length {limit} tokens, output included)",
                param="prompt",
            ) from None

    def _checked_ids(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        if ids and {*map(type, ids)} == {int} and min(ids) >= 0 and max(ids) < self.limits.vocab_size:
            return ids  # long prompts by the thousand: no loop in Python
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.limits.vocab_size:
                shown = repr(token)[:40]
                raise InvalidRequest(
                    f"prompt holds {shown}, which is no token id of this model (0 .. {self.limits.vocab_size - 1})",
                    param="prompt",
                )
        return ids

    def _fitting(self, tokens: Sequence[int]) -> tuple[int, ...]:
        limit = self.limits.max_model_len
        if not tokens:
            raise InvalidRequest("prompt is empty: it must hold at least one token", param="prompt")
        if len(tokens) >= limit:
            raise InvalidRequest(
                f"prompt is too long: {len(tokens)} tokens, but the maximum context length is {limit} tokens, output "
                "included; shorten it or start the engine with a larger max_model_len",
                param="prompt",
            )
        return tuple(tokens)

    # -- generations --------------------------------------------------------------------------------------------------
    async def generate(
        self,
        prompt: str | Sequence[int] | Prompt,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        reading: Reading = PLAIN,
        arrival: float | None = None,
        pins: tuple[Pin, ...] = (),
    ) -> AsyncGenerator[Event, None]:
        """Events of `params.n` choices of one prompt, in the order in which they happen.

        Each choice ends with one `Finished`; an error of any choice is raised and ends them all. `max_tokens` beyond
        the context is cut to what fits, and shows as finish reason `length`. `reading` tells thoughts and calls apart.
        `arrival`: its place among requests of one priority, lower first; None = now, in seconds of the monotonic clock.
        `pins`: beginnings of the prompt that stay in the cache.
        """
        ready = prompt if isinstance(prompt, Prompt) else await self.prompt(prompt)
        thinking = self.reply_format is not None and self.reply_format.is_thinking(ready.text, reading)
        if self.reply_format is not None and reading is not PLAIN:
            may_think = self.reply_format.may_think(ready.text, reading, thinking)
            params = self.reply_format.bound(params, reading, thinking, may_think)
        requests = self._requests(ready, params, priority, cache_salt, arrival)
        if pins:
            requests[0] = replace(requests[0], pins=pins)
        if params.structured is not None:
            await self._teach()
        shared = asyncio.Event()
        if len(requests) == 1 or len(ready.tokens) < SHARE_FROM:
            shared.set()
        choices = [self._choice(i, r, shared, reading, thinking) for i, r in enumerate(requests)]
        try:
            async with aclosing(merge(choices)) as events:
                async for event in events:
                    yield event
        except InvalidRequest as error:
            source = params.structured.source if params.structured is not None else ""
            if error.param != "structured" or not source:
                raise
            raise InvalidRequest(error.message, param=source) from None

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        **options: Any,
    ) -> AsyncGenerator[Event, None]:
        """`generate` on the rendered conversation."""
        prompt = await self.chat_prompt(messages, **options)
        async with aclosing(self.generate(prompt, params, priority=priority, cache_salt=cache_salt)) as events:
            async for event in events:
                yield event

    async def pooled(self, prompt: Prompt, pooling: str, *, priority: int = 0, arrival: float | None = None) -> bytes:
        """The prompt's final hidden states, pooled ("mean" or "last"): (D,) float32. For `embed.py`."""
        params = SamplingParams(max_tokens=1, temperature=0.0)
        request = replace(self._requests(prompt, params, priority, "", arrival)[0], pooling=pooling)
        async with aclosing(self.client.generate(request)) as updates:
            async for update in updates:
                if update.finish_reason is FinishReason.ERROR:
                    raise error_of(update)
                if update.pooled:
                    return update.pooled
        raise EngineDead("the engine ended an embedding without a vector")

    async def close(self) -> None:
        await self.client.close()

    def _requests(
        self, prompt: Prompt, params: SamplingParams, priority: int, cache_salt: str, arrival: float | None = None
    ) -> list[Request]:
        if len(cache_salt) > MAX_SALT_CHARS:
            raise InvalidRequest(f"cache_salt must have at most {MAX_SALT_CHARS} characters", param="cache_salt")
        if not isinstance(priority, int) or isinstance(priority, bool) or abs(priority) >= 2**31:
            raise InvalidRequest("priority must be a 32-bit integer", param="priority")
        base = self.resolve(params, len(prompt.tokens))
        return [
            Request(
                id=f"{self._prefix}-{next(self._numbers)}",
                tokens=prompt.tokens,
                params=self._of_choice(base, index),
                eos_token_ids=self._ends,
                priority=priority,
                arrival=time.monotonic() if arrival is None else arrival,
                cache_salt=cache_salt,
            )
            for index in range(params.n)
        ]

    def resolve(self, params: SamplingParams, n_prompt: int) -> SamplingParams:
        """Fill in what the engine wants settled: max_tokens that fits, a seed, ids in the vocabulary."""
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
            for token in ids:
                if token >= self.limits.vocab_size:
                    raise InvalidRequest(
                        f"{name} holds {token}, but {self.model_name} has {self.limits.vocab_size} tokens", param=name
                    )
        room = self.limits.max_model_len - n_prompt
        if params.min_tokens > room:
            raise InvalidRequest(
                f"min_tokens is {params.min_tokens}, but only {room} tokens fit after a prompt of {n_prompt} "
                f"(maximum context length {self.limits.max_model_len})",
                param="min_tokens",
            )
        seed = self._rng.getrandbits(62) if params.seed is None else params.seed
        return replace(params, max_tokens=min(params.max_tokens or room, room), seed=seed)

    async def _teach(self) -> None:
        """Tell the engine what the tokens stand for, once, before the first grammar."""
        async with self._teaching:
            if not self._taught:
                self.client.teach(await asyncio.to_thread(self._vocabulary))
                self._taught = True

    def _vocabulary(self) -> Vocabulary:
        from septet.grammar.vocabulary import Vocabulary

        tokens = map(self.tokenizer.token_bytes, range(self.tokenizer.vocab_size))
        return Vocabulary.of(tokens, self.tokenizer.special_ids, self.tokenizer.eos_token_ids, self.tokenizer.as_json())

    @staticmethod
    def _of_choice(params: SamplingParams, index: int) -> SamplingParams:
        seed = ((params.seed or 0) + index + 2**63) % 2**64 - 2**63  # wraps in 64 bits
        return replace(params, n=1, seed=seed, prompt_logprobs=params.prompt_logprobs if index == 0 else None)

    async def _choice(
        self, index: int, request: Request, shared: asyncio.Event, reading: Reading, thinking: bool
    ) -> AsyncGenerator[Event, None]:
        """One choice as events. Choice 0 opens `shared` once its prompt is computed; the others wait for it."""
        keep: frozenset[int] = frozenset()
        reader: ReplyReader | None = None
        if self.reply_format is not None and reading is not PLAIN:
            keep = self.reply_format.kept_ids(reading)
            reader = self.reply_format.reader(reading, thinking, request.params.structured)
        choice = Choice(index, self.tokenizer, request.params, len(request.tokens), keep)
        if index:
            await shared.wait()
        try:
            async with aclosing(self._updates(request, reader, reading)) as updates:
                async for update in updates:
                    events = choice.feed(update)
                    if update.tokens:
                        shared.set()
                    for event in events if reader is None else reader.read_all(events):
                        yield event
                    if reader is not None and reader.full and not choice.finished:
                        for event in reader.read(choice.end(FinishReason.STOP)):
                            yield event
                    if choice.finished:
                        return
        finally:
            shared.set()

    async def _updates(
        self, request: Request, reader: ReplyReader | None, reading: Reading
    ) -> AsyncGenerator[Update, None]:
        """The engine's updates. Thoughts over their budget are ended: a second request goes on behind their end."""
        made: list[int] = []
        async with aclosing(self.client.generate(request)) as updates:
            async for update in updates:
                made += update.tokens
                yield update
                if update.finish_reason is None and reader is not None and reader.over(reading.thinking_budget):
                    break
            else:
                return
        assert self.reply_format is not None
        told, following = end_of_thoughts(
            request, made, self.reply_format.thoughts, self.tokenizer, f"{self._prefix}-{next(self._numbers)}"
        )
        yield told
        if following is None:
            return
        async with aclosing(self.client.generate(following)) as updates:
            async for update in updates:
                yield update


def _asks_nothing(name: str, value: Any) -> bool:
    """Of a model that does not think: how much it should, and that it should not."""
    return name == "reasoning_effort" or (name in ("enable_thinking", "thinking") and value is False)
