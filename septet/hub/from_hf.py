"""Fetch a Hugging Face repo: the safetensors checkpoint with its configuration and tokenizer, or one GGUF file.

Called by `pull.py`, which holds the model's lock. Only files on a list are ever asked for: no pickles, no code, nothing
in sub-directories. huggingface_hub does the transfers (its configuration, token and mirrors are the user's) and goes on
with files that an interrupted pull left half-done. Large files are held to the sha256 that the hub states.
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from septet.errors import ModelFileError, ModelNotFound, OfflineError, SeptetError
from septet.hub.facts import shown
from septet.hub.store import FileEntry, Manifest, hash_file, is_plain
from septet.hub.watch import Progress, bytes_below, watched

if TYPE_CHECKING:
    from pathlib import Path

    from septet.hub.store import LocalModel, Store

__all__ = ["pull_repo"]

TIMEOUT_S = 10.0
MAX_FILES = 2048
WEIGHTS = ("*.safetensors", "model.safetensors.index.json")
ASIDE = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
NOTICES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, slots=True)
class _Remote:
    """One file of the repo, as the hub lists it."""

    name: str
    n_bytes: int
    sha256: str | None  # of files in large-file storage


def pull_repo(store: Store, name: str, progress: Progress | None, hub: Any = None) -> LocalModel:
    """`name` = org/repo[:file.gguf]. `hub` stands in for the huggingface_hub module in tests.

    OfflineError: the hub can't be reached; ModelNotFound: no such repo or file, or not for this user; ModelFileError:
    only pickles, several GGUF files to choose from, wrong bytes.
    """
    if hub is None:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
        hub = huggingface_hub
    repo, _, file = name.partition(":")
    try:
        info = hub.HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT_S)
    except Exception as error:
        raise _hub_error(repo, error) from None
    if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
        raise ModelFileError(f"{repo}: the hub states no revision")
    files, notices = _choose(repo, [_remote(sibling) for sibling in info.siblings or ()], file)
    work = store.work_directory(name)
    _check_space(work, files)
    paths = _download(hub, repo, info.sha, work, (*files, *notices), progress)
    manifest = Manifest(
        name=name,
        source=f"hf:{repo}@{info.sha}",
        license=_license(info),
        files=tuple(_verified(paths[f.name], f) for f in files),
        notices=tuple(_verified(paths[f.name], f) for f in notices),
    )
    placed = store.add(manifest, paths)
    shutil.rmtree(work, ignore_errors=True)
    return placed


def _remote(sibling: Any) -> _Remote:
    lfs = sibling.lfs
    sha = (lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)) if lfs else None
    return _Remote(str(sibling.rfilename), int(sibling.size or 0), sha)


def _matching(files: list[_Remote], patterns: tuple[str, ...]) -> list[_Remote]:
    return [f for f in files if is_plain(f.name) and any(fnmatch.fnmatchcase(f.name, p) for p in patterns)]


def _choose(repo: str, listed: list[_Remote], file: str) -> tuple[list[_Remote], list[_Remote]]:
    """-> (files of the model, notices)."""
    notices = _matching(listed, NOTICES)
    ggufs = _matching(listed, ("*.gguf",))
    if file:
        chosen = [f for f in ggufs if f.name == file]
        if not chosen:
            raise ModelNotFound(f"{repo} has no GGUF file {shown(file)}; it has {_names(ggufs)}")
        return chosen, notices
    weights = _matching(listed, WEIGHTS)
    single = [f for f in weights if f.name == "model.safetensors"]
    shards = [f for f in weights if f.name.startswith("model")]
    chosen = single or shards
    if chosen and any(f.name == "config.json" for f in listed):
        files = [*_matching(listed, ASIDE), *chosen]
        if len(files) > MAX_FILES:
            raise ModelFileError(f"{repo} has {len(files)} files; at most {MAX_FILES} are accepted")
        return files, notices
    if len(ggufs) == 1:
        return ggufs, notices
    if ggufs:
        raise ModelFileError(f"{repo} has several GGUF files; choose one with {repo}:FILE of {_names(ggufs)}")
    if any(fnmatch.fnmatchcase(f.name, p) for f in listed for p in PICKLES):
        raise ModelFileError(
            f"{repo} has only pickled weights, which can run code when opened and are never loaded: "
            "use a repository with safetensors"
        )
    raise ModelFileError(f"{repo} has neither safetensors with a config.json nor a GGUF file")


def _names(files: list[_Remote]) -> str:
    names = [f.name for f in files]
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "none"


def _check_space(work: Path, files: list[_Remote]) -> None:
    needed = sum(f.n_bytes for f in files) - bytes_below(work)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise ModelFileError(f"SEPTET_HOME needs {needed >> 20} MiB free, it has {free >> 20} MiB")


def _download(
    hub: Any, repo: str, revision: str, work: Path, files: tuple[_Remote, ...], progress: Progress | None
) -> dict[str, Path]:
    total = sum(f.n_bytes for f in files)
    paths: dict[str, Path] = {}
    report = None if progress is None else (lambda n: progress(min(n, total), total, f"downloading {repo}"))
    with watched(work, report):
        for file in files:
            try:
                hub.hf_hub_download(repo, file.name, revision=revision, local_dir=work, etag_timeout=TIMEOUT_S)
            except OSError as error:
                if error.errno is not None and type(error).__module__ == "builtins":
                    raise  # of this machine: no space, say
                raise _hub_error(repo, error) from None
            except Exception as error:
                raise _hub_error(repo, error) from None
            paths[file.name] = work / file.name
    if progress:
        progress(total, total, f"downloading {repo}")
    return paths


def _verified(path: Path, file: _Remote) -> FileEntry:
    sha256 = hash_file(path)
    if file.sha256 and sha256 != file.sha256:
        path.unlink()
        raise ModelFileError(f"{file.name}: sha256 is {sha256}, the hub states {file.sha256}; pull again")
    return FileEntry(file.name, sha256, path.stat().st_size)


def _license(info: Any) -> str:
    tags = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return tags[0][:100] if tags and tags[0].isprintable() else "not stated"


def _hub_error(repo: str, error: Exception) -> SeptetError:
    """What an exception of huggingface_hub means; told by name, for these types have moved between its versions."""
    names = {cls.__name__ for cls in type(error).__mro__}
    if "GatedRepoError" in names:
        return ModelNotFound(f"{repo} is gated: accept its terms on Hugging Face and set HF_TOKEN")
    if names & {"RepositoryNotFoundError", "EntryNotFoundError"} and "LocalEntryNotFoundError" not in names:
        return ModelNotFound(f"Hugging Face has no model {repo} (or it is private: set HF_TOKEN)")
    if "HFValidationError" in names:
        return ModelNotFound(f"{shown(repo)} is not a name of a Hugging Face repo")
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = f" (HTTP {status})" if status else ""
    return OfflineError(
        f"{repo} can't be fetched: Hugging Face can't be reached{said}. Check the network, or give the path of a "
        ".gguf file or a checkpoint directory"
    )
