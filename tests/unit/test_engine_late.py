"""Requests that need torch wait at the door while it is imported; nobody else does, and no message is lost."""

from __future__ import annotations

import queue
import threading
from typing import Any

import pytest

from septet.engine.grammars import GrammarReady
from septet.engine.late import LateInbox
from septet.engine.messages import Abort, Shutdown, StatsRequest, Submit
from septet.engine.native import asks_more
from septet.request import Request, SamplingParams
from septet.structured import Structured


def request(id: str, pooling: str = "", **params: Any) -> Request:
    return Request(id=id, tokens=(1, 2), params=SamplingParams(seed=0, max_tokens=4, **params), pooling=pooling)


GRAMMAR = Structured("regex", "a+")


@pytest.mark.parametrize(
    ("params", "more"),
    [
        ({}, False),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, False),
        ({"stop": ("x",), "stop_token_ids": (3,)}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"presence_penalty": 0.1}, True),
        ({"logit_bias": {3: 1.0}}, True),
        ({"min_tokens": 2}, True),
        ({"logprobs": 0}, True),
        ({"prompt_logprobs": 0}, True),
        ({"structured": GRAMMAR}, True),
        ({"pooling": "mean"}, True),
    ],
)
def test_who_asks_for_more_than_tokens(params: dict[str, Any], more: bool) -> None:
    assert asks_more(request("r", **params)) is more


class Door:
    """A `LateInbox` whose import ends when the test says so."""

    def __init__(self, error: Exception | None = None) -> None:
        self.queue: queue.Queue[Any] = queue.Queue()
        self.go, self.error, self.begun = threading.Event(), error, 0
        self.inbox = LateInbox(self, self.queue.put, asks_more, self.load)

    def load(self) -> None:
        self.begun += 1
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error

    def receive(self, timeout: float | None) -> list[Any]:
        return [self.queue.get(timeout=60)]

    def hear(self, *messages: Any) -> list[Any]:
        for message in messages:
            self.queue.put(message)
        return [heard for _ in messages for heard in self.inbox.receive(None)]


def test_plain_requests_begin_no_import() -> None:
    door = Door()
    messages = [Submit((request("a"), request("b"))), Abort(("a",)), StatsRequest(1)]
    assert door.hear(*messages) == messages
    assert not door.begun


@pytest.mark.parametrize("error", [None, ImportError("broken")])
def test_they_wait_for_the_import_and_others_pass(error: Exception | None) -> None:
    """A failed import lets them go on too, to be told why."""
    door = Door(error)
    odd, even = request("odd", logprobs=1), request("even")
    assert door.hear(Submit((odd, even), 5.0)) == [Submit((even,), 5.0)]
    assert door.hear(Submit((request("late", min_tokens=1),)), StatsRequest(1)) == [StatsRequest(1)]
    door.go.set()
    assert door.inbox.receive(None) == [Submit((odd,), 5.0), Submit((request("late", min_tokens=1),))]
    assert door.hear(Submit((odd,))) == [Submit((odd,))]
    assert door.begun == 1


def test_a_grammar_is_compiled_meanwhile() -> None:
    door = Door()
    bound = Submit((request("g", structured=GRAMMAR),))
    assert door.hear(bound, GrammarReady("g")) == [bound]
    door.go.set()
    assert door.inbox.receive(None) == [GrammarReady("g")]


def test_whoever_leaves_is_heard_at_once_and_so_is_the_end() -> None:
    door = Door()
    odd, other = request("odd", logprobs=1), request("other", logprobs=1)
    assert door.hear(Submit((odd, other))) == []
    assert door.hear(Abort(("odd", "unknown"))) == [Submit((odd,)), Abort(("odd", "unknown"))]
    assert door.hear(Shutdown()) == [Submit((other,)), Shutdown()]
    door.go.set()
