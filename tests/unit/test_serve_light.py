"""What must not hold up everybody else's tokens, nor cost memory for good: long texts, logs, pollers, watchers."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from typing import TYPE_CHECKING, Any

import pytest

from septet import log
from septet.serve.app import Service, Settings, create_app
from septet.serve.llamacpp import LLAMACPP
from septet.serve.models import ModelCard
from septet.serve.openai_tokens import MAX_LISTED
from septet.session import session as sessions
from tests.fakes import FakeClient, session
from tests.unit.test_serve_openai import app_of, ask

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_texts_of_tokens_are_told_up_to_a_bound() -> None:
    body = {"prompt": "x" * (MAX_LISTED + 1), "return_token_strs": True}
    refused = ask(app_of(), "POST", "/tokenize", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "return_token_strs")
    whole = ask(app_of(), "POST", "/tokenize", json={"prompt": body["prompt"]}).json()
    assert whole["count"] == MAX_LISTED + 1
    few = ask(app_of(), "POST", "/tokenize", json={"prompt": "ab", "return_token_strs": True}).json()
    assert few["token_strs"] == ["a", "b"]


def test_what_a_huge_text_took_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[bool] = []
    monkeypatch.setattr(sessions, "give_back_memory", lambda: given.append(True))
    ask(app_of(), "POST", "/tokenize", json={"prompt": "x" * 1000})
    assert given == []
    ask(app_of(), "POST", "/tokenize", json={"prompt": "x" * (sessions.HUGE_TEXT + 1)})
    assert given == [True]


def test_metrics_are_as_few_as_they_can_be() -> None:
    service = Service(session(FakeClient()), Settings())
    service.metrics.answered("/v1/models", "GET", 200, 0.2)
    told = service.metrics.render().decode()
    assert "_created" not in told
    assert told.count('http_request_duration_seconds_bucket{handler="/v1/models"') <= 9


# -- pollers ----------------------------------------------------------------------------------------------------------
class Unloaded:
    """A pool of one model that nobody has asked for."""

    manages, restarts, dead, restarting = False, 0, False, False

    def cards(self) -> list[ModelCard]:
        return [ModelCard(name="m", root="m", created=0)]

    def find(self, name: str | None) -> ModelCard:
        assert name == "m"
        return self.cards()[0]

    def running(self) -> list[Any]:
        return []

    loaded = running

    def use(self, name: str | None, **_: Any) -> Any:
        raise AssertionError("nothing is loaded to be shown")


def test_props_load_nothing() -> None:
    assert ("GET", "/props") in {(method, path) for method, path, _ in LLAMACPP.routes}
    told = ask(create_app(Service(Unloaded(), Settings())), "GET", "/props").json()  # type: ignore[arg-type]
    assert (told["model_alias"], told["total_slots"]) == ("m", 0)


def test_a_frame_of_the_scope_that_fails_is_told_and_the_next_one_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("septet.serve.scope.PERIOD_S", 0.001)
    client = FakeClient()
    works = client.scope

    async def fail() -> Any:
        client.scope = works  # type: ignore[method-assign]
        raise RuntimeError("a mistake of ours")

    client.scope = fail  # type: ignore[method-assign]

    async def go() -> list[dict[str, Any]]:
        service = Service(session(client), Settings())
        async with asyncio.timeout(20):
            frames, watched = [], service.scopes.watch("fake")
            async for frame in watched:
                frames.append(frame)
                if "engine" in frame:
                    break
            await watched.aclose()
            return frames

    frames = asyncio.run(go())
    assert "error" in frames[0]
    assert "a mistake of ours" not in str(frames)
    assert "engine" in frames[-1]


# -- the program's own log --------------------------------------------------------------------------------------------
class Stuck(io.StringIO):
    """A full pipe."""

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()

    def write(self, text: str) -> int:
        self.free.wait()
        return super().write(text)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(log, "CLOSE_WAIT_S", 30.0)
    logger = logging.getLogger("septet")
    before = (logger.handlers[:], logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_log_that_is_stuck_holds_nobody_up(kept: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MAX_QUEUED", 5)
    stream, logger = Stuck(), logging.getLogger("septet.serve")
    with log.beside("INFO", stream):
        for number in range(20):  # returns, though nobody writes
            logger.warning("line %d\n%s", number, "forged")
        stream.free.set()
    lines = stream.getvalue().splitlines()
    assert "WARNING serve: line 0" in lines[0]
    assert "\\nforged" in lines[0]
    assert 5 <= len(lines) <= 7


def test_a_traceback_in_the_log_is_indented_as_ever(kept: None) -> None:
    stream = io.StringIO()
    with log.beside("INFO", stream):
        try:
            raise RuntimeError("deep\ninside")
        except RuntimeError:
            logging.getLogger("septet.serve").exception("failed")
    head, *rest = stream.getvalue().splitlines()
    assert "ERROR serve: failed" in head
    assert rest
    assert all(line.startswith("    | ") for line in rest)
