"""What every route gets: the settings of one server, its models, and who counts, admits, logs and traces.

Made once by `septet serve` (or a test). Knows no route.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from septet.errors import EngineDead
from septet.serve.admission import Admission
from septet.serve.keys import Keys
from septet.serve.metrics import Metrics
from septet.serve.models import FixedModels, Models
from septet.serve.openai_batch_run import Batches
from septet.serve.openai_responses_store import ResponseStore
from septet.serve.scope import Scopes
from septet.session.session import Session

if TYPE_CHECKING:
    from septet.engine.messages import EngineStats
    from septet.serve.access_log import AccessLog
    from septet.serve.tracing import Tracing

__all__ = ["Service", "Settings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    host: str = "127.0.0.1"
    port: int = 8000
    served_names: tuple[str, ...] = ()  # () = the model's own name
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    page: bool = True  # the chat and the scope at /
    max_body_bytes: int = 16 * 2**20
    max_waiting: int = 4096  # sequences beyond those that run
    max_waiting_tokens: int = 0  # of prompts without a first token yet; 0 = no limit
    request_timeout_s: float = 0.0  # 0 = none but the client's own
    head_timeout_s: float = 30.0  # a connection on which no whole head of a request comes for so long is cut
    body_timeout_s: float = 60.0
    write_timeout_s: float = 60.0  # a reader that takes nothing for so long is dropped
    stats_timeout_s: float = 2.0
    drain_s: float = 30.0  # after SIGTERM or SIGINT, for open requests
    silent_s: float = 3.0  # an engine process that has not run for so long makes no progress
    stuck_s: float = 600.0  # nor does one with a step of this length, which is longer than any prefill
    kill_silent_s: float = 60.0  # and then it is ended; 0 = never


class Service:
    """One server's state. Lives on one loop."""

    def __init__(self, models: Models | Session, settings: Settings, keys: Keys | None = None) -> None:
        self.models = FixedModels(models, settings.served_names) if isinstance(models, Session) else models
        self.settings = settings
        self.keys = keys or Keys()
        self.admission = Admission(settings.max_waiting, settings.max_waiting_tokens)
        self.metrics = Metrics([self.label(session) for session in self.models.loaded()])
        self.scopes = Scopes(self)
        self.responses = ResponseStore()
        self.access_log: AccessLog | None = None
        self.tracing: Tracing | None = None
        self.draining = False
        self.unwatched = False  # a watch over the engines has failed

    @cached_property
    def batches(self) -> Batches:
        """Files and batches on disk; nothing is read before the first use."""
        from septet.serve.openai import WHOLE_ANSWERS

        return Batches(self, WHOLE_ANSWERS)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(card.name for card in self.models.cards())

    def label(self, session: Session) -> str:
        """A session's model in metrics, logs and traces: a served name, of which there are few."""
        return self.models.names[0] if isinstance(self.models, FixedModels) else session.model_name

    async def refresh(self) -> None:
        """Ask every engine for its figures, all at once; one that does not answer in time keeps its last ones."""
        sessions = {self.label(session): session for session in self.models.loaded()}
        got = await asyncio.gather(*(self._stats(session) for session in sessions.values()))
        engines = self.metrics.engines
        engines.up = not self.models.dead
        engines.refused = self.admission.refused
        engines.restarts = self.models.restarts
        engines.dropped_log_lines = self.access_log.dropped if self.access_log is not None else 0
        engines.infos = {name: session.client.info for name, session in sessions.items()}
        engines.stats = {
            name: stats if stats is not None else engines.stats[name]
            for name, stats in zip(sessions, got, strict=True)
            if stats is not None or name in engines.stats
        }

    async def _stats(self, session: Session) -> EngineStats | None:
        try:
            return await asyncio.wait_for(session.client.stats(), self.settings.stats_timeout_s)
        except (TimeoutError, EngineDead):
            return None
