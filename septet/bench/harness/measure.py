"""The measurement: rounds over targets and workloads, alternating who goes first, writing down what is known so far.

Called by the command. Owns the order of things; what a target does wrong ends that target, never the others.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.bench.harness.drive import Run, drive
from septet.bench.harness.launch import Running, running
from septet.bench.harness.prompts import Ask, asks, warm_up
from septet.bench.harness.results import Results, run_of
from septet.bench.harness.watch import Watch, gpu_now
from septet.errors import SeptetError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from septet.bench.harness.limits import Limit
    from septet.bench.harness.targets import Target
    from septet.bench.harness.workload import Point, Workload

__all__ = ["Measurement", "Progress"]

WARM_TOKENS, DEATH_S = 8, 2.0


class Progress:
    """What the command shows meanwhile; this one shows nothing."""

    def state(self, line: str) -> None: ...

    def begin(self, line: str, requests: int) -> None: ...

    def step(self) -> None: ...

    def warn(self, line: str) -> None: ...


@dataclass
class Measurement:
    targets: list[Target]
    workloads: list[Workload]
    results: Results
    path: Path  # of the JSON
    rounds: int = 3
    seed: int = 0
    port: int = 0
    together: bool = False  # all servers stay up
    wait_s: float = 900.0
    timeout_s: float = 600.0
    limits: dict[str, Limit] = field(default_factory=dict)  # by target
    progress: Progress = Progress()  # noqa: RUF009  (holds no state)

    def run(self) -> Results:
        """All rounds. Interrupted: what is there is written, marked partial, and the interruption goes on."""
        self.results.workloads = {work.name: work.data() for work in self.workloads}
        for target in self.targets:
            self.results.targets[target.name] = {
                "name": target.name, "title": target.title, "model": target.model,
                "status": "missing" if target.missing else "measured", "why": target.missing, "start_s": [],
                "served_model": "", "version": "", "command": list(target.command),
            }  # fmt: skip
            if target.missing:
                self._told(f"{target.name}: {target.missing}")
            elif target.note:
                self.results.note(f"{target.name}: {target.note}")
        if self._gpus_shared():
            self.results.note("engines stay up together: memory and energy of GPUs can't be told apart")
        try:
            with contextlib.ExitStack() as up:
                kept: dict[str, Running] = {}
                for number in range(self.rounds):
                    left = [t for t in self.targets if self._status(t) == "measured"]
                    for target in left if number % 2 == 0 else left[::-1]:
                        self._turn(target, number, kept, up, alone=len(left) == 1)
            self.results.finished = True
        finally:
            self.results.write(self.path)
        return self.results

    def _gpus_shared(self) -> bool:
        return self.together and sum(bool(t.command) for t in self.targets) > 1

    def _status(self, target: Target) -> str:
        return str(self.results.targets[target.name]["status"])

    def _turn(
        self, target: Target, number: int, kept: dict[str, Running], up: contextlib.ExitStack, alone: bool
    ) -> None:
        """One target's part of a round. Whatever is wrong with it is noted and ends it."""
        try:
            with contextlib.ExitStack() as now:
                server = kept.get(target.name)
                if server is None:
                    keep = self.together or alone
                    server = (up if keep else now).enter_context(self._started(target))
                    if keep:
                        kept[target.name] = server
                for work in self.workloads:
                    for point in work.points():
                        self._point(server, work, point, number)
        except SeptetError as error:
            entry = self.results.targets[target.name]
            measured = any(key[0] == target.name for key in self.results.points)
            entry["status"], entry["why"] = ("partial" if measured else "failed"), error.message
            line = error.message if error.message.startswith(target.name) else f"{target.name}: {error.message}"
            self._told(line + ("; what was measured before is kept" if measured else ""))
        self.results.write(self.path)

    def _told(self, line: str) -> None:
        self.results.note(line)
        self.progress.warn(line)

    @contextlib.contextmanager
    def _started(self, target: Target) -> Any:
        self.progress.state(f"{target.name}: starting" if target.command else f"{target.name}: looking")
        before, _ = gpu_now() if target.command else (None, None)
        with running(target, self.port, self.wait_s) as server:
            self.progress.state(f"{target.name}: first request")
            warm = self._drive(server, [Ask(0.0, ("Hello",), WARM_TOKENS)])
            if not (warm.samples and warm.samples[0].ok):
                raise SeptetError(
                    server.death(DEATH_S if warm.samples and warm.samples[0].broken else 0.0)
                    or f"{target.title} can't answer: {warm.samples[0].error if warm.samples else warm.lost}"
                )
            entry = self.results.targets[target.name]
            if target.command:
                entry["start_s"].append(round(server.start_s, 3))
            entry["gpu_before_mib"] = before
            entry["served_model"], entry["version"] = server.model, server.version
            yield server

    def _drive(
        self, server: Running, todo: list[Ask], streams: int = 1, timed: bool = False,
        told: Callable[[], object] = lambda: None,
    ) -> Run:  # fmt: skip
        return drive(server, todo, streams=streams, timed=timed, timeout_s=self.timeout_s, told=told)

    def _point(self, server: Running, work: Workload, point: Point, number: int) -> None:
        name = server.target.name
        if (work.name, point.label) not in server.warmed:
            self.progress.state(f"{name}  {work.name}, {point.label}: warming up")
            if self._drive(server, warm_up(work, point), point.streams).interrupted:
                raise KeyboardInterrupt
            server.warmed.add((work.name, point.label))
        todo = asks(work, point, self.seed, number)
        line = f"{name}  {work.name}, {point.label}  round {number + 1} of {self.rounds}"
        self.progress.begin(line, sum(len(one.turns) for one in todo))
        before = self.results.targets[name].get("gpu_before_mib")
        with Watch(server, before, gpus=not self._gpus_shared()) as watch:
            run = self._drive(server, todo, point.streams, work.kind in ("open", "trace"), self.progress.step)
        if run.interrupted and not any(s.ok for s in run.samples):
            raise KeyboardInterrupt
        found = {**run_of(run, work, number), "memory_mib": watch.memory_mib, "gpu_memory_mib": watch.gpu_mib}
        if watch.energy_j is not None and found["output_tokens"]:
            found["joules_per_token"] = watch.energy_j / found["output_tokens"]
        limit = self.limits[name].tokens_s(work, point.streams) if name in self.limits else None
        self.results.add(name, work, point, found, limit)
        self._remarks(name, work, point, found, run)
        self.results.write(self.path)
        if run.interrupted:
            raise KeyboardInterrupt
        if run.lost:
            raise SeptetError(f"{server.death(DEATH_S) or run.lost} ({work.name}, {point.label}, round {number + 1})")

    def _remarks(self, name: str, work: Workload, point: Point, found: dict[str, Any], run: Run) -> None:
        where = f"{name}, {work.name}, {point.label}"
        if found["failed"] and not (run.lost or run.interrupted):
            self._told(f"{where}: {found['failed']} of {found['requests']} requests failed: {found['error']}")
        if found["short"]:
            self.results.note(f"{where}: answers ended before the length asked for, so lengths differ between engines")
        if found["requests"] > found["failed"] and not found["counted_by_server"]:
            self.results.note(f"{name}: the server counts no tokens; pieces of text are counted instead")
