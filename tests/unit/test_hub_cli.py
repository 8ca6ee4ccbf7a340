"""The hub in the terminal: commands end with one line on errors, help is quick, licence texts are shown harmlessly."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from septet.cli.main import COMMANDS, main
from septet.hub.store import FileEntry, Manifest, Store

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "home"))
    return Store()


def septet(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def put(store: Store, name: str, files: dict[str, bytes], notices: dict[str, bytes]) -> None:
    work = store.work_directory(name)
    for file, raw in {**files, **notices}.items():
        (work / file).write_bytes(raw)
    entries = [
        tuple(FileEntry(file, hashlib.sha256(raw).hexdigest(), len(raw)) for file, raw in group.items())
        for group in (files, notices)
    ]
    manifest = Manifest(name=name, source="test", license="Free", files=entries[0], notices=entries[1])
    store.add(manifest, {file: work / file for file in (*files, *notices)})


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from septet.cli.main import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\n"
        "bad = {'torch', 'transformers', 'rich', 'huggingface_hub', 'uvicorn', 'numpy', 'septet.cli.run'}\n"
        "assert not bad & set(sys.modules), bad & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_run_starts_its_engine_before_it_imports_what_may_come_later() -> None:
    code = (
        "import sys, septet.cli.run, septet.engine.spawn\n"
        "late = {'asyncio', 'msgspec', 'numpy', 'torch', 'septet.cli.terminal', 'septet.engine.loop'}\n"
        "assert not late & set(sys.modules), late & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["pull", "list", "show", "rm"])
def test_each_command_has_its_own_help(name: str) -> None:
    result = septet(name, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("pull", "nope"), "no model is called 'nope'"),
        (("show", "../x"), "no model at that path"),
        (("rm", "a/../b"), "is not a model's name"),
        (("rm", "smollm2"), "not in the store"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(store: Store, args: tuple[str, ...], words: str) -> None:
    result = septet(*args)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_list_show_rm(store: Store) -> None:
    assert "septet pull smollm2" in septet("list").output
    put(store, "org/name:m.gguf", {"m.gguf": b"junk"}, {"LICENSE": b"Be \x1b[31mkind\x07.\n"})
    listed = septet("list").output.splitlines()
    assert listed[0].split() == ["NAME", "SIZE", "LICENCE", "SOURCE"]
    assert any(line.split() == ["org/name:m.gguf", "4", "B", "Free", "test"] for line in listed)
    shown = septet("show", "org/name:m.gguf").output
    assert "can't be run: m.gguf is not a GGUF file" in shown
    assert "Be [31mkind." in shown
    assert "\x1b" not in shown
    assert "Be [31mkind." in septet("show", "org/name:m.gguf", "--license").output
    removed = septet("rm", "org/name:m.gguf")
    assert removed.exit_code == 0
    assert list((store.home / "blobs").iterdir()) == []


def test_show_of_what_is_not_pulled_yet(store: Store) -> None:
    shown = septet("show", "gemma3:270m").output
    assert "Gemma Terms of Use" in shown
    assert "not pulled: septet pull gemma3:270m" in shown
    assert septet("show", "gemma3:270m", "--license").exit_code == 1


def test_terms_in_html_are_shown_as_text(store: Store) -> None:
    page = b"<html><head><title>T</title></head><script>evil()</script><nav>menu</nav><article><p>Be <b>kind</b>.</p>"
    put(store, "org/x", {"m.gguf": b"j"}, {"TERMS.html": page})
    text = septet("show", "org/x", "--license").output
    assert "Be kind." in text
    assert not any(word in text for word in ("evil", "menu", "<b>"))


def test_the_chats_history_lies_in_the_home_that_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from septet.cli.terminal import _history_file

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SEPTET_HOME", "~/models")
    assert _history_file() == tmp_path / "models" / "run_history"
    assert _history_file().stat().st_mode & 0o077 == 0


def test_ctrl_c_ends_with_the_code_of_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("septet.cli.hub.pull_model", interrupted)
    result = septet("pull", "smollm2")
    assert result.exit_code == 130
    assert "interrupted" in result.output


def test_an_empty_prompt_is_told_before_anything_is_loaded(store: Store) -> None:
    result = septet("run", "smollm2", " ")
    assert result.exit_code == 1
    assert "the prompt is empty" in result.output
