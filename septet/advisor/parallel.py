"""Replicas that never look at each other are simulated one by one, on as many cores as there are.

Called by `septet simulate`; `simulate.py` stays the one that knows what a replica does. The answer is the same whatever
the number of processes: each replica is a simulation of its own, and the parts are put together in the fleet's order.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

from septet.advisor.simulate import Outcome, group_of, simulate

if TYPE_CHECKING:
    from collections.abc import Sequence

    from septet.advisor.arrivals import Arrival
    from septet.advisor.simulate import Fleet

__all__ = ["independent", "simulate_apart"]

WORTH_TOKENS = 500_000  # of output: below, processes take longer to start than to finish


def independent(fleet: Fleet, arrivals: Sequence[Arrival]) -> bool:
    """Does the router decide without looking at the replicas' load?"""
    if fleet.replicas == 1 or fleet.prefill_replicas:
        return False
    return fleet.router == "round-robin" or (fleet.router == "prefix" and all(a.prefix_id for a in arrivals))


def simulate_apart(fleet: Fleet, arrivals: Sequence[Arrival], processes: int = 1) -> Outcome:
    """As `simulate`, and with several processes where the router allows it and there is enough to do."""
    if not independent(fleet, arrivals):
        return simulate(fleet, arrivals)
    if fleet.router == "round-robin":
        shares = [list(range(i, len(arrivals), fleet.replicas)) for i in range(fleet.replicas)]
    else:
        shares = [[] for _ in range(fleet.replicas)]
        for i, arrival in enumerate(arrivals):
            shares[group_of(arrival, fleet.replicas)].append(i)
    parts = [[arrivals[i] for i in share] for share in shares]
    one = replace(fleet, replicas=1)
    if processes > 1 and sum(a.output for a in arrivals) >= WORTH_TOKENS:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(processes, fleet.replicas), mp_context=spawn) as pool:
            outcomes = list(pool.map(simulate, repeat(one), parts))
    else:
        outcomes = [simulate(one, part) for part in parts]
    return _together(outcomes, shares)


def _together(outcomes: Sequence[Outcome], shares: Sequence[Sequence[int]]) -> Outcome:
    at = {
        i: served for o, share in zip(outcomes, shares, strict=True) for i, served in zip(share, o.served, strict=True)
    }
    return Outcome(
        [at[i] for i in range(len(at))],
        seconds=max(o.seconds for o in outcomes),
        busy_s=sum(o.busy_s for o in outcomes),
        steps=sum(o.steps for o in outcomes),
        prompt_tokens=sum(o.prompt_tokens for o in outcomes),
        cached_tokens=sum(o.cached_tokens for o in outcomes),
        preemptions=sum(o.preemptions for o in outcomes),
        replicas=len(outcomes),
    )
