"""A model's recipe over its session: template, system message, opening messages, whichever surface asks.

Used by `start.py` and by the server's pool. The engine, the tokenizer and the limits stay the base session's own; what
the request says itself comes first. Knows no API's JSON.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest, ModelFileError
from septet.session.reading import ReplyFormat
from septet.session.session import Session
from septet.text.go_template import as_jinja
from septet.text.template import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from septet.hub.modelfile import Recipe
    from septet.session.session import Prompt
    from septet.text.parsers.tools import Tool

__all__ = ["PresetSession", "check_template", "preset"]


class PresetSession(Session):
    """`opening`: messages before every conversation. A conversation with a system message of its own keeps that one."""

    opening: tuple[Mapping[str, Any], ...] = ()

    async def chat_prompt(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Tool | Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Prompt:
        own = bool(messages) and isinstance(messages, list | tuple) and _role(messages[0]) == "system"
        rest = [m for m in self.opening if not (own and _role(m) == "system")]
        opened = [messages[0], *rest, *messages[1:]] if own else [*rest, *messages]
        return await super().chat_prompt(opened, tools=tools, **options)


def _role(message: Any) -> Any:
    return message.get("role") if hasattr(message, "get") else None


def check_template(source: str) -> None:
    """InvalidRequest where a recipe's template can't be used, before anything is stored."""
    try:
        ChatTemplate(as_jinja(source))
    except ModelFileError as error:
        raise InvalidRequest(error.message, param="template") from None


def preset(
    base: Session, name: str, recipe: Recipe, *, tool_call_parser: str = "auto", reasoning_parser: str = "auto"
) -> PresetSession:
    """A session over the same engine. Close the base, not this one."""
    template, reply_format = base.template, base.reply_format
    if recipe.template is not None:
        tokenizer = base.tokenizer
        template = ChatTemplate(as_jinja(recipe.template), tokenizer.special_texts, tokenizer.control_texts)
        reply_format = ReplyFormat.of(
            template.source, tokenizer, tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser
        )
    session = PresetSession(base.client, base.tokenizer, template, name, base.limits, reply_format=reply_format)
    system = [{"role": "system", "content": recipe.system}] if recipe.system else []
    session.opening = (*system, *({"role": role, "content": content} for role, content in recipe.messages))
    return session
