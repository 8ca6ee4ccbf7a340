"""The models of one server: which there are, and a session to use while a request runs.

Owned by the serve room; every dialect's handler asks `service.models`. `FixedModels` serves one session under its
names; `pool.py` loads and unloads many within one budget. Knows no dialect and no HTTP.
"""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from septet.errors import ModelNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from septet.session.session import Session

__all__ = ["FixedModels", "ModelCard", "Models"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is told of a model without loading it."""

    name: str
    root: str  # what was asked for at start, or the store's name
    created: int  # seconds since the epoch
    max_model_len: int | None = None  # None: not loaded, not known yet


class Models(Protocol):
    def cards(self) -> Sequence[ModelCard]:
        """Every model that a request may name, the default one first."""
        ...

    def use(self, name: str | None, *, keep_alive_s: float | None = None) -> AbstractAsyncContextManager[Session]:
        """The session of a model, loaded if need be, which stays loaded until the block ends.

        name: None = the default one. keep_alive_s: how long it stays loaded after its last use; None = the server's
        setting, negative = for ever, 0 = not at all. Raises ModelNotFound, OutOfMemory (says what is in the way),
        ModelFileError, UnsupportedModel or EngineDead.
        """
        ...

    def loaded(self) -> Sequence[Session]:
        """Sessions whose engine runs, for health, metrics and the scope; costs no engine work."""
        ...

    @property
    def dead(self) -> bool:
        """True when no request can be served any more: the server then exits."""
        ...

    async def close(self) -> None: ...


def not_found(name: str, known: Sequence[str]) -> ModelNotFound:
    shown = name if len(name) <= 120 else name[:117] + "..."
    return ModelNotFound(f"no model {shown!r} here; this server has {', '.join(known)}", param="model")


class FixedModels:
    """One session, made and closed by the caller, under one name or several."""

    def __init__(self, session: Session, names: Sequence[str] = ()) -> None:
        self.session = session
        self.names = tuple(names) or (session.model_name,)
        self.created = int(time.time())

    def cards(self) -> Sequence[ModelCard]:
        length, root = self.session.limits.max_model_len, self.session.model_name
        return [ModelCard(name=n, root=root, created=self.created, max_model_len=length) for n in self.names]

    @asynccontextmanager
    async def use(self, name: str | None, *, keep_alive_s: float | None = None) -> AsyncGenerator[Session, None]:
        if name is not None and name not in self.names:
            raise not_found(name, self.names)
        yield self.session

    def loaded(self) -> Sequence[Session]:
        return [self.session]

    @property
    def dead(self) -> bool:
        return self.session.client.dead

    async def close(self) -> None:
        """The session is the caller's."""
