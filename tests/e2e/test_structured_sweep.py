"""Some hundred schemas answered by the real model at temperature 1: each answer validates, or its schema was refused
by the name of what can't be enforced. Minutes: `make test-slow`; a dozen of them are in `test_structured.py`."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from septet import LLM, SamplingParams
from septet.errors import InvalidRequest
from septet.structured import Structured
from tests import schemas

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow
N_SCHEMAS = 300
PARTS = 5  # minutes each
BATCH = 30
KINDS = ("object", "array", "enum", "pattern", "minimum", "$ref", "anyOf", "oneOf", "allOf", "format")


def answers(llm: LLM, wanted: list[Any], seed: int) -> list[Any]:
    """An output for each schema; the InvalidRequest of one that is refused, whose neighbours are asked again."""
    kept = dict(enumerate(wanted))
    refused: dict[int, InvalidRequest] = {}
    while True:
        params = [
            SamplingParams(temperature=1.0, seed=seed + i, max_tokens=200, structured=Structured.json_schema(schema))
            for i, schema in kept.items()
        ]
        try:
            outputs = llm.generate(["Here is a short JSON value: "] * len(kept), params, use_tqdm=False)
        except InvalidRequest as error:
            one = next(i for i in kept if refuses(llm, wanted[i], error))
            refused[one] = error
            del kept[one]
            continue
        made = dict(zip(kept, outputs, strict=True))
        return [made.get(i) or refused[i] for i in range(len(wanted))]


def refuses(llm: LLM, schema: Any, error: InvalidRequest) -> bool:
    params = SamplingParams(max_tokens=1, structured=Structured.json_schema(schema))
    try:
        llm.generate(["x"], params, use_tqdm=False)
    except InvalidRequest as own:
        return own.message == error.message
    return False


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> LLM:
    return LLM("smollm2", max_model_len=1024, max_num_seqs=BATCH, kernels="native")


@pytest.fixture(scope="module")
def seen() -> Iterator[Counter[str]]:
    """What the parts have come to."""
    tally = Counter[str]()
    yield tally
    print(dict(tally))


@pytest.mark.parametrize("part", range(PARTS))
def test_every_answer_validates(llm: LLM, seen: Counter[str], part: int) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    size = N_SCHEMAS // PARTS
    for start in range(part * size, (part + 1) * size, BATCH):
        wanted = [schemas.schema(seed) for seed in range(2000 + start, 2000 + start + BATCH)]
        for schema, output in zip(wanted, answers(llm, wanted, start), strict=True):
            if isinstance(output, InvalidRequest):
                assert "oneOf" in output.message or "nsatisfiable" in output.message, output.message
                seen["refused"] += 1
                continue
            choice = output.outputs[0]
            seen[choice.finish_reason or ""] += 1
            if choice.finish_reason == "stop":
                seen.update(kind for kind in KINDS if f'"{kind}"' in json.dumps(schema))
                jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(choice.text))
    seen["parts"] += 1


def test_enough_answers_of_every_kind_came_to_their_end(seen: Counter[str]) -> None:
    if seen["parts"] < PARTS:
        pytest.skip("not all parts ran")
    assert seen["stop"] >= 0.5 * N_SCHEMAS
    assert min(seen[kind] for kind in KINDS) >= 3
