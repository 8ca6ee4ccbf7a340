"""The rules are whole, every question has an answer that says what it rests on, and contradictions are told."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from septet.advisor.advise import DIMENSIONS, Question, advise, choices, rules
from septet.advisor.tree import decision_tree
from septet.cli.main import main
from septet.cli.serve import serve
from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from pathlib import Path

KNOWN = {"published", "corrected", "measured", "rule of thumb"}


def test_the_file_is_whole() -> None:
    engines = rules()["engines"]
    for dimension, answers in rules()["dimensions"].items():
        for name, answer in answers.items():
            ranked = [engine for engine, _, _ in answer["ranking"]]
            assert len(set(ranked)) == len(ranked), f"{dimension}.{name} ranks an engine twice"
            assert set(ranked) <= set(engines)
            assert {known for _, _, known in answer["ranking"]} <= KNOWN
    assert set(rules()["profiles"]) == set(choices("use"))
    assert {where for engine in engines.values() for where in engine["runs_on"]} == set(choices("hardware"))


@pytest.mark.parametrize("hardware", choices("hardware"))
def test_every_question_has_an_answer_that_runs_there(hardware: str) -> None:
    for use, priority in itertools.product(choices("use"), choices("priority")):
        found = advise(Question(hardware=hardware, use=use, priority=priority))
        assert found.ranking
        points = [ranked.points for ranked in found.ranking]
        assert points == sorted(points, reverse=True)
        for ranked in found.ranking:
            assert hardware in rules()["engines"][ranked.engine]["runs_on"]
            assert all(known in KNOWN for _, _, known in ranked.reasons)


def test_answers_of_the_published_comparison() -> None:
    first = {
        ("h100", "latency", "latency"): "tensorrt-llm",
        ("h100", "agents", "agents"): "sglang",
        ("amd", "chat", "community"): "vllm",
        ("apple", "local", "ease"): "ollama",
        ("edge", "edge", "flexibility"): "llama.cpp",
    }
    for (hardware, use, priority), engine in first.items():
        assert advise(Question(hardware=hardware, use=use, priority=priority)).ranking[0].engine == engine


def test_contradictions_corrections_and_changes_are_told() -> None:
    found = advise(Question(hardware="edge", use="production", priority="throughput"))
    assert any("edge devices do not serve" in warning for warning in found.warnings)
    found = advise(Question(hardware="h100", use="latency", priority="throughput"))
    assert any("pull apart" in warning for warning in found.warnings)
    assert any(about == "tgi" and "archived" in now for about, _, now in found.corrections)
    assert any(change.startswith("use: ") and change.endswith("-> SGLang") for change in found.changes)
    with pytest.raises(InvalidRequest, match="h100"):
        Question(hardware="abacus", use="chat", priority="ease")


def test_profiles_are_commands_that_exist() -> None:
    flags = {flag for param in serve.params for flag in param.opts}
    for profile in rules()["profiles"].values():
        for flag in profile["flags"]:
            assert flag.split()[0] in flags, flag


def test_the_picture_names_who_comes_first() -> None:
    question = Question(hardware="h100", use="agents", priority="latency")
    picture = decision_tree(question)
    root = ElementTree.fromstring(picture)
    space = "{http://www.w3.org/2000/svg}"
    texts = [element.text for element in root.iter(f"{space}text")]
    assert texts.count(advise(question).ranking[0].title) >= 1
    assert set(choices("use").values()) | set(choices("priority").values()) <= set(texts)
    assert sum(1 for e in root.iter(f"{space}rect") if e.get("class") == "chosen") == 1


def test_the_command(tmp_path: Path) -> None:
    asked = ["advise", "--hardware", "cpu", "--use", "local", "--priority", "ease"]
    run = CliRunner().invoke(main, [*asked, "--json", "--svg", str(tmp_path / "tree.svg")])
    assert run.exit_code == 0, run.output
    assert {*json.loads(run.output)["question"]} >= set(DIMENSIONS)
    assert (tmp_path / "tree.svg").read_text().startswith("<svg")
    assert "what would change the answer" in CliRunner().invoke(main, asked).output
    missing = CliRunner().invoke(main, asked[:-2])
    assert missing.exit_code == 2
    assert "give --priority: throughput" in missing.output
