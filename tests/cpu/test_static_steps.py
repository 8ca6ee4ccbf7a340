"""Steps of fixed shape, padded, give what eager steps give: the same code that a GPU captures, called as it is.

And which shape serves which plan, what stands in for a shape that is not captured yet, and what a pause adds.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

from septet.engine import common
from septet.engine.buckets import MAX_TOKENS, MIN_SHARING, Shape, Shapes, decode_sizes, stand_in
from septet.engine.forward import EagerForward
from septet.engine.graphs import StepGraphs
from septet.engine.static import ChunkStep, DecodeStep, StaticStep
from septet.request import Request, SamplingParams
from septet.step import PlanRow
from tests import tiny
from tests.cpu.test_engine_parity import ask, start

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from septet.engine.process import Engine


class Replays:
    """Instead of a capture: the step itself, every time. Remembers which shapes were replayed."""

    def __init__(self) -> None:
        self.made: list[Shape] = []
        self.ran: list[Shape] = []

    def __call__(self, step: StaticStep) -> tuple[Callable[[], None], Callable[[], None]]:
        self.made.append(step.shape)

        def forward() -> None:
            self.ran.append(step.shape)
            step.forward()

        return forward, step.draw


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("llama", tmp_path_factory.mktemp("static") / "hf")


def with_graphs(model: Path, **settings: object) -> tuple[Engine, StepGraphs, Replays]:
    engine = start(model, "reference", **settings)
    runner = engine.executor.runner  # type: ignore[attr-defined]
    assert isinstance(runner.forward, EagerForward)
    info, replays = engine.info, Replays()
    shapes = Shapes.of(info.max_num_seqs, info.max_model_len, info.max_num_batched_tokens)
    runner.graphs = StepGraphs(runner, runner.forward.model, shapes, replays)
    with torch.inference_mode():
        for shape in shapes.first():
            runner.graphs._capture(shape)
    return engine, runner.graphs, replays


def prompts() -> list[list[int]]:
    rng = random.Random(5)
    own = [[rng.randrange(300) for _ in range(n)] for n in (1, 5, 23, 40, 61, 33)]
    return [*own, [*own[4][:50], 7, 8, 9]]


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_padded_steps_give_the_same_ids(model: Path, overlap: str) -> None:
    # Chunks of prompts, beside decoding rows; twice, since shapes are captured once they have been asked for.
    settings = {"max_num_batched_tokens": 40, "overlap": overlap, "enable_prefix_caching": False}
    asked = prompts()[::-1]
    want = ask(start(model, "reference", **settings), asked, 24, stagger=3)
    engine, graphs, replays = with_graphs(model, **settings)
    for _ in range(2):
        assert ask(engine, asked, 24, stagger=3) == want
        while graphs.spare(busy=False):
            pass
    assert {shape.decode for shape in replays.ran} == {True, False}
    assert any(shape.rows > 1 and not shape.decode for shape in replays.ran)
    assert any(shape.rows == 1 and not shape.decode for shape in replays.ran)


def test_sampling_of_every_kind_after_a_captured_chunk(model: Path) -> None:
    """Rows that the captured sampler can't serve take the logits; noise and filters as in an eager step."""

    def answers(engine: Engine) -> dict[str, list[int]]:
        for i, prompt in enumerate(prompts()):
            more = {"top_k": 7, "logprobs": 2} if i % 2 else {}
            params = SamplingParams(temperature=0.9, seed=i, max_tokens=12, ignore_eos=True, **more)
            engine.scheduler.submit(Request(id=str(i), tokens=tuple(prompt), params=params))
        got: dict[str, list[int]] = {}
        while (plan := engine.scheduler.plan()) is not None:
            for update in engine.scheduler.commit(engine.executor.launch(plan).result()):
                got.setdefault(update.request, []).extend(update.tokens)
        return got

    engine, graphs, replays = with_graphs(model)
    while graphs.spare(busy=False):
        pass
    assert answers(engine) == answers(start(model, "reference"))
    assert not all(shape.decode for shape in replays.ran)


def test_steps_over_one_beginning_say_so_and_it_is_true(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that share their first slots are told as such, no matter which of them computed these, or comes and goes."""
    monkeypatch.setattr(common, "MIN_POSITIONS", 16)
    told, lay_out = [], DecodeStep.lay_out

    def checked(step: DecodeStep) -> Any:
        ids, layout, wanted = lay_out(step)
        if layout.shared is not None:
            told.append(n := int(layout.shared))
            longer = layout.rows[layout.kv_len > n]
            assert len(longer) >= min(MIN_SHARING, len(layout.rows)) or not n
            assert bool((layout.slot_of[longer, :n] == layout.slot_of[longer[0], :n]).all())
        return ids, layout, wanted

    monkeypatch.setattr(DecodeStep, "lay_out", checked)
    rng = random.Random(3)
    system = [rng.randrange(300) for _ in range(40)]
    asked = [[*system, *(rng.randrange(300) for _ in range(1 + i % 5))] for i in range(MIN_SHARING + 3)]
    settings = {"max_num_seqs": MIN_SHARING + 3}
    want = ask(start(model, "reference", **settings), asked, 24, stagger=2)
    engine, graphs, replays = with_graphs(model, **settings)
    while graphs.spare(busy=False):
        pass
    told.clear()
    assert ask(engine, asked, 24, stagger=2) == want
    assert max(told) >= 32, "nearly all of the 40 positions"
    assert any(shape.shared for shape in replays.ran)
    told.clear()
    apart = [[i, *prompt] for i, prompt in enumerate(asked)]
    assert ask(engine, apart, 24, stagger=2) == ask(start(model, "reference", **settings), apart, 24, stagger=2)
    assert not any(told)


@torch.inference_mode()
def test_a_chunk_writes_nothing_beyond_its_rows(model: Path) -> None:
    """All rows' tables, and every slot but 0, are as they were except where the plan says; a chunk inside a prompt
    leaves the prompt's next token alone."""
    _, graphs, _ = with_graphs(model)
    rows = graphs.machine.rows
    rows.tokens.copy_(torch.arange(rows.tokens.numel()).view_as(rows.tokens) % 300)
    rows.slot_of.zero_()
    tokens, slot_of = rows.tokens.clone(), rows.slot_of.clone()
    pools = [(kv.k.clone(), kv.v.clone()) for kv in graphs.machine.kv]
    plan = [PlanRow("a", 2, 0, 5, (11, 12, 13, 14, 15), 0), PlanRow("b", 5, 0, 3, (21, 22, 23), 1)]
    shape = graphs.shapes.chunk(8, 2, 5)
    assert shape is not None
    graphs._capture(shape)
    out = graphs.captured[shape].run(plan, sample=True)
    assert isinstance(out, ChunkStep)
    slot_of[2, :5], slot_of[5, :3] = torch.arange(11, 16), torch.arange(21, 24)
    tokens[5, 3] = int(out.tokens[0])
    assert torch.equal(rows.tokens[:-1], tokens[:-1])
    assert torch.equal(rows.slot_of[:-1], slot_of[:-1])
    written = [0, *range(11, 16), 21, 22, 23]
    for kv, (k, v) in zip(graphs.machine.kv, pools, strict=True):
        for now, before in ((kv.k, k), (kv.v, v)):
            changed = (now != before).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert set(changed) <= set(written)
            assert set(changed) >= set(written[1:])
            assert bool(torch.isfinite(now).all())


# -- shapes -----------------------------------------------------------------------------------------------------------
def test_every_plan_within_the_limits_has_a_shape_with_little_padding() -> None:
    shapes = Shapes.of(256, 4096, 8192)
    for n_tokens in range(1, MAX_TOKENS + 1):
        single = shapes.chunk(n_tokens, 1, n_tokens)
        assert single is not None
        assert n_tokens <= single.tokens <= max(n_tokens + 15, n_tokens * 1.125)
        assert (single.rows, single.max_kv) == (1, single.tokens)
        for n_rows in (2, 17, 100, 256):
            if n_rows <= n_tokens:
                mixed = shapes.chunk(n_tokens, n_rows, n_tokens)
                assert mixed is not None
                assert n_rows <= mixed.rows <= min(mixed.tokens, max(4 * n_rows, 4))
                assert n_tokens <= mixed.tokens <= max(32, 2 * n_tokens)
                assert mixed in shapes.usual(), "no plan waits for a capture for ever"
    assert shapes.chunk(MAX_TOKENS + 1, 1, 1) is None
    assert shapes.chunk(8, 1, 4000) == Shape(False, 16, 1, 4096)
    assert [shapes.decode(n).rows for n in (1, 3, 9, 65, 256)] == [1, 4, 16, 80, 256]


def test_shapes_stay_within_a_small_engine() -> None:
    """The padding of a chunk takes positions of the scratch row: none may be longer than a request."""
    for max_rows, max_len, step in ((1, 16, 16), (8, 130, 16), (3, 40, 4096), (8, 5, 64)):
        shapes = Shapes.of(max_rows, max_len, step)
        every = [*shapes.first(), *shapes.usual()]
        assert all(shape.tokens <= min(max_len, step) for shape in every if not shape.decode)
        assert all(shape.rows <= max_rows for shape in every)
        assert {shape.rows for shape in every if shape.decode} == set(decode_sizes(max_rows))
        assert len(set(shapes.usual())) <= shapes.max_graphs


def test_what_stands_in_is_larger_but_not_wasteful() -> None:
    small, large = Shape(False, 128, 1, 128), Shape(False, 512, 16, 4096)
    assert stand_in(Shape(False, 112, 1, 112), [small, large]) == small
    assert stand_in(Shape(False, 80, 1, 80), [large]) is None
    assert stand_in(Shape(False, 112, 1, 4096), [small]) is None
    assert stand_in(Shape(False, 448, 16, 448), [small, large]) == large
    assert stand_in(Shape(True, 3, 3, 4096), [Shape(True, 256, 256, 4096), large]) == Shape(True, 256, 256, 4096)


def test_shapes_are_captured_as_traffic_asks_and_in_pauses(model: Path) -> None:
    engine, graphs, replays = with_graphs(model)
    first = list(replays.made)
    assert first == graphs.shapes.first()
    assert first[0].rows == 8
    assert first[0].decode
    ask(engine, prompts()[:3], 6)
    assert graphs.wanted
    assert not set(graphs.wanted) & set(graphs.captured)
    wanted, mixed = Shape(False, 48, 1, 48), Shape(False, 32, 4, graphs.shapes.max_len)
    assert {wanted, mixed} <= set(graphs.shapes.usual()) - set(graphs.captured)
    graphs.wanted = Counter({wanted: 1})
    graphs.spare(busy=True)  # once may be chance
    assert len(replays.made) == len(first)
    graphs.wanted[wanted] += 1
    graphs._not_before = 0.0
    graphs.compiled = lambda: False
    graphs.spare(busy=True)  # would compile: not while somebody waits
    assert len(replays.made) == len(first)
    graphs.compiled = lambda: True
    graphs.spare(busy=True)
    assert replays.made[len(first) :] == [wanted]
    graphs.wanted[Shape(False, 16, 1, 16)] += 5
    graphs.spare(busy=True)  # right after the last: not yet
    assert len(replays.made) == len(first) + 1
    graphs.wanted = Counter({Shape(False, 16, 1, 16): 1, mixed: 1})
    graphs._not_before = 0.0
    graphs.spare(busy=True)  # a mixed step at once: there are few shapes of them
    assert replays.made[len(first) + 1 :] == [mixed]
    while graphs.spare(busy=False):
        pass
    assert set(graphs.captured) >= set(graphs.shapes.usual())
    assert len(replays.made) == len(set(replays.made))


def test_a_capture_that_fails_under_way_leaves_the_others(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine, graphs, _ = with_graphs(model)

    def refuse(step: StaticStep) -> tuple[Callable[[], None], Callable[[], None]]:
        raise torch.OutOfMemoryError("no room")

    graphs.capture = refuse
    assert graphs.spare(busy=False) is False
    assert "could not be captured" in caplog.text
    want = ask(start(model, "reference"), prompts(), 8)
    assert ask(engine, prompts(), 8) == want
    assert graphs.spare(busy=True) is False
