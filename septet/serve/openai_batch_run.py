"""Batches of /v1/batches as backfill: requests run behind everybody else's and survive a restart.

Owned by `Service`, used by the routes of files and batches; `running.py` calls `resume` and `close`. A batch is checked
as a whole, runs when its turn comes, and puts its answers out line by line; what was answered before a restart is not
asked again. Each request goes the way of its route: same fields, same errors, admitted as its API key's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from septet.errors import EngineDead, InvalidRequest, ModelNotFound, Overloaded
from septet.serve.body import take_timeout
from septet.serve.context import Context, entered
from septet.serve.errors import HttpError, error_body, status_of
from septet.serve.openai_batch_input import check, lines
from septet.serve.openai_batch_store import FINISHED, Batch, BatchStore
from septet.serve.openai_file_store import FileStore, disk_errors

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from pathlib import Path

    from septet.serve.keys import Key
    from septet.serve.openai_batch_input import Line
    from septet.serve.service import Service

    Answer = Callable[[Service, dict[str, Any]], Awaitable[dict[str, Any]]]

__all__ = ["BACKFILL", "Batches"]

BACKFILL = 2**20  # priority of every request of a batch: behind all that name none
WORKERS = 64  # requests of all batches at a time
MAX_OPEN = 64  # batches of one key that are not finished
WINDOW_S = 24 * 3600
MAX_WAIT_S = 30.0
_NAMED = {"out": "output", "err": "error"}

log = logging.getLogger(__name__)


class _Leaving(Exception):
    """The server ends: the batch stays as it is and goes on at the next start."""


class Batches:
    """answers: how the request of an endpoint is answered whole."""

    def __init__(self, service: Service, answers: Mapping[str, Answer], home: Path | None = None) -> None:
        self.service = service
        self.answers = answers
        self.files = FileStore(home)
        self.store = BatchStore(home)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._workers: dict[str, list[asyncio.Task[None]]] = {}
        self._slots = asyncio.Semaphore(WORKERS)

    # -- what the routes ask ------------------------------------------------------------------------------------------
    async def create(self, owner: str, input_file_id: str, endpoint: str, metadata: dict[str, str] | None) -> Batch:
        if endpoint not in self.answers:
            raise InvalidRequest(f"endpoint must be one of {', '.join(self.answers)}", param="endpoint")
        self.files.get(owner, input_file_id)
        if sum(b.owner == owner and b.status not in FINISHED for b in self.store.batches.values()) >= MAX_OPEN:
            raise HttpError(429, f"{MAX_OPEN} batches are not finished yet", code="too_many_batches")
        batch = Batch(
            owner=owner,
            endpoint=endpoint,
            input_file_id=input_file_id,
            completion_window="24h",
            metadata=metadata,
        )
        batch.at["expires"] = batch.created_at + WINDOW_S
        await asyncio.to_thread(self.store.save, batch)
        self.store.add(batch)
        self._start(batch)
        return batch

    def get(self, owner: str, number: str) -> Batch:
        batch = self.store.batches.get(number)
        if batch is None or batch.owner != owner:
            shown = number if len(number) <= 80 else number[:77] + "..."
            raise HttpError(404, f"no batch {shown!r} here", code="batch_not_found", param="batch_id")
        self._look_again(batch)
        return self.store.batches[number]

    def all(self, owner: str) -> list[Batch]:
        """Oldest first."""
        for batch in list(self.store.batches.values()):
            self._look_again(batch)
        return [batch for batch in self.store.batches.values() if batch.owner == owner]

    def _look_again(self, batch: Batch) -> None:
        """Another server on the same disk may run it."""
        if batch.status not in FINISHED and batch.id not in self._tasks:
            self.store.reload(batch.id)
            batch = self.store.batches[batch.id]
            if _is_over(batch):  # nobody has its model any more: what is left is told as expired
                self._start(batch)

    async def cancel(self, owner: str, number: str) -> Batch:
        batch = self.get(owner, number)
        if batch.status in FINISHED or batch.status == "finalizing":
            raise HttpError(409, f"the batch is {batch.status} already", code="batch_not_cancellable")
        if batch.id not in self._tasks:
            with self.store.lock(batch) as ours:
                if not ours:
                    raise HttpError(409, "another server runs this batch; cancel it there", code="batch_elsewhere")
        if batch.status != "cancelling":
            batch.turn("cancelling")
            batch.ending = "cancelled"
            await asyncio.to_thread(self.store.save, batch)
            for worker in self._workers.get(batch.id, ()):
                worker.cancel()
        if batch.id not in self._tasks:  # of a server that is gone
            self._start(batch)
        return batch

    def reads(self, number: str) -> bool:
        """Whether a batch that is not finished needs this file."""
        return any(b.input_file_id == number and b.status not in FINISHED for b in self.store.batches.values())

    # -- life ---------------------------------------------------------------------------------------------------------
    def resume(self) -> None:
        """Go on with what the last server left, where this one has the model."""
        for batch in self.store.batches.values():
            if batch.status not in FINISHED and (self._has_model(batch) or _is_over(batch)):
                self._start(batch)

    def _has_model(self, batch: Batch) -> bool:
        try:
            self.service.models.find(batch.model or None)
        except ModelNotFound:
            return not batch.model
        return True

    async def close(self) -> None:
        """Stop without ending any batch."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _start(self, batch: Batch) -> None:
        if batch.id not in self._tasks:
            task = self._tasks[batch.id] = asyncio.create_task(self._run(batch), name=batch.id)
            task.add_done_callback(lambda _: self._tasks.pop(batch.id, None))

    async def _run(self, batch: Batch) -> None:
        try:
            with self.store.lock(batch) as ours:
                if not ours:
                    return
                if batch.status == "validating":
                    await self._validate(batch)
                if batch.status in ("in_progress", "cancelling"):
                    await self._work(batch)
                if batch.status not in FINISHED:
                    await self._finalize(batch)
        except _Leaving:
            log.info("batch %s goes on when the server is there again", batch.id)
        except Exception as error:
            shown = error_body(error)["error"]
            batch.errors = [{"code": shown["code"], "message": shown["message"], "line": None, "param": None}]
            batch.turn("failed")
            with contextlib.suppress(HttpError):
                await asyncio.to_thread(self.store.save, batch)

    async def _validate(self, batch: Batch) -> None:
        path = self.files.content(self.files.get(batch.owner, batch.input_file_id).id)
        checked = await asyncio.to_thread(check, path, batch.endpoint)
        batch.total, batch.errors, batch.model = checked.total, checked.errors, checked.model or self.service.names[0]
        if batch.status == "validating":  # it may have been cancelled meanwhile
            batch.turn("failed" if checked.errors else "in_progress")
        await asyncio.to_thread(self.store.save, batch)

    # -- requests -----------------------------------------------------------------------------------------------------
    async def _work(self, batch: Batch) -> None:
        """Until every line is answered, or the batch is cancelled or out of time. Raises _Leaving."""
        done = await asyncio.to_thread(self.store.done, batch)
        path = self.files.content(self.files.get(batch.owner, batch.input_file_id).id)
        todo = (line for line in lines(path, batch.endpoint) if line.custom_id not in done)
        rows = max((s.client.info.max_num_seqs for s in self.service.models.loaded()), default=WORKERS)
        n_workers = min(WORKERS, batch.total, rows) if batch.status == "in_progress" else 0  # see `Admission`
        turn = asyncio.Lock()
        workers = [asyncio.create_task(self._worker(batch, todo, turn)) for _ in range(n_workers)]
        self._workers[batch.id] = workers
        try:
            results = await asyncio.gather(*workers, return_exceptions=True)
        finally:
            del self._workers[batch.id]
        for result in results:
            if isinstance(result, Exception):
                raise result
        if batch.status != "cancelling" and batch.completed + batch.failed < batch.total:
            raise _Leaving

    async def _worker(self, batch: Batch, todo: Iterator[Line], turn: asyncio.Lock) -> None:
        key = self.service.keys.named(batch.owner) if batch.owner else None
        if batch.owner and key is None:
            raise HttpError(
                401, f"the API key {batch.owner!r} that asked for this batch is gone", code="invalid_api_key"
            )
        while True:
            async with turn:  # a line has up to 8 MiB: it is decoded beside the loop
                line = await asyncio.to_thread(next, todo, None)
            if line is None:
                return
            if batch.status != "in_progress" or self.service.draining:
                return
            if _is_over(batch):
                batch.ending = "expired"
                error = {"code": "batch_expired", "message": "the batch was out of time before this request ran"}
                self._record(batch, "err", line, None, error)
            else:
                async with self._slots:
                    await self._one(batch, line, key)

    async def _one(self, batch: Batch, line: Line, key: Key | None) -> None:
        """Counted for its key and told in the access log like any request."""
        context = Context(key=key, route="batch", backfill=True)
        entered(context)
        status = 499
        try:
            status = await self._asked(batch, line)
        finally:
            context.ended = True
            if key is not None:
                self.service.metrics.key_used(key.name, context.prompt_tokens, context.output_tokens)
            if self.service.access_log is not None:
                shown = {"method": "BATCH", "path": f"{batch.endpoint}#{batch.id}", "headers": ()}
                self.service.access_log.write(context, shown, status, 0)

    async def _asked(self, batch: Batch, line: Line) -> int:
        """The status of the answer, which is on the disk then."""
        body = {**line.body, "priority": BACKFILL}
        kind, status = "out", 200
        try:
            if line.body.get("stream"):
                raise InvalidRequest("stream is not possible in a batch", param="stream")
            take_timeout(body)
            answer = await self._answered(batch, body)
        except (_Leaving, asyncio.CancelledError):
            raise
        except Exception as error:
            kind, status, answer = "err", status_of(error), error_body(error)
        self._record(batch, kind, line, {"status_code": status, "request_id": _number("req"), "body": answer}, None)
        return status

    async def _answered(self, batch: Batch, body: dict[str, Any]) -> dict[str, Any]:
        """The answer; a server that is full or without its engine for a moment is asked again."""
        while True:
            try:
                return await self.answers[batch.endpoint](self.service, dict(body))
            except Overloaded as error:
                await asyncio.sleep(min(MAX_WAIT_S, error.retry_after_s))
            except EngineDead:
                if self.service.models.dead or self.service.draining:
                    raise _Leaving from None
                await asyncio.sleep(1.0)

    def _record(self, batch: Batch, kind: str, line: Line, response: Any, error: Any) -> None:
        told = {"id": _number("batch_req"), "custom_id": line.custom_id, "response": response, "error": error}
        self.store.append(batch, kind, told)
        if kind == "out":
            batch.completed += 1
        else:
            batch.failed += 1

    async def _finalize(self, batch: Batch) -> None:
        """Place the files, then say so; done again from the start where a crash came between."""
        if batch.status != "cancelling":
            batch.turn("finalizing")
            await asyncio.to_thread(self.store.save, batch)
        batch.output_file_id = await asyncio.to_thread(self._place, batch, "out", batch.output_number)
        batch.error_file_id = await asyncio.to_thread(self._place, batch, "err", batch.error_number)
        ended = replace(batch, at=dict(batch.at))
        ended.turn(batch.ending)
        await asyncio.to_thread(self.store.save, ended)  # before anybody is told
        batch.status, batch.at = ended.status, ended.at

    def _place(self, batch: Batch, kind: str, number: str) -> str | None:
        part = self.store.part(batch, kind)
        with disk_errors():
            if not part.exists() and not self.files.content(number).exists():
                return None
        filename = f"{batch.id}_{_NAMED[kind]}.jsonl"
        return self.files.place(number, part, owner=batch.owner, filename=filename, purpose="batch_output").id


def _is_over(batch: Batch) -> bool:
    return batch.status not in FINISHED and time.time() >= batch.at["expires"]


def _number(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"
