"""Constrained answers through the whole engine with a tiny random model: batched, overlapped, chunked, preempted.

The model's logits are noise, so only masks can make an answer valid; `jsonschema` says whether it is.
"""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch

from septet.config import EngineConfig
from septet.engine.buckets import Shapes
from septet.engine.client import InlineClient
from septet.engine.graphs import StepGraphs
from septet.errors import InvalidRequest
from septet.grammar import compiler, limits
from septet.grammar.masks import Masks
from septet.grammar.trial import TrialProcess
from septet.grammar.vocabulary import Vocabulary
from septet.request import FinishReason, Request, SamplingParams
from septet.structured import Structured
from septet.text.vocabulary import byte_alphabet
from tests import schemas, tiny
from tests.native import native_library

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from pathlib import Path

    from septet.engine.messages import Update

EOS = 301
TOKENS = (
    [bytes([i]) for i in range(256)]
    + [b'{"', b'":', b'"}', b"null", b"12", b"\xc3\xa9", b"nu", b"ll", b"ta", b"tag"]
    + [b""] * 35
    + [b"<eos>"]
    + [b""] * 18
)
MERGES = ['{ "', '" :', '" }', "n u", "l l", "nu ll", "1 2", "t a", "ta g"]
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "tag": {"enum": ["a", "bb", None]}},
    "required": ["id", "tag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module", autouse=True)
def one_trial() -> Iterator[None]:
    """One process tries the grammars of all engines here, which come one after the other."""
    shared: list[TrialProcess] = []

    def any_trial(vocabulary: Vocabulary, *args: Any) -> Any:
        shared[:] = shared or [Lasting(vocabulary, *args)]
        return shared[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "WORKERS", 1)
        patch.setattr(compiler, "TrialProcess", any_trial)
        yield
    for trial in shared:
        TrialProcess.close(trial)


class Lasting(TrialProcess):
    def close(self) -> None:
        """An engine that has closed is not the last one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("llama", tmp_path_factory.mktemp("constraints"))


def encoder() -> str:
    """A byte-level tokenizer over TOKENS, as the session would send it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    spelled = {byte: character for character, byte in byte_alphabet().items()}
    vocab = {"".join(spelled[b] for b in token): i for i, token in enumerate(TOKENS) if token and i != EOS}
    merges = [tuple(merge.split()) for merge in MERGES]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(f"<unused{i}>") for i in range(len(backend.get_vocab()), EOS)])
    backend.add_special_tokens([AddedToken("<eos>")])
    return backend.to_str()


def params(structured: Any, **values: Any) -> SamplingParams:
    defaults = {"max_tokens": 200, "seed": 5, "structured": structured}
    return SamplingParams(**{**defaults, **values})


def request(id: str, prompt: tuple[int, ...], wanted: SamplingParams) -> Request:
    return Request(id=id, tokens=prompt, params=wanted, eos_token_ids=(EOS,))


def with_engine(
    model: Path,
    work: Callable[[InlineClient], Awaitable[Any]],
    *,
    taught: bool = True,
    forced: bool = False,
    captured: bool = False,
    **options: Any,
) -> Any:
    """Run `work` over an engine with an audit that raises; it must be left with nothing held."""

    if options.get("kernels") == "native":
        native_library()

    async def run() -> Any:
        settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_slots": 4096, **options}
        where = {"device": "cpu", "dtype": "float32", "kernels": "reference"}
        client = await InlineClient.start(EngineConfig(model=str(model), **{**where, **settings}), strict=True)
        try:
            if captured:
                static_steps(client)
            if taught:
                client.teach(Vocabulary.of(TOKENS, [EOS], [EOS], encoder() if forced else ""))
            result = await work(client)
            grammars = client.loop.grammars
            assert grammars is not None
            assert grammars.held == len(grammars) == 0
            return result
        finally:
            await client.close()

    return asyncio.run(run())


async def ask(client: InlineClient, wanted: Request) -> tuple[bytes, Update]:
    """The answer's bytes without its end token, and its last update."""
    tokens: list[int] = []
    async for update in client.generate(wanted):
        tokens += update.tokens
    return b"".join(TOKENS[token] for token in tokens if token != EOS), update


def many(structured: list[Any], **values: Any) -> Callable[[InlineClient], Awaitable[list[tuple[bytes, Update]]]]:
    """All at once, free answers between them, a common prefix long enough to share."""

    async def work(client: InlineClient) -> list[tuple[bytes, Update]]:
        prompt = tuple(range(40))
        wanted = [request(str(i), (*prompt, i), params(one, seed=i, **values)) for i, one in enumerate(structured)]
        return await asyncio.gather(*(ask(client, one) for one in wanted))

    return work


def static_steps(client: InlineClient) -> None:
    """What a GPU captures, called as it is; masks made on threads beside the loop, of matchers in three lanes."""
    runner = client.loop.executor.runner  # type: ignore[attr-defined]
    runner.constraints.overlaps, runner.constraints.library = True, Masks(2, pool_from=2)
    client.loop.grammars.max_lanes = 3  # type: ignore[union-attr]
    info = client.info
    shapes = Shapes.of(info.max_num_seqs, info.max_model_len, info.max_num_batched_tokens)
    runner.graphs = StepGraphs(runner, runner.forward.model, shapes, lambda step: (step.forward, step.draw))
    runner.graphs.capture_first()
    while runner.graphs.spare(busy=False):
        pass


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "captured": {"captured": True, "overlap": "on"},
    "overlapped": {"overlap": "on"},
    "chunked": {"max_num_batched_tokens": 9, "overlap": "on"},
    "native": {"kernels": "native"},
    "native, overlapped": {"kernels": "native", "overlap": "on"},
    "preempted": {"num_kv_slots": 250, "max_model_len": 241, "overlap": "on", "max_num_batched_tokens": 32},
}


@pytest.mark.parametrize(("way", "forced"), list(zip(WAYS, (False, True, True, False, True, True, True), strict=True)))
def test_answers_follow_their_grammars_in_any_company(model: Path, way: str, forced: bool) -> None:
    wanted = [schemas.schema(seed) if seed % 3 else None for seed in range(30, 48)]
    seen: dict[str, Any] = {}

    async def work(client: InlineClient) -> list[tuple[bytes, Update]]:
        client.loop.scheduler.estimate.ratio = 0.0 if way == "preempted" else 0.5
        answers = await many([one and Structured.json_schema(one) for one in wanted])(client)
        seen["preemptions"] = (await client.stats()).preemptions
        return answers

    answers = with_engine(model, work, forced=forced, **WAYS[way])
    complete = 0
    for schema, (text, last) in zip(wanted, answers, strict=True):
        assert last.error is None
        if schema is not None and last.finish_reason is FinishReason.STOP:
            complete += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert complete >= 6, "too few answers came to their end for this to say something"
    assert way != "preempted" or seen["preemptions"] > 0, "nothing was preempted: the test shows nothing"


def test_the_same_answer_in_every_way(model: Path) -> None:
    wanted = [Structured.json_schema(SCHEMA)] * 6 + [None, None]
    answers = [
        [text for text, _ in with_engine(model, many(wanted), forced=True, **options)] for options in WAYS.values()
    ]
    assert all(answer == answers[0] for answer in answers)
    assert len(set(answers[0])) > 3


FIXED = "tag tag null 12 tag null null tag 12 12 tag"


@pytest.mark.parametrize("way", WAYS)
def test_forced_text_is_one_chunk(model: Path, way: str) -> None:
    """Few steps for many tokens, split as the tokenizer splits them; the same where they are sampled one by one."""
    from tokenizers import Tokenizer

    shape = Structured.regex(f"[ab]{FIXED}[ab]{FIXED}")
    canonical = Tokenizer.from_str(encoder()).encode(FIXED).ids

    async def work(client: InlineClient) -> tuple[list[int], list[int], Update, int]:
        told: list[int] = []
        async for update in client.generate(request("a", (1, 2, 3), params(shape))):
            told += update.tokens
        steps = (await client.stats()).steps
        wanted = request("b", (1, 2, 3), params(shape, logprobs=0))
        single = [update async for update in client.generate(wanted)]
        assert all(len(update.logprobs) == len(update.tokens) for update in single)
        return told, [token for update in single for token in update.tokens], update, steps

    told, single, last, steps = with_engine(model, work, forced=True, **WAYS[way])
    assert last.finish_reason is FinishReason.STOP
    assert told == single
    assert told[1 : 1 + len(canonical)] == told[2 + len(canonical) :] == canonical
    assert steps < len(told) / 2, f"{steps} steps for {len(told)} tokens"


def test_forced_tokens_end_where_others_would(model: Path) -> None:
    """max_tokens and stop ids inside forced text, with tokens counted once."""
    shape = Structured.regex(f"[ab]{FIXED}")

    async def work(client: InlineClient) -> None:
        counted = 0
        for limit in (1, 2, 3, 7):
            answer = [u async for u in client.generate(request("a", (1, 2), params(shape, max_tokens=limit)))]
            assert sum(len(u.tokens) for u in answer) == limit
            assert answer[-1].finish_reason is FinishReason.LENGTH
            counted += limit
        stops = params(shape, stop_token_ids=(TOKENS.index(b"null"),))
        text, last = await ask(client, request("b", (1, 2), stops))
        counted += 6
        assert text[1:] == b"tag tag null"
        assert last.stop_token == TOKENS.index(b"null")
        text, last = await ask(client, request("c", (1, 2), params(shape, ignore_eos=True, min_tokens=50)))
        assert text[1:] == FIXED.encode()
        assert (await client.stats()).generated_tokens == counted + 1 + 21

    for overlap in ("off", "on"):
        with_engine(model, work, forced=True, overlap=overlap)


def one(model: Path, wanted: SamplingParams, **options: Any) -> tuple[bytes, Update]:
    return with_engine(model, lambda client: ask(client, request("a", (1, 2, 3), wanted)), **options)


@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_complete_grammar_ends_the_answer(model: Path, overlap: str) -> None:
    for values in ({}, {"ignore_eos": True}, {"min_tokens": 50}):
        text, last = one(model, params(Structured.choice(["yes"]), **values), overlap=overlap)
        assert (text, last.finish_reason) == (b"yes", FinishReason.STOP)


def test_min_tokens_holds_where_the_grammar_has_a_choice(model: Path) -> None:
    loose = Structured.regex("[ab]+")
    lengths = [len(one(model, params(loose, seed=seed, min_tokens=20, logit_bias={EOS: 100}))[0]) for seed in range(3)]
    assert lengths == [20] * 3
    assert len(one(model, params(loose, logit_bias={EOS: 100}))[0]) == 1


def test_length_stop_ids_penalties_and_filters(model: Path) -> None:
    loose = Structured.regex("[ab]+")
    text, last = one(model, params(loose, max_tokens=7, logit_bias={EOS: -100}))
    assert (len(text), last.finish_reason) == (7, FinishReason.LENGTH)
    text, last = one(model, params(loose, stop_token_ids=(ord("b"),), logit_bias={EOS: -100}))
    assert text == b"a" * (len(text) - 1) + b"b"
    assert last.stop_token == ord("b")


def test_filters_penalties_and_logprobs(model: Path) -> None:
    ways = ({"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.1}, {"min_p": 0.9}, {"presence_penalty": 2.0})

    async def work(client: InlineClient) -> list[tuple[bytes, Update]]:
        wanted = [params(Structured.json_schema(SCHEMA), logprobs=2, max_tokens=300, **way) for way in ways]
        return [await ask(client, request(str(i), (1, 2, 3), one)) for i, one in enumerate(wanted)]

    for text, last in with_engine(model, work):
        assert last.error is None
        if last.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(text), SCHEMA)


def test_free_draws_give_what_masks_give(model: Path) -> None:
    """Where a row may draw freely, and where it may not, side by side with free ones: the reference's tokens."""
    native_library()
    ways: list[dict[str, Any]] = [{}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 5}, {"top_p": 0.5}]
    ways += [{"min_p": 0.2}, {"min_tokens": 30}, {"structured": None}]
    shapes = [Structured.json_schema(SCHEMA), Structured.regex(f"[ -z]{{4,40}}{FIXED}"), Structured.json_object()]

    async def work(client: InlineClient) -> list[list[int]]:
        async def tokens(id: str, wanted: SamplingParams) -> list[int]:
            return [token async for u in client.generate(request(id, (1, 2, 3), wanted)) for token in u.tokens]

        wanted = [params(**{"structured": shape, "seed": i, **way}) for shape in shapes for i, way in enumerate(ways)]
        return await asyncio.gather(*(tokens(str(i), one) for i, one in enumerate(wanted)))

    options = {"forced": True, "max_num_seqs": 32}
    want = with_engine(model, work, **options)
    for overlap in ("off", "on"):
        assert with_engine(model, work, kernels="native", overlap=overlap, **options) == want
    assert len(set(map(tuple, want))) > len(want) / 2


def test_a_mask_is_made_for_a_refused_draw_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native_library()
    made: list[int] = []
    fill = Masks.fill

    def counted(self: Masks, matchers: Any, out: Any) -> None:
        made.append(len(matchers))
        fill(self, matchers, out)

    monkeypatch.setattr(Masks, "fill", counted)
    text = Structured.regex(r"(?s:.{80,})")  # nearly half of all draws are text by chance
    masks: dict[float, int] = {}
    for top_p in (1.0, 0.999):
        made.clear()
        _, last = one(model, params(text, max_tokens=60, top_p=top_p), kernels="native")
        assert last.finish_reason is FinishReason.LENGTH
        masks[top_p] = sum(made)
    assert masks[0.999] == 60, "a filter sees what the grammar has left"
    assert 10 < masks[1.0] < 50


def test_a_refused_grammar_ends_its_request_alone(model: Path) -> None:
    async def work(client: InlineClient) -> list[Any]:
        bad = Structured.json_schema({"type": "array", "uniqueItems": True})
        wanted = [Structured.json_schema(SCHEMA), bad, None, Structured.regex("(")]
        return await many(wanted)(client)

    answers = with_engine(model, work)
    errors = [last.error for _, last in answers]
    assert errors[0] is errors[2] is None
    for error, word in ((errors[1], "uniqueItems"), (errors[3], "regex")):
        assert error is not None
        assert word in error
    assert answers[1][1].error_kind == InvalidRequest.kind


def test_waiting_for_a_grammar_can_be_left(model: Path) -> None:
    async def work(client: InlineClient) -> None:
        slow = Structured.json_schema({"allOf": [{"type": "string", "pattern": f".*a{i}.*"} for i in range(12)]})
        task = asyncio.ensure_future(ask(client, request("slow", (1,), params(slow))))
        text, _ = await ask(client, request("quick", (1, 2), params(None, max_tokens=5)))
        assert text is not None
        assert not task.done(), "the slow grammar was not slow: the test shows nothing"
        assert (await client.stats()).waiting == 1
        client.abort(["slow"])
        _, last = await asyncio.wait_for(task, 5)
        assert last.finish_reason is FinishReason.ABORT

    with_engine(model, work)


def test_without_a_vocabulary_a_grammar_is_refused(model: Path) -> None:
    _, last = one(model, params(Structured.json_object()), taught=False)
    assert last.error_kind == InvalidRequest.kind
