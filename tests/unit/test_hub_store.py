"""The store: names, placement, sharing, removal, damage, locks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from septet.errors import ModelFileError, ModelNotFound
from septet.hub.store import FileEntry, LocalModel, Manifest, Store, check_name, home_directory

BAD_NAMES = [
    "", ".", "..", "../x", "/etc/passwd", "a/../b", "a/..", "a//b", "a/b/c", "a\\b", "C:\\x", "a\0b", "a\nb",
    "\x1b[31mred", "x" * 10_000, "%2e%2e%2fx", ".hidden", "a/.hidden", "a:", ":b", "a b", "č", "a..b", "~x", "-x",
]  # fmt: skip


def add(store: Store, name: str, **files: bytes) -> LocalModel:
    work = store.work_directory(name)
    sources, entries = {}, []
    for file, raw in files.items():
        path = work / f"incoming-{file}"
        path.write_bytes(raw)
        sources[file] = path
        entries.append(FileEntry(file, hashlib.sha256(raw).hexdigest(), len(raw)))
    return store.add(Manifest(name=name, source="test", license="MIT", files=tuple(entries)), sources)


def blobs(store: Store) -> set[bytes]:
    return {path.read_bytes() for path in (store.home / "blobs").iterdir()}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_could_be_paths_are_refused_and_touch_nothing(store: Store, name: str) -> None:
    for act in (check_name, store.get, store.view, store.work_directory, store.remove):
        with pytest.raises(ModelNotFound) as caught:
            act(name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 300
    assert not store.home.exists()


def test_names_do_not_collide(store: Store) -> None:
    names = ["a", "a:b", "a/b", "org/name:file.gguf", "A"]
    assert len({store.view(name) for name in names}) == len(names)
    assert all(store.view(name).parent == store.home / "models" for name in names)


@pytest.mark.parametrize("digest", ["", "abc", "../" * 20, "g" * 64, "A" * 64, "0" * 63, "0" * 65, "0" * 64 + "\n"])
def test_digests_of_another_form_are_refused(store: Store, digest: str) -> None:
    with pytest.raises(ModelFileError, match="not a sha256"):
        store.blob(digest)


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "x"))
    assert home_directory() == tmp_path / "x"
    assert home_directory(tmp_path) == tmp_path
    monkeypatch.delenv("SEPTET_HOME")
    assert home_directory() == Path.home() / ".septet"


def test_a_model_of_one_file_is_a_path_to_it_and_of_several_a_directory(store: Store) -> None:
    one = add(store, "one", **{"m.gguf": b"weights"})
    assert one.path.name == "m.gguf"
    assert one.path.read_bytes() == b"weights"
    assert one.digest == hashlib.sha256(b"weights").hexdigest()
    two = add(store, "org/two", **{"config.json": b"{}", "model.safetensors": b"w"})
    assert two.path.is_dir()
    assert sorted(path.name for path in two.path.iterdir()) == ["config.json", "model.safetensors"]
    assert [manifest.name for manifest in store.all()] == ["one", "org/two"]
    assert two.n_bytes == 3


def test_blobs_are_shared_and_go_with_their_last_model(store: Store) -> None:
    add(store, "a", x=b"shared", y=b"only a")
    add(store, "b", x=b"shared", y=b"only b")
    assert blobs(store) == {b"shared", b"only a", b"only b"}
    assert store.remove("a") == len(b"only a")
    assert blobs(store) == {b"shared", b"only b"}
    kept = store.get("b")
    assert kept
    assert store.damaged(kept) is None
    assert store.remove("b") == len(b"shared") + len(b"only b")
    assert blobs(store) == set()
    with pytest.raises(ModelNotFound, match="not in the store"):
        store.remove("b")


def test_blobs_are_read_only(store: Store) -> None:
    model = add(store, "a", x=b"1")
    assert model.path.stat().st_mode & 0o222 == 0


def test_replacing_a_model(store: Store) -> None:
    add(store, "a", x=b"old", y=b"old y")
    add(store, "a", x=b"new")
    manifest = store.get("a")
    assert manifest
    local = store.local(manifest)
    assert local
    assert local.path.read_bytes() == b"new"
    assert not (store.view("a") / "y").exists()


def test_damage_is_seen(store: Store) -> None:
    add(store, "a", x=b"1234", y=b"abc")
    manifest = store.get("a")
    assert manifest
    path = store.view("a") / "x"
    path.chmod(0o644)
    path.write_bytes(b"1235")
    assert store.local(manifest) is not None  # a quick look sees sizes only
    assert store.damaged(manifest) == "x"
    path.write_bytes(b"123")
    assert store.local(manifest) is None
    path.unlink()
    assert store.damaged(manifest) == "x"


@pytest.mark.parametrize(
    "change",
    [{"name": "b"}, {"files": []}, {"files": [1]}, {"files": {}}, {"license": 3}, {"source": None},
     {"files": [{"name": "../../x", "sha256": "0" * 64, "n_bytes": 1}]},
     {"files": [{"name": "x", "sha256": "../x", "n_bytes": 1}]},
     {"files": [{"name": "x", "sha256": "0" * 64, "n_bytes": -1}]}],
)  # fmt: skip
def test_a_damaged_manifest_counts_as_not_pulled(store: Store, change: dict[str, object]) -> None:
    add(store, "a", x=b"1")
    path = store.home / "manifests" / "a.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert store.get("a") is None
    assert store.all() == []
    path.write_bytes(path.read_bytes()[:-5])
    assert store.get("a") is None
    add(store, "a", x=b"1")
    assert store.get("a") is not None


@pytest.mark.parametrize("step", ["link", "rename", "replace"])
def test_a_crash_while_placing_leaves_no_half_model(store: Store, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Whatever step fails, the name is either absent or whole, and the next attempt succeeds."""

    class Crash(BaseException):
        pass

    def crash(*args: object, **kwargs: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path if step == "rename" else os, step, crash)
        with pytest.raises(Crash):
            add(store, "a", x=b"1")
    manifest = store.get("a")
    assert manifest is None
    assert add(store, "a", x=b"1").path.read_bytes() == b"1"


def test_a_crash_while_replacing_never_pairs_old_digests_with_new_files(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(store, "a", x=b"old")

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("septet.hub.store._write_atomically", crash)
        with pytest.raises(KeyboardInterrupt):
            add(store, "a", x=b"new")
    assert store.get("a") is None
    assert add(store, "a", x=b"new").path.read_bytes() == b"new"


def test_without_hard_links_files_are_copied(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert add(store, "a", x=b"1").path.read_bytes() == b"1"


def test_one_process_at_a_time_per_name_and_death_releases(store: Store) -> None:
    code = (
        "import sys, pathlib, time; from septet.hub.store import Store\n"
        "with Store(pathlib.Path(sys.argv[1])).lock('a'): print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(store.home)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        waiting, inside = threading.Event(), threading.Event()

        def enter() -> None:
            with store.lock("a", waiting.set):
                inside.set()

        thread = threading.Thread(target=enter, daemon=True)
        thread.start()
        assert waiting.wait(10)
        assert not inside.is_set()
        with store.lock("b"):
            pass  # another name is free
        process.kill()
        assert inside.wait(10)
        thread.join(10)
    finally:
        process.kill()
        process.wait()


def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "home")
    with pytest.raises(ModelFileError, match="set SEPTET_HOME elsewhere"):
        store.work_directory("a")
    with pytest.raises(ModelFileError, match="set SEPTET_HOME elsewhere"), store.lock("a"):
        pass
