"""The engine as a child process: how it is started and ended (the parent's side of `process.py`).

Used by `client.py`, and by commands that start the engine before anything else: its libraries take longest to load, and
they need no word of the configuration. So this imports little. Must not know the loop, frames or asyncio.
"""

from __future__ import annotations

import os
import signal
import site
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import septet
from septet.engine.pulse import SharedPulse
from septet.machine import thread_env, usable_cpus

__all__ = ["EngineProcess"]


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A child process and our end of the socket pair. Whoever spawns it must `stop` it."""

    popen: subprocess.Popen[bytes]
    sock: socket.socket
    pulse: SharedPulse

    @classmethod
    def spawn(cls, *, warm: bool = False) -> EngineProcess:
        """Start `python -m septet.engine`; it waits for an EngineConfig as its first frame.

        `warm`: a model will be asked for, so its libraries are loaded meanwhile. A process group of its own, so that
        the terminal's Ctrl-C reaches the parent alone, which decides.
        """
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        pulse = SharedPulse.create()
        fds = [theirs.fileno(), pulse.fd]
        flags = ["--fd", str(fds[0]), "--pulse", str(fds[1]), *["--warm"] * warm]
        try:
            popen = subprocess.Popen(
                [sys.executable, "-P", "-m", "septet.engine", *flags],
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout belongs to the parent's answers
                pass_fds=fds,
                env=_child_env(dict(os.environ)),
                process_group=0,
            )
        except BaseException:
            ours.close()
            pulse.close()
            raise
        finally:
            theirs.close()
        return cls(popen, ours, pulse)

    def exit_reason(self) -> str | None:
        """How the process ended, for people; None while it runs."""
        code = self.popen.poll()
        if code is None:
            return None
        if code >= 0:
            return f"it exited with code {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"it was killed by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")

    def discard(self) -> None:
        """End one that no client has taken."""
        self.popen.kill()
        self.popen.wait()
        self.sock.close()
        self.pulse.close()

    def stop(self, grace_s: float) -> int:
        """Wait for the exit, then SIGTERM, then SIGKILL, each after `grace_s`; returns the exit code. Blocks."""
        for ask in (self.popen.terminate, self.popen.kill):
            try:
                return self.popen.wait(grace_s)
            except subprocess.TimeoutExpired:
                ask()
        return self.popen.wait()


def _child_env(environ: dict[str, str]) -> dict[str, str]:
    """The parent's environment with thread counts, and with this package importable where it is not installed.

    PyTorch looks for no packages of other devices: that reads the metadata of everything installed.
    """
    environ.update(thread_env(environ, usable_cpus()))
    environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    root = str(Path(septet.__file__).parent.parent)
    if root not in site.getsitepackages():
        environ["PYTHONPATH"] = os.pathsep.join(part for part in (environ.get("PYTHONPATH"), root) if part)
    return environ
