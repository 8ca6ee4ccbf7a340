"""The loop between a scripted scheduler and a scripted executor: who is called when, and what a failure costs."""

from __future__ import annotations

import gc
import logging
import threading
import time
from dataclasses import dataclass, field

import pytest

from septet.engine.loop import EngineLoop
from septet.engine.messages import Abort, EngineStats, Fatal, Shutdown, StatsReply, StatsRequest, Submit, Update
from septet.engine.wire import Disconnected
from septet.errors import InvalidRequest, Overloaded
from septet.request import FinishReason, Request, SamplingParams
from septet.step import PlanRow, StepPlan, StepResult


def request(id: str) -> Request:
    return Request(id=id, tokens=(1,), params=SamplingParams(max_tokens=1, seed=0))


def plan(step: int) -> StepPlan:
    return StepPlan(step, rows=(PlanRow("r", 0, step, 1, (step + 1,), 1),))


@dataclass
class Box:
    """Inbox and outbox: each `receive` gives the next list of messages; the client leaves after the last one."""

    script: list[list]
    sent: list[list] = field(default_factory=list)
    waits: list[float | None] = field(default_factory=list)

    def receive(self, timeout):
        self.waits.append(timeout)
        if not self.script:
            raise Disconnected("the client is gone")
        return self.script.pop(0)

    def send(self, messages):
        assert messages
        assert len({type(message) for message in messages}) == 1
        self.sent.append(list(messages))


@dataclass
class ScriptedScheduler:
    """Hands out `plans`, writes down what it is told in `calls`."""

    plans: list[StepPlan | None]
    calls: list
    refuse: dict[str, Exception] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    stats: EngineStats = field(default_factory=lambda: EngineStats(steps=3))
    audit_error: Exception | None = None

    def submit(self, request):
        if request.id in self.refuse:
            raise self.refuse[request.id]
        self.calls.append(("submit", request.id))
        self.open.append(request.id)

    def abort(self, id):
        self.calls.append(("abort", id))
        if id not in self.open:
            return []
        self.open.remove(id)
        return [Update(id, finish_reason=FinishReason.ABORT)]

    def abort_all(self):
        return [update for id in list(self.open) for update in self.abort(id)]

    def plan(self):
        made = self.plans.pop(0) if self.plans else None
        if made is not None:
            self.calls.append(("plan", made.step))
        return made

    def commit(self, result):
        self.calls.append(("commit", result.step))
        return [Update("r", (result.step,)), Update("s", (result.step,))]

    def fail(self, plan, error):
        self.calls.append(("fail", plan.step, str(error)))
        return [Update("r", finish_reason=FinishReason.ERROR, error=str(error))]

    def audit(self):
        self.calls.append(("audit",))
        if self.audit_error is not None:
            raise self.audit_error


@dataclass
class ScriptedExecutor:
    """Steps in `bad_launch` raise when launched, those in `bad_result` when awaited."""

    depth: int
    calls: list
    bad_launch: frozenset[int] = frozenset()
    bad_result: frozenset[int] = frozenset()
    closed: bool = False
    pieces: int = 0  # of work that waits for a pause
    spares: list = field(default_factory=list)  # busy or not, of each call

    def launch(self, plan):
        if plan.step in self.bad_launch:
            raise RuntimeError(f"launch {plan.step}")
        self.calls.append(("launch", plan.step))
        return Pending(plan.step, self)

    def spare(self, busy):
        self.spares.append(busy)
        return self.spares.count(False) < self.pieces

    def close(self):
        self.closed = True


@dataclass
class Pending:
    step: int
    executor: ScriptedExecutor

    def result(self):
        if self.step in self.executor.bad_result:
            raise MemoryError(f"result {self.step}")
        return StepResult(self.step)


def build(script, plans=(), depth=1, **options):
    """A loop and its parts; `options` of the scheduler, the executor and the loop by their names."""
    calls: list = []
    box = Box(script)
    scheduler = ScriptedScheduler(
        list(plans), calls, **{k: options.pop(k) for k in ("refuse", "audit_error") if k in options}
    )
    executor = ScriptedExecutor(
        depth, calls, **{k: frozenset(options.pop(k)) for k in ("bad_launch", "bad_result") if k in options}
    )
    executor.pieces = options.pop("pieces", 0)
    return EngineLoop(scheduler, executor, box, box, **options), box, calls


def test_depth_1_commits_each_step_before_the_next_plan():
    loop, _, calls = build([[], [], [], []], [plan(0), plan(1)], depth=1)
    assert loop.run() == 0
    steps = [call for call in calls if call[0] != "audit"]
    assert steps == [("plan", 0), ("launch", 0), ("commit", 0), ("plan", 1), ("launch", 1), ("commit", 1)]


def test_depth_2_commits_the_step_before_while_the_next_one_runs():
    loop, _, calls = build([[]] * 4, [plan(0), plan(1), plan(2)], depth=2)
    loop.run()
    assert calls == [
        ("plan", 0),
        ("launch", 0),
        ("plan", 1),
        ("launch", 1),
        ("commit", 0),
        ("plan", 2),
        ("launch", 2),
        ("commit", 1),
        ("commit", 2),
    ]


def test_the_updates_of_a_step_are_one_frame():
    loop, box, _ = build([[], []], [plan(4)])
    loop.run()
    assert box.sent == [[Update("r", (4,)), Update("s", (4,))]]


def test_tokens_that_wait_leave_when_nothing_more_is_computed_and_before_the_last_words():
    loop, box, _ = build([[]] * 4, [plan(0), plan(1), plan(2)], gap_s=1000.0)
    loop.run()
    assert box.sent == [
        [Update("r", (0,)), Update("s", (0,))],
        [Update("r", (1,)), Update("s", (1,)), Update("r", (2,)), Update("s", (2,))],
    ]
    loop, box, _ = build([[]] * 9, [plan(0), plan(1), plan(2)], gap_s=1000.0, bad_launch=[2], max_failures=1)
    assert loop.run() == 1
    assert [token for update in box.sent[1] for token in update.tokens] == [1, 1]
    assert isinstance(box.sent[-1][0], Fatal)


def test_waits_only_with_nothing_to_do():
    loop, box, _ = build([[]] * 6, [plan(0), plan(1)], pause_s=0.25)
    loop.run()
    # at birth for ever; two busy turns; a turn that finds nothing to do; a moment, then housekeeping; for ever
    assert box.waits[:6] == [None, 0.0, 0.0, 0.25, None, None]


def test_work_that_can_wait_is_done_piece_by_piece_in_a_pause():
    loop, box, _ = build([[]] * 8, [plan(0), plan(1)], pause_s=0.25, pieces=3)
    loop.idle = False
    loop.run()
    # two busy turns; a turn that finds nothing to do; a moment, three pieces with a look at the inbox between; for ever
    assert box.waits[:7] == [0.0, 0.0, 0.0, 0.25, 0.0, 0.0, None]
    assert loop.executor.spares == [True, True, True, False, False, False]


def test_an_idle_loop_does_not_spin():
    class Silent(Box):
        def receive(self, timeout):
            self.waits.append(timeout)
            if timeout is None:
                time.sleep(0.3)
                raise Disconnected("gone")
            time.sleep(timeout)
            return []

    loop, _, _ = build([], pause_s=0.1)
    loop.inbox = box = Silent([])
    loop.chores.step_done()
    loop.run()
    assert box.waits == [0.1, None]


def test_audit_and_collection_happen_once_in_the_first_rest(monkeypatch):
    collections = []
    monkeypatch.setattr(gc, "collect", lambda *args: collections.append(args))
    monkeypatch.setattr(gc, "freeze", lambda: None)
    monkeypatch.setattr(gc, "disable", lambda: None)
    loop, _, calls = build([[], [], [], [], [StatsRequest(1)], []], [plan(0)], owns_gc=True)
    loop.run()
    assert calls.count(("audit",)) == 1
    assert collections == [()]


def test_a_failed_audit_is_logged_and_counted(caplog):
    loop, _, _ = build([[], [], [], []], [plan(0)], audit_error=AssertionError("3 slots lost"))
    with caplog.at_level(logging.ERROR, "septet"):
        assert loop.run() == 0
    assert loop.chores.audit_failures == 1
    assert "3 slots lost" in caplog.text


def test_a_failed_audit_ends_a_strict_loop():
    loop, box, _ = build([[], [], [], []], [plan(0)], audit_error=AssertionError("3 slots lost"), strict=True)
    assert loop.run() == 1
    assert isinstance(box.sent[-1][0], Fatal)


# -- messages ---------------------------------------------------------------------------------------------------------
def test_a_refusal_is_the_answer_of_that_request_alone():
    refuse = {
        "bad": InvalidRequest("top_p is odd", param="top_p"),
        "late": Overloaded("too many"),
        "bug": KeyError("oops at /secret/path"),
    }
    loop, box, calls = build(
        [[Submit((request("a"), request("bad"), request("late"), request("bug"), request("b")))]], refuse=refuse
    )
    assert loop.run() == 0
    assert [call for call in calls if call[0] == "submit"] == [("submit", "a"), ("submit", "b")]
    bad, late, bug = box.sent[0]
    assert (bad.request, bad.finish_reason, bad.error, bad.error_kind) == (
        "bad",
        FinishReason.ERROR,
        "top_p is odd",
        "invalid_request_error",
    )
    assert late.error_kind == "overloaded_error"
    assert bug.error_kind == "internal_error"
    assert "secret" not in bug.error


def test_stats_are_answered_between_steps_with_the_loops_times():
    loop, box, _ = build([[], [StatsRequest(9)]], [plan(0), plan(1)])
    before = time.monotonic()
    loop.run()
    reply = next(message for frame in box.sent for message in frame if isinstance(message, StatsReply))
    assert (reply.ticket, reply.stats.steps) == (9, 3)
    assert before <= reply.stats.progress_at <= time.monotonic()
    assert 0 < reply.stats.step_s < 1
    assert 0 < reply.stats.host_s < 1


def test_abort_of_unknown_ids_is_silent():
    loop, box, _ = build([[Submit((request("a"),))], [Abort(("a", "x", "a"))]])
    loop.run()
    assert box.sent == [[Update("a", finish_reason=FinishReason.ABORT)]]


def test_a_message_for_clients_is_ignored():
    loop, _, calls = build([[Fatal("?"), Submit((request("a"),))]])
    assert loop.run() == 0
    assert ("submit", "a") in calls


def test_shutdown_answers_everybody_and_ends_the_steps_in_flight():
    loop, box, calls = build([[Submit((request("a"), request("b")))], [Shutdown()]], [plan(0)], depth=2)
    assert loop.run() == 0
    answered = [update.request for frame in box.sent for update in frame if update.finish_reason]
    assert answered == ["a", "b"]
    assert ("commit", 0) in calls
    assert loop.executor.closed


def test_a_client_that_leaves_is_a_clean_end():
    loop, _, _ = build([])
    assert loop.run() == 0
    assert loop.executor.closed


# -- failures (T8, T9) ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["bad_launch", "bad_result"])
def test_a_step_that_raises_ends_its_requests_and_the_loop_goes_on(where):
    loop, box, calls = build([[]] * 5, [plan(0), plan(1), plan(2)], **{where: {1}})
    assert loop.run() == 0
    assert [call[:2] for call in calls if call[0] in ("commit", "fail")] == [("commit", 0), ("fail", 1), ("commit", 2)]
    assert any(update.finish_reason is FinishReason.ERROR for frame in box.sent for update in frame)


def test_a_failed_launch_comes_after_the_steps_before_it():
    loop, _, calls = build([[]] * 5, [plan(0), plan(1)], depth=2, bad_launch={1})
    loop.run()
    assert [call[:2] for call in calls if call[0] in ("commit", "fail")] == [("commit", 0), ("fail", 1)]


def test_a_failed_result_does_not_take_the_next_step_in_flight_with_it():
    loop, _, calls = build([[]] * 5, [plan(0), plan(1)], depth=2, bad_result={0})
    loop.run()
    assert [call[:2] for call in calls if call[0] in ("commit", "fail")] == [("fail", 0), ("commit", 1)]


def test_failures_in_a_row_are_fatal():
    loop, box, calls = build([[]] * 9, [plan(n) for n in range(6)], bad_result={0, 1, 2, 3, 4, 5}, max_failures=3)
    assert loop.run() == 1
    assert [call[0] for call in calls].count("fail") == 3
    (fatal,) = box.sent[-1]
    assert isinstance(fatal, Fatal)
    assert "3 steps failed in a row" in fatal.error
    assert loop.executor.closed


def test_a_good_step_forgives_the_failures_before_it():
    loop, _, _ = build([[]] * 9, [plan(n) for n in range(6)], bad_result={0, 1, 3, 4}, max_failures=3)
    assert loop.run() == 0


def test_a_scheduler_that_raises_is_fatal_without_its_words():
    loop, box, _ = build([[]], [plan(0)])
    loop.scheduler.commit = lambda result: [][1]
    assert loop.run() == 1
    (fatal,) = box.sent[-1]
    assert fatal == Fatal("the engine failed: IndexError")


def test_run_from_another_thread_leaves_this_process_collector_alone():
    loop, _, _ = build([[]], [plan(0)])
    thread = threading.Thread(target=loop.run)
    thread.start()
    thread.join()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
