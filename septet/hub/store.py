"""Where pulled models live: content-addressed blobs, one manifest per name, and a readable view of each model.

Called by `pull.py` and the CLI. Knows no network and no model format. Layout under SEPTET_HOME (default ~/.septet):

    blobs/sha256-<hex>       a file's bytes, read-only
    manifests/<name>.json    which blobs make up a model: written last, its presence is what "pulled" means
    models/<name>/<file>     hard links to the blobs, for readers that want file names
    tmp/<name>/              a pull in progress; what an interrupted one left is reused or removed by the next
    locks/<name>.lock        held (flock) for the length of a pull; `locks/.store` for each change of the above

Everything is placed by rename after fsync, so a crash leaves either the old state or the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from septet.errors import ModelFileError, ModelNotFound
from septet.hub.facts import Facts, read_json, shown
from septet.hub.modelfile import Recipe, parse_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["FileEntry", "LocalModel", "Manifest", "Store", "hash_file", "home_directory"]

MAX_MANIFEST_BYTES = 4 * 2**20
MAX_NAME = 200
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?(:[A-Za-z0-9][A-Za-z0-9._-]*)?")
_HEX = re.compile(r"[0-9a-f]{64}")
_CHUNK = 2**20


@dataclass(frozen=True, slots=True)
class FileEntry:
    name: str  # plain file name
    sha256: str
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a pulled model consists of. `files[0]` is the model itself where it is one file."""

    name: str
    source: str  # "pypi:<package>==<version>", "hf:<org>/<name>@<revision>"
    license: str
    files: tuple[FileEntry, ...]
    notices: tuple[FileEntry, ...] = ()  # licence texts; kept in the same view
    recipe: Recipe | None = None  # of a created model: what it adds to these files

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model on this machine. `path`: a .gguf file or a checkpoint directory."""

    name: str
    path: Path
    source: str
    n_bytes: int
    digest: str | None = None  # sha256 of the file; of the sorted file list for a directory; None for a local path
    license: str | None = None
    notices: tuple[Path, ...] = ()
    recipe: Recipe | None = None


def home_directory(home: Path | None = None) -> Path:
    """`home`, else SEPTET_HOME, else ~/.septet; absolute, not created."""
    chosen = home or os.environ.get("SEPTET_HOME") or "~/.septet"
    return Path(chosen).expanduser().absolute()


def check_name(name: str) -> str:
    """The name, fit to become a file name. ModelNotFound for anything else (../, NUL, ANSI, 10 KB, ...)."""
    if not isinstance(name, str) or len(name) > MAX_NAME or not _NAME.fullmatch(name) or ".." in name:
        raise ModelNotFound(f"{shown(name)} is not a model's name: try smollm2, an org/name of Hugging Face, or a path")
    return name


def hash_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """sha256 in hex. `advance` gets the number of bytes of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            if advance:
                advance(len(chunk))
    return digest.hexdigest()


class Store:
    """All paths and all changes of one SEPTET_HOME. Holds no state but the path."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home_directory(home)

    def blob(self, sha256: str) -> Path:
        if not _HEX.fullmatch(sha256):
            raise ModelFileError(f"{shown(sha256)} is not a sha256 digest")
        return self.home / "blobs" / f"sha256-{sha256}"

    def view(self, name: str) -> Path:
        return self.home / "models" / _quoted(name)

    def _manifest(self, name: str) -> Path:
        return self.home / "manifests" / f"{_quoted(name)}.json"

    # -- reading ------------------------------------------------------------------------------------------------------
    def get(self, name: str) -> Manifest | None:
        """The manifest of `name`, None if it was never pulled (or is damaged: the next pull replaces it)."""
        path = self._manifest(name)
        if not path.exists():
            return None
        try:
            return _parse_manifest(name, Facts(path.name, read_json(path, MAX_MANIFEST_BYTES)))
        except ModelFileError:
            return None

    def local(self, manifest: Manifest) -> LocalModel | None:
        """Where the model lies; None if a file is missing or has another size (a pull mends it)."""
        view = self.view(manifest.name)
        for file in (*manifest.files, *manifest.notices):
            try:
                if (view / file.name).stat().st_size != file.n_bytes:
                    return None
            except OSError:
                return None
        single = len(manifest.files) == 1
        return LocalModel(
            name=manifest.name,
            path=view / manifest.files[0].name if single else view,
            source=manifest.source,
            n_bytes=manifest.n_bytes,
            digest=manifest.files[0].sha256 if single else _digest_of(manifest.files),
            license=manifest.license,
            notices=tuple(view / file.name for file in manifest.notices),
            recipe=manifest.recipe,
        )

    def all(self) -> list[Manifest]:
        """Every pulled model, by name."""
        found = []
        for path in sorted((self.home / "manifests").glob("*.json")):
            with contextlib.suppress(ModelFileError, ModelNotFound):
                facts = Facts(path.name, read_json(path, MAX_MANIFEST_BYTES))
                manifest = _parse_manifest(check_name(facts.text("name")), facts)
                if self._manifest(manifest.name) == path:
                    found.append(manifest)
        return found

    def damaged(self, manifest: Manifest, advance: Callable[[int], None] | None = None) -> str | None:
        """The name of a file whose bytes are not what the manifest says, None if all are. Reads everything."""
        view = self.view(manifest.name)
        for file in (*manifest.files, *manifest.notices):
            path = view / file.name
            if not path.is_file() or hash_file(path, advance) != file.sha256:
                return file.name
        return None

    # -- changing -----------------------------------------------------------------------------------------------------
    def work_directory(self, name: str) -> Path:
        """tmp/<name>, made. Call it while holding `lock(name)`."""
        path = self.home / "tmp" / _quoted(name)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ModelFileError(f"can't write to SEPTET_HOME ({error.strerror}); set SEPTET_HOME elsewhere") from None
        return path

    @contextlib.contextmanager
    def lock(self, name: str, waiting: Callable[[], None] | None = None) -> Iterator[None]:
        """Only one process at a time is inside for a name; the system releases it if that process dies."""
        import fcntl

        path = self.home / "locks" / f"{_quoted(name)}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stream = path.open("a")
        except OSError as error:
            raise ModelFileError(f"can't write to SEPTET_HOME ({error.strerror}); set SEPTET_HOME elsewhere") from None
        with stream:
            told = False
            while True:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if waiting and not told:
                        waiting()
                        told = True
                    time.sleep(0.1)
            yield

    def add(self, manifest: Manifest, sources: dict[str, Path]) -> LocalModel:
        """Move the files in (`sources`: file name -> path on the same file system), already verified, and publish.

        Files without a source must be blobs already: a model of another one's files. ModelNotFound if one is not.
        """
        with self.lock(".store"):
            for file in (*manifest.files, *manifest.notices):
                if file.name in sources:
                    _place(sources[file.name], self.blob(file.sha256))
                elif not self.blob(file.sha256).is_file():
                    raise ModelNotFound(f"the files behind {manifest.name} are gone from the store; pull them again")
            self._make_view(manifest)
            raw = json.dumps({"version": 1, **asdict(manifest)}, indent=2).encode()
            _write_atomically(self._manifest(manifest.name), raw)
        model = self.local(manifest)
        assert model is not None
        return model

    def modified(self, name: str) -> float:
        """When the model was put here, in seconds since the epoch; 0 if it is not."""
        try:
            return self._manifest(name).stat().st_mtime
        except OSError:
            return 0.0

    def _make_view(self, manifest: Manifest) -> None:
        view = self.view(manifest.name)
        fresh = view.with_name(view.name + ".new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        for file in (*manifest.files, *manifest.notices):
            blob = self.blob(file.sha256)
            try:
                os.link(blob, fresh / file.name)
            except OSError:  # a file system without hard links
                shutil.copyfile(blob, fresh / file.name)
        self._manifest(manifest.name).unlink(missing_ok=True)  # from here to the new manifest: not pulled
        shutil.rmtree(view, ignore_errors=True)
        fresh.rename(view)

    def remove(self, name: str) -> int:
        """Forget a model; -> bytes freed (blobs that no other model uses). ModelNotFound if it is not here."""
        path = self._manifest(check_name(name))
        with self.lock(name), self.lock(".store"):
            if not path.exists():
                raise ModelNotFound(f"{name} is not in the store (see: septet list)")
            path.unlink()
            shutil.rmtree(self.view(name), ignore_errors=True)
            shutil.rmtree(self.home / "tmp" / _quoted(name), ignore_errors=True)
            return self._sweep()

    def _sweep(self) -> int:
        """Remove blobs that no manifest names; -> their bytes. Call it while holding the store's lock."""
        used = {self.blob(f.sha256) for manifest in self.all() for f in (*manifest.files, *manifest.notices)}
        freed = 0
        for path in (self.home / "blobs").glob("sha256-*"):
            if path not in used:
                freed += path.stat().st_size
                path.unlink()
        return freed


def _quoted(name: str) -> str:
    return name if name == ".store" else quote(check_name(name), safe="")


def _digest_of(files: tuple[FileEntry, ...]) -> str:
    lines = sorted(f"{file.sha256}  {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _parse_manifest(name: str, facts: Facts) -> Manifest:
    if facts.text("name") != name:
        raise facts.bad("name", repr(name))
    recipe = facts.part("recipe")
    return Manifest(
        name=name,
        source=facts.text("source"),
        license=facts.text("license"),
        files=_parse_files(facts, "files"),
        notices=_parse_files(facts, "notices"),
        recipe=parse_recipe(recipe) if recipe else None,
    )


def _parse_files(facts: Facts, key: str) -> tuple[FileEntry, ...]:
    entries = facts.values.get(key)
    if not isinstance(entries, list) or (key == "files" and not entries):
        raise facts.bad(key, "a list of files")
    files = []
    for entry in entries:
        if not isinstance(entry, dict):
            raise facts.bad(key, "a list of files")
        part = Facts(facts.file, entry)
        file = FileEntry(part.text("name"), part.text("sha256"), part.integer("n_bytes", 0, 2**60))
        if not _HEX.fullmatch(file.sha256) or not is_plain(file.name):
            raise facts.bad(key, "a list of plain file names with sha256 digests")
        files.append(file)
    return tuple(files)


def is_plain(name: str) -> bool:
    """A file name without directories, drives, control characters or a leading dot."""
    return 0 < len(name) <= 255 and name.isprintable() and not name.startswith(".") and not set(name) & set('/\\:"')


def _place(source: Path, blob: Path) -> None:
    blob.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as stream:
        os.fsync(stream.fileno())
    source.chmod(0o444)
    os.replace(source, blob)
    _sync_directory(blob.parent)


def _write_atomically(path: Path, raw: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with fresh.open("wb") as stream:
        stream.write(raw)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(fresh, path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
