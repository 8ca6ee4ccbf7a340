"""A grammar's first compilation, in a process that can be killed: `TrialProcess.run` on this side, `main` on that.

Used by `compiler.py`, one thread at a time. The process translates, compiles, computes masks along a short random walk
and says what it found; one that takes too long or too much memory dies, and only its request with it. Frames on its
standard input and output: a 4-byte big-endian length, then msgpack. Never forked: the engine has threads and a device.
"""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

import septet
from septet.errors import InvalidRequest
from septet.grammar import limits
from septet.grammar.vocabulary import Vocabulary  # noqa: TC001 - msgspec evaluates the annotations
from septet.structured import Structured

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

__all__ = ["TrialProcess"]

ORPHAN_S = 3 * int(limits.COMPILE_DEADLINE_S)
START_DEADLINE_S = 60.0  # a large vocabulary on a busy machine


class Introduction(msgspec.Struct):
    vocabulary: Vocabulary
    vocab_size: int


class Verdict(msgspec.Struct):
    grammar: str = ""  # what to compile
    error: str = ""  # why not


# -- this side --------------------------------------------------------------------------------------------------------
class TrialProcess:
    """Started at the first `run`, and again after it had to be killed."""

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, deadline_s: float = limits.COMPILE_DEADLINE_S) -> None:
        self._hello = msgspec.msgpack.encode(Introduction(vocabulary, vocab_size))
        self._deadline_s = deadline_s
        self._popen: subprocess.Popen[bytes] | None = None

    def run(self, structured: Structured) -> str:
        """The text to compile. InvalidRequest: it can't be, or not within the limits."""
        if self._popen is None:
            self._start()
        try:
            self._write(msgspec.msgpack.encode(structured))
            verdict = msgspec.msgpack.decode(self._read(self._deadline_s), type=Verdict)
        except TimeoutError:
            self.close()
            raise InvalidRequest(
                f"{structured.kind}: it takes more than {self._deadline_s:g} s to compile; make it simpler",
                param="structured",
            ) from None
        except (OSError, EOFError):
            self.close()
            raise InvalidRequest(
                f"{structured.kind}: it takes too much memory to compile; make it simpler", param="structured"
            ) from None
        if verdict.error:
            raise InvalidRequest(verdict.error, param="structured")
        return verdict.grammar

    def close(self) -> None:
        if self._popen is not None:
            popen, self._popen = self._popen, None
            popen.kill()
            popen.wait()
            for pipe in (popen.stdin, popen.stdout):
                if pipe is not None:
                    pipe.close()

    def _start(self) -> None:
        root = str(Path(septet.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), root)))
        self._popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "septet.grammar.trial"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path, "RAYON_NUM_THREADS": "1"},
            process_group=0,
        )
        try:
            self._write(self._hello)
            self._read(START_DEADLINE_S)
        except (OSError, EOFError, TimeoutError):
            self.close()
            raise RuntimeError("the process that tries grammars did not start") from None

    def _write(self, payload: bytes) -> None:
        assert self._popen is not None
        assert self._popen.stdin is not None
        view = memoryview(len(payload).to_bytes(4, "big") + payload)
        while view:
            view = view[self._popen.stdin.write(view) :]

    def _read(self, deadline_s: float) -> bytes:
        end = time.monotonic() + deadline_s
        size = int.from_bytes(self._exactly(4, end), "big")
        return self._exactly(size, end)

    def _exactly(self, n: int, end: float) -> bytes:
        assert self._popen is not None
        assert self._popen.stdout is not None
        data = b""
        while len(data) < n:
            if not select.select([self._popen.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(self._popen.stdout.fileno(), n - len(data))
            if not part:
                raise EOFError
            data += part
        return data


# -- that side --------------------------------------------------------------------------------------------------------
def main() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = limits.TRIAL_MEMORY if hard == resource.RLIM_INFINITY else min(hard, limits.TRIAL_MEMORY)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nobody prints between the frames
    hello = msgspec.msgpack.decode(_frame(source), type=Introduction)
    tokenizer, _ = hello.vocabulary.tokenizer(hello.vocab_size)
    special = hello.vocabulary.special_ids()
    _answer(target, Verdict())
    while payload := _frame(source):
        structured = msgspec.msgpack.decode(payload, type=Structured)
        signal.alarm(ORPHAN_S)  # if the engine died meanwhile, nobody else would end us; the default action is death
        try:
            _answer(target, Verdict(grammar=_tried(structured, tokenizer, special)))
        except InvalidRequest as error:
            _answer(target, Verdict(error=error.message))
        except RecursionError:
            _answer(target, Verdict(error=f"{structured.kind}: it is nested too deeply"))
        signal.alarm(0)


def _frame(source: BinaryIO) -> bytes:
    """Empty at the end of the stream: the engine is gone."""
    return source.read(int.from_bytes(source.read(4), "big"))


def _answer(target: BinaryIO, verdict: Verdict) -> None:
    payload = msgspec.msgpack.encode(verdict)
    target.write(len(payload).to_bytes(4, "big") + payload)
    target.flush()


def _tried(structured: Structured, tokenizer: LLTokenizer, special: dict[str, int]) -> str:
    """What to compile. Where a part may fall back to something simpler, that is tried next."""
    from septet.grammar.translate import translate

    try:
        return _walked(structured, translate(structured, special), tokenizer)
    except InvalidRequest:
        relaxed = translate(structured, special, relaxed=True)
        if relaxed == translate(structured, special):
            raise
        return _walked(structured, relaxed, tokenizer)


def _walked(structured: Structured, text: str, tokenizer: LLTokenizer) -> str:
    from llguidance import LLMatcher

    matcher = LLMatcher(tokenizer, text, limits=limits.parser_limits(), log_level=0)
    _check(structured, matcher)
    rng = random.Random(0)
    for step in range(limits.TRIAL_TOKENS):
        began = time.monotonic()
        mask = matcher.compute_bitmask()
        if time.monotonic() - began > limits.SLOW_MASK_S:
            raise InvalidRequest(f"{structured.kind}: it is too complex: a single step takes too long")
        if step == 0 and matcher.stop_reason() in ("NoExtensionBias", "NoExtension") and not matcher.is_accepting():
            raise InvalidRequest(f"{structured.kind}: it allows no answer at all")
        _check(structured, matcher)
        allowed = _some_allowed(mask, rng)
        if matcher.is_stopped() or allowed is None or not matcher.consume_token(allowed):
            break
    return text


def _some_allowed(mask: bytes, rng: random.Random) -> int | None:
    """A token of the mask, found from a random byte on."""
    at = rng.randrange(len(mask))
    for i in (*range(at, len(mask)), *range(at)):
        if mask[i]:
            bits = [bit for bit in range(8) if mask[i] >> bit & 1]
            return 8 * i + rng.choice(bits)
    return None


def _check(structured: Structured, matcher: LLMatcher) -> None:
    if not matcher.is_error():
        return
    why = matcher.get_error().removesuffix("<non-verbose/>").strip()
    if "oneOf" in why:
        why = "oneOf can't be enforced where two alternatives may both hold; use anyOf, or tell them apart by a const"
    elif "NoExtension" in why:
        why = "it allows no answer at all"
    elif not why or "panic" in why.lower():
        why = "it can't be compiled"
    raise InvalidRequest(f"{structured.kind}: {why[:500]}")


if __name__ == "__main__":
    main()
