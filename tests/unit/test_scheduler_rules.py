"""The scheduler's rules one by one: refusals, budgets, stops, sharing, preemption, priorities, aborts, failures."""

from __future__ import annotations

from array import array
from dataclasses import replace

import pytest

from septet.engine.scheduler import SchedulerLimits
from septet.errors import InvalidRequest, OutOfMemory, Overloaded
from septet.request import FinishReason
from septet.step import RowResult, StepResult
from tests.scheduling import VOCAB, Engine, alone, prompt, request

DEPTHS = pytest.mark.parametrize("depth", [1, 2])


# -- what is taken in -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "more", "param", "says"),
    [
        ([], {}, "prompt", "empty"),
        (prompt(200), {}, "prompt", "context is 200 tokens"),
        (prompt(101), {}, "prompt", "KV pool holds 100"),
        ([1, VOCAB], {}, "prompt", f"token id {VOCAB}"),
        ([1, -1], {}, "prompt", "token id -1"),
        ([1, 2.5], {}, "prompt", "integers"),
        ([1, 2**31], {}, "prompt", "integers"),
        ([1], {"stop_token_ids": (VOCAB,)}, "stop_token_ids", f"token id {VOCAB}"),
        ([1], {"logit_bias": {VOCAB + 1: 1.0}}, "logit_bias", f"token id {VOCAB + 1}"),
    ],
)
def test_a_request_that_cannot_run_is_refused(tokens: list, more: dict, param: str, says: str) -> None:
    engine = Engine(capacity=100)
    with pytest.raises(InvalidRequest, match=says) as refusal:
        engine.submit(request("r", tokens, **more))
    assert refusal.value.param == param
    assert not engine.busy


def test_an_end_outside_of_the_vocabulary_is_refused() -> None:
    engine = Engine(capacity=100)
    with pytest.raises(InvalidRequest, match=f"eos_token_ids names token id {VOCAB}"):
        engine.submit(replace(request("r", [1]), eos_token_ids=(VOCAB,)))


def test_limits_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least max_num_seqs"):
        SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=7, max_model_len=10)
    with pytest.raises(ValueError, match="max_waiting must be at least 1"):
        SchedulerLimits(max_num_seqs=8, max_num_batched_tokens=8, max_model_len=10, max_waiting=0)


def test_a_full_queue_is_overloaded_and_takes_again_later() -> None:
    engine = Engine(rows=1, waiting=2)
    engine.submit(request("a", [1]), request("b", [1]))
    with pytest.raises(Overloaded, match="2 requests are waiting"):
        engine.submit(request("c", [1]))
    engine.turn()
    engine.submit(request("c", [1]))
    engine.run()
    assert {id: got.reason for id, got in engine.got.items()} == dict.fromkeys("abc", FinishReason.LENGTH)


def test_an_id_under_way_is_refused() -> None:
    engine = Engine()
    engine.submit(request("a", [1]))
    with pytest.raises(InvalidRequest, match="under way"):
        engine.submit(request("a", [2]))


# -- steps ------------------------------------------------------------------------------------------------------------
def test_decode_rows_come_first_and_prompts_fill_the_budget() -> None:
    engine = Engine(rows=4, budget=16)
    engine.submit(request("a", prompt(5)))
    engine.turn()
    engine.submit(request("b", prompt(30, 1), arrival=1.0), request("c", prompt(5, 2), arrival=2.0))
    engine.turn()
    assert engine.rows() == [("a", 5, 1, 1), ("b", 0, 15, 0)]
    engine.turn()
    assert engine.rows() == [("a", 6, 1, 1), ("b", 15, 15, 1)]
    engine.turn()
    assert engine.rows() == [("a", 7, 1, 1), ("b", 30, 1, 1), ("c", 0, 5, 1)]
    assert engine.scheduler.stats.mixed_steps == 3
    assert engine.scheduler.stats.last_step_prefill_tokens == 5


@DEPTHS
def test_a_stop_by_length_is_known_ahead(depth: int) -> None:
    engine = Engine(depth=depth)
    asked = [request(f"r{i}", prompt(10 + i, i), 5) for i in range(3)]
    engine.submit(*asked)
    engine.run()
    engine.check(*asked)
    assert engine.scheduler.stats.computed_tokens == sum(len(one.tokens) + 5 - 1 for one in asked)


def test_the_next_step_is_planned_before_the_token_is_known() -> None:
    engine = Engine(depth=2)
    engine.submit(request("a", prompt(4)))
    engine.turn(), engine.turn()
    assert [engine.rows(plan) for plan in engine.plans] == [[("a", 0, 4, 1)], [("a", 4, 1, 1)]]
    assert len(engine.got["a"].tokens) == 1


def test_overshoot_past_a_stop_id_is_dropped() -> None:
    engine = Engine(depth=2)
    plain = request("a", prompt(4), 20)
    stop = alone(plain)[0][2]
    asked = request("a", prompt(4), 20, stop_token_ids=(stop,))
    engine.submit(asked)
    engine.run()
    engine.check(asked)
    got = engine.got["a"]
    assert (got.reason, got.final.stop_token) == (FinishReason.STOP, stop)
    assert engine.scheduler.stats.computed_tokens == 4 + len(got.tokens), "one step too many was under way"


def test_the_context_and_the_pool_end_a_request_by_length() -> None:
    for engine in (Engine(length=12, capacity=100), Engine(length=100, capacity=11)):
        asked = request("a", prompt(5), 50)
        engine.submit(asked)
        engine.run()
        assert len(engine.got["a"].tokens) == 7
        assert engine.got["a"].reason is FinishReason.LENGTH


def test_min_tokens_holds_even_against_the_sampler() -> None:
    engine = Engine()
    engine.submit(request("a", prompt(4), 5, eos_token_ids=(3,), min_tokens=2))
    for n in range(3):
        plan = engine.scheduler.plan()
        assert plan is not None
        updates = engine.scheduler.commit(StepResult(plan.step, (RowResult("a", (3,)),)))
        assert updates[0].finish_reason is (FinishReason.STOP if n == 2 else None)


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_ignore_eos(ignore_eos: bool) -> None:
    engine = Engine()
    asked = request("a", prompt(4), 40, eos_token_ids=tuple(range(25)), ignore_eos=ignore_eos)
    engine.submit(asked)
    engine.run()
    engine.check(asked)
    assert engine.got["a"].reason is (FinishReason.LENGTH if ignore_eos else FinishReason.STOP)


def test_a_result_of_another_step_is_refused() -> None:
    engine = Engine()
    engine.submit(request("a", [1]))
    engine.scheduler.plan()
    with pytest.raises(ValueError, match="result of step 7, but the oldest step in flight is 0"):
        engine.scheduler.commit(StepResult(7))


# -- sharing ----------------------------------------------------------------------------------------------------------
def test_a_cached_prefix_is_not_computed_again_and_told_once() -> None:
    engine = Engine()
    engine.submit(request("a", prompt(40)))
    engine.run()
    asked = request("b", [*prompt(40), 1, 2], 4)
    engine.submit(asked)
    engine.turn()
    assert engine.rows() == [("b", 40, 2, 1)]
    engine.run()
    engine.check(asked)
    assert engine.got["b"].cached == [40, 0, 0, 0]
    assert (engine.scheduler.stats.prompt_tokens, engine.scheduler.stats.cached_tokens) == (82, 40)


def test_generated_tokens_are_cached_for_the_next_turn_of_a_conversation() -> None:
    engine = Engine()
    engine.submit(request("a", prompt(10), 6))
    engine.run()
    answer = engine.got["a"].tokens
    engine.submit(request("b", prompt(10) + answer + [1, 2, 3]))
    engine.run()
    assert engine.got["b"].cached[0] == 10 + 6 - 1, "all but the last token, which was never computed"


def test_salts_do_not_share() -> None:
    engine = Engine()
    for id, salt in (("a", "x"), ("b", "y"), ("c", "x")):
        engine.submit(request(id, prompt(40), cache_salt=salt))
        engine.run()
    assert [engine.got[id].cached[0] for id in "abc"] == [0, 0, 39]


@DEPTHS
def test_a_prompt_being_computed_is_waited_for(depth: int) -> None:
    engine = Engine(rows=8, budget=64, capacity=1000, depth=depth)
    asked = [request(f"r{i}", [*prompt(100), i], 4, seed=i) for i in range(4)]
    other = request("other", prompt(20, 3), 4)
    engine.submit(*asked, other)
    engine.run()
    engine.check(*asked, other)
    assert [engine.got[one.id].cached[0] for one in asked] == [0, 100, 100, 100]
    assert engine.scheduler.stats.computed_tokens == 100 + 4 * 4 + 20 + 3
    assert engine.plans[1].rows[-1].request == "other", "who shares nothing does not wait"


def test_a_follower_goes_on_when_its_leader_leaves() -> None:
    engine = Engine(rows=4, budget=20)
    follower = request("b", [*prompt(100), 1], 4)
    engine.submit(request("a", prompt(100), 4), follower)
    engine.turn(), engine.turn()
    assert engine.rows() == [("a", 20, 20, 0)]
    engine.abort("a")
    engine.turn()
    assert engine.rows() == [("b", 40, 20, 0)]
    engine.run()
    engine.check(follower)


# -- preemption -------------------------------------------------------------------------------------------------------
@DEPTHS
def test_a_preempted_request_resumes_with_the_same_text(depth: int) -> None:
    engine = Engine(rows=4, capacity=60, depth=depth)
    asked = [request(f"r{i}", prompt(10, i), 30, seed=i, logprobs=0, arrival=float(i)) for i in range(4)]
    engine.scheduler.estimate.ratio = 0.0  # admit blindly
    engine.submit(*asked)
    engine.run()
    engine.check(*asked)
    stats = engine.scheduler.stats
    assert stats.preemptions > 0
    for one in asked:
        assert [entry.token for entry in engine.got[one.id].logprobs] == engine.got[one.id].tokens
    joins = [join for plan in engine.plans for join in plan.joins]
    resumed = [join for join in joins if len(join.tokens) > join.n_prompt]
    assert resumed
    assert any(join.slots for join in resumed), "its computed tokens were still cached"
    assert all(join.n_prompt == 10 for join in joins)


def test_a_preempted_request_stays_out_while_a_result_of_it_is_in_flight() -> None:
    engine = Engine(rows=1, depth=2)
    low = request("low", prompt(5), 6, priority=1)
    engine.submit(low)
    launched = [engine.scheduler.plan()]
    engine.submit(request("high", prompt(5, 1)))
    launched.append(engine.scheduler.plan())
    assert [plan.rows[0].request for plan in launched] == ["low", "high"]
    results = [engine.executor.launch(plan).result() for plan in launched]
    engine.abort("high")
    assert engine.scheduler.plan() is None, "low's first token is still on its way"
    engine.take(engine.scheduler.commit(results[0]))
    plan = engine.scheduler.plan()
    assert plan.joins[0].tokens == (*low.tokens, results[0].rows[0].tokens[0])
    engine.take(engine.scheduler.commit(results[1]))
    engine.take(engine.scheduler.commit(engine.executor.launch(plan).result()))
    engine.run()
    engine.check(low)


def test_prompt_logprobs_come_once_for_each_position_and_read_no_cache() -> None:
    engine = Engine(rows=3, budget=8, capacity=60, depth=2)
    engine.submit(request("first", prompt(30), 2))
    engine.run()
    asked = [request(f"r{i}", prompt(30), 25, prompt_logprobs=0, seed=i, priority=i) for i in range(2)]
    engine.submit(asked[1])
    for _ in range(3):
        engine.turn()
    engine.submit(asked[0])  # takes the slots of the other in the middle of its prompt
    engine.run()
    assert engine.scheduler.stats.preemptions > 0
    engine.check(*asked)
    for one in asked:
        assert [entry.token for entry in engine.got[one.id].prompt_logprobs] == prompt(30)[1:]
        assert not any(engine.got[one.id].cached)


def test_an_estimate_keeps_preemption_rare() -> None:
    engine = Engine(rows=16, capacity=300, length=100)
    asked = [request(f"r{i}", [i, *prompt(9, i)], 40, seed=i) for i in range(40)]
    engine.submit(*asked)
    engine.run()
    engine.check(*asked)
    assert engine.scheduler.stats.preemptions <= 4


@DEPTHS
@pytest.mark.parametrize("scarce", ["rows", "slots"])
def test_a_higher_priority_takes_what_a_lower_one_holds(scarce: str, depth: int) -> None:
    engine = Engine(rows=2, depth=depth) if scarce == "rows" else Engine(rows=4, capacity=60, depth=depth)
    low = [request(f"low{i}", prompt(20, i), 10, priority=1) for i in range(2)]
    engine.submit(*low)
    for _ in range(3):
        engine.turn()
    high = request("high", prompt(30, 5), 10)
    engine.submit(high)
    engine.turn()
    assert engine.rows()[-1][:2] == ("high", 0)
    engine.run()
    engine.check(high, *low)
    ends = [id for id, got in engine.got.items() if got.final]
    assert set(ends) == {"high", "low0", "low1"}
    assert engine.scheduler.stats.preemptions >= 1


def test_equal_priority_takes_nothing() -> None:
    engine = Engine(rows=1)
    engine.submit(request("a", prompt(5), 10))
    engine.turn()
    engine.submit(request("b", prompt(5, 1), 10))
    engine.run()
    assert engine.scheduler.stats.preemptions == 0


def test_waiting_requests_start_in_order_of_priority_and_arrival() -> None:
    engine = Engine(rows=1)
    order = [("c", 0, 2.0), ("a", 0, 1.0), ("d", 1, 0.0), ("b", 0, 1.5)]
    engine.submit(*(request(id, [i], 2, priority=p, arrival=when) for i, (id, p, when) in enumerate(order)))
    engine.run()
    assert [join.request for plan in engine.plans for join in plan.joins] == ["a", "b", "c", "d"]


def test_a_blocked_queue_costs_a_step_nothing() -> None:
    engine = Engine(rows=8, capacity=120)
    engine.submit(request("a", prompt(60), 50))
    engine.turn()
    engine.submit(*(request(f"r{i}", prompt(100, 1 + i % 40), 4) for i in range(500)))
    probes = 0
    probe = engine.cache.probe

    def counted(*args: object) -> tuple[int, int]:
        nonlocal probes
        probes += 1
        return probe(*args)  # type: ignore[arg-type]

    engine.cache.probe = counted  # type: ignore[method-assign]
    for _ in range(20):
        engine.turn()
    assert engine.scheduler.stats.waiting == 500
    assert probes <= 3


# -- leaving early ----------------------------------------------------------------------------------------------------
@DEPTHS
def test_abort_ends_a_request_wherever_it_is(depth: int) -> None:
    engine = Engine(rows=2, budget=8, depth=depth)
    stays = request("stays", prompt(5), 12)
    engine.submit(stays, request("running", prompt(30, 1), 9), request("waiting", prompt(5, 2), 9))
    engine.turn(), engine.turn()
    for id in ("running", "waiting", "nobody"):
        engine.abort(id)
    engine.abort("running")
    engine.run()
    engine.check(stays)
    assert {id: got.reason for id, got in engine.got.items()} == {
        "stays": FinishReason.LENGTH,
        "running": FinishReason.ABORT,
        "waiting": FinishReason.ABORT,
    }


def test_abort_all_answers_everybody() -> None:
    engine = Engine(rows=2, depth=2)
    engine.submit(*(request(f"r{i}", prompt(5, i)) for i in range(5)))
    engine.turn()
    engine.take(engine.scheduler.abort_all())
    engine.run()
    assert [got.reason for got in engine.got.values()] == [FinishReason.ABORT] * 5


@DEPTHS
def test_a_failed_step_ends_its_requests_alone(depth: int) -> None:
    engine = Engine(rows=2, depth=depth)
    waits = request("waits", prompt(40), 6)
    engine.submit(request("a", prompt(40), 6), request("b", prompt(5, 1), 6), waits)
    for _ in range(depth):
        plan = engine.scheduler.plan()
        assert plan is not None
        engine.in_flight.append((plan, engine.executor.launch(plan)))
    engine.fail_oldest(RuntimeError("/secret/path exploded"))
    for id in "ab":
        assert engine.got[id].reason is FinishReason.ERROR
        assert engine.got[id].final.error == "the step failed: RuntimeError", "no inner text reaches a user"
    engine.run()
    engine.check(waits)
    assert engine.got["waits"].cached[0] == 0, "what the failed step wrote is not trusted"


@DEPTHS
def test_a_step_too_large_for_the_memory_ends_its_largest_request_alone(depth: int) -> None:
    """Decoding rows, one of them at its last token, and a prompt: the prompt ends, the others answer as ever."""
    engine = Engine(rows=4, depth=1, prefix=True)
    others = [request("a", prompt(5), 9), request("last", prompt(7, 1), 3), request("b", prompt(12, 2), 6)]
    engine.submit(*others)
    engine.turn()
    engine.turn()
    engine.submit(request("large", prompt(40, 3), 6))
    plan = engine.scheduler.plan()
    assert plan is not None
    assert {row.request for row in plan.rows} == {"a", "last", "b", "large"}
    engine.in_flight.append((plan, engine.executor.launch(plan)))
    engine.fail_oldest(OutOfMemory("40 tokens did not fit"))
    assert engine.got["large"].final.error == "40 tokens did not fit"
    assert engine.got["large"].final.error_kind == "out_of_memory_error"
    engine.executor.depth = depth
    engine.run()
    engine.check(*others)


def test_a_step_that_fails_under_a_later_one_ends_what_both_name() -> None:
    engine = Engine(rows=4, depth=2)
    engine.submit(request("a", prompt(5), 9), request("b", prompt(12, 2), 1))
    waits = request("waits", prompt(30, 4), 5)
    for _ in range(2):
        plan = engine.scheduler.plan()
        assert plan is not None
        engine.in_flight.append((plan, engine.executor.launch(plan)))
        if len(engine.in_flight) == 1:
            engine.submit(waits)
    engine.fail_oldest(OutOfMemory("too large"))
    assert engine.got["a"].reason is FinishReason.ERROR, "the step in flight builds on what failed"
    assert engine.got["b"].reason is FinishReason.ERROR, "it had most tokens"
    engine.run()
    engine.check(waits)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (RowResult("a", error="NaN in the logits"), "NaN in the logits"),
        (RowResult("a", (VOCAB,)), "outside the vocabulary"),
        (RowResult("a", (-1,)), "outside the vocabulary"),
        (RowResult("a"), "0 tokens where 1 were planned"),
        (None, "0 tokens where 1 were planned"),
    ],
)
def test_a_bad_row_ends_its_request_alone(bad: RowResult | None, says: str) -> None:
    engine = Engine()
    other = request("b", prompt(4, 2), 6)
    engine.submit(request("a", prompt(4), 6), other)
    plan = engine.scheduler.plan()
    assert plan is not None
    good = engine.executor.launch(plan).result()
    rows = [row for row in good.rows if row.request == "b"] + ([bad] if bad else [])
    engine.take(engine.scheduler.commit(StepResult(plan.step, tuple(rows))))
    assert engine.got["a"].reason is FinishReason.ERROR
    assert says in engine.got["a"].final.error
    engine.run()
    engine.check(other)


def test_what_a_failed_request_generated_is_not_cached() -> None:
    engine = Engine()
    engine.submit(request("a", prompt(4), 20))
    for _ in range(5):
        engine.turn()
    plan = engine.scheduler.plan()
    assert plan is not None
    engine.take(engine.scheduler.commit(StepResult(plan.step, (RowResult("a", error="NaN in the logits"),))))
    follow = prompt(4) + engine.got["a"].tokens
    assert engine.cache.probe(array("i", [*follow, 0]))[0] == 4
