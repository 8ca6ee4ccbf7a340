"""The models of one server: which there are, and a session to use while a request runs.

Owned by the serve room; every dialect's handler asks `service.models`. `FixedModels` serves one session under its
names; `pool.py` loads and unloads many within one budget. Knows no dialect and no HTTP.
"""

from __future__ import annotations

import time
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from septet.errors import InvalidRequest, ModelNotFound
from septet.hub.store import LocalModel

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from septet.session.session import Session

__all__ = ["FixedModels", "ModelCard", "Models", "Running"]


PLACEHOLDERS = ("tgi", "dummy")
"""What TGI's documentation and clients call the model of a server that has one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is told of a model without loading it."""

    name: str
    root: str  # what was asked for at start, or the store's name
    created: int  # seconds since the epoch
    max_model_len: int | None = None  # None: not loaded, not known yet


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A model that is loaded."""

    name: str
    session: Session
    n_bytes: int  # of memory; shared by the names of one engine
    users: int  # requests that use it now
    left_s: float | None  # until it is unloaded, if nobody uses it before; None = it stays


class Models(Protocol):
    manages: bool
    """Whether clients may pull, create, copy and delete models of the store."""
    restarts: int
    """Engines started again after a death."""

    @property
    def restarting(self) -> bool:
        """Whether requests wait for an engine that is started again."""
        ...

    def cards(self) -> Sequence[ModelCard]:
        """Every model that a request may name, the default one first."""
        ...

    def find(self, name: str | None) -> LocalModel:
        """Where a model's files lie, loaded or not. Raises ModelNotFound."""
        ...

    def use(self, name: str | None, *, keep_alive_s: float | None = None) -> AbstractAsyncContextManager[Session]:
        """The session of a model, loaded if need be, which stays loaded until the block ends.

        name: None = the default one. keep_alive_s: how long it stays loaded after its last use; None = as it was told
        before, at first the server's setting; negative = for ever, 0 = not at all. Raises ModelNotFound, OutOfMemory
        (says what is in the way), ModelFileError, UnsupportedModel or EngineDead.
        """
        ...

    async def unload(self, name: str) -> None:
        """Unload a model now, or as soon as nobody uses it; nothing happens if it isn't loaded."""
        ...

    def running(self) -> Sequence[Running]:
        """What is loaded, by name; costs no engine work."""
        ...

    def loaded(self) -> Sequence[Session]:
        """Sessions whose engine runs, for health, metrics and the scope; costs no engine work."""
        ...

    @property
    def dead(self) -> bool:
        """True when no request can be served any more: the server then exits."""
        ...

    async def close(self) -> None: ...


def default_card(models: Models) -> ModelCard:
    """What a request that names no model gets. ModelNotFound where there is none at all."""
    card = next(iter(models.cards()), None)
    if card is None:
        raise ModelNotFound("this server has no model; pull one: septet pull smollm2", param="model")
    return card


def not_found(name: str, known: Sequence[str]) -> ModelNotFound:
    shown = name if len(name) <= 120 else name[:117] + "..."
    here = f"this server has {', '.join(known)}" if known else "no model is pulled yet"
    return ModelNotFound(f"no model {shown!r} here; {here}", param="model")


class FixedModels:
    """One session, made and closed by the caller, under one name or several."""

    manages = False

    def __init__(self, session: Session, names: Sequence[str] = ()) -> None:
        self.session = session
        self.names = tuple(names) or (session.model_name,)
        self.created = int(time.time())
        self.restarts = 0

    def cards(self) -> Sequence[ModelCard]:
        length, root = self.session.limits.max_model_len, self.session.model_name
        return [ModelCard(name=n, root=root, created=self.created, max_model_len=length) for n in self.names]

    def find(self, name: str | None) -> LocalModel:
        known = name is None or name in self.names or name.removesuffix(":latest") in self.names
        if not known and name not in PLACEHOLDERS:
            raise not_found(name or "", self.names)
        if self.session.origin is not None:
            return replace(self.session.origin, name=name or self.names[0])
        path = Path(self.session.client.info.model)
        n_bytes = path.stat().st_size if path.is_file() else 0
        return LocalModel(name=name or self.names[0], path=path, source="local", n_bytes=n_bytes)

    @asynccontextmanager
    async def use(self, name: str | None, *, keep_alive_s: float | None = None) -> AsyncGenerator[Session, None]:
        self.find(name)
        yield self.session

    async def unload(self, name: str) -> None:
        self.find(name)
        raise InvalidRequest(
            "this server keeps its one model loaded; start it with --keep-alive, or without a model, to unload",
            param="keep_alive",
        )

    def running(self) -> Sequence[Running]:
        info = self.session.client.info
        n_bytes = info.weight_bytes + info.num_kv_slots * info.kv_bytes_per_token
        return [Running(name=self.names[0], session=self.session, n_bytes=n_bytes, users=0, left_s=None)]

    def loaded(self) -> Sequence[Session]:
        return [self.session]

    @property
    def dead(self) -> bool:
        return self.session.client.dead

    @property
    def restarting(self) -> bool:
        return False

    async def close(self) -> None:
        """The session is the caller's."""
