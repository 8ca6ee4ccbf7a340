"""The rules are whole and say what files say; every question has an answer that holds together; commands can be run."""

from __future__ import annotations

import fnmatch
import itertools
import json
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from septet.advisor.advise import DIMENSIONS, Advice, Question, advise, choices, first, rank
from septet.advisor.hardware import all_hardware, known_models
from septet.advisor.rules import engines, rules, status
from septet.advisor.tree import decision_tree, text_width
from septet.cli.main import main
from septet.cli.serve import serve
from septet.errors import InvalidRequest

ROOT = Path(__file__).parents[2]
ALL = tuple(itertools.product(choices("hardware"), choices("use"), choices("priority")))
SVG = "{http://www.w3.org/2000/svg}"


def ask(hardware: str, use: str, priority: str, **more: Any) -> Question:
    return Question(hardware=hardware, use=use, priority=priority, **more)


def every_line() -> list[dict[str, Any]]:
    answers = [answer for dimension in rules()["dimensions"].values() for answer in dimension.values()]
    return [line for answer in answers for order in answer["orders"] for line in order["lines"]]


# -- the file ---------------------------------------------------------------------------------------------------------
def test_the_file_is_whole() -> None:
    classes, known = set(choices("hardware")), set(rules()["known"])
    assert known == {"measured", "published", "corrected", "rule of thumb"}
    for engine in engines().values():
        assert set(engine["hardware"]) == classes
        assert {kind for kind, *_ in engine["hardware"].values()} <= {"runs", "limited", "assumed", "untested", "no"}
    cautions = [caution for engine in engines().values() for caution in engine["cautions"]]
    for told in [*every_line(), *rules()["warnings"], *cautions]:
        assert told["known"] in known
        assert told["source"] or told["known"] == "rule of thumb", told
        assert set(told.get("on", {})) | set(told.get("for", [])) <= classes
        assert told["known"] != "measured" or "benchmarks/" in told["source"], told
    assert {line["engine"] for line in every_line()} <= set(engines())
    assert set(rules()["profiles"]["use"]) == set(choices("use")) - {"edge"}, "not tested on edge devices"
    assert {h.kind for h in all_hardware()} == set(rules()["kinds"])


def test_what_was_measured_says_where_and_is_in_the_files() -> None:
    for line in every_line():
        if line["known"] == "measured":
            assert line["on"], line
            for word in re.findall(r"benchmarks/[\w./*-]+", line["source"]):
                assert fnmatch.filter((str(p.relative_to(ROOT)) for p in (ROOT / "benchmarks").rglob("*")), word), word


def test_figures_beside_llama_cpp_are_those_of_the_run() -> None:
    """Every "x.xx times" of a line about CPUs is a ratio in one of the two files, and every rate a rate."""
    figures: set[str] = set()
    for name in ("c1-c5-zen3", "c4-zen3"):
        (of,) = json.loads((ROOT / f"benchmarks/results/cpu/{name}.json").read_text())["files"].values()
        ours, theirs = of["sides"]["septet"], of["sides"]["llama_cpp"]
        assert all(len(runs) == 1 for runs in ours.values()), "the rules say n = 1"
        for what in ours:
            figures |= {f"{ours[what][0] / theirs[what][0]:.2f}", f"{ours[what][0]:.0f}", f"{theirs[what][0]:.0f}"}
    seen = 0
    for line in every_line():
        if line["known"] == "measured" and "zen3" in line["source"]:
            said = re.findall(
                r"(\d\.\d\d)(?: \([^)]*\))? (?:and|times)|(?<![\d.])(\d{2,3}) (?:against|tokens)", line["says"]
            )
            assert {a or b for a, b in said} <= figures, line["says"]
            assert line.get("rounds") == 1
            seen += len(said)
    assert seen >= 12


def test_septet_is_put_first_by_figures_of_one_run_alone() -> None:
    own = rules()["own"]
    for dimension in rules()["dimensions"].values():
        for answer in dimension.values():
            for order in answer["orders"]:
                places = {line["engine"]: line["place"] for line in order["lines"]}
                ours = next((line for line in order["lines"] if line["engine"] == own), {"says": ""})
                if "another run" in ours["says"]:
                    assert ours["place"] >= places["vllm"], ours["says"]
                if ours["says"] and [engine for engine, place in places.items() if place == 1] == [own]:
                    assert "zen3" in ours["source"], f"alone in first place without a peer: {ours['says']}"


def test_what_septet_lacks_is_the_same_for_advise_and_plan() -> None:
    for machine in all_hardware():
        assert status(rules()["own"], rules()["kinds"][machine.kind]).here == (not machine.septet_lacks), machine.name


# -- all questions ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hardware", choices("hardware"))
def test_every_answer_holds_together(hardware: str) -> None:
    for use, priority in itertools.product(choices("use"), choices("priority")):
        for users in (None, 1, 5000):
            _check(advise(ask(hardware, use, priority, users=users)))


def _check(found: Advice) -> None:
    q = found.question
    ranked, out = [r.engine for r in found.ranking], [o.engine for o in found.out]
    assert sorted(ranked + out) == sorted(engines()), "each engine is in one list"
    assert ranked
    assert first(found.ranking)
    for r in found.ranking:
        assert status(r.engine, q.hardware).here
        assert r.place == 1 + sum(other.points > r.points for other in found.ranking)
        assert r.tied == (sum(other.points == r.points for other in found.ranking) > 1)
        assert r.points == pytest.approx(sum(c.points for c in r.lines), abs=1e-5)
        for c in r.lines:
            full = rules()["points"]["weights"][c.dimension] / c.place
            assert c.points == full if not c.less else c.points < full
    assert all(o.why and not o.why.endswith(": ") for o in found.out)
    for dimension in DIMENSIONS:  # an answer counts, or is said to count for nothing
        counts = any(c.dimension == dimension for r in found.ranking for c in r.lines)
        assert counts != any(says.startswith(dimension) for says in found.silent)
        assert any(change.startswith(f"{dimension}: ") for change in found.changes)
    _runs_here(found)


def _runs_here(found: Advice) -> None:
    """Septet's commands exist, and are given only where it runs."""
    q, own, profile = found.question, rules()["own"], found.profile
    here = status(own, q.hardware)
    assert bool(profile["command"]) == (own in [r.engine for r in found.ranking])
    assert profile["why"]
    if profile["command"]:
        assert (here.kind == "assumed") == ("not tested" in profile["note"])
        words = shlex.split(profile["command"])
        assert words[:2] == ["septet", "serve"]
        serve.make_context("serve", words[2:], resilient_parsing=False)
        assert "keys.json" not in profile["command"]
        assert (q.use == "production") == ("septet key new" in profile["before"])
    assert bool(found.plan) == (q.hardware != "edge")


def test_what_is_measured_counts_elsewhere_at_a_discount() -> None:
    """No line that was seen on other hardware alone counts in full."""
    seen = {(line["engine"], line["says"]): line.get("on", {}) for line in every_line()}
    for hardware, use, priority in ALL:
        for r in rank(ask(hardware, use, priority)):
            for c in r.lines:
                on = seen[r.engine, c.told.says]
                assert ("seen on other hardware" in c.less) == (bool(on) and hardware not in on), c
                assert bool(c.told.seen) == bool(on)


def test_the_priority_matters_where_there_is_a_choice() -> None:
    """With two engines to choose from (Apple, edge) the published answer is one; elsewhere most uses have several."""
    for hardware in ("h100", "nvidia", "amd", "cpu"):
        several = [use for use in choices("use")
                   if len({first(rank(ask(hardware, use, p))) for p in choices("priority")}) > 1]  # fmt: skip
        assert len(several) >= 4, hardware
    assert "priority: no other answer changes who comes first" in advise(ask("edge", "edge", "ease")).changes


# -- single answers ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("hardware", "use", "priority", "engine"),
    [
        ("h100", "latency", "latency", "tensorrt-llm"),
        ("h100", "agents", "agents", "sglang"),
        ("h100", "json", "agents", "sglang"),
        ("h100", "local", "ease", "ollama"),
        ("amd", "chat", "community", "vllm"),
        ("nvidia", "chat", "latency", "vllm"),
        ("apple", "local", "ease", "ollama"),
        ("apple", "chat", "throughput", "llama.cpp"),
        ("edge", "edge", "flexibility", "llama.cpp"),
        ("cpu", "chat", "throughput", "septet"),
    ],
)
def test_who_comes_first(hardware: str, use: str, priority: str, engine: str) -> None:
    assert [r.engine for r in rank(ask(hardware, use, priority)) if r.place == 1] == [engine]


def test_a_hard_engine_is_out_for_local_work_and_an_edge_needs_one_that_runs_there() -> None:
    out = {o.engine: o.why for o in advise(ask("h100", "local", "throughput")).out}
    assert "hard to run" in out["tensorrt-llm"]
    edge = advise(ask("h100", "edge", "latency"))
    assert {r.engine for r in edge.ranking} == {"llama.cpp", "ollama"}
    assert any("no edge device" in told.says for told in edge.contradictions)
    assert all("tgi" not in [r.engine for r in rank(ask(*each))] for each in ALL), "archived"


def test_an_answer_that_counts_for_nothing_is_told() -> None:
    (told,) = advise(ask("h100", "edge", "agents")).silent
    assert told == "priority 'agents' counts for nothing: no engine that it ranks can be had here"


def test_ties_stand_level() -> None:
    found = advise(ask("h100", "cost", "throughput")).ranking
    assert [(r.place, r.tied) for r in found[:3]] == [(1, True), (1, True), (3, False)]
    assert " or ".join(first(found)) == "SGLang or TensorRT-LLM"


def test_the_published_warnings_are_there() -> None:
    def warned(hardware: str, use: str, priority: str) -> str:
        return " ".join(told.says for told in advise(ask(hardware, use, priority)).warnings)

    assert "always faster' is wrong" in warned("h100", "latency", "latency")
    assert "not interchangeable" in warned("h100", "chat", "throughput")
    for hardware, use in (("cpu", "chat"), ("apple", "local"), ("edge", "edge"), ("nvidia", "chat"), ("h100", "cost")):
        assert "4-bit weights are no free speed-up" in warned(hardware, use, "ease")
    assert "about 100 requests a day" in warned("cpu", "chat", "ease")
    assert "1,000 requests/s" in warned("h100", "production", "latency")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"hardware": "edge", "use": "production"}, "edge devices do not serve"),
        ({"hardware": "h100", "use": "latency"}, "pull apart"),
        ({"hardware": "h100", "use": "chat", "users": 1}, "1 user are not high-QPS chat"),
        ({"hardware": "h100", "use": "local", "users": 500}, "500 users is no longer local"),
        ({"hardware": "edge", "use": "agents", "users": 300}, "no engine that can be had here is for 300"),
        ({"hardware": "cpu", "use": "chat", "users": 100_000, "model": "llama-70b"}, "beyond one machine"),
        ({"hardware": "cpu", "use": "json", "model": "llama-70b"}, "llama-70b does not fit 1 x"),
        ({"hardware": "m3max", "use": "json", "users": 10**6}, "beyond one machine (llama-1b is the smallest"),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], says: str) -> None:
    told = [t.says for t in advise(Question(**{"priority": "throughput", **asked})).contradictions]
    assert any(says in each for each in told), told


def test_a_model_is_held_against_the_machine() -> None:
    fits = advise(ask("rtx4090", "local", "ease", model="llama-8b"))
    assert "fits 1 x NVIDIA GeForce RTX 4090" in fits.fit[0]
    assert "put your checkpoint" in fits.profile["note"], "a shape is no model to serve"
    assert fits.plan == "septet plan llama-8b --hardware rtx4090"
    large = advise(ask("h100", "chat", "throughput", model="llama-70b", users=1000))
    assert large.profile["command"] == "", "one device an engine"
    assert "need about" in large.fit[0]
    assert large.plan == "septet plan llama-70b --hardware h100 --users 1000"
    small = advise(ask("cpu", "local", "ease", model="qwen2.5-32b"))
    assert "GGUF file of four bits" in small.profile["note"]
    assert "not checked" in advise(ask("h100", "chat", "ease", model="nobody/nothing")).fit[0]


@pytest.mark.parametrize("machine", [h.name for h in all_hardware()])
@pytest.mark.parametrize("model", ["llama-1b", "llama-70b"])
def test_every_machine_has_a_word_on_the_model(machine: str, model: str) -> None:
    for users in (None, 40):
        found = advise(ask(machine, "agents", "ease", model=model, users=users))
        said = [*found.fit, *(told.says for told in found.contradictions if told.source == "septet plan")]
        assert any(model in says for says in said), said
        fits = "does not fit" not in found.profile["why"]
        assert bool(found.profile["command"]) == (
            fits and not next(h for h in all_hardware() if h.name == machine).septet_lacks
        )
        assert model not in found.profile["command"], "a shape is no model to serve"


def test_machines_of_plan_are_put_into_their_class() -> None:
    for machine in all_hardware():
        found = ask(machine.name, "chat", "ease")
        assert (found.hardware, found.machine) == (rules()["kinds"][machine.kind], machine.name)
    assert ask("NVIDIA H100", "chat", "ease").hardware == "h100"
    with pytest.raises(InvalidRequest, match=r"mi300x.*not 'abacus'"):
        ask("abacus", "chat", "ease")
    with pytest.raises(InvalidRequest, match="control characters"):
        ask("cpu", "chat", "ease", model="a\x1b[2Jb")


@pytest.mark.parametrize("model", ["x; rm -rf ~", "a b'c", "$(id)", "-x"])
def test_names_are_quoted_in_commands(model: str) -> None:
    command = advise(ask("cpu", "chat", "ease", model=model)).profile["command"]
    words = shlex.split(command)
    assert model in words
    assert serve.make_context("serve", words[2:]).params["models"] == (model,)


def test_the_command_for_plan_works() -> None:
    model = known_models()[0]
    command = advise(ask("rtx4090", "chat", "ease", model=model, users=20)).plan
    run = CliRunner().invoke(main, [*shlex.split(command)[1:], "--no-check"])
    assert run.exit_code == 0, run.output


# -- what is shown ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("hardware", choices("hardware"))
def test_the_picture_is_a_tree_of_questions(hardware: str) -> None:
    question = ask(hardware, "agents", "latency")
    root = ElementTree.fromstring(decision_tree(question))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    joined = " ".join(texts)
    for asked in ("1. Which hardware?", "2. What for?", "3. What matters most?"):
        assert asked in texts
    assert all(title in joined for title in [*choices("hardware").values(), *choices("use").values()])
    boxes = [[float(e.get(n, 0)) for n in ("x", "y", "width", "height")] for e in root.iter(f"{SVG}rect")]
    chosen = [e for e in root.iter(f"{SVG}rect") if e.get("class") == "chosen"]
    assert len(chosen) == 5, "root, hardware, use, priority, engine"
    paths = [e.get("class") for e in root.iter(f"{SVG}path")]
    assert paths.count("path") == 4
    assert len(paths) == len(boxes) - 1, "each box but the root hangs on one"
    assert " or ".join(first(rank(question))) in joined
    for a, b in itertools.combinations(boxes, 2):
        apart = a[0] + a[2] <= b[0] or b[0] + b[2] <= a[0] or a[1] + a[3] <= b[1] or b[1] + b[3] <= a[1]
        assert apart, "boxes overlap"
    widths = {x + w / 2: w for x, _, w, _ in boxes}
    for element in root.iter(f"{SVG}text"):
        if element.get("text-anchor") == "middle":
            assert text_width(element.text or "") <= widths[float(element.get("x", 0))], element.text


def test_the_command(tmp_path: Path) -> None:
    asked = ["advise", "--hardware", "cpu", "--use", "local", "--priority", "ease"]
    run = CliRunner().invoke(main, [*asked, "--json", "--svg", str(tmp_path / "tree.svg")])
    assert run.exit_code == 0, run.output
    assert {*json.loads(run.output)["question"]} >= set(DIMENSIONS)
    assert (tmp_path / "tree.svg").read_text().startswith("<svg")
    shown = CliRunner().invoke(main, asked).output
    for said in (
        "what would change the answer",
        "n = 1",
        "slower to start: 3.95 s",
        "rule of thumb: an opinion",
        "out",
    ):
        assert said in shown
    missing = CliRunner().invoke(main, asked[:-2])
    assert missing.exit_code == 2
    assert "give --priority: throughput" in missing.output
    nowhere = CliRunner().invoke(main, [*asked, "--svg", str(tmp_path / "none" / "tree.svg")])
    assert nowhere.exit_code == 1
    assert "could not be written" in nowhere.output
    assert CliRunner().invoke(main, [*asked, "--users", "0"]).exit_code == 2
    elsewhere = CliRunner().invoke(main, ["advise", "--hardware", "mi300x", *asked[3:]]).output
    assert "Septet's own profile: none" in elsewhere
