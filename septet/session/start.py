"""From a model's name to a running session: find the files, start the engine, load tokenizer and template meanwhile.

Called by the Python API, `septet run` and `septet serve`. The engine process loads the weights while this process reads
the vocabulary, so that neither waits for the other.
"""

from __future__ import annotations

import asyncio
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from septet.config import EngineConfig
from septet.errors import InvalidRequest
from septet.session.session import Limits, Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.engine.spawn import EngineProcess
    from septet.hub.modelfile import Recipe
    from septet.hub.store import LocalModel
    from septet.text.template import ChatTemplate
    from septet.text.tokenizer import Tokenizer

__all__ = ["engine_config", "start_session"]

_ALIASES = {"gpu_memory_utilization": "memory_utilization"}


def engine_config(path: str, options: dict[str, Any]) -> EngineConfig:
    """`EngineConfig` of these options; `InvalidRequest` names an unknown one."""
    known = {f.name for f in fields(EngineConfig)} - {"model"}
    named = {_ALIASES.get(name, name): value for name, value in options.items()}
    unknown = sorted(set(named) - known)
    if unknown:
        raise InvalidRequest(
            f"unknown engine option {unknown[0]!r}; known are {', '.join(sorted(known))}", param=unknown[0]
        )
    return EngineConfig(model=path, **named)


async def start_session(
    model: str,
    *,
    served_name: str | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    engine: EngineProcess | None = None,
    tool_call_parser: str = "auto",
    reasoning_parser: str = "auto",
    **options: Any,
) -> Session:
    """Resolve (and pull, where needed) `model`, start its engine process, return the session over it.

    Raises ModelNotFound, ModelFileError, UnsupportedModel, OfflineError, OutOfMemory or EngineDead, each saying what to
    do. `on_phase` is told in words what is happening, for a spinner. `tool_call_parser`, `reasoning_parser`: a name of
    `text/parsers/dialects.py`, "auto" = as the chat template shows, "none" = no reasoning is told apart. `engine`: a
    process that was started ahead, this session's from here on.
    """
    try:
        local, config = await _found(model, on_phase, tool_call_parser, reasoning_parser, options)
    except BaseException:
        if engine is not None:
            engine.discard()
        raise
    return await _over(local, config, engine, served_name, tool_call_parser, reasoning_parser)


async def _found(
    model: str,
    on_phase: Callable[[str], None],
    tool_call_parser: str,
    reasoning_parser: str,
    options: dict[str, Any],
) -> tuple[LocalModel, EngineConfig]:
    """The model's files, and what its engine is told."""
    from septet.hub.pull import resolve
    from septet.text.parsers.dialects import dialect_of, reasoning_of

    dialect_of(None, tool_call_parser)  # a wrong name is told before anything is loaded
    reasoning_of(None, reasoning_parser)
    on_phase(f"finding {model}")
    local = await asyncio.to_thread(resolve, model, progress=_fetching(on_phase))
    config = engine_config(str(local.path), options)
    on_phase(f"loading {local.name}")
    return local, config


async def _over(
    local: LocalModel,
    config: EngineConfig,
    engine: EngineProcess | None,
    served_name: str | None,
    tool_call_parser: str,
    reasoning_parser: str,
) -> Session:
    """Load the model in its engine and its text side here, at the same time."""
    from septet.engine.client import ProcessClient
    from septet.session.reading import ReplyFormat

    text = asyncio.create_task(asyncio.to_thread(_load_text, str(local.path)))
    try:
        client = await ProcessClient.start(config, process=engine)
    except BaseException:
        text.cancel()
        raise
    try:
        tokenizer, template = await text
    except BaseException:
        await client.close()
        raise
    limits = Limits(client.info.max_model_len, min(client.info.vocab_size, tokenizer.vocab_size))
    reply_format = ReplyFormat.of(
        template.source if template else None,
        tokenizer,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
    )
    session = Session(client, tokenizer, template, served_name or local.name, limits, reply_format=reply_format)
    if local.recipe is not None:
        session = await _with_recipe(session, local.recipe, tool_call_parser, reasoning_parser)
    session.origin = local
    return session


async def _with_recipe(session: Session, recipe: Recipe, tool_call_parser: str, reasoning_parser: str) -> Session:
    """A created model: the same engine, and what its Modelfile adds."""
    from septet.session.preset import preset

    try:
        return preset(
            session, session.model_name, recipe, tool_call_parser=tool_call_parser, reasoning_parser=reasoning_parser
        )
    except BaseException:
        await session.close()
        raise


def _fetching(on_phase: Callable[[str], None]) -> Callable[[int, int, str], None]:
    """A hub's progress in words, with a bar."""

    def progress(done: int, total: int, what: str) -> None:
        share = min(done / total, 1.0) if total > 0 else 0.0
        bar = "#" * round(24 * share)
        on_phase(f"fetching {what} [{bar:<24}] {100 * share:.0f} % of {total / 1e6:.0f} MB")

    return progress


def _load_text(path: str) -> tuple[Tokenizer, ChatTemplate | None]:
    from septet.text.template import ChatTemplate
    from septet.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path)
    return tokenizer, ChatTemplate.of(tokenizer)
