"""For those who run a server: probes, access log, traces, the scope, the page's files, TLS, flags."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from septet.engine.pulse import Pulse
from septet.errors import InvalidRequest
from septet.serve.access_log import AccessLog
from septet.serve.app import Service, Settings, bind, create_app, serve_forever
from septet.serve.keys import Key, Keys, digest_of
from septet.serve.restart import RestartedModel
from septet.serve.running import check_tls
from septet.serve.tracing import Tracing
from tests.fakes import FakeClient, session
from tests.unit.test_serve_openai import CHAT, HI, ask

if TYPE_CHECKING:
    from pathlib import Path


# -- probes -----------------------------------------------------------------------------------------------------------
def test_live_ready_and_progressing_are_three_answers() -> None:
    client = FakeClient()
    service = Service(session(client), Settings(silent_s=2, stuck_s=100))
    app = create_app(service)

    def codes() -> list[int]:
        return [ask(app, "GET", path).status_code for path in ("/live", "/ready", "/progressing")]

    assert codes() == [200, 200, 200]
    client.beat = Pulse(0.1, 90.0)  # in the middle of a long prefill
    assert codes() == [200, 200, 200]
    client.beat = Pulse(2.5, 0.0)  # stopped
    assert codes() == [200, 200, 503]
    client.beat = Pulse(0.1, 101.0)  # hung
    assert codes() == [200, 200, 503]
    client.beat, service.draining = None, True
    assert codes() == [200, 503, 200]
    assert ask(app, "GET", "/ping").status_code == 503, "load balancers send traffic by it"
    service.draining, client.dead = False, True
    assert codes() == [200, 503, 503]
    assert ask(app, "GET", "/ping").status_code == 503


# -- access log -------------------------------------------------------------------------------------------------------
def logged(tmp_path: Path, style: str, **request: Any) -> list[str]:
    key = "k" * 20
    service = Service(session(FakeClient("hello")), Settings(), Keys([Key(name="alice", digest=digest_of(key))]))
    service.access_log = AccessLog(style, str(tmp_path / "access.log"))
    headers = {"authorization": f"Bearer {key}"} | request.pop("headers", {})
    response = ask(create_app(service), "POST", request.pop("path", CHAT), headers=headers, **request)
    service.access_log.close()
    lines = (tmp_path / "access.log").read_text().splitlines()
    assert key not in "".join(lines)
    assert response.headers["x-request-id"] in lines[-1]
    return lines


def test_one_line_of_json_for_each_request(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, "json", json=HI, headers={"x-request-id": 'mine"\\n'})
    told = json.loads(line)
    assert told["method"] == "POST"
    assert told["path"] == CHAT
    assert told["status"] == 200
    assert (told["key"], told["model"], told["finish"]) == ("alice", "fake", "length")
    assert (told["prompt_tokens"], told["cached_tokens"], told["output_tokens"]) == (19, 3, 5)
    assert 0 <= told["ttft"] <= told["seconds"]
    assert told["client_id"]


def test_what_is_refused_has_a_line_too_and_no_line_can_be_forged(tmp_path: Path) -> None:
    (line,) = logged(tmp_path, "text", json=HI, path="/nope%0a2026-01-01%20forged%1b[31m" + "x" * 5000)
    assert "status=404" in line
    assert "\\n" in line
    assert "\x1b" not in line
    assert len(line) < 800
    (tmp_path / "access.log").unlink()
    (line,) = logged(tmp_path, "text", json=HI, headers={"host": "evil.example"})
    assert "status=403" in line


def test_a_log_that_cannot_be_opened_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="access log"):
        AccessLog("json", str(tmp_path / "no" / "such" / "file"))


# -- traces -----------------------------------------------------------------------------------------------------------
def test_a_span_for_each_request_continues_the_callers_trace() -> None:
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    service = Service(session(FakeClient("hello")), Settings())
    service.tracing = Tracing(exporter)
    trace, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    app = create_app(service)
    ask(app, "POST", CHAT, json=HI, headers={"traceparent": f"00-{trace}-{parent}-01"})
    ask(app, "GET", "/nope")
    service.tracing.close()
    first, second = exporter.get_finished_spans()
    assert first.name == f"POST {CHAT}"
    assert first.parent is not None
    assert f"{first.context.trace_id:032x}" == trace
    assert first.attributes is not None
    assert first.attributes["gen_ai.usage.input_tokens"] == 19
    assert first.attributes["gen_ai.usage.output_tokens"] == 5
    assert first.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert "hi" not in str(dict(first.attributes)), "no text of a prompt leaves the server"
    assert second.parent is None
    assert second.attributes is not None
    assert second.attributes["http.response.status_code"] == 404


# -- the scope --------------------------------------------------------------------------------------------------------
def frame_of(settings: dict[str, Any] | None = None, keys: Keys | None = None, key: str = "") -> dict[str, Any]:
    async def go() -> dict[str, Any]:
        service = Service(session(FakeClient()), Settings(**(settings or {})), keys)
        try:
            async for frame in service.scopes.watch("fake"):
                return frame
        finally:
            await asyncio.sleep(0)
        raise AssertionError

    return asyncio.run(go())


def test_a_frame_tells_rows_pool_tree_and_figures() -> None:
    frame = frame_of()
    assert frame["stats"]["running"] == 2
    assert frame["rows"][0] == {
        "state": "decode", "row": 0, "prompt": 5, "cached": 3, "computed": 8, "length": 9, "limit": 20, "priority": 0,
    }  # fmt: skip
    assert frame["pool"] == {"cell_slots": 50, "free": [25, 50], "leased": [25, 0], "shared": [10, 0]}
    assert frame["tree"][0]["text"] == "<b>"
    assert len(json.dumps(frame)) < 64_000


def test_prompts_of_others_are_not_shown_where_there_are_others() -> None:
    keys = Keys([Key(name="a", digest=digest_of("x" * 20))])
    assert frame_of(keys=keys)["tree"][0]["text"] is None
    assert frame_of({"host": "0.0.0.0"})["tree"][0]["text"] is None


def test_nobody_polls_the_engine_when_nobody_watches_and_watchers_are_bounded() -> None:
    async def go() -> None:
        client, asked = FakeClient(), 0
        inner = client.scope

        async def counting() -> Any:
            nonlocal asked
            asked += 1
            return await inner()

        client.scope = counting  # type: ignore[method-assign]
        service = Service(session(client), Settings())
        watchers = [service.scopes.watch("fake") for _ in range(16)]
        for watcher in watchers:
            await anext(watcher)
        assert asked == 1, "all watch one poll"
        with pytest.raises(Exception, match="watch the scope already"):
            await anext(service.scopes.watch("fake"))
        for watcher in watchers:
            await watcher.aclose()
        before = asked
        await asyncio.sleep(0.6)
        assert asked == before

    asyncio.run(go())


def test_the_engines_look_is_bounded_whatever_it_holds() -> None:
    from septet.engine.echo import EchoExecutor
    from septet.engine.scheduler import Scheduler, SchedulerLimits
    from septet.engine.scope import look
    from septet.kv.cache import KVCache
    from septet.request import Request, SamplingParams

    limits = SchedulerLimits(max_num_seqs=256, max_num_batched_tokens=8192, max_model_len=4096)
    scheduler = Scheduler(limits, KVCache(1 << 17), 1000)
    for i in range(2000):
        tokens = (i % 1000, i // 1000, *range(40))
        scheduler.submit(Request(id=str(i), tokens=tokens, params=SamplingParams(max_tokens=9, seed=1)))
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(EchoExecutor(vocab_size=1000, verify=False).launch(plan).result())
    view = look(scheduler)
    assert len(view.rows) == 64
    assert view.more_rows == 2000 - 64
    assert 0 < len(view.tree) <= 20
    assert len(view.pool.free) == 128
    assert sum(view.pool.free) >= 0.95 * scheduler.cache.free
    assert min(look(scheduler).took_s for _ in range(20)) < 0.002, "a look must be a fraction of a step"


# -- the page's files, CORS, TLS --------------------------------------------------------------------------------------
def test_the_page_for_browsers_a_word_for_clients_and_neither_a_path_outside() -> None:
    app = create_app(Service(session(), Settings()))
    assert "<title>Septet</title>" in ask(app, "GET", "/", headers={"accept": "text/html,*/*"}).text
    assert ask(app, "GET", "/", headers={"accept": "*/*"}).text == "Ollama is running"
    for name in ("main.js", "chat.js", "scope.js", "draw.js", "api.js", "page.css", "mark.svg"):
        response = ask(app, "GET", f"/static/{name}")
        assert response.status_code == 200
        assert response.headers["x-content-type-options"] == "nosniff"
    for name in ("page.py", "..%2fapp.py", "%2e%2e/app.py", "main.js/", "x" * 3000, "main.js%00"):
        assert ask(app, "GET", f"/static/{name}").status_code == 404
    off = create_app(Service(session(), Settings(page=False)))
    assert ask(off, "GET", "/static/main.js").status_code == 404


def test_a_page_of_an_allowed_origin_may_ask_before_it_sends_a_key() -> None:
    keys = Keys([Key(name="a", digest=digest_of("x" * 20))])
    app = create_app(Service(session(), Settings(allowed_origins=("https://ui.example",)), keys))
    headers = {"origin": "https://ui.example", "access-control-request-method": "POST"}
    asked = ask(app, "OPTIONS", CHAT, headers=headers | {"access-control-request-headers": "authorization"})
    assert asked.status_code == 200
    assert asked.headers["access-control-allow-origin"] == "https://ui.example"
    assert ask(app, "OPTIONS", CHAT, headers=headers | {"origin": "https://evil.example"}).status_code == 403
    assert ask(app, "POST", CHAT, json=HI, headers={"origin": "https://ui.example"}).status_code == 401


def test_tls_that_cannot_work_is_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    broken = tmp_path / "cert.pem"
    broken.write_text("nothing")
    for given in ({"ssl_certfile": str(broken)}, {"ssl_certfile": str(tmp_path / "none")}, {"ssl_keyfile": "x"}):
        with pytest.raises(InvalidRequest):
            check_tls(Settings(**given))


def test_https_with_a_certificate(tmp_path: Path) -> None:
    from tests.unit.test_serve_faults import running

    cert, private = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*request, *names, "-keyout", private, "-out", cert], check=True, capture_output=True)
    settings = {"ssl_certfile": str(cert), "ssl_keyfile": str(private)}
    with running(settings=settings) as server:
        root = server.root.replace("http:", "https:")
        assert httpx.get(root + "/health", verify=ssl.create_default_context(cafile=str(cert))).status_code == 200
        with pytest.raises(httpx.TransportError):
            httpx.get(server.root + "/health")


def test_a_restart_that_the_system_refuses_counts_as_a_death_and_is_given_up_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse() -> Any:
        raise OSError("no memory")

    async def go() -> None:
        monkeypatch.setattr("septet.serve.restart.WATCH_S", 0.001)
        pauses = asyncio.sleep
        monkeypatch.setattr("septet.serve.restart.asyncio.sleep", lambda s: pauses(min(s, 0.001)))
        client = FakeClient()
        models = RestartedModel(session(client), ["m"], refuse)
        client.dead = True
        async with asyncio.timeout(20):
            while not models.dead:
                await pauses(0.001)
        await models.close()

    asyncio.run(go())


def test_a_watch_that_fails_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(service: Service) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("septet.serve.running._end_stalled", fail)
    service = Service(session(FakeClient()), Settings())
    sock = bind("127.0.0.1", 0)

    async def go() -> int:
        async with asyncio.timeout(30):
            return await serve_forever(service, sock)

    assert asyncio.run(go()) == 1
