"""The pool of models: one budget, first use loads, idle models leave. Fake sessions, real concurrency."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.errors import EngineDead, ModelFileError, ModelNotFound, OutOfMemory, SeptetError
from septet.hub.store import LocalModel
from septet.serve.models import ModelCard, not_found
from septet.serve.pool import ModelPool, Need

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence


class FakeSession:
    """Takes memory until it is closed, and knows who uses it."""

    def __init__(self, loader: FakeLoader, name: str, n_bytes: int) -> None:
        self.loader = loader
        self.name = self.model_name = name
        self.n_bytes = n_bytes
        self.client = SimpleNamespace(dead=False)
        self.limits = SimpleNamespace(max_model_len=64)
        self.users = 0
        self.closed = False

    async def close(self) -> None:
        begun = self.users
        await asyncio.sleep(self.loader.close_s)
        users = max(begun, self.users)
        if self.closed or (users and not self.client.dead and not self.loader.closing):
            self.loader.wrong.append(f"{self.name} closed with {users} users, closed before: {self.closed}")
        self.closed = True


class FakeLoader:
    """`sizes`: what arithmetic says; `real`: what is taken in truth."""

    def __init__(self, sizes: dict[str, int], real: dict[str, int] | None = None) -> None:
        self.sizes = sizes
        self.real = sizes | (real or {})
        self.load_s = self.close_s = 0.001
        self.fails: dict[str, Exception] = {}
        self.loads: list[str] = []
        self.sessions: list[FakeSession] = []
        self.closing = False
        self.wrong: list[str] = []  # closed while in use, or twice
        self.cancelled: list[str] = []

    @property
    def taken(self) -> int:
        return sum(s.n_bytes for s in self.sessions if not s.closed)

    async def need(self, model: LocalModel, budget: int) -> Need:
        await asyncio.sleep(0)
        return Need(self.sizes[_base(model)])

    async def load(self, model: LocalModel, need: Need) -> tuple[Any, int]:
        self.loads.append(_base(model))
        try:
            await asyncio.sleep(self.load_s)
        except asyncio.CancelledError:
            self.cancelled.append(_base(model))
            raise
        if error := self.fails.get(_base(model)):
            raise error
        session = FakeSession(self, _base(model), self.real[_base(model)])
        self.sessions.append(session)
        return session, session.n_bytes

    def view(self, session: Any, model: LocalModel) -> Any:
        return session


class FakeShelf:
    """`a+x` is another name of the files of `a`."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)

    def cards(self) -> list[ModelCard]:
        return [ModelCard(name=n, root=n, created=0) for n in self.names]

    def find(self, name: str | None) -> LocalModel:
        name = name or self.names[0]
        if name.partition("+")[0] not in self.names:
            raise not_found(name, self.names)
        return LocalModel(name=name, path=Path("/none") / name.partition("+")[0], source="test", n_bytes=1)


def _base(model: LocalModel) -> str:
    return model.path.name


def pool_of(loader: FakeLoader, budget: int, **options: Any) -> ModelPool:
    return ModelPool(FakeShelf(list(loader.sizes)), loader, budget=budget, **options)


def run(loader: FakeLoader, budget: int, play: Callable[[ModelPool], Awaitable[None]], **options: Any) -> ModelPool:
    """`play` on a pool that is closed afterwards; then nothing may be left."""

    async def go() -> ModelPool:
        pool = pool_of(loader, budget, **options)
        try:
            await asyncio.wait_for(play(pool), 30)
        finally:
            loader.closing = True
            await pool.close()
        assert not loader.wrong
        assert loader.taken == 0, "a session was left open"
        assert pool.used_bytes == 0
        return pool

    return asyncio.run(go())


async def touch(pool: ModelPool, name: str | None = None, hold_s: float = 0.0, **how: Any) -> str:
    async with pool.use(name, **how) as session:
        session.users += 1  # type: ignore[attr-defined]
        assert not session.closed  # type: ignore[attr-defined]
        try:
            await asyncio.sleep(hold_s)
        finally:
            session.users -= 1  # type: ignore[attr-defined]
        return session.model_name


def names(pool: ModelPool) -> set[str]:
    return {running.name for running in pool.running()}


# -- loading ----------------------------------------------------------------------------------------------------------
def test_the_first_use_loads_and_later_ones_find_it_loaded() -> None:
    loader = FakeLoader({"a": 5, "b": 5})

    async def play(pool: ModelPool) -> None:
        assert [c.max_model_len for c in pool.cards()] == [None, None]
        assert await touch(pool) == "a"
        assert await touch(pool, "b") == "b"
        assert await touch(pool, "a") == "a"
        assert names(pool) == {"a", "b"}
        assert [c.max_model_len for c in pool.cards()] == [64, 64]

    run(loader, 10, play)
    assert loader.loads == ["a", "b"]


def test_twenty_first_uses_at_once_load_once() -> None:
    loader = FakeLoader({"a": 5})

    async def play(pool: ModelPool) -> None:
        assert await asyncio.gather(*(touch(pool, "a") for _ in range(20))) == ["a"] * 20

    run(loader, 10, play)
    assert loader.loads == ["a"]


def test_who_stops_waiting_does_not_end_the_load() -> None:
    loader = FakeLoader({"a": 5})
    loader.load_s = 0.05

    async def play(pool: ModelPool) -> None:
        gone = asyncio.create_task(touch(pool, "a"))
        stays = asyncio.create_task(touch(pool, "a"))
        await asyncio.sleep(0.01)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await stays == "a"

    run(loader, 10, play)
    assert loader.loads == ["a"]
    assert not loader.cancelled


def test_a_load_that_nobody_waits_for_any_more_ends_and_is_kept_and_then_unloaded() -> None:
    loader = FakeLoader({"a": 5})
    loader.load_s = 0.02

    async def play(pool: ModelPool) -> None:
        gone = asyncio.create_task(touch(pool, "a"))
        await asyncio.sleep(0.005)
        gone.cancel()
        await asyncio.sleep(0.03)
        assert names(pool) == {"a"}
        await asyncio.sleep(0.15)
        assert names(pool) == set()

    run(loader, 10, play, keep_alive_s=0.1)


def test_a_failed_load_is_told_to_all_who_wait_and_the_rest_goes_on() -> None:
    loader = FakeLoader({"a": 5, "bad": 5})
    loader.fails["bad"] = ModelFileError("the file is damaged")

    async def play(pool: ModelPool) -> None:
        use = asyncio.create_task(touch(pool, "a", 0.05))
        told = await asyncio.gather(*(touch(pool, "bad") for _ in range(3)), return_exceptions=True)
        assert [type(e) for e in told] == [ModelFileError] * 3
        assert await use == "a"
        assert pool.used_bytes == 5
        del loader.fails["bad"]
        assert await touch(pool, "bad") == "bad"

    run(loader, 10, play)
    assert loader.loads == ["a", "bad", "bad"]


def test_a_name_that_is_not_there() -> None:
    async def play(pool: ModelPool) -> None:
        with pytest.raises(ModelNotFound, match="this server has a"):
            await touch(pool, "nope")

    run(FakeLoader({"a": 5}), 10, play)


def test_names_of_the_same_files_share_one_engine_and_leave_one_by_one() -> None:
    loader = FakeLoader({"a": 6})

    async def play(pool: ModelPool) -> None:
        await touch(pool, "a")
        await touch(pool, "a+mine")
        assert names(pool) == {"a", "a+mine"}
        assert pool.used_bytes == 6
        await pool.unload("a")
        assert names(pool) == {"a+mine"}
        await pool.unload("a+mine")
        assert pool.used_bytes == 0

    run(loader, 10, play)
    assert loader.loads == ["a"]


# -- the budget -------------------------------------------------------------------------------------------------------
def test_the_least_recently_used_idle_model_leaves_first() -> None:
    loader = FakeLoader({"a": 4, "b": 4, "c": 4})

    async def play(pool: ModelPool) -> None:
        await touch(pool, "a")
        await touch(pool, "b")
        await touch(pool, "a")
        await touch(pool, "c")
        assert names(pool) == {"a", "c"}

    run(loader, 8, play)


def test_what_is_in_the_way_is_named_and_nothing_leaves_in_vain() -> None:
    loader = FakeLoader({"busy": 6 << 30, "idle": 2 << 30, "big": 5 << 30})

    async def play(pool: ModelPool) -> None:
        await touch(pool, "idle")
        use = asyncio.create_task(touch(pool, "busy", 0.1))
        await asyncio.sleep(0.02)
        with pytest.raises(OutOfMemory) as caught:
            await touch(pool, "big")
        for words in ("big needs 5.00 GiB", "budget of 9.00 GiB", "busy holds 6.00 GiB", "in use by 1", "300 s"):
            assert words in caught.value.message
        assert "idle" not in caught.value.message.replace("once it is idle", "")
        assert names(pool) == {"idle", "busy"}
        await use
        assert await touch(pool, "big") == "big"

    run(loader, 9 << 30, play)


def test_a_model_larger_than_the_budget_is_refused_at_once() -> None:
    async def play(pool: ModelPool) -> None:
        with pytest.raises(OutOfMemory, match="--memory-budget"):
            await touch(pool, "a")
        assert pool.used_bytes == 0

    loader = FakeLoader({"a": 11})
    run(loader, 10, play)
    assert loader.loads == []


def test_an_engine_that_took_more_than_the_arithmetic_said_goes_again_or_moves_others() -> None:
    loader = FakeLoader({"a": 4, "b": 4}, real={"b": 8})

    async def play(pool: ModelPool) -> None:
        await touch(pool, "a")
        assert await touch(pool, "b") == "b"  # a was idle
        assert names(pool) == {"b"}
        await pool.unload("b")
        use = asyncio.create_task(touch(pool, "a", 0.1))
        await asyncio.sleep(0.02)
        with pytest.raises(OutOfMemory, match="b needs"):
            await touch(pool, "b")
        assert loader.taken == 4
        await use

    run(loader, 10, play)


# -- keep_alive -------------------------------------------------------------------------------------------------------
def test_idle_models_are_unloaded_after_keep_alive_and_not_while_in_use() -> None:
    loader = FakeLoader({"a": 4, "b": 4})

    async def play(pool: ModelPool) -> None:
        use = asyncio.create_task(touch(pool, "a", 0.15))
        await touch(pool, "b")
        await asyncio.sleep(0.1)
        assert names(pool) == {"a"}
        await use
        await asyncio.sleep(0.1)
        assert names(pool) == set()

    run(loader, 10, play, keep_alive_s=0.05)


def test_keep_alive_of_a_request() -> None:
    loader = FakeLoader({"a": 4, "b": 4, "c": 2})

    async def play(pool: ModelPool) -> None:
        await touch(pool, "a", keep_alive_s=0)
        await asyncio.sleep(0.01)
        assert names(pool) == set()
        await touch(pool, "b", keep_alive_s=-1)
        await touch(pool, "c", keep_alive_s=100)
        left = {running.name: running.left_s for running in pool.running()}
        assert left["b"] is None
        assert 99 < (left["c"] or 0) <= 100
        await touch(pool, "b")  # says nothing: for ever it stays
        await asyncio.sleep(0.05)
        assert names(pool) == {"b", "c"}

    run(loader, 10, play, keep_alive_s=0.02)


def test_with_no_keep_alive_at_all_a_model_stays_for_those_who_waited_for_it() -> None:
    loader = FakeLoader({"a": 4})

    async def play(pool: ModelPool) -> None:
        assert await asyncio.gather(touch(pool, "a", 0.02), touch(pool, "a", 0.02)) == ["a", "a"]
        await asyncio.sleep(0.01)
        assert names(pool) == set()

    run(loader, 10, play, keep_alive_s=0)
    assert loader.loads == ["a"]


def test_unload_waits_for_those_who_use_it() -> None:
    loader = FakeLoader({"a": 4})

    async def play(pool: ModelPool) -> None:
        use = asyncio.create_task(touch(pool, "a", 0.05))
        await asyncio.sleep(0.02)
        await pool.unload("a")
        assert names(pool) == {"a"}
        await use
        await asyncio.sleep(0.01)
        assert names(pool) == set()
        await pool.unload("a")  # not loaded: nothing happens

    run(loader, 10, play)


# -- death, close -----------------------------------------------------------------------------------------------------
def test_a_dead_engine_leaves_the_budget_and_is_loaded_again_on_the_next_use() -> None:
    loader = FakeLoader({"a": 6, "b": 6})

    async def play(pool: ModelPool) -> None:
        await touch(pool, "a")
        loader.sessions[0].client.dead = True
        assert not pool.dead
        assert names(pool) == set()
        await touch(pool, "b")
        loader.sessions[1].client.dead = True
        assert await touch(pool, "b") == "b"
        assert loader.loads == ["a", "b", "b"]

    run(loader, 10, play)


def test_closing_ends_loads_and_engines_and_tells_who_waits() -> None:
    loader = FakeLoader({"a": 4, "b": 4})
    loader.load_s = 0.05
    told: list[Any] = []

    async def play(pool: ModelPool) -> None:
        await touch(pool, "a")
        waiting = asyncio.create_task(touch(pool, "b"))
        await asyncio.sleep(0.02)
        loader.closing = True
        await pool.close()
        told.extend(await asyncio.gather(waiting, return_exceptions=True))
        with pytest.raises(EngineDead):
            await touch(pool, "a")

    run(loader, 10, play)
    assert [type(e) for e in told] == [EngineDead]
    assert loader.cancelled == ["b"]


# -- anything at any time ---------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), budget=st.integers(4, 20), n_users=st.integers(1, 30))
def test_whatever_happens_budget_use_and_answers_hold(seed: int, budget: int, n_users: int) -> None:
    """Random uses, cancels, failed loads, deaths, unloads: never over budget, no model closed under a user (the fake
    notes it), everybody answered, nothing left."""
    rng = random.Random(seed)
    sizes = {name: rng.randint(1, 9) for name in "abcde"}
    loader = FakeLoader(sizes, real={name: max(1, size - rng.randint(0, 2)) for name, size in sizes.items()})
    worst = 0

    async def user(pool: ModelPool) -> str:
        await asyncio.sleep(rng.random() * 0.02)
        name = rng.choice("abcde") + rng.choice(["", "", "+x"])
        keep = rng.choice([None, None, 0, 0.003, -1])
        try:
            return await touch(pool, name, rng.random() * 0.01, keep_alive_s=keep)
        except SeptetError as error:
            return type(error).__name__

    async def trouble(pool: ModelPool) -> None:
        for _ in range(10):
            await asyncio.sleep(rng.random() * 0.006)
            what = rng.random()
            if what < 0.3:
                loader.fails[rng.choice("abcde")] = ModelFileError("bad")
            elif what < 0.6:
                loader.fails.clear()
            elif what < 0.8 and (alive := [s for s in loader.sessions if not s.closed]):
                rng.choice(alive).client.dead = True
            else:
                await pool.unload(rng.choice("abcde"))

    async def watch(pool: ModelPool) -> None:
        nonlocal worst
        while True:
            worst = max(worst, loader.taken, pool.used_bytes)
            await asyncio.sleep(0)

    async def play(pool: ModelPool) -> None:
        watching = asyncio.create_task(watch(pool))
        users = [asyncio.create_task(user(pool)) for _ in range(n_users)]
        troubles = asyncio.create_task(trouble(pool))
        leavers = set(rng.sample(users, n_users // 4))
        await asyncio.sleep(rng.random() * 0.02)
        for task in leavers:
            task.cancel()
        told = await asyncio.gather(*users, return_exceptions=True)
        for task, answer in zip(users, told, strict=True):
            assert isinstance(answer, str) or (task in leavers and isinstance(answer, asyncio.CancelledError)), answer
        await troubles
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching

    run(loader, budget, play, keep_alive_s=0.004)
    assert worst <= budget
