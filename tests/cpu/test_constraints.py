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
from septet.engine.client import InlineClient
from septet.errors import InvalidRequest
from septet.grammar.vocabulary import Vocabulary
from septet.request import FinishReason, Request, SamplingParams
from septet.structured import Structured
from tests import schemas, tiny

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from septet.engine.messages import Update

EOS = 301
TOKENS = (
    [bytes([i]) for i in range(256)]
    + [b'{"', b'":', b'"}', b"null", b"12", b"\xc3\xa9"]
    + [b""] * 39
    + [b"<eos>"]
    + [b""] * 18
)
SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 99}, "tag": {"enum": ["a", "bb", None]}},
    "required": ["id", "tag"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.build("llama", tmp_path_factory.mktemp("constraints"))


def params(structured: Any, **values: Any) -> SamplingParams:
    defaults = {"max_tokens": 200, "seed": 5, "structured": structured}
    return SamplingParams(**{**defaults, **values})


def request(id: str, prompt: tuple[int, ...], wanted: SamplingParams) -> Request:
    return Request(id=id, tokens=prompt, params=wanted, eos_token_ids=(EOS,))


def with_engine(
    model: Path, work: Callable[[InlineClient], Awaitable[Any]], *, taught: bool = True, **options: Any
) -> Any:
    """Run `work` over an engine with an audit that raises; it must be left with nothing held."""

    async def run() -> Any:
        settings: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "num_kv_slots": 4096, **options}
        config = EngineConfig(model=str(model), device="cpu", dtype="float32", kernels="reference", **settings)
        client = await InlineClient.start(config, strict=True)
        try:
            if taught:
                client.teach(Vocabulary.of(TOKENS, [EOS], [EOS]))
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


WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlapped": {"overlap": "on"},
    "chunked": {"max_num_batched_tokens": 9, "overlap": "on"},
    "preempted": {"num_kv_slots": 250, "max_model_len": 241, "overlap": "on", "max_num_batched_tokens": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_answers_follow_their_grammars_in_any_company(model: Path, way: str) -> None:
    wanted = [schemas.schema(seed) if seed % 3 else None for seed in range(30, 48)]
    seen: dict[str, Any] = {}

    async def work(client: InlineClient) -> list[tuple[bytes, Update]]:
        client.loop.scheduler.estimate.ratio = 0.0 if way == "preempted" else 0.5
        answers = await many([one and Structured.json_schema(one) for one in wanted])(client)
        seen["preemptions"] = (await client.stats()).preemptions
        return answers

    answers = with_engine(model, work, **WAYS[way])
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
    answers = [[text for text, _ in with_engine(model, many(wanted), **options)] for options in WAYS.values()]
    assert answers[0] == answers[1] == answers[2] == answers[3]
    assert len(set(answers[0])) > 3


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
