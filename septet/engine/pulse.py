"""Does the engine move? A few numbers in memory that both processes map, so that asking costs the engine nothing.

Made by the parent (`EngineProcess.spawn`), written by a thread of the engine, read through `ProcessClient.pulse`.
A stopped process writes nothing; one whose loop hangs writes how long. Knows no requests and no socket.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from septet.engine.loop import EngineLoop

__all__ = ["Pulse", "SharedPulse"]

BEAT_S = 0.25
_LAYOUT = struct.Struct("=dd")  # time of the last beat (monotonic clock of this machine), seconds without progress
_SIZE = mmap.PAGESIZE


@dataclass(frozen=True, slots=True)
class Pulse:
    silent_s: float  # since the engine's process last ran at all
    stuck_s: float  # how long it has had work and finished no step

    def moves(self, *, silent_s: float, stuck_s: float) -> bool:
        """Within these limits? A long prefill is a long step: `stuck_s` must be longer than any step takes."""
        return self.silent_s <= silent_s and self.stuck_s <= stuck_s


class SharedPulse:
    """One side's view of the memory. The parent makes it, the child opens it by the inherited descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, _SIZE)

    @classmethod
    def create(cls) -> SharedPulse:
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("septet-pulse")
        else:
            import tempfile

            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        os.ftruncate(fd, _SIZE)
        pulse = cls(fd)
        pulse.write(0.0)
        return pulse

    def write(self, stuck_s: float) -> None:
        _LAYOUT.pack_into(self._memory, 0, time.monotonic(), stuck_s)

    def read(self) -> Pulse:
        beat_at, stuck_s = _LAYOUT.unpack_from(self._memory, 0)
        return Pulse(max(0.0, time.monotonic() - beat_at), stuck_s)

    def close(self) -> None:
        """The parent's side, once or twice; reading afterwards raises ValueError."""
        if not self._memory.closed:
            self._memory.close()
            os.close(self.fd)

    def beat(self, loop: EngineLoop | None = None) -> threading.Event:
        """Write from a thread until the returned event is set. Without a loop (it loads) only the beat counts."""
        stop = threading.Event()
        threading.Thread(target=self._beat, args=(loop, stop), name="pulse", daemon=True).start()
        return stop

    def _beat(self, loop: EngineLoop | None, stop: threading.Event) -> None:
        moved_at, progress = time.monotonic(), 0.0
        while not stop.wait(BEAT_S):
            now = time.monotonic()
            if loop is None or loop.idle or loop.clock.progress_at != progress:
                moved_at = now
            progress = loop.clock.progress_at if loop is not None else 0.0
            self.write(now - moved_at)
