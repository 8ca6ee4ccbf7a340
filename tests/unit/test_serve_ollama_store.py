"""Ollama's API over a store: create, copy, show, delete, uploads, pulls; who may do so."""

from __future__ import annotations

import asyncio
import hashlib
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from septet.hub.create import Upload
from septet.hub.store import FileEntry, Manifest, Store
from septet.serve.app import Service, Settings, create_app
from septet.serve.jobs import MAX_JOBS, Job
from septet.serve.keys import Key, Keys, digest_of, new_key
from septet.serve.library import StoreShelf
from septet.serve.pool import ModelPool, Need
from septet.session.preset import preset
from tests.fakes import FakeClient, session
from tests.unit.test_hub_model_config import make_gguf
from tests.unit.test_serve_ollama import CHAT, GENERATE, lines_of
from tests.unit.test_serve_openai import ask

if TYPE_CHECKING:
    from pathlib import Path

    from septet.hub.store import LocalModel
    from septet.session.session import Session


class FakeLoader:
    def __init__(self) -> None:
        self.client = FakeClient("hello", eos=True)

    async def need(self, model: LocalModel, budget: int) -> Need:
        return Need(1)

    async def load(self, model: LocalModel, need: Need) -> tuple[Session, int]:
        self.client.dead = False
        return session(self.client, model_name=model.name), 1

    def view(self, base: Session, model: LocalModel) -> Session:
        return preset(base, model.name, model.recipe) if model.recipe else base


class Here:
    """A server of a store with one model, `base`."""

    def __init__(self, home: Path) -> None:
        self.store = Store()
        work = self.store.work_directory("base")
        raw = make_gguf(work, "llama").read_bytes()
        (work / "base.gguf").write_bytes(raw)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self.raw = raw
        file = FileEntry("base.gguf", self.sha256, len(raw))
        self.store.add(
            Manifest(name="base", source="test", license="MIT", files=(file,)), {"base.gguf": work / "base.gguf"}
        )
        self.loader = FakeLoader()
        self.home = home

    def ask(self, method: str, path: str, body: Any = None, **request: Any) -> httpx.Response:
        """Each call is a server of its own: the pool belongs to one loop."""
        pool = ModelPool(StoreShelf(), self.loader, budget=100, manages=True)
        if body is not None:
            request["json"] = body
        return ask(create_app(Service(pool, Settings())), method, path, **request)

    def ask_twice(self, *asked: tuple[str, str, Any], keys: Keys | None = None, key: str = "") -> list[httpx.Response]:
        """One after the other, of one server."""

        async def go() -> list[httpx.Response]:
            pool = ModelPool(StoreShelf(), self.loader, budget=100, manages=True)
            transport = httpx.ASGITransport(create_app(Service(pool, Settings(), keys)))
            headers = {"authorization": f"Bearer {key}"} if key else {}
            async with httpx.AsyncClient(
                transport=transport, base_url="http://localhost:8000", headers=headers
            ) as http:
                told = [await http.request(method, path, json=body) for method, path, body in asked]
            await pool.close()
            return told

        return asyncio.run(go())

    def names(self) -> list[str]:
        return [model["name"] for model in self.ask("GET", "/api/tags").json()["models"]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path))
    return Here(tmp_path)


def test_create_copy_show_ask_delete(here: Here) -> None:
    body = {"model": "mario", "from": "base", "system": "You are Mario.",
            "parameters": {"temperature": 0, "stop": "l"},
            "messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}],
            "license": "X"}  # fmt: skip
    lines = lines_of(here.ask("POST", "/api/create", body))
    assert lines[-1] == {"status": "success"}
    assert here.names() == ["base:latest", "mario:latest"]
    shown = here.ask("POST", "/api/show", {"model": "mario"}).json()
    assert (shown["system"], shown["license"]) == ("You are Mario.", "X")
    assert 'PARAMETER stop "l"' in shown["modelfile"]
    assert shown["details"]["parent_model"] == "base"
    assert here.ask("POST", "/api/copy", {"source": "mario", "destination": "luigi"}).status_code == 200
    chat = {"model": "luigi:latest", "messages": [{"role": "user", "content": "hi"}], "stream": False}
    assert here.ask("POST", CHAT, chat).json()["message"]["content"] == "he"  # the model's stop
    assert bytes(here.loader.client.seen[-1].tokens) == b"[system]You are Mario.[user]u[assistant]a[user]hi[assistant]"
    assert here.loader.client.seen[-1].params.temperature == 0
    own = {**chat, "messages": [{"role": "system", "content": "S"}, *chat["messages"]], "options": {"temperature": 1}}
    here.ask("POST", CHAT, own)
    assert bytes(here.loader.client.seen[-1].tokens) == b"[system]S[user]u[assistant]a[user]hi[assistant]"
    assert here.loader.client.seen[-1].params.temperature == 1
    assert len(list((here.home / "blobs").iterdir())) == 1  # no copy of the weights
    for name in ("mario", "base", "luigi"):
        assert here.ask("DELETE", "/api/delete", {"model": name}).status_code == 200
    assert here.names() == []
    assert not list((here.home / "blobs").iterdir())
    assert here.ask("DELETE", "/api/delete", {"model": "mario"}).status_code == 404
    assert here.ask("POST", CHAT, chat).status_code == 404


BLOB = "/api/blobs/sha256:" + "0" * 64
MANAGING: list[tuple[str, str, Any]] = [
    ("POST", "/api/create", {"model": "x", "from": "base", "stream": False}),
    ("POST", "/api/copy", {"source": "base", "destination": "y"}),
    ("POST", "/api/pull", {"model": "no-such-model", "stream": False}),
    ("HEAD", BLOB, None),
    ("POST", BLOB, None),
    ("POST", GENERATE, {"model": "base", "keep_alive": 0}),
    ("POST", CHAT, {"model": "base", "messages": [], "keep_alive": 0}),
    ("DELETE", "/api/delete", {"model": "base"}),
]


def test_only_an_admins_key_changes_models_and_unloads_them(here: Here) -> None:
    user, admin = new_key(), new_key()
    keys = Keys([Key(name="user", digest=digest_of(user)), Key(name="admin", digest=digest_of(admin), role="admin")])
    told = here.ask_twice(*MANAGING, keys=keys, key=user)
    assert [answer.status_code for answer in told] == [403] * len(MANAGING)
    assert 'role = "admin"' in told[0].json()["error"]
    assert here.names() == ["base:latest"]
    keep: Any = {"model": "base", "prompt": "x", "stream": False, "keep_alive": -1}
    asked = ("POST", GENERATE, keep), ("GET", "/api/ps", None)
    answer, ps = here.ask_twice(*asked, keys=keys, key=user)
    assert answer.status_code == 200
    assert ps.json()["models"][0]["expires_at"] < "2100", "how long it stays is the server's setting"
    _, ps = here.ask_twice(*asked, keys=keys, key=admin)
    assert ps.json()["models"][0]["expires_at"] > "2100"
    told = here.ask_twice(*MANAGING, keys=keys, key=admin)
    assert [answer.status_code for answer in told] == [200, 200, 404, 404, 400, 200, 200, 200]
    assert here.names() == ["x:latest", "y:latest"]


def test_a_model_that_is_removed_while_it_is_loaded_hides_no_other(here: Here) -> None:
    load: Any = {"prompt": "", "stream": False}
    *_, ps = here.ask_twice(
        ("POST", "/api/copy", {"source": "base", "destination": "gone"}),
        ("POST", GENERATE, load | {"model": "gone"}),
        ("POST", GENERATE, load | {"model": "base"}),
        ("DELETE", "/api/delete", {"model": "gone"}),
        ("GET", "/api/ps", None),
    )
    assert [model["name"] for model in ps.json()["models"]] == ["base:latest"]


def test_a_created_model_goes_on_when_its_base_is_deleted(here: Here) -> None:
    here.ask("POST", "/api/create", {"model": "mine", "from": "base", "stream": False})
    here.ask("DELETE", "/api/delete", {"model": "base"})
    assert here.ask("POST", GENERATE, {"model": "mine", "prompt": "x", "stream": False}).json()["response"] == "hello"


def test_keep_alive_of_zero_unloads_and_ps_tells_when(here: Here) -> None:
    answer = here.ask("POST", GENERATE, {"model": "base", "keep_alive": 0}).json()
    assert answer["done_reason"] == "unload"
    for keep in ("10m", -1, 1e17, "-5m"):
        loaded, running = here.ask_twice(
            ("POST", GENERATE, {"model": "base", "keep_alive": keep}), ("GET", "/api/ps", None)
        )
        assert loaded.json()["done_reason"] == "load"
        assert running.json()["models"][0]["expires_at"] > "2026"


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"model": "x", "from": "/etc/passwd"}, 404, "not a model's name"),
        ({"model": "x", "from": "./base.gguf"}, 404, "not a model's name"),
        ({"model": "x", "from": "nope"}, 404, "no model is called"),
        ({"model": "../x", "from": "base"}, 400, "can't be a model's name"),
        ({"model": "smollm2", "from": "base"}, 400, "name of the catalogue"),
        ({"model": "x"}, 400, "either from or files"),
        ({"model": "x", "from": "base", "files": {"a.gguf": "sha256:" + "0" * 64}}, 400, "either from or files"),
        ({"model": "x", "files": {"a.gguf": "sha256:" + "0" * 64}}, 400, "no upload"),
        ({"model": "x", "files": {"../a.gguf": "sha256:" + "0" * 64}}, 400, "plain name"),
        ({"model": "x", "files": {"a.bin": "sha256:" + "0" * 64}}, 400, "plain name"),
        ({"model": "x", "files": {"a.gguf": "sha256:00"}}, 400, "64 hexadecimal digits"),
        ({"model": "x", "from": "base", "adapters": {"a": "b"}}, 400, "LoRA adapters are not supported"),
        ({"model": "x", "from": "base", "quantize": "q4_0"}, 400, "quantising is not supported"),
        ({"model": "x", "from": "base", "parameters": {"temperature": "hot"}}, 400, "temperature"),
        ({"model": "x", "from": "base", "parameters": {"magic": 1}}, 400, "unknown parameter 'magic'"),
        ({"model": "x", "from": "base", "template": "{{ .Nope }}"}, 400, ".Nope is not known"),
        ({"model": "x", "from": "base", "template": "{% if %}"}, 400, "not valid Jinja"),
        ({"model": "x", "modelfile": "FROM base\nADAPTER x"}, 400, "Modelfile line 2: ADAPTER"),
        ({"model": "x", "modelfile": "FROM /etc/passwd"}, 404, "not a model's name"),
        ({"model": "x", "from": "base", "messages": [{"role": "bot", "content": "x"}]}, 400, "role"),
    ],
)
def test_what_can_not_be_created_is_named_and_leaves_nothing(here: Here, body: Any, status: int, words: str) -> None:
    response = here.ask("POST", "/api/create", {**body, "stream": False})
    assert response.status_code == status, response.text
    assert words in response.json()["error"]
    assert [path.name for path in (here.home / "manifests").iterdir()] == ["base.json"]


def test_uploads_are_checked_and_become_models(here: Here) -> None:
    path = f"/api/blobs/sha256:{hashlib.sha256(b'other').hexdigest()}"
    assert here.ask("HEAD", path).status_code == 404
    wrong = here.ask("POST", path, content=here.raw)
    assert wrong.status_code == 400
    assert "another sha256" in wrong.json()["error"]
    assert here.ask("HEAD", path).status_code == 404
    assert not list((here.home / "uploads").iterdir())
    fresh = here.raw + b"\0" * 32
    digest = "sha256:" + hashlib.sha256(fresh).hexdigest()
    assert here.ask("POST", f"/api/blobs/{digest}", content=fresh).status_code == 201
    assert here.ask("HEAD", f"/api/blobs/{digest}").status_code == 200
    body = {"model": "mine", "files": {"mine.gguf": digest}, "system": "S", "stream": False}
    assert here.ask("POST", "/api/create", body).json() == {"status": "success"}
    assert here.names() == ["base:latest", "mine:latest"]
    damaged = b"no model"
    digest = "sha256:" + hashlib.sha256(damaged).hexdigest()
    here.ask("POST", f"/api/blobs/{digest}", content=damaged)
    bad = here.ask("POST", "/api/create", {"model": "bad", "files": {"bad.gguf": digest}, "stream": False})
    assert bad.status_code == 400
    assert "bad.gguf" in bad.json()["error"]
    assert here.names() == ["base:latest", "mine:latest"]


@pytest.mark.parametrize("digest", ["sha256:", "x", "sha256:" + "g" * 64, "sha256:" + "0" * 65, "..%2F..%2Fx"])
def test_digests_that_are_none(here: Here, digest: str) -> None:
    for method in ("HEAD", "POST"):
        assert here.ask(method, f"/api/blobs/{digest}", content=b"").status_code in (400, 404)
    assert not (here.home / "uploads").exists()


def test_an_upload_has_an_end(here: Here) -> None:
    upload = Upload(here.store, "0" * 64, max_bytes=10)
    upload.write(b"12345")
    with pytest.raises(Exception, match="larger than this server takes"):
        upload.write(b"678901")
    upload.close()
    assert not list((here.home / "uploads").iterdir())


def test_pulls_are_bounded_and_a_name_is_never_a_path(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.home / "evil.gguf").write_bytes(here.raw)
    monkeypatch.chdir(here.home)
    for name in (str(here.home / "evil.gguf"), "./evil.gguf", "evil.gguf", "blobs"):
        response = here.ask("POST", "/api/pull", {"model": name})
        assert response.status_code == 404, response.text
    monkeypatch.setattr(Job, "_n_running", MAX_JOBS)
    assert here.ask("POST", "/api/pull", {"model": "base"}).status_code == 503


def test_a_pull_of_what_is_here_verifies_it_and_tells_so(here: Here) -> None:
    told = [line["status"] for line in lines_of(here.ask("POST", "/api/pull", {"model": "base"}))]
    assert told == ["pulling manifest", "verifying sha256 digest", "writing manifest", "success"]
