"""New models out of ones that are here: `create` (a recipe over another model's files), `copy`, uploaded files.

Called by `septet create` and the Ollama dialect. Weights are never copied within the store: the new manifest names the
same blobs. Knows no template language; whoever calls has checked that the template can be used.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest, ModelFileError, ModelNotFound, UnsupportedModel
from septet.hub.catalog import find
from septet.hub.facts import shown
from septet.hub.model_config import read_model_config
from septet.hub.pull import canonical, resolve
from septet.hub.store import FileEntry, LocalModel, Manifest, Store, check_name, is_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from septet.hub.modelfile import Recipe
    from septet.hub.watch import Progress

__all__ = ["Upload", "copy", "create", "create_from_uploads", "new_name", "uploaded"]

_KINDS = (".json", ".safetensors", ".jinja", ".txt", ".model", ".gguf")  # of a checkpoint; pickles are never taken
MAX_FILES = 4096
STALE_S = 24 * 3600.0  # after which an upload that nothing was made of is removed
_CHUNK = 2**20


def create(
    name: str,
    base: str,
    recipe: Recipe,
    *,
    home: Path | None = None,
    paths: bool = True,
    progress: Progress | None = None,
) -> LocalModel:
    """The model `name`: the files of `base` (a name, pulled if need be, or a path) and what the recipe adds.

    InvalidRequest for a name that can't be given; what `resolve` and the readers of model files raise for `base`.
    """
    store = Store(home)
    name = new_name(name)
    model = resolve(base, home=home, progress=progress, paths=paths)
    read_model_config(model.path)  # a model that can't be run is refused now
    source = _manifest_of(store, base) if model.source != "local" else None
    whole = recipe.over(source.recipe if source else None)
    if source is not None:
        made = replace(source, name=name, recipe=whole, license=whole.license or source.license)
        return _publish(store, made, {})
    with store.lock(name):
        work = store.work_directory(name)
        try:
            files, sources = _taken_in(model.path, work)
            made = Manifest(name=name, source="local", license=whole.license or "", files=files, recipe=whole)
            return store.add(made, sources)
        except OSError as error:
            raise ModelFileError(f"can't store {name}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def copy(source: str, destination: str, *, home: Path | None = None) -> LocalModel:
    """The same model under another name. ModelNotFound if the source is not in the store."""
    store = Store(home)
    return _publish(store, replace(_manifest_of(store, source), name=new_name(destination)), {})


def new_name(name: str) -> str:
    """The store's name for a model to be made. InvalidRequest: the catalogue's names stay what they are."""
    plain = name.removesuffix(":latest") if isinstance(name, str) else name
    if isinstance(plain, str) and find(plain):
        raise InvalidRequest(f"{plain} is a name of the catalogue; choose another for your own model", param="model")
    try:
        return check_name(plain)
    except ModelNotFound:
        raise InvalidRequest(
            f"{shown(name)} can't be a model's name: letters, digits and . _ - with one : for a tag", param="model"
        ) from None


def _manifest_of(store: Store, name: str) -> Manifest:
    manifest = store.get(canonical(name, store))
    if manifest is None:
        raise ModelNotFound(f"{shown(name)} is not in the store (see: septet list)")
    return manifest


def _publish(store: Store, manifest: Manifest, sources: Mapping[str, Path]) -> LocalModel:
    with store.lock(manifest.name):
        try:
            return store.add(manifest, dict(sources))
        except OSError as error:
            raise ModelFileError(f"can't store {manifest.name}: {error.strerror or error}") from error


# -- files from elsewhere ---------------------------------------------------------------------------------------------
def _taken_in(path: Path, work: Path) -> tuple[tuple[FileEntry, ...], dict[str, Path]]:
    """Copies of a model's files in `work`: a file of the user's may be changed later, a blob never."""
    found = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _KINDS and p.is_file())
    if len(found) > MAX_FILES:
        raise ModelFileError(f"{path.name} holds {len(found)} files; at most {MAX_FILES} are taken")
    _check_space(work, sum(p.stat().st_size for p in found))
    files: list[FileEntry] = []
    sources: dict[str, Path] = {}
    for one in found:
        if not is_plain(one.name):
            raise ModelFileError(f"{shown(one.name)} is no plain file name")
        digest, n_bytes = hashlib.sha256(), 0
        target = work / f"incoming-{len(files)}"
        with one.open("rb") as stream, target.open("wb") as out:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                n_bytes += out.write(chunk)
        files.append(FileEntry(one.name, digest.hexdigest(), n_bytes))
        sources[one.name] = target
    return tuple(files), sources


def _check_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed + (64 << 20):
        raise ModelFileError(f"SEPTET_HOME needs {needed >> 20} MiB free, it has {free >> 20} MiB")


# -- uploads ----------------------------------------------------------------------------------------------------------
def uploaded(store: Store, sha256: str) -> Path | None:
    """Where a file of this digest lies, uploaded or part of a model; None if it doesn't."""
    store.blob(sha256)  # checks the digest
    place = _uploads(store) / f"sha256-{sha256}"
    if place.is_file():
        return place
    blob = store.blob(sha256)
    return blob if blob.is_file() else None


def _uploads(store: Store) -> Path:
    return store.home / "uploads"


class Upload:
    """A file that arrives in parts: nothing of it is seen until its digest has been found right."""

    def __init__(self, store: Store, sha256: str, max_bytes: int) -> None:
        store.blob(sha256)
        self._sha256 = sha256
        self._place = _uploads(store)
        self._left = max_bytes
        self._digest = hashlib.sha256()
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            self._forget_old()
            self._path = self._place / f"incoming-{secrets.token_hex(8)}"
            self._stream = self._path.open("wb")
        except OSError as error:
            raise ModelFileError(f"can't write to SEPTET_HOME ({error.strerror}); set SEPTET_HOME elsewhere") from None

    def write(self, part: bytes) -> None:
        self._left -= len(part)
        if self._left < 0:
            raise InvalidRequest("the file is larger than this server takes", param="digest")
        self._digest.update(part)
        try:
            if shutil.disk_usage(self._place).free < len(part) + (64 << 20):
                raise ModelFileError("the disk of SEPTET_HOME is full")
            self._stream.write(part)
        except OSError as error:
            raise ModelFileError(f"can't write to SEPTET_HOME ({error.strerror})") from None

    def finish(self) -> None:
        """InvalidRequest if the bytes are not what the digest says."""
        if self._digest.hexdigest() != self._sha256:
            raise InvalidRequest("the bytes that came have another sha256 than the digest says", param="digest")
        self._stream.flush()
        os.fsync(self._stream.fileno())
        os.replace(self._path, self._place / f"sha256-{self._sha256}")

    def close(self) -> None:
        self._stream.close()
        self._path.unlink(missing_ok=True)

    def _forget_old(self) -> None:
        now = time.time()
        for path in self._place.iterdir():
            with contextlib.suppress(OSError):
                if now - path.stat().st_mtime > STALE_S:
                    path.unlink()


def create_from_uploads(name: str, files: Mapping[str, str], recipe: Recipe, *, home: Path | None = None) -> LocalModel:
    """A model of uploaded files: file name -> sha256. They become blobs of the store."""
    store = Store(home)
    name = new_name(name)
    if not files or len(files) > MAX_FILES:
        raise InvalidRequest(f"files must name 1 to {MAX_FILES} files", param="files")
    with store.lock(name):
        work = store.work_directory(name)
        try:
            entries, sources = [], {}
            for file, sha256 in files.items():
                entries.append(_gathered(store, work, file, sha256))
                sources[file] = work / file
            _check_sound(work / entries[0].name if len(entries) == 1 else work)
            made = Manifest(
                name=name, source="upload", license=recipe.license or "", files=tuple(entries), recipe=recipe
            )
            return store.add(made, sources)
        except OSError as error:
            raise ModelFileError(f"can't store {name}: {error.strerror or error}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _check_sound(path: Path) -> None:
    """What a client sent is the client's to mend."""
    try:
        read_model_config(path)
    except (ModelFileError, UnsupportedModel) as error:
        raise InvalidRequest(f"files: {error.message}", param="files") from None


def _gathered(store: Store, work: Path, file: str, sha256: str) -> FileEntry:
    if not is_plain(file) or Path(file).suffix not in _KINDS:
        raise InvalidRequest(
            f"files: {shown(file)} must be a plain name that ends in {', '.join(_KINDS)}", param="files"
        )
    found = uploaded(store, sha256)
    if found is None:
        raise InvalidRequest(f"files: no upload sha256:{sha256}; send it to /api/blobs first", param="files")
    with contextlib.suppress(FileExistsError):
        os.link(found, work / file)
    return FileEntry(file, sha256, found.stat().st_size)
