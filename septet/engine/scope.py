"""What the engine does right now, for people who watch: rows, pool and tree, bounded and cheap.

Called by `engine/loop.py` between two steps when a client asks for it, which it does only while somebody watches.
Reads the scheduler and changes nothing. Knows no text: token ids are the session's to turn into words.
"""

from __future__ import annotations

import time
from itertools import islice
from typing import TYPE_CHECKING

from septet.engine.messages import ScopeBranch, ScopePool, ScopeRow, ScopeView
from septet.kv import view

if TYPE_CHECKING:
    from septet.engine.scheduler import Scheduler
    from septet.engine.sequence import Sequence

__all__ = ["look"]

MAX_RUNNING, MAX_WAITING = 48, 16  # rows told
CELLS = 128  # of the pool's map
BRANCHES = 20  # of the tree


def look(scheduler: Scheduler) -> ScopeView:
    """A view as of now. Costs a fraction of a step, whatever the pool and the queue hold."""
    begun = time.perf_counter()
    rows = [_row(seq) for seq in islice(scheduler._running, MAX_RUNNING)]
    rows += [_row(seq) for seq in islice(scheduler._waiting, MAX_WAITING)]
    pool, tree = view.look(scheduler.cache, CELLS, BRANCHES)
    return ScopeView(
        rows=rows,
        more_rows=len(scheduler._running) + len(scheduler._waiting) - len(rows),
        pool=ScopePool(*pool),
        tree=[ScopeBranch(*branch) for branch in tree],
        took_s=time.perf_counter() - begun,
    )


def _row(seq: Sequence) -> ScopeRow:
    if seq.lease is None:
        state = "waiting"
    else:
        state = "prefill" if seq.planned < seq.n_known else "decode"
    cached = seq.cached_tokens or 0
    return ScopeRow(state, seq.row, seq.n_prompt, cached, seq.computed, seq.length, seq.limit, seq.priority)
