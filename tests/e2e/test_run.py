"""`septet run` as a user meets it: one answer on a pipe, a conversation on a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time
from typing import TYPE_CHECKING

from tests.e2e.serving import command

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "What is the capital of France? Answer in one sentence."
ANSWER = "The capital of France is Paris."


def test_one_answer_and_its_figures(smollm2_path: Path) -> None:
    done = subprocess.run(
        command("run", "smollm2", QUESTION, "--temperature", "0"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    assert done.stdout == ANSWER + "\n"
    assert re.search(
        r"TTFT \d+\.\d+ s \| \d+\.\d tokens/s \| 8 tokens \| \d+ of \d+ prompt tokens from cache", done.stderr
    )


def test_the_prompt_may_come_through_a_pipe(smollm2_path: Path) -> None:
    done = subprocess.run(
        command("run", "smollm2", "--temperature", "0", "--no-stats", "--max-tokens", "3"),
        input=QUESTION.encode(),
        capture_output=True,
        timeout=240,
        check=True,
    )
    assert done.stdout == b"The capital of\n"
    assert b"TTFT" not in done.stderr


def test_bad_options_are_one_line(smollm2_path: Path) -> None:
    done = subprocess.run(
        command("run", "smollm2", "hi", "--temperature", "-1"), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "temperature must be" in done.stderr
    assert "Traceback" not in done.stderr


_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Terminal:
    """A program on a pseudo terminal."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm", SEPTET_HOME=str(home), PROMPT_TOOLKIT_NO_CPR="1")
            os.execv(arguments[0], arguments)
        self.seen = ""

    def until(self, words: str, wait_s: float = 180) -> str:
        """Read on until `words` come; returns what came before."""
        deadline = time.monotonic() + wait_s
        while words not in self.seen:
            assert time.monotonic() < deadline, f"no {words!r} in {self.seen[-2000:]!r}"
            if select.select([self.fd], [], [], 0.2)[0]:
                self.seen = _ESCAPES.sub("", self.seen + os.read(self.fd, 65536).decode("utf-8", "replace"))
        before, _, self.seen = self.seen.partition(words)
        return before

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def exit_code(self, wait_s: float = 120) -> int:
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    os.read(self.fd, 65536)
                except OSError:
                    time.sleep(0.1)
        raise AssertionError("still running")

    def end(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.fd)


def figures_of(terminal: Terminal) -> tuple[int, int]:
    """(cached, all) prompt tokens of the line after an answer."""
    cached, n_prompt = re.findall(r"(\d+) of (\d+) prompt", terminal.until("tokens from cache"))[-1]
    return int(cached), int(n_prompt)


def test_a_conversation(smollm2_path: Path, tmp_path: Path) -> None:
    # The slow kernels: the native ones have told the story before anybody can stop it.
    slow = ("--temperature", "0", "--kernels", "reference")
    terminal = Terminal(command("run", str(smollm2_path), *slow), tmp_path)
    try:
        terminal.until(">>>")
        terminal.type(f"{QUESTION}\r")
        terminal.until(ANSWER)
        _, first = figures_of(terminal)
        terminal.until(">>>")

        terminal.type("/help\r")
        terminal.until("/reset")
        terminal.until(">>>")

        terminal.type("Write a very long story about a river.\r")  # the conversation goes on: its prompt is longer
        terminal.until("river.")
        terminal.until("\n")
        time.sleep(0.5)  # in its prompt or its first words: later, a quick machine may have told the story
        terminal.type("\x03")
        terminal.until("(stopped)")
        terminal.until(">>>")

        terminal.type("/reset\r")
        terminal.until("conversation forgotten")
        terminal.until(">>>")
        terminal.type(f"{QUESTION}\r")
        terminal.until(ANSWER)
        cached, again = figures_of(terminal)
        assert again == first
        assert cached >= again - 1
        terminal.until(">>>")
        terminal.type("\x03")  # at the prompt it does not end the program either
        terminal.until("leaves")
        terminal.until(">>>")
        terminal.type("\x04")
        assert terminal.exit_code() == 0
        assert QUESTION in (tmp_path / "run_history").read_text()
    finally:
        terminal.end()
