"""What can be measured: the table of engines (`targets.toml`), what is installed of it, or a server that runs already.

Used by the command and by `launch.py`. Starts nothing.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
import tomllib
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from septet.errors import InvalidRequest, SeptetError

if TYPE_CHECKING:
    from septet.bench.harness.workload import Workload

__all__ = ["Target", "at_url", "fitted", "known", "target"]

MOST_SLOTS, MOST_TOKENS, FEW = 64, 131_072, 16  # of engines that reserve a context for each request


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    name: str  # as given: "septet:smollm2", or the URL
    title: str
    model: str
    command: tuple[str, ...] = ()  # with {port}; empty: it runs already, at `url`
    environment: dict[str, str] = field(default_factory=dict)
    url: str = ""
    ready: str = "/v1/models"
    served_name: bool = True  # ask the server for the model's name
    fixed: dict[str, Any] = field(default_factory=dict)
    missing: str = ""  # why it can't be started here
    note: str = ""  # what a reader of its figures must know
    api_key: str | None = None


@cache
def known() -> dict[str, dict[str, Any]]:
    return tomllib.loads(files("septet.bench.harness").joinpath("targets.toml").read_text())


def target(given: str, programs: dict[str, str], arguments: dict[str, str]) -> Target:
    """`ENGINE[:MODEL]`; `programs` and `arguments` by engine, as --program and --args give them.

    An engine that is not installed, or a model that can't be had, is a Target that says so; a name that is none raises.
    """
    name, _, model = given.partition(":")
    if name not in known():
        raise InvalidRequest(f"no engine {name!r}; there are {', '.join(known())}, or --url http://HOST:PORT/v1")
    entry = known()[name]
    model = model or entry.get("model", "")
    if not model:
        raise InvalidRequest(f"{name} needs a model: --target {name}:MODEL")
    common = {"name": given, "title": entry["title"], "model": model, "ready": entry["ready"]}
    command = _command(name, entry["launch"], programs)
    if isinstance(command, str):
        return Target(**common, missing=command)
    try:
        place = _file_of(model) if entry.get("file") else model
    except SeptetError as error:
        return Target(**common, missing=error.message)
    filled = [word.replace("{model}", place) for word in command] + shlex.split(arguments.get(name, ""))
    return Target(
        **common,
        command=tuple(filled),
        environment=entry.get("environment", {}),
        note=next((note for word, note in entry.get("notes", {}).items() if word in command), ""),
        served_name=entry["named"] == "served",
        fixed=entry["fixed"],
    )


def fitted(target: Target, workloads: list[Workload]) -> Target:
    """With {context}, {slots} and {tokens} (both multiplied) filled in: what the workloads need. An engine that is left
    with fewer slots would be measured as a queue."""
    streams = max(
        (p.streams if w.kind in ("closed", "agents") else FEW for w in workloads for p in w.points()), default=1
    )
    context = -(-int(max((w.longest for w in workloads), default=0) * 1.25 + 256) // 256) * 256
    slots = max(1, min(streams, MOST_SLOTS, MOST_TOKENS // context))
    known = {"{context}": str(context), "{slots}": str(slots), "{tokens}": str(slots * context)}

    def filled(word: str) -> str:
        for name, value in known.items():
            word = word.replace(name, value)
        return word

    return replace(target, command=tuple(map(filled, target.command)),
                   environment={name: filled(value) for name, value in target.environment.items()})  # fmt: skip


def at_url(url: str, model: str | None, api_key: str | None) -> Target:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InvalidRequest(f"--url {url!r} is no http address; http://127.0.0.1:8000/v1 is one")
    root = url.rstrip("/").removesuffix("/v1")
    return Target(name=root, title=root, model=model or "", url=root, served_name=not model,
                  fixed={"ignore_eos": True}, api_key=api_key)  # fmt: skip


def _command(name: str, launches: list[list[str]], programs: dict[str, str]) -> list[str] | str:
    """The first command that this machine has, or what is missing. "{python}" is this Python, or the one given."""
    tried = []
    for launch in launches:
        module = launch[2] if launch[0] == "{python}" and launch[1:2] == ["-m"] else None
        if name in programs:
            # A Python of another environment takes the place of ours; any other program that of the first word.
            given = programs[name]
            if Path(given).name.startswith("python") != (launch[0] == "{python}"):
                continue
            if shutil.which(given) is None:
                return f"--program {name}={given}: no such program"
            return [given, *launch[1:]]
        if module is not None:
            if _importable(module):
                return [sys.executable, *launch[1:]]
            tried.append(f"python -m {module}")
        else:
            beside = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
            if found := shutil.which(launch[0], path=beside):
                return [found, *launch[1:]]
            tried.append(launch[0])
    if name in programs:
        return f"--program {name}={programs[name]}: this engine is started otherwise (see docs/benchmarking.md)"
    return f"not installed: {' or '.join(tried)} not found (--program {name}=PATH if it is elsewhere)"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module.partition(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _file_of(model: str) -> str:
    from septet.hub.pull import resolve

    return str(Path(resolve(model).path))
