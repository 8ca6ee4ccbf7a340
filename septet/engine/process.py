"""The engine as a process of its own: what it does from its first frame to its exit code (`serve`, for `__main__`).

The parent's side is `spawn.py`. Both know each other's death as the end of the stream on an inherited socket pair, to
which nobody else can connect. No torch here: the model comes in through a late import of `engine/build.py`.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from septet.config import EngineConfig
from septet.engine import compilers
from septet.engine.frames import GAP_S
from septet.engine.late import LateInbox
from septet.engine.loop import EngineLoop
from septet.engine.messages import EngineInfo, Fatal, Shutdown
from septet.engine.wire import BlockingEnd, Disconnected, WireError
from septet.errors import InvalidRequest, SeptetError

if TYPE_CHECKING:
    from septet.engine.executor import Executor
    from septet.engine.grammars import Grammars
    from septet.engine.loop import Inbox
    from septet.engine.pulse import SharedPulse
    from septet.engine.scheduler import Scheduler

__all__ = ["Engine", "build_engine", "serve"]

ECHO = "echo:"  # EngineConfig.model "echo:[VOCABULARY[:STEP_MS]]": no model, for tests and benchmarks of the engine
PARENT_CHECK_MS = 2000
PARENT_GRACE_S = 1.0

log = logging.getLogger(__name__)


# -- the child's side -------------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Engine:
    """What a loop turns."""

    scheduler: Scheduler
    executor: Executor
    info: EngineInfo
    grammars: Grammars | None = None  # None: the executor has no masks
    gap_s: float = 0.0  # between frames of tokens, see `frames.py`


def build_engine(config: EngineConfig) -> Engine:
    """Load the model, size the pool, make the scheduler. Raises SeptetError with the reason."""
    from septet.engine.scheduler import Scheduler, SchedulerLimits
    from septet.kv.cache import KVCache

    executor: Executor
    grammars = None
    if config.model.startswith(ECHO):
        executor, info = _build_echo(config)
    else:
        _wake(config)
        from septet.engine.build import build_executor
        from septet.engine.grammars import Grammars

        with _header(config.model):
            executor, info = build_executor(config)
        compilers.discard()
        grammars = Grammars(info.vocab_size, config.max_waiting)
        executor.constrain(grammars, info.vocab_size)
    try:
        limits = SchedulerLimits(
            max_num_seqs=info.max_num_seqs,
            max_num_batched_tokens=info.max_num_batched_tokens,
            max_model_len=info.max_model_len,
            max_waiting=config.max_waiting,
        )
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    cache = KVCache(info.num_kv_slots + 1, enable_prefix=config.enable_prefix_caching)  # and the padding slot
    scheduler = Scheduler(limits, cache, info.vocab_size)
    gap_ms, why = _stream_gap(config, info)
    choices = (*info.choices, ("stream_gap_ms", str(gap_ms), why))
    return Engine(scheduler, executor, replace(info, pid=os.getpid(), choices=choices), grammars, gap_ms / 1000)


def _stream_gap(config: EngineConfig, info: EngineInfo) -> tuple[int, str]:
    if config.stream_gap_ms >= 0:
        return config.stream_gap_ms, "as asked"
    if info.kernels == "native":
        return round(GAP_S * 1000), "readers share the CPUs with the compute threads: sixty frames of tokens a second"
    return 0, "each step's tokens leave with it"


def _header(model: str) -> contextlib.AbstractContextManager[object]:
    """A GGUF file's header, parsed once for all who open it meanwhile."""
    from septet.hub.gguf import GGUFFile

    return contextlib.nullcontext() if Path(model).is_dir() else GGUFFile.open(model)


def _build_echo(config: EngineConfig) -> tuple[Executor, EngineInfo]:
    """An engine without a model: a token is a hash of seed, position and the tokens before; steps take STEP_MS."""
    from septet.engine.echo import EchoExecutor

    vocabulary, _, step_ms = config.model.removeprefix(ECHO).partition(":")
    vocabulary, step_ms = vocabulary or "1000", step_ms or "0"
    if not (vocabulary.isdigit() and 0 < int(vocabulary) < 2**31 and step_ms.isdigit() and int(step_ms) <= 60_000):
        raise InvalidRequest(f"the model {ECHO}[VOCABULARY[:STEP_MS]] takes positive numbers", param="model")
    depth = 1 if config.overlap == "off" else 2
    executor = EchoExecutor(depth, int(vocabulary), verify=False, step_s=int(step_ms) / 1000)
    info = EngineInfo(
        model=config.model,
        vocab_size=int(vocabulary),
        max_model_len=config.max_model_len or 4096,
        max_num_seqs=config.max_num_seqs or 256,
        max_num_batched_tokens=config.max_num_batched_tokens or 2048,
        num_kv_slots=config.num_kv_slots or 1 << 17,
        kv_bytes_per_token=0,
        weight_bytes=0,
        device="none",
        dtype="none",
        kernels="echo",
        pid=0,
        load_s=0.0,
    )
    return executor, info


def serve(fd: int, pulse: SharedPulse | None = None, *, warm: bool = False) -> int:
    """The engine process: configuration in, engine info out, then turns until the client leaves. The exit code.

    `warm`: a model will be asked for, so what every model needs is imported while the configuration is on its way.
    """
    if warm:
        compilers.begin_early()
        threading.Thread(target=_warm, name="imports", daemon=True).start()
    loading = pulse.beat() if pulse is not None else None
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    sock = socket.socket(fileno=fd)
    end = BlockingEnd(sock)
    threading.Thread(target=_follow_parent, args=(sock, os.getppid()), name="parent", daemon=True).start()
    try:
        config = _first_frame(end)
        if not config.model.startswith(ECHO):
            _wake(config)
            log.debug("the configuration is here; now the libraries")
            from septet.engine.build import import_libraries

            import_libraries(config)
            log.debug("the libraries are loaded")
        gc.freeze()  # modules are never garbage
        gc.enable()  # as `__main__` has left it off
        engine = build_engine(config)
        signal.signal(signal.SIGTERM, lambda *_: end.post(Shutdown()))
        end.send([engine.info])
    except Disconnected:
        log.info("the client left while the engine was loading")
        return 1
    except Exception as error:
        _report(end, error)
        return 1
    gc.collect()
    if engine.grammars is not None:
        engine.grammars.notify = end.post
    loop = EngineLoop(
        engine.scheduler,
        engine.executor,
        _inbox(engine, end),
        end,
        grammars=engine.grammars,
        owns_gc=True,
        gap_s=engine.gap_s,
    )
    if pulse is not None and loading is not None:
        loading.set()
        pulse.beat(loop)
    return loop.run()


def _inbox(engine: Engine, end: BlockingEnd) -> Inbox:
    """Where torch is not there yet, the first requests that need it wait at the door."""
    native = sys.modules.get("septet.engine.native")  # what is not there yet made no executor, and is not waited for
    if native is None or not isinstance(engine.executor, native.NativeExecutor) or "torch" in sys.modules:
        return end
    return LateInbox(end, end.post, native.asks_more, native.import_torch)


def _warm() -> None:
    """What fails here fails again, and is told, where it is needed."""
    with contextlib.suppress(Exception):
        from septet.engine.build import import_libraries

        import_libraries(None)


def _wake(config: EngineConfig) -> None:
    """Before the libraries, which take as long as the GPU's context."""
    if config.device in ("auto", "cuda"):
        from septet.engine.wake import wake_gpu

        compilers.begin_early()
        wake_gpu()


def _first_frame(end: BlockingEnd) -> EngineConfig:
    messages = end.receive(None)
    while not messages:
        messages = end.receive(None)
    if not isinstance(messages[0], EngineConfig):
        raise WireError(f"the first frame must be an EngineConfig, not {type(messages[0]).__name__}")
    return messages[0]


def _report(end: BlockingEnd, error: Exception) -> None:
    """Tell the client why there is no engine: our own errors by their words, others with a traceback in the log."""
    if isinstance(error, SeptetError):
        fatal = Fatal(str(error), error.kind)
    else:
        log.error("the engine could not start", exc_info=error)
        fatal = Fatal(f"the engine could not start: {type(error).__name__}: {str(error)[:500]}")
    with contextlib.suppress(Disconnected):
        end.send([fatal])


def _follow_parent(sock: socket.socket, parent: int) -> None:
    """End this process when the parent is gone, even if the main thread is busy in a long step or a load.

    Not PR_SET_PDEATHSIG: that fires when the parent's *thread* that started us ends.
    """
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLRDHUP)
    while not poll.poll(PARENT_CHECK_MS) and os.getppid() == parent:
        pass
    time.sleep(PARENT_GRACE_S)  # the loop sees the end of the stream too, and is given the chance to leave by itself
    os._exit(1)
