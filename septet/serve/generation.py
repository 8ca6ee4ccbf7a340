"""The one way from a dialect's request to the engine's events: counted, measured, cancelled as one.

Every dialect's handler takes a session from `service.models.use(...)`, makes its prompts with it, and reads `generate`.
Limits and deadlines belong here too. Knows no dialect's fields.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from septet.session.merge import merge

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from septet.request import SamplingParams
    from septet.serve.app import Service
    from septet.session.events import Event
    from septet.session.session import Prompt, Session

__all__ = ["Numbered", "generate"]

Numbered = tuple[int, "Event"]  # number of the prompt, its event


async def generate(
    service: Service, session: Session, prompts: Sequence[Prompt], params: SamplingParams, **how: Any
) -> AsyncGenerator[Numbered, None]:
    """Events of all prompts as they come. how: `priority`, `cache_salt`, `reading`, as `Session.generate` takes them.

    Closing it (or cancelling its reader) aborts what is open. Errors of the session pass through.
    """
    track = service.metrics.track(params, [len(p.tokens) for p in prompts])
    sources = [_numbered(session, i, prompt, params, how) for i, prompt in enumerate(prompts)]
    async with aclosing(merge(sources)) as events:
        try:
            async for number, event in events:
                track.saw(number, event)
                yield number, event
        except Exception:
            track.failed()
            raise
        finally:
            track.aborted()  # what is still open: the client left


async def _numbered(
    session: Session, number: int, prompt: Prompt, params: SamplingParams, how: dict[str, Any]
) -> AsyncGenerator[Numbered, None]:
    async with aclosing(session.generate(prompt, params, **how)) as events:
        async for event in events:
            yield number, event
