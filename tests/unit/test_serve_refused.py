"""What a server does not do, and how it is told: an engine on its way back, foreign pages, paths that nobody serves."""

from __future__ import annotations

import asyncio
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from click.testing import CliRunner

from septet.cli.serve import serve
from septet.errors import InvalidRequest
from septet.serve.app import Service, Settings, create_app
from septet.serve.keys import Key, Keys, digest_of, new_key
from septet.serve.ollama_shape import _object as arguments_of
from septet.serve.restart import RestartedModel
from septet.serve.running import check_tls
from septet.serve.unrouted import ABSENT
from tests.fakes import FakeClient, session
from tests.unit.test_serve_openai import CHAT, HI, app_of, ask

if TYPE_CHECKING:
    from pathlib import Path

    from septet.session.session import Session

ALICE = new_key()
MESSAGES = {**HI, "max_tokens": 4}


# -- an engine that is started again ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (CHAT, HI, "engine_dead_error"),
        ("/v1/messages", MESSAGES, "overloaded_error"),
        ("/api/chat", {"model": "fake", **HI}, None),
        ("/generate_stream", {"inputs": "x"}, "healthcheck"),
        ("/completion", {"prompt": "x"}, "unavailable_error"),
    ],
)
def test_while_an_engine_starts_again_every_dialect_says_503_and_when(path: str, body: Any, kind: str | None) -> None:
    async def never() -> Session:
        await asyncio.Event().wait()
        raise AssertionError

    async def go() -> list[httpx.Response]:
        client = FakeClient()
        client.dead = True
        models = RestartedModel(session(client), ["fake"], never)
        try:
            transport = httpx.ASGITransport(create_app(Service(models, Settings())))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as http:
                return [await http.get("/ready"), await http.post(path, json=body)]
        finally:
            await models.close()

    for answer in asyncio.run(go()):
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"] == "2"
        assert answer.headers["retry-after-ms"] == "2000"
        assert "started again" in answer.text
    error = answer.json()["error"]
    assert kind is None or kind == (error["type"] if isinstance(error, dict) else answer.json()["error_type"])


# -- limits of a key --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limits", [{"requests_per_minute": 1}, {"max_concurrent": 1}])
def test_every_refusal_by_a_keys_limits_is_counted(limits: dict[str, int]) -> None:
    key = Key(name="alice", digest=digest_of(ALICE), **limits)
    service = Service(session(FakeClient()), Settings(), Keys([key]))
    service.admission.keys.enter(key)  # a request that is under way
    app, bearer = create_app(service), {"authorization": f"Bearer {ALICE}"}
    for _ in range(3):
        assert ask(app, "POST", CHAT, json=HI, headers=bearer).status_code == 429
    assert service.admission.refused["key"] == 3


def test_what_the_guard_and_the_router_refuse_is_counted() -> None:
    service = Service(session(FakeClient()), Settings())
    app = create_app(service)
    ask(app, "GET", "/health", headers={"host": "evil.example"})
    ask(app, "GET", "/nope")
    told = service.metrics.render().decode()
    assert 'http_requests_total{handler="guard",method="GET",status="403"} 1.0' in told
    assert 'http_requests_total{handler="unrouted",method="GET",status="404"} 1.0' in told


# -- pages ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("origin", ["http://localhost:3000", "https://app.localhost", "http://127.0.0.1:5173"])
def test_a_page_on_loopback_may_read_a_server_on_loopback(origin: str) -> None:
    wanted = {"origin": origin, "access-control-request-method": "POST"}
    asked = wanted | {"access-control-request-headers": "authorization,content-type"}
    preflight = ask(app_of(), "OPTIONS", CHAT, headers=asked)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == origin
    answer = ask(app_of(), "POST", CHAT, json=HI, headers={"origin": origin})
    assert answer.headers["access-control-allow-origin"] == origin
    beyond = ask(app_of(host="0.0.0.0"), "POST", CHAT, json=HI, headers={"origin": origin})
    assert "access-control-allow-origin" not in beyond.headers


@pytest.mark.parametrize("named", ["https://App.example/", "https://app.example"])
def test_an_allowed_origin_is_read_as_browsers_write_it(named: str) -> None:
    answer = ask(app_of(allowed_origins=(named,)), "POST", CHAT, json=HI, headers={"origin": "https://app.example"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example"


def test_refusals_of_hosts_and_pages_name_the_way_out() -> None:
    assert (
        "--allowed-host host.docker.internal"
        in ask(app_of(), "GET", "/", headers={"host": "host.docker.internal"}).text
    )
    assert "--allowed-origin" in ask(app_of(), "GET", "/", headers={"origin": "https://a.example"}).text


@pytest.mark.parametrize(
    ("version", "path", "headers", "status"),
    [
        ("1.0", "/health", [], 200),
        ("1.1", "/health", [], 400),
        ("1.0", "/v1/models", [], 400),
        ("1.0", "/health", [(b"host", b"evil.example")], 403),
    ],
)
def test_an_old_probe_needs_no_host(version: str, path: str, headers: list[tuple[bytes, bytes]], status: int) -> None:
    scope = {
        "type": "http", "http_version": version, "method": "GET", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": headers, "root_path": "", "scheme": "http",
    }  # fmt: skip
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app_of()(scope, receive, send))
    assert sent[0]["status"] == status


# -- paths ------------------------------------------------------------------------------------------------------------
def test_a_missing_route_is_told_as_its_clients_read_errors() -> None:
    app = app_of()
    assert isinstance(ask(app, "POST", "/api/delete").json()["error"], str)
    assert ask(app, "GET", "/generate").json()["error_type"] == "validation"
    assert ask(app, "GET", "/v1/messages/x").json()["type"] == "error"
    assert "openapi.json" in ask(app, "GET", "/v1/nope").json()["error"]["message"]


@pytest.mark.parametrize("path", ABSENT)
def test_calls_that_are_known_and_absent_are_refused_by_name(path: str) -> None:
    answer = ask(app_of(), "POST", path, json={})
    assert answer.status_code == 501, "or serve it, and strike it from the table"
    assert path in answer.text


def test_invocations_is_tgis_way_of_sagemaker() -> None:
    answer = ask(app_of(FakeClient("hello")), "POST", "/invocations", json={"inputs": "x"})
    assert answer.json()[0]["generated_text"] == "hello"


# -- fields and flags -------------------------------------------------------------------------------------------------
def test_a_timeout_of_null_is_none() -> None:
    assert ask(app_of(), "POST", CHAT, json={**HI, "timeout": None}).status_code == 200
    assert ask(app_of(), "POST", CHAT, json={**HI, "timeout": -1}).status_code == 400


def test_what_an_assistant_said_may_have_been_thoughts_alone() -> None:
    said = [*HI["messages"], {"role": "assistant", "content": None}, *HI["messages"]]
    assert ask(app_of(), "POST", CHAT, json={**HI, "messages": said}).status_code == 200
    refused = ask(app_of(), "POST", CHAT, json={**HI, "messages": [{"role": "user", "content": None}]})
    assert refused.status_code == 400


def test_ollamas_calls_take_json_from_a_page_without_a_type() -> None:
    body = b'{"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": false}'
    for media in ("text/plain", "text/plain;charset=UTF-8"):
        headers = {"content-type": media}
        assert ask(app_of(), "POST", "/api/chat", content=body, headers=headers).status_code == 200
        assert ask(app_of(), "POST", CHAT, content=body, headers=headers).status_code == 415


def test_arguments_that_are_too_deep_to_read_are_text() -> None:
    deep = "[" * 100_000
    assert arguments_of(deep) == {"arguments": deep}


def test_files_that_would_expire_are_refused_by_name() -> None:
    form = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
    refused = ask(app_of(), "POST", "/v1/files", data=form, files={"file": ("a.jsonl", b"{}")})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expires_after")


def test_a_tls_key_with_a_password_is_one_line_and_no_prompt(tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-days", "2", "-passout", "pass:secret"]
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *subject]
    subprocess.run([*request, "-keyout", key, "-out", cert], check=True, capture_output=True)
    with pytest.raises(InvalidRequest, match="has a password"):
        check_tls(Settings(ssl_certfile=str(cert), ssl_keyfile=str(key)))


def test_a_model_may_be_given_as_other_servers_take_it() -> None:
    """The flag that asks for a server without a named model tells that one was named."""
    told = CliRunner().invoke(serve, ["--model", "smollm2", "--manage"])
    assert isinstance(told.exception, InvalidRequest)
    assert "without naming a model" in str(told.exception)
