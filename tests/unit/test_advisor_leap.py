"""Steps taken at once against steps taken one by one: the same answers, counters and cache, whatever the arrivals."""

from __future__ import annotations

from dataclasses import asdict, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from septet.advisor.arrivals import Arrival
from septet.advisor.calibrate import Calibration
from septet.advisor.leap import LeapingScheduler
from septet.advisor.simulate import ROUTERS, TOKEN, Fleet, Simulation
from septet.engine.scheduler import SchedulerLimits
from septet.kv.cache import KVCache
from septet.request import Request, SamplingParams
from septet.step import RowResult, StepResult

MODEL = Calibration(
    model="m", machine="a bench", step=0.004, row=0.001, prompt_token=0.0005, context_token=1e-6, pair=1e-7,
    kv_slots=4096, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=512,
)  # fmt: skip
EVEN = replace(MODEL, step=0.0078125, row=0.0, prompt_token=0.0, context_token=0.0, pair=0.0)  # ends coincide, exactly

arrivals = st.lists(
    st.builds(
        lambda at, prompt, output, group, prefix: (at, prompt, output, group, min(prefix, prompt) if group else 0),
        st.integers(0, 200), st.integers(1, 60), st.integers(1, 40), st.integers(0, 3), st.integers(1, 40),
    ),
    min_size=1, max_size=30,
)  # fmt: skip
fleets = st.fixed_dictionaries({
    "step_model": st.sampled_from([MODEL, EVEN]), "kv_slots": st.sampled_from([120, 300, 1100, 4000]),
    "max_num_seqs": st.sampled_from([2, 5, 16]), "replicas": st.sampled_from([1, 1, 2, 3]),
    "router": st.sampled_from(ROUTERS), "prefix_caching": st.booleans(), "chunked_prefill": st.booleans(),
    "prefill_replicas": st.sampled_from([0, 0, 1, 2]),
    "overlap": st.booleans(), "hand_over_s": st.sampled_from([0.0, 0.0078125, 1e-4]),
})  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(arrivals, fleets, st.sampled_from([0.0078125, 0.003]))
def test_leaps_change_nothing(
    drawn: list[tuple[int, int, int, int, int]], more: dict[str, object], unit: float
) -> None:
    fleet = Fleet(max_num_batched_tokens=64, max_model_len=110, **more)  # type: ignore[arg-type]
    come = [Arrival(at * unit, *rest) for at, *rest in sorted(drawn)]
    one, many = Simulation(fleet, leaps=False), Simulation(fleet, leaps=True)
    assert asdict(one.run(come)) == asdict(many.run(come))
    for a, b in zip(one.replicas, many.replicas, strict=True):
        seen, said = a.scheduler.stats, b.scheduler.stats
        assert seen == said
        assert a.scheduler.estimate.ratio == b.scheduler.estimate.ratio


def test_a_leap_leaves_every_counter_as_steps_would() -> None:
    """In the middle of answers, where a simulation's outcome does not look."""
    limits = SchedulerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64)
    fast, slow = (LeapingScheduler(limits, KVCache(97), 1 << 20) for _ in range(2))
    for s in (fast, slow):
        for name, output in (("a", 30), ("b", 20), ("c", 9)):
            params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, seed=0)
            s.submit(Request(id=name, tokens=(1, 2, ord(name)), params=params))
        assert s.ahead() is None, "prompts are waiting"
        _turn(s)
    ahead = fast.ahead()
    assert ahead == (8, 3, 12), "c, which has its first token, gets eight more; three prompts and first tokens are read"
    assert fast.leap(5, TOKEN) == []
    assert fast.leap(3, TOKEN) == ["c"]
    for _ in range(8):
        _turn(slow)
    assert fast.stats == slow.stats
    for one, other in zip(fast._running, slow._running, strict=True):
        for name in ("tokens", "length", "planned", "computed", "in_flight", "last_step"):
            assert getattr(one, name) == getattr(other, name), name
    fast.audit()
    assert _turn(fast) == _turn(slow)


def _turn(s: LeapingScheduler) -> int:
    plan = s.plan()
    assert plan is not None
    s.commit(StepResult(plan.step, tuple(RowResult(r.request, (TOKEN,)) for r in plan.rows if r.n_sample)))
    return plan.step
