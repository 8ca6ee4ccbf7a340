"""Where in a prompt a part of its conversation ends: what a client marks by message, the cache keeps by token.

Asked by dialects that pin prefixes. Knows no template: it renders the part alone, and counts what both have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from septet.session.session import Prompt, Session
    from septet.text.parsers.tools import Tool

__all__ = ["shared_prefix"]


async def shared_prefix(
    session: Session, prompt: Prompt, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool] = (), **options: Any
) -> int:
    """Leading tokens of `prompt` that a prompt of `messages` alone begins with.

    0 where the template takes no such conversation. options: as `prompt` was made with.
    """
    options |= {"add_generation_prompt": False, "continue_final_message": False}
    try:
        part = await session.chat_prompt(messages, tools=tools, **options)
    except InvalidRequest:
        return 0
    pairs = zip(prompt.tokens, part.tokens, strict=False)
    return next(
        (n for n, (whole, alone) in enumerate(pairs) if whole != alone), min(len(prompt.tokens), len(part.tokens))
    )
