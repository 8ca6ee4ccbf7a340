"""Kernels compiled ahead and in parallel: which ones the first steps need is found by running them on no data.

Called by `build.py` before the weights are loaded, on a GPU. A model of the same shape, with as many layers as there
are kinds of them, lives on torch's meta device: no memory, no values. Its steps run with a hook that notes each kernel
that Triton would compile and skips the launch; what is noted is compiled by processes (`compilers.py`) while the
weights arrive, and by threads where there are none. What is missed here is compiled at its first launch, as ever, and
named in the log's details. Knows no kernel by name.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from septet import kernels
from septet.engine import compilers
from septet.engine.buckets import Shape
from septet.engine.compilers import FIRST, Compilers, kernel_directory
from septet.engine.masked import MaskBuffers
from septet.engine.missed import Missed
from septet.engine.rows import Rows
from septet.engine.static import Machine, input_length, static_step
from septet.kernels.ops import LayerKV
from septet.layers.build import Build
from septet.machine import usable_cpus
from septet.models.registry import load_model
from septet.quant.none import Dense
from septet.quant.scheme import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from septet.config import ModelConfig
    from septet.engine.buckets import Shapes
    from septet.kernels.ops import Ops

__all__ = ["Rehearsal", "kernel_directory", "needed_kernels"]

MAX_THREADS = 16
THREADS = "kernels"  # their names
SLOWEST = 5  # kernels that are named in the log's details
LATER_PROCESSES, NICE = 2, 15  # for what is compiled behind traffic
SWITCH_S = 0.0003  # seconds a thread that compiles may keep the interpreter while one that loads or serves wants it
PROMPTS = (
    (1024, 1),
    (8192, 16),
)  # (tokens, rows) of eager steps that come early: one long prompt, a full batch of them
META = torch.device("meta")

log = logging.getLogger(__name__)


class Rehearsal:
    """Two parts: what the first steps need, at work from the constructor on until `finish`, and what the other captured
    steps will need, behind traffic after `go_on`. A part that has ended once leaves a stamp in `directory` and is left
    out from then on: its kernels are read from there when they are launched."""

    def __init__(
        self, config: ModelConfig, ops: Ops, dtype: torch.dtype, shapes: Shapes, directory: Path | None
    ) -> None:
        self._what = (config, ops, dtype, shapes)
        self._stamp = directory / f"rehearsed-{_digest(config, dtype, shapes)}" if directory else None
        self._cancelled = False
        self._missed = Missed(THREADS)
        self._pool = ThreadPoolExecutor(max(2, min(usable_cpus(), MAX_THREADS)), thread_name_prefix=THREADS)
        prompts = [Shape(False, tokens, n_rows, tokens) for tokens, n_rows in PROMPTS]
        self._switch_s = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._libraries = self._pool.submit(_wake_libraries, config, dtype)
        self._first = self._begin(FIRST, [*shapes.first(), *prompts])
        self._later: Future[int] | None = None

    def _begin(self, part: str, steps: Sequence[Shape]) -> Future[int] | None:
        if self._done(part):
            return None
        return self._pool.submit(self._compile, part, steps)

    def _done(self, part: str) -> bool:
        return self._stamp is not None and self._stamp.with_name(f"{self._stamp.name}-{part}").exists()

    def _compile(self, part: str, steps: Sequence[Shape]) -> int:
        """-> kernels that are ready. One that can't be compiled is left to its first launch."""
        ready = 0
        try:
            with self._processes(part) as processes:
                ready = self._compile_by(processes, part, steps)
            if self._stamp is not None and not self._cancelled:
                self._stamp.with_name(f"{self._stamp.name}-{part}").touch()
        except Exception as error:
            log.warning("not all kernels could be compiled ahead: %s: %s", type(error).__name__, error)
        return ready

    @contextmanager
    def _processes(self, part: str) -> Iterator[Compilers | None]:
        """None: there are none, so threads compile."""
        processes = None
        if self._stamp is not None and usable_cpus() > 1 and torch.version.hip is None:
            try:
                processes = compilers.take() if part == FIRST else Compilers(LATER_PROCESSES, NICE)
            except OSError as error:
                log.info("kernels are compiled by threads: %s", error.strerror)
        try:
            yield processes
        finally:
            if processes is not None:
                processes.close()

    def _compile_by(self, processes: Compilers | None, part: str, steps: Sequence[Shape]) -> int:
        began = time.perf_counter()
        told: dict[int, tuple[Any, str]] = {}
        if processes is not None:
            processes.target(_capability())

        def tell(*kernel: Any) -> None:
            if processes is not None:
                told[processes.tell(*kernel)] = kernel

        left = dict.fromkeys(needed_kernels(*self._what, steps, tell))
        self._missed.know(left)
        found_s = time.perf_counter() - began
        submit = self._pool.submit if part == FIRST else _at_once  # one thread: the engine is serving
        ready: list[Future[bool]] = []
        for job in processes.finish() if processes is not None else ():
            if (one := told.get(job)) in left:
                del left[one]
                ready.append(submit(self._preload, *one))
        if processes is None or not processes.late:
            ready += [submit(self._preload, *one) for one in left]
        n_ready = sum(map(Future.result, ready))
        if processes is not None:
            seconds = sorted(
                ((s, told[job][0].__name__) for job, s in processes.seconds.items() if job in told), reverse=True
            )
            slow = ", ".join(f"{name} {s:.1f} s" for s, name in seconds[:SLOWEST])
            log.debug(
                "found after %.2f s, ready after %.2f s: %d kernels by processes; the slowest: %s",
                found_s,
                time.perf_counter() - began,
                len(seconds),
                slow,
            )
        return n_ready

    def _preload(self, kernel: Any, data: str) -> bool:
        """From the store, if a process has put it there; else compiled here. Its launcher is left to the thread that
        launches: all of Triton's launchers are modules of one name, and a second load of one overwrites what another
        thread is just loading (CPython, modules of single-phase initialisation)."""
        if not self._cancelled:
            kernel.preload(data)
        return not self._cancelled

    def finish(self) -> int:
        """Wait for the first part -> its kernels."""
        self._libraries.result()
        return self._first.result() if self._first is not None else 0

    def go_on(self) -> None:
        """The first steps are captured: now the rest."""
        self._later = self._begin("all", self._what[-1].usual())
        if self._later is None:
            self._end()
        else:
            self._later.add_done_callback(lambda _: self._end())

    def _end(self) -> None:
        sys.setswitchinterval(self._switch_s)
        self._pool.shutdown(wait=False)

    def over(self) -> bool:
        """Whether nothing is left to be compiled."""
        return self._later.done() if self._later is not None else self._done("all")

    def cancel(self) -> None:
        """Nobody needs the rest any more."""
        self._cancelled = True
        self._end()


@torch.inference_mode()
def _wake_libraries(config: ModelConfig, dtype: torch.dtype) -> None:
    """What the first launches would wait for, whatever they are: Triton's hash over its own files (0.4 GB of them), and
    the library of matrix products with its first kernel."""
    with suppress(Exception):  # then they do it themselves, or say why not
        from triton.runtime.cache import triton_key

        triton_key()
        if torch.cuda.is_available():
            x = torch.zeros(256, config.hidden_size, dtype=dtype, device="cuda")
            torch.nn.functional.linear(
                x, torch.zeros(config.hidden_size, config.hidden_size, dtype=dtype, device="cuda")
            )


def _capability() -> int:
    """90 = compute capability 9.0."""
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return 10 * major + minor
    from triton.runtime import driver

    return int(driver.active.get_current_target().arch)


def _at_once(run: Callable[..., bool], *args: Any) -> Future[bool]:
    done: Future[bool] = Future()
    done.set_result(run(*args))
    return done


def _digest(*what: object) -> str:
    """Of these values and the kernels' sources."""
    digest = hashlib.sha256(repr(what).encode())
    for file in sorted(Path(kernels.__file__).parent.glob("triton/*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@torch.inference_mode()
def needed_kernels(
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype,
    shapes: Shapes,
    steps: Sequence[Shape],
    tell: Callable[[Any, str], None] = lambda kernel, data: None,
) -> list[tuple[Any, str]]:
    """[(Triton function, what to compile it for)] of these steps, each once; `tell` hears of each at once."""
    windows = config.windows
    n_layers = max(windows.index(window) for window in set(windows)) + 1
    config = replace(config, num_layers=n_layers, layer_windows=windows[:n_layers] if config.layer_windows else ())
    ops = copy(ops)  # what it keeps between calls must not mix with the engine's
    model = load_model(Build(config, ops, _Hollow(config, dtype), META, dtype, max_len=64))
    rows = Rows(shapes.max_rows, shapes.max_len, META)
    kv_shape = (1 << 16, config.num_kv_heads, config.head_dim)
    pool = [LayerKV(torch.empty(kv_shape, dtype=dtype, device=META), torch.empty(kv_shape, dtype=dtype, device=META))]
    inputs = torch.empty(max(map(input_length, steps)), dtype=torch.int64, device=META)
    tokens = torch.empty(max(shape.rows for shape in steps), dtype=torch.int64, device=META)
    machine = Machine(model, ops, pool * n_layers, rows, inputs, tokens, MaskBuffers(len(tokens), META))
    with _noted(tell) as notes:
        for shape in steps:
            step = static_step(machine, shape)
            step.forward()
            step.draw()
    return [(kernel, data) for data, kernel in notes.items()]


@contextmanager
def _noted(tell: Callable[[Any, str], None]) -> Iterator[dict[str, Any]]:
    """This thread's launches of Triton kernels are skipped, and what is not compiled yet is noted, and told: {what to
    compile: function}."""
    from triton import knobs
    from triton.runtime import JITFunction

    notes: dict[str, Any] = {}
    here = threading.get_ident()
    run = JITFunction.run

    def note(*, fn: Any, compile: dict[str, Any], **more: object) -> bool:
        if threading.get_ident() != here:
            return False
        data = compile["specialization_data"]
        if data not in notes:
            notes[data] = fn.jit_function
            tell(fn.jit_function, data)
        return True

    def without_launch(self: Any, *args: object, warmup: bool, **more: object) -> object:
        return run(self, *args, warmup=warmup or threading.get_ident() == here, **more)

    before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, note
    JITFunction.run = without_launch  # a kernel that is compiled by now would otherwise run, on tensors without memory
    try:
        yield notes
    finally:
        knobs.runtime.jit_cache_hook, JITFunction.run = before, run


class _NoValues(Dense):
    """Stacked without `torch.cat`, whose meta version would import torch's compiler: seconds."""

    def concat(self, weights: list[PackedWeight]) -> PackedWeight | None:
        first = weights[0].tensors["weight"]
        shape = (sum(weight.shape[0] for weight in weights), first.shape[1])
        return PackedWeight(self, {"weight": first.new_empty(shape)}, shape)


class _Hollow:
    """A `Source` of tensors without values."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        self.config = config
        self.dtype = dtype

    def matrix(self, name: str, shape: tuple[int, int]) -> PackedWeight:
        return PackedWeight(_NoValues(), {"weight": torch.empty(shape, dtype=self.dtype, device=META)}, shape)

    def vector(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=META)

    def optional(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        return None

    def has(self, name: str) -> bool:
        return not (name == "lm_head.weight" and self.config.tie_embeddings) and name != "rope_freqs.weight"

    def finish(self) -> None:
        """Nothing can be left over."""
