"""/v1/files and /v1/batches over a scripted engine: what a client sees, what is on the disk, what a restart leaves."""

from __future__ import annotations

import asyncio
import errno
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from septet.serve.access_log import AccessLog
from septet.serve.admission import Admission
from septet.serve.app import Service, Settings, create_app
from septet.serve.keys import Key, Keys, digest_of
from septet.serve.openai_batch_run import BACKFILL
from tests.fakes import FakeClient, session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine
    from pathlib import Path

CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEPTET_HOME", str(tmp_path))
    return tmp_path


def line(number: str, body: Any = None, url: str = CHAT, **changes: Any) -> dict[str, Any]:
    body = body or {"model": "fake", "messages": [{"role": "user", "content": number}], "max_tokens": 5}
    return {"custom_id": number, "method": "POST", "url": url, "body": body, **changes}


def jsonl(*lines: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


class Http:
    """A client of one server on this loop."""

    def __init__(self, client: FakeClient | None = None, keys: Keys | None = None, key: str = "") -> None:
        self.service = Service(session(client or FakeClient("hello", eos=True)), Settings(), keys)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(create_app(self.service))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://localhost:8000/v1", headers=headers)

    async def upload(self, content: bytes, **fields: str) -> httpx.Response:
        files = {"file": ("in.jsonl", content)}
        return await self.http.post("/files", data={"purpose": "batch", **fields}, files=files)

    async def start(self, content: bytes, endpoint: str = CHAT, **more: Any) -> dict[str, Any]:
        file = (await self.upload(content)).json()["id"]
        body = {"input_file_id": file, "endpoint": endpoint, "completion_window": "24h", **more}
        response = await self.http.post("/batches", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def until(self, number: str, *statuses: str) -> dict[str, Any]:
        for _ in range(1000):
            batch = (await self.http.get(f"/batches/{number}")).json()
            if batch["status"] in statuses:
                return batch
            await asyncio.sleep(0.005)
        raise AssertionError(f"the batch is still {batch['status']}")

    async def lines(self, file: str) -> list[dict[str, Any]]:
        content = await self.http.get(f"/files/{file}/content")
        assert content.status_code == 200
        return [json.loads(one) for one in content.text.splitlines()]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_files() -> None:
    async def go() -> None:
        http = Http()
        content = jsonl(line("a"))
        file = (await http.upload(content)).json()
        assert (file["object"], file["bytes"], file["purpose"], file["filename"]) == (
            "file",
            len(content),
            "batch",
            "in.jsonl",
        )
        again = Http()  # another server on the same home
        assert (await again.http.get(f"/files/{file['id']}")).json() == file
        assert (await again.http.get(f"/files/{file['id']}/content")).content == content
        second = (await again.upload(content)).json()
        shown = (await again.http.get("/files", params={"limit": "1", "order": "asc"})).json()
        assert (shown["has_more"], [f["id"] for f in shown["data"]]) == (True, [file["id"]])
        rest = (await again.http.get("/files", params={"after": file["id"], "order": "asc"})).json()
        assert [f["id"] for f in rest["data"]] == [second["id"]]
        assert (await again.http.delete(f"/files/{file['id']}")).json()["deleted"] is True
        assert (await again.http.get(f"/files/{file['id']}")).status_code == 404

    run(go())


@pytest.mark.parametrize(
    ("data", "file", "status"),
    [
        ({"purpose": "batch"}, None, 400),
        ({"purpose": "fine-tune"}, b"x", 400),
        ({}, b"x", 400),
        ({"purpose": "batch", "surprise": "1"}, b"x", 400),
        ({"purpose": "batch"}, b"", 400),
    ],
)
def test_bad_uploads(data: Any, file: bytes | None, status: int, home: Path) -> None:
    async def go() -> None:
        http = Http()
        files = {"file": ("../../etc/passwd", file)} if file is not None else {"other": ("x", b"y")}
        response = await http.http.post("/files", data=data, files=files)
        assert response.status_code == status, response.text
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        plain = await http.http.post("/files", content=b"x", headers={"content-type": "application/json"})
        assert plain.status_code == 415
        torn = await http.http.post("/files", content=b"x", headers={"content-type": "multipart/form-data; boundary=b"})
        assert torn.status_code == 400
        none = await http.http.post("/files", content=b"x", headers={"content-type": "multipart/form-data"})
        assert none.status_code == 400
        assert not list(home.glob("files/*"))

    run(go())


def test_a_file_may_not_be_too_large(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    monkeypatch.setattr("septet.serve.openai_files.MAX_FILE_BYTES", 1000)
    monkeypatch.setattr("septet.serve.openai_files.OVERHEAD", 1000)

    async def go() -> None:
        http = Http()
        assert (await http.upload(b"x" * 1500)).status_code == 400
        assert (await http.upload(b"x" * 5000)).status_code == 413
        monkeypatch.setattr("septet.serve.openai_file_store.MAX_TOTAL_BYTES", 1500)
        assert (await http.upload(b"x" * 800)).status_code == 200
        assert (await http.upload(b"x" * 800)).json()["error"]["code"] == "too_many_files"
        assert len(list(home.glob("files/*.jsonl"))) == 1

    run(go())


def test_uploads_at_a_time_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("septet.serve.openai_file_store.MAX_UPLOADS", 1)

    async def go() -> None:
        http, gate = Http(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield b"--b\r\n"
            await gate.wait()

        headers = {"content-type": "multipart/form-data; boundary=b"}
        first = asyncio.create_task(http.http.post("/files", content=slow(), headers=headers))
        await asyncio.sleep(0.05)
        refused = await http.upload(b"x")
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        gate.set()
        assert (await first).status_code == 400
        assert (await http.upload(b"x")).status_code == 200

    run(go())


@pytest.mark.parametrize("name", ["../x", "..%2f..%2fetc", "file-%00", "file-" + "a" * 10_000, "%1b[31m"])
def test_odd_names_touch_no_file(name: str) -> None:
    async def go() -> None:
        http = Http()
        for method, path in (
            ("GET", "files/{}"),
            ("GET", "files/{}/content"),
            ("DELETE", "files/{}"),
            ("GET", "batches/{}"),
        ):
            response = await http.http.request(method, "http://localhost:8000/v1/" + path.format(name))
            assert response.status_code in (404, 405), response.text
            assert len(response.text) < 500

    run(go())


def test_batch() -> None:
    async def go() -> None:
        client = FakeClient(lambda r: "<" + bytes(r.tokens).decode()[-13:] + ">", eos=True)
        http = Http(client)
        bad = line("bad", {"messages": [], "max_tokens": 1})
        streamed = line("streamed", {"messages": [{"role": "user", "content": "x"}], "stream": True})
        batch = await http.start(jsonl(line("a"), bad, line("b"), streamed), metadata={"k": "v"})
        assert (batch["object"], batch["endpoint"], batch["metadata"]) == ("batch", CHAT, {"k": "v"})
        done = await http.until(batch["id"], "completed")
        assert done["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
        for name in ("in_progress_at", "finalizing_at", "completed_at", "expires_at"):
            assert done[name] >= done["created_at"]
        answers = {one["custom_id"]: one for one in await http.lines(done["output_file_id"])}
        assert answers.keys() == {"a", "b"}
        assert answers["a"]["response"]["status_code"] == 200
        assert answers["a"]["response"]["body"]["choices"][0]["finish_reason"] == "length"
        failed = {one["custom_id"]: one["response"] for one in await http.lines(done["error_file_id"])}
        assert {name: r["status_code"] for name, r in failed.items()} == {"bad": 400, "streamed": 400}
        assert failed["bad"]["body"]["error"]["param"] == "messages"
        assert {request.priority for request in client.seen} == {BACKFILL}
        listed = (await http.http.get("/batches")).json()
        assert [one["id"] for one in listed["data"]] == [batch["id"]]
        assert (await http.http.post(f"/batches/{batch['id']}/cancel")).status_code == 409

    run(go())


def test_every_endpoint() -> None:
    async def go() -> None:
        http = Http()
        for url, body in (
            ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
            ("/v1/responses", {"input": "x"}),
        ):
            batch = await http.start(jsonl(line("a", body, url)), url)
            done = await http.until(batch["id"], "completed")
            (answer,) = await http.lines(done["output_file_id"])
            assert answer["response"]["body"]["object"] in ("text_completion", "response")

    run(go())


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"\n \n", "empty_file"),
        (b"{", "invalid_json_line"),
        (b"[1]\n", "invalid_json_line"),
        (b"\xff\n", "invalid_json_line"),
        (jsonl(line("a"), line("a")), "duplicate_custom_id"),
        (jsonl(line("a", url="/v1/completions")), "mismatched_endpoint"),
        (jsonl(line("a", method="GET")), "invalid_method"),
        (jsonl(line("")), "missing_required_parameter"),
        (jsonl({**line("a"), "body": 1}), "missing_required_parameter"),
        (jsonl(line("a", extra=1)), "invalid_request"),
        (b'{"custom_id": "a", "x": "' + b"y" * (8 * 2**20) + b'"}', "line_too_long"),
    ],
)
def test_bad_input_fails_before_anything_runs(content: bytes, code: str) -> None:
    async def go() -> None:
        client = FakeClient()
        http = Http(client)
        batch = await http.start(content)
        failed = await http.until(batch["id"], "failed")
        assert failed["errors"]["data"][0]["code"] == code
        assert client.seen == []

    run(go())


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"endpoint": CHAT}, 400, "input_file_id"),
        ({"input_file_id": "file-none", "endpoint": CHAT}, 404, "file_id"),
        ({"input_file_id": 3, "endpoint": CHAT}, 400, "input_file_id"),
        ({"input_file_id": "x", "endpoint": "/v1/models"}, 400, "endpoint"),
        ({"input_file_id": "x", "endpoint": CHAT, "completion_window": "1h"}, 400, "completion_window"),
        ({"input_file_id": "x", "endpoint": CHAT, "metadata": {"a": 1}}, 400, "metadata"),
    ],
)
def test_bad_batches(body: Any, status: int, param: str) -> None:
    async def go() -> None:
        response = await Http().http.post("/batches", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (status, param)

    run(go())


@pytest.mark.parametrize("query", ["limit=0", "limit=x", "limit=101", "after=nothing", "odd=1", "limit=1&limit=2"])
def test_bad_pages(query: str) -> None:
    async def go() -> None:
        assert (await Http().http.get(f"/batches?{query}")).status_code == 400

    run(go())


def test_cancel_keeps_what_is_answered() -> None:
    async def go() -> None:
        gate = asyncio.Event()
        client = FakeClient("hello", eos=True)

        async def pause() -> None:
            if len(client.seen) > 1:
                await gate.wait()

        client.pause = pause
        http = Http(client)
        http_workers(http.service, 1)
        batch = await http.start(jsonl(*(line(str(i)) for i in range(5))))
        while len(client.seen) < 2:
            await asyncio.sleep(0.005)
        assert (await http.http.delete(f"/files/{batch['input_file_id']}")).status_code == 409
        assert (await http.http.post(f"/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
        done = await http.until(batch["id"], "cancelled")
        assert done["request_counts"]["completed"] == 1
        assert len(await http.lines(done["output_file_id"])) == 1
        assert client.aborted == [client.seen[1].id]

    run(go())


def http_workers(service: Service, n: int) -> None:
    """So many requests at a time."""
    service.batches._slots = asyncio.Semaphore(n)


def test_a_restart_goes_on_where_the_last_server_was(home: Path) -> None:
    async def first() -> dict[str, Any]:
        client = FakeClient("hello", eos=True)
        stuck = asyncio.Event()

        async def pause() -> None:
            if len(client.seen) > 2:
                await stuck.wait()

        client.pause = pause
        http = Http(client)
        http_workers(http.service, 1)
        batch = await http.start(jsonl(*(line(str(i)) for i in range(5))))
        while len(client.seen) < 3:
            await asyncio.sleep(0.005)
        await http.service.batches.close()
        return batch

    batch = asyncio.run(asyncio.wait_for(first(), 20))
    part = home / "batches" / f"{batch['id']}.out.part"
    assert len(part.read_bytes().splitlines()) == 2
    part.write_bytes(part.read_bytes() + b'{"custom_id": "2", "resp')  # the power went while a line was written
    (home / "batches" / "batch_0.json").write_bytes(b"{garbage")

    async def second() -> None:
        client = FakeClient("hello", eos=True)
        http = Http(client)
        http.service.batches.resume()
        done = await http.until(batch["id"], "completed")
        assert done["request_counts"] == {"total": 5, "completed": 5, "failed": 0}
        answers = await http.lines(done["output_file_id"])
        assert sorted(one["custom_id"] for one in answers) == list("01234")
        assert len(client.seen) == 3
        assert not list((home / "batches").glob("*.part"))

    run(second())


def test_a_running_batch_belongs_to_one_server() -> None:
    async def go() -> None:
        client = FakeClient("hello", eos=True)
        gate = asyncio.Event()
        client.pause = gate.wait
        http = Http(client)
        batch = await http.start(jsonl(line("a")))
        while not client.seen:
            await asyncio.sleep(0.005)
        idle = FakeClient()
        other = Http(idle)
        other.service.batches.resume()
        await asyncio.sleep(0.05)
        assert idle.seen == []
        assert (await other.http.get(f"/batches/{batch['id']}")).json()["status"] == "in_progress"
        assert (await other.http.post(f"/batches/{batch['id']}/cancel")).status_code == 409
        gate.set()
        assert (await http.until(batch["id"], "completed"))["request_counts"]["completed"] == 1
        told = (await other.http.get("/batches")).json()["data"][0]
        assert told["status"] == "completed"
        assert len(await other.lines(told["output_file_id"])) == 1

    run(go())


def test_out_of_time() -> None:
    async def go() -> None:
        http = Http()
        batch = await http.start(jsonl(line("a"), line("b")))
        http.service.batches.store.batches[batch["id"]].at["expires"] = 0
        done = await http.until(batch["id"], "expired")
        errors = await http.lines(done["error_file_id"])
        assert [one["error"]["code"] for one in errors] == ["batch_expired"] * 2

    run(go())


def test_a_full_server_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from septet.errors import Overloaded

    async def go() -> None:
        http = Http()
        answer, refused = http.service.batches.answers[CHAT], []

        async def at_first_full(service: Service, body: dict[str, Any]) -> dict[str, Any]:
            if len(refused) < 3:
                refused.append(body)
                raise Overloaded("full", retry_after_s=0.01)
            return await answer(service, body)

        http.service.batches.answers = {CHAT: at_first_full}
        batch = await http.start(jsonl(line("a")))
        done = await http.until(batch["id"], "completed")
        assert (len(refused), done["request_counts"]["completed"]) == (3, 1)

    run(go())


def test_a_full_disk_ends_the_upload_or_the_batch_alone(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def go() -> None:
        http = Http()
        with monkeypatch.context() as patch:
            patch.setattr("septet.serve.openai_files.shutil.copyfileobj", full)
            refused = await http.upload(b"x")
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "disk_full")
        assert not list(home.glob("files/*"))
        with monkeypatch.context() as patch:
            patch.setattr("septet.serve.openai_batch_store.os.open", full)
            batch = await http.start(jsonl(line("a"), line("b")))
            failed = await http.until(batch["id"], "failed")
        assert failed["errors"]["data"][0]["code"] == "disk_full"
        again = await http.start(jsonl(line("a")))
        assert (await http.until(again["id"], "completed"))["request_counts"]["completed"] == 1

    run(go())


def test_keys_see_their_own_alone() -> None:
    keys = Keys([Key(name=name, digest=digest_of(f"{name}-secret-0123456789")) for name in ("a", "b")])

    async def go() -> None:
        one = Http(keys=keys, key="a-secret-0123456789")
        batch = await one.start(jsonl(line("x")))
        done = await one.until(batch["id"], "completed")
        two = Http(keys=keys, key="b-secret-0123456789")
        assert (await two.http.get("/files")).json()["data"] == []
        assert (await two.http.get("/batches")).json()["data"] == []
        for path in (
            f"files/{done['output_file_id']}",
            f"files/{done['input_file_id']}/content",
            f"batches/{batch['id']}",
        ):
            assert (await two.http.get(f"/{path}")).status_code == 404
        body = {"input_file_id": done["input_file_id"], "endpoint": CHAT}
        assert (await two.http.post("/batches", json=body)).status_code == 404

    run(go())


# -- beside others ----------------------------------------------------------------------------------------------------
def test_a_batch_takes_nobodys_place() -> None:
    """Six places in all, and a batch of forty requests that do not move: the six are free, and no more than they."""

    async def go() -> None:
        gate = asyncio.Event()
        client = FakeClient("hello", eos=True)

        async def pause() -> None:
            if any(request.priority == BACKFILL for request in client.seen):
                await gate.wait()

        client.pause = pause
        client.info = replace(client.info, max_num_seqs=2)
        http = Http(client)
        admission = http.service.admission
        admission.max_waiting, admission.max_waiting_tokens = 4, 500
        batch = await http.start(jsonl(*(line(str(i)) for i in range(40))))
        while len(client.seen) < 2:
            await asyncio.sleep(0.005)
        body = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        asked = [asyncio.create_task(http.http.post("/chat/completions", json=body)) for _ in range(8)]
        while sum(task.done() for task in asked) < 2 or len(client.seen) < 8:
            await asyncio.sleep(0.005)
        assert (admission.open, admission.backfill) == (6, 2)
        gate.set()
        codes = sorted(answer.status_code for answer in await asyncio.gather(*asked))
        assert codes == [200] * 6 + [429] * 2
        done = await http.until(batch["id"], "completed")
        assert done["request_counts"]["completed"] == 40
        assert (admission.open, admission.backfill, admission.waiting_tokens) == (0, 0, 0)

    run(go())


def test_a_keys_batch_does_not_move_its_place_among_those_who_wait() -> None:
    admission, alice = Admission(100), Key(name="alice", digest=b"")
    first = admission.enter(alice, n=1, tokens=9000, max_output=9, rows=4, backfill=True)
    assert admission.enter(alice, n=1, tokens=9, max_output=9, rows=4).place == 0.0
    first.leave()
    assert admission.enter(alice, n=1, tokens=9, max_output=9, rows=4, backfill=True).place == 9000.0


def test_requests_of_a_batch_are_accounted_for(tmp_path: Path) -> None:
    async def go() -> None:
        secret = "k" * 20
        http = Http(keys=Keys([Key(name="alice", digest=digest_of(secret))]), key=secret)
        http.service.access_log = AccessLog("json", str(tmp_path / "access.log"))
        batch = await http.start(jsonl(line("a"), line("b")))
        await http.until(batch["id"], "completed")
        http.service.access_log.close()
        told = [json.loads(one) for one in (tmp_path / "access.log").read_text().splitlines()]
        mine = [one for one in told if one["method"] == "BATCH"]
        assert [(one["key"], one["status"], one["output_tokens"]) for one in mine] == [("alice", 200, 5)] * 2
        assert all(one["path"].endswith(batch["id"]) for one in mine)
        assert 'septet:key_tokens_total{key="alice",kind="output"} 10.0' in http.service.metrics.render().decode()

    run(go())


@pytest.mark.parametrize(("model", "expired", "status"), [
    ("fake:latest", False, "completed"), ("gone", False, "in_progress"), ("gone", True, "expired"),
])  # fmt: skip
def test_after_a_restart_a_batch_of_any_name_of_a_model_goes_on_and_one_of_no_model_expires(
    model: str, expired: bool, status: str
) -> None:
    async def first() -> str:
        client = FakeClient("hello", eos=True)
        client.pause = asyncio.Event().wait
        http = Http(client)
        body = {"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
        batch = await http.start(jsonl(line("a", body)))
        while not client.seen:
            await asyncio.sleep(0.005)
        await http.service.batches.close()
        kept = http.service.batches.store.batches[batch["id"]]
        kept.model = model
        if expired:
            kept.at["expires"] = 0
        http.service.batches.store.save(kept)
        return str(batch["id"])

    number = asyncio.run(asyncio.wait_for(first(), 20))

    async def second() -> None:
        http = Http()
        if not expired:  # one that runs out of time meanwhile is seen when it is asked for
            http.service.batches.resume()
        await http.until(number, status)

    run(second())
