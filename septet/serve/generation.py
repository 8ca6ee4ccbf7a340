"""The one way from a dialect's request to the engine's events: admitted, counted, timed, cancelled as one.

Every dialect's handler takes a session from `service.models.use(...)`, makes its prompts with it, and reads `generate`.
Admission, the key's limits and its fair place, and the deadline belong here. Knows no dialect's fields.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from septet.errors import EngineDead
from septet.request import FinishReason
from septet.serve.context import current
from septet.serve.errors import DeadlineExceeded
from septet.session.embed import embed
from septet.session.events import Finished, TextDelta
from septet.session.merge import merge

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncGenerator, Sequence

    from septet.request import SamplingParams
    from septet.serve.admission import Ticket
    from septet.serve.app import Service
    from septet.serve.context import Context
    from septet.serve.metrics import Track
    from septet.session.events import Event
    from septet.session.session import Prompt, Session

__all__ = ["Numbered", "generate", "vectors"]

Numbered = tuple[int, "Event"]  # number of the prompt, its event


async def generate(
    service: Service, session: Session, prompts: Sequence[Prompt], params: SamplingParams, **how: Any
) -> AsyncGenerator[Numbered, None]:
    """Events of all prompts as they come. how: `priority`, `cache_salt`, `reading`, as `Session.generate` takes them.

    Closing it (or cancelling its reader) aborts what is open. Raises Overloaded before anything is done, and
    DeadlineExceeded when the request's time is over; errors of the session pass through. An answer that the engine
    ends because it is stopped is no answer: EngineDead.
    """
    context, label = current(), service.label(session)
    tokens = [len(p.tokens) for p in prompts]
    ticket = service.admission.enter(
        context.key if context is not None else None,
        n=len(prompts) * params.n,
        tokens=sum(tokens),
        max_output=params.max_tokens,
        rows=session.client.info.max_num_seqs,
        backfill=context is not None and context.backfill,
    )
    track: Track | None = None
    try:
        if ticket.place is not None:
            how["arrival"] = ticket.place
        if context is not None:
            context.model = label
            context.prompt_tokens += sum(tokens)
        track = service.metrics.track(label, params, tokens, context.began if context is not None else None)
        sources = [_numbered(session, i, prompt, params, how) for i, prompt in enumerate(prompts)]
        async with aclosing(merge(sources)) as events:
            async for number, event in _until(events, context.deadline if context is not None else None):
                if isinstance(event, Finished) and event.reason is FinishReason.ABORT:
                    raise EngineDead("the server was stopped before this answer was complete")
                _note(context, ticket, event)
                track.saw(number, event)
                yield number, event
    except Exception as error:
        if track is not None:
            track.failed(error)
        raise
    finally:
        if track is not None:
            track.aborted()  # what is still open: the client left
        ticket.leave()


async def vectors(service: Service, session: Session, prompts: Sequence[Prompt], **how: Any) -> list[array[float]]:
    """`session.embed.embed` in the same way: admitted, the key charged, within the deadline."""
    context = current()
    tokens = sum(len(p.tokens) for p in prompts)
    ticket = service.admission.enter(
        context.key if context is not None else None,
        n=len(prompts),
        tokens=tokens,
        max_output=1,
        rows=session.client.info.max_num_seqs,
        backfill=context is not None and context.backfill,
    )
    if context is not None:
        context.model = service.label(session)
        context.prompt_tokens += tokens
    try:
        async with asyncio.timeout_at(context.deadline if context is not None else None):
            return await embed(session, prompts, arrival=ticket.place, **how)
    except TimeoutError:
        raise DeadlineExceeded("the request's time is over; what it held is freed") from None
    finally:
        ticket.leave()


def _note(context: Context | None, ticket: Ticket, event: Event) -> None:
    if isinstance(event, TextDelta):
        ticket.output(len(event.token_ids))
        if context is not None and context.ttft_s is None:
            context.ttft_s = time.monotonic() - context.began
    elif isinstance(event, Finished) and context is not None:
        context.output_tokens += event.usage.completion_tokens
        context.cached_tokens += event.usage.cached_tokens
        context.finish = str(event.reason)


async def _until(events: AsyncGenerator[Numbered, None], deadline: float | None) -> AsyncGenerator[Numbered, None]:
    """The events up to a time of the monotonic clock, which is asyncio's; the caller closes them."""
    if deadline is None:
        async for item in events:
            yield item
        return
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                item = await anext(events)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise DeadlineExceeded("the request's time is over; what it held is freed") from None
        yield item


async def _numbered(
    session: Session, number: int, prompt: Prompt, params: SamplingParams, how: dict[str, Any]
) -> AsyncGenerator[Numbered, None]:
    async with aclosing(session.generate(prompt, params, **how)) as events:
        async for event in events:
            yield number, event
