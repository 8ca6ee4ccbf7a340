"""Stand-ins for the engine and the text room: scripted updates, a vocabulary of bytes. No torch, no files."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from septet.engine.messages import (
    EngineInfo,
    EngineStats,
    ScopeBranch,
    ScopePool,
    ScopeRow,
    ScopeView,
    StatsReply,
    Update,
)
from septet.errors import EngineDead, InvalidRequest
from septet.request import FinishReason
from septet.session.session import Limits, Session
from septet.step import Logprobs

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

    from septet.engine.pulse import Pulse
    from septet.request import Request

EOS = 256
MAX_LEN = 200


class ByteTokenizer:
    """Token = byte; 256 ends a sequence. The parts of `Tokenizer` that a session uses."""

    vocab_size = 257
    eos_token_ids = (EOS,)
    special_ids = frozenset((EOS,))
    strip_space = False
    chat_template = "fake"

    def encode(self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None) -> list[int]:
        ids = list(text.encode())
        if max_tokens is not None and len(ids) > max_tokens:
            raise InvalidRequest(f"the prompt has {len(ids)} tokens; at most {max_tokens} fit", param="prompt")
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", "replace")

    def as_json(self) -> str:
        return ""

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b"<eos>"

    def token_text(self, token: int) -> str:
        return self.token_bytes(token).decode("utf-8", "replace")


class PlainTemplate:
    variables = frozenset({"thinking"})

    def render(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        unknown = set(options) - {"add_generation_prompt", "continue_final_message", "thinking"}
        if unknown:
            raise InvalidRequest(f"chat_template_kwargs has {sorted(unknown)[0]!r}", param="chat_template_kwargs")
        text = "".join(f"[{m['role']}]{m['content']}" for m in messages)
        return text + ("[assistant]" if options.get("add_generation_prompt", True) else "")


class FakeClient:
    """An engine that answers each request with the bytes of `reply(request)`, one token an update.

    `pause`: an awaitable before each update. Log-probabilities are -1 for the chosen token, then -2, -3 ...
    """

    def __init__(self, reply: Callable[[Request], str] | str = "hello", *, eos: bool = False) -> None:
        self.info = info()
        self.dead = False
        self.seen: list[Request] = []
        self.aborted: list[str] = []
        self.failure: Update | None = None  # sent in place of the third token
        self.pause: Callable[[], Any] = lambda: asyncio.sleep(0)
        self.chunk = 1  # tokens per update
        self.beat: Pulse | None = None
        self._reply = reply if callable(reply) else lambda request: reply
        self._eos = eos

    async def generate(self, request: Request) -> AsyncGenerator[Update, None]:
        if self.dead:
            raise EngineDead("the engine is gone")
        self.seen.append(request)
        finished = False
        try:
            for update in self._updates(request):
                await self.pause()
                if self.dead:
                    raise EngineDead("the engine is gone")
                finished = update.finish_reason is not None
                yield update
        finally:
            if not finished:
                self.aborted.append(request.id)

    def _updates(self, request: Request) -> list[Update]:
        limit = request.params.max_tokens
        assert limit is not None
        assert request.params.seed is not None
        ids = [*self._reply(request).encode(), *([EOS] if self._eos else [])][:limit]
        made = []
        for start in range(0, len(ids), self.chunk):
            part = tuple(ids[start : start + self.chunk])
            last = start + self.chunk >= len(ids)
            stopped = part[-1] if part[-1] == EOS or part[-1] in request.params.stop_token_ids else None
            reason = (FinishReason.STOP if stopped is not None else FinishReason.LENGTH) if last else None
            made.append(
                Update(
                    request.id,
                    tokens=part,
                    logprobs=tuple(_logprobs(t, request.params.logprobs) for t in part),
                    prompt_logprobs=_prompt(request) if start == 0 else (),
                    finish_reason=reason,
                    stop_token=stopped if last else None,
                    cached_tokens=3 if start == 0 else 0,
                )
            )
        if self.failure is not None:
            made[2:] = [self.failure]
        return made

    def abort(self, ids: Iterable[str]) -> None:
        self.aborted.extend(ids)

    async def stats(self) -> EngineStats:
        return EngineStats(
            running=2,
            waiting=1,
            slots_total=100,
            slots_leased=25,
            prompt_tokens=40,
            cached_tokens=10,
            failed_steps=3,
            audit_failures=1,
        )

    async def scope(self) -> StatsReply:
        view = ScopeView(
            rows=[ScopeRow("decode", 0, 5, 3, 8, 9, 20, 0), ScopeRow("waiting", -1, 7, 0, 0, 7, 9, 0)],
            more_rows=0,
            pool=ScopePool(50, [25, 50], [25, 0], [10, 0]),
            tree=[ScopeBranch(-1, 3, 1, 4, 0, tuple(b"<b>"))],
            took_s=0.0001,
        )
        return StatsReply(0, await self.stats(), view)

    def pulse(self) -> Pulse | None:
        return self.beat

    def kill(self, reason: str) -> None:
        self.dead = True

    async def close(self) -> None:
        self.dead = True


def _logprobs(token: int, top: int | None) -> Logprobs:
    return Logprobs(token, -1.0, 1, tuple(((token + i) % 256, -1.0 - i) for i in range(top or 0)))


def _prompt(request: Request) -> tuple[Logprobs, ...]:
    if request.params.prompt_logprobs is None:
        return ()
    return tuple(_logprobs(t, request.params.prompt_logprobs) for t in request.tokens[1:])


def info() -> EngineInfo:
    return EngineInfo(
        model="fake",
        vocab_size=257,
        max_model_len=MAX_LEN,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        num_kv_slots=1000,
        kv_bytes_per_token=1,
        weight_bytes=1,
        device="cpu",
        dtype="float32",
        kernels="fake",
        pid=0,
        load_s=0.0,
        choices=(("max_model_len", str(MAX_LEN), "the fake's"),),
    )


def session(client: FakeClient | None = None, **changes: Any) -> Session:
    parts: dict[str, Any] = {
        "client": client or FakeClient(),
        "tokenizer": ByteTokenizer(),
        "template": PlainTemplate(),
        "model_name": "fake",
        "limits": Limits(MAX_LEN, 257),
    }
    return Session(**(parts | changes))
