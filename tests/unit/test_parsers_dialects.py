"""Each dialect's real format, however it is cut; which dialect a template stands for; what a broken call leaves."""

# ruff: noqa: E501, RUF001 (samples as they are)

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.errors import InvalidRequest
from septet.text.parsers.dialects import DIALECTS, REASONING, dialect_of, reasoning_of
from septet.text.parsers.events import CallArguments, CallBroken, CallEnd, CallStart, Content, ParserEvent, Reasoning
from septet.text.parsers.machine import OutputParser, parse
from septet.text.parsers.reader import Markers
from septet.text.parsers.tools import Tool

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "metric": {"type": "boolean"}},
}
TOOLS = (Tool("get_weather", "The weather", SCHEMA), Tool("now", "The time"), Tool("a.b-c", "Odd name"))
PARIS = ("get_weather", {"city": "Paris"})
OSLO = ("get_weather", {"city": "Oslo", "days": 3})


@dataclass
class Read:
    """Events gathered as a caller that does not stream sees them."""

    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    shown: str = field(default="", compare=False)  # content and broken calls in their order


def gather(events: list[ParserEvent]) -> Read:
    read, name, arguments = Read(), "", ""
    for event in events:
        match event:
            case Content(text):
                read.content += text
                read.shown += text
            case Reasoning(text):
                read.reasoning += text
            case CallStart(name):
                arguments = ""
            case CallArguments(text):
                arguments += text
            case CallEnd():
                read.calls.append((name, json.loads(arguments)))
            case CallBroken(text):
                read.broken.append(text)
                read.shown += text
    return read


def parser(dialect: str = "", thoughts: str = "", thinking: bool = False, limit: int = 2**20) -> OutputParser:
    chosen = DIALECTS[dialect] if dialect else None
    return OutputParser(chosen, REASONING[thoughts] if thoughts else None, TOOLS, thinking=thinking, limit=limit)


# (dialect, reasoning, text, content, reasoning text, calls): as the families' own templates and cards write them
SAMPLES = [
    ("hermes", "", 'Let me look.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
     "Let me look.", "", [PARIS]),
    ("hermes", "", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n<tool_call>\n'
     '{"arguments": {"city": "Oslo", "days": 3}, "name": "get_weather"}\n</tool_call>', "", "", [PARIS, OSLO]),
    ("hermes", "", '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>', "", "",
     [PARIS]),
    ("hermes", "", '<tool_call>{"type":"function","function":{"name":"get_weather","arguments":{"city":"Paris"}}}'
     "</tool_call> Done.", "Done.", "", [PARIS]),
    ("hermes", "qwen3", '<think>\nThe user wants <tool_call>s.\n</think>\n\nOk\n<tool_call>\n{"name": "now"}\n'
     "</tool_call>", "Ok", "The user wants <tool_call>s.", [("now", {})]),
    ("llama3_json", "", '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", "", [PARIS]),
    ("llama3_json", "", '<|python_tag|>{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", '
     '"parameters": {}}', "", "", [PARIS, ("now", {})]),
    ("llama3_json", "", '{"name": "Bob", "age": 5}', '{"name": "Bob", "age": 5}', "", []),
    ("pythonic", "", "[get_weather(city='Paris'), get_weather(city=\"Oslo\", days=3)]", "", "", [PARIS, OSLO]),
    ("pythonic", "", "<|python_start|>[now()]<|python_end|>", "", "", [("now", {})]),
    ("pythonic", "", "[see](http://x) and f(a=1)", "[see](http://x) and f(a=1)", "", []),
    ("pythonic", "", "[get_weather(city='it\\'s \"x\"', days=[1, {'a': None}, (2.5, True, false)])]", "", "",
     [("get_weather", {"city": 'it\'s "x"', "days": [1, {"a": None}, [2.5, True, False]]})]),
    ("functionary", "", 'Sure <function=get_weather>{"city": "Paris"}</function>', "Sure", "", [PARIS]),
    ("mistral", "", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}]', "", "",
     [PARIS]),
    ("mistral", "mistral", '[THINK]Hm.[/THINK]Ok[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[CALL_ID]'
     "x1[ARGS]{}", "Ok", "Hm.", [PARIS, ("now", {})]),
    ("deepseek_v3", "deepseek_r1", "I think.</think>Let me see.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>"
     'get_weather\n```json\n{"city": "Paris"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n'
     "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "Let me see.", "I think.", [PARIS, ("now", {})]),
    ("deepseek_v3", "", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
     "<｜tool▁call▁end｜><｜tool▁calls▁end｜>", "", "", [PARIS]),
    ("kimi_k2", "kimi_k2", "<think>x<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0"
     '<|tool_call_argument_begin|>{"city": "Paris"}<|tool_call_end|><|tool_calls_section_end|>', "",
     "x", [PARIS]),
    ("openai", "openai_gptoss", "<|channel|>analysis<|message|>Need weather.<|end|><|start|>assistant<|channel|>commentary"
     ' to=functions.get_weather <|constrain|>json<|message|>{"city":"Paris"}<|call|>', "", "Need weather.", [PARIS]),
    ("openai", "openai_gptoss", "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}<|call|>"
     "<|start|>assistant<|channel|>final<|message|>It is late.<|return|>", "It is late.", "", [("now", {})]),
    ("functiongemma", "", "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>", "", "",
     [PARIS]),
    ("gemma4", "gemma4", '<|channel>thought\nHm\n<channel|><|tool_call>call:get_weather{city:<|"|>Oslo<|"|>,days:3}'
     "<tool_call|>", "", "Hm", [OSLO]),
    ("granite", "granite", "Here is my thought process:\nHm.\nHere is my response:\nOk <|tool_call|>"
     '[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]', "Ok", "Hm.",
     [PARIS, ("now", {})]),
    ("phi4_mini_json", "", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}]<|/tool_call|>', "",
     "", [PARIS]),
    ("phi4_mini_json", "", 'functools[{"name": "get_weather", "arguments": {"city": "Paris"}}]', "", "", [PARIS]),
    ("phi4_mini_json", "", "use functools.partial", "use functools.partial", "", []),
    ("glm45", "qwen3", "<think>Hm</think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
     "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>", "", "Hm", [OSLO]),
    ("qwen3_coder", "", "<tool_call>\n<function=get_weather>\n<parameter=city>\n<b>Oslo</b>\n12\n</parameter>\n"
     "<parameter=days>\n3\n</parameter>\n<parameter=metric>\nTrue\n</parameter>\n</function>\n</tool_call>", "", "",
     [("get_weather", {"city": "<b>Oslo</b>\n12", "days": 3, "metric": True})]),
    ("minimax_m2", "", '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n'
     '<parameter name="days">3</parameter>\n</invoke>\n</minimax:tool_call>', "", "", [OSLO]),
    ("seed_oss", "seed_oss", "<seed:think>Hm</seed:think>\n<seed:tool_call>\n<function=now>\n</function>\n"
     "</seed:tool_call>", "", "Hm", [("now", {})]),
    ("lfm2", "", '<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>Checking.', "Checking.", "", [PARIS]),
    ("lfm2", "", '<|tool_call_start|>[{"name": "now", "arguments": {}, "id": "1"}]<|tool_call_end|>', "", "", [("now", {})]),
    ("nemotron", "", '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Paris"}}]</TOOLCALL>', "", "", [PARIS]),
    ("cohere", "cohere", "<|START_THINKING|>Hm<|END_THINKING|><|START_ACTION|>[\n"
     '    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}\n]<|END_ACTION|>', "", "Hm",
     [PARIS]),
    ("internlm", "", 'Ok<|action_start|><|plugin|>{"name": "get_weather", "parameters": {"city": "Paris"}}<|action_end|>',
     "Ok", "", [PARIS]),
    ("jamba", "", '<tool_calls>[\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n]</tool_calls>', "", "",
     [PARIS]),
    ("json", "", '[{"name": "now", "arguments": {}}]', "", "", [("now", {})]),
    ("", "hunyuan_a13b", "<think>\nHm\n</think>\n<answer>\nYes\n</answer>", "Yes", "Hm", []),
    ("", "cohere", "<|START_THINKING|>Hm<|END_THINKING|><|START_RESPONSE|>Yes<|END_RESPONSE|>", "Yes", "Hm", []),
    ("", "qwen3", "No thoughts, but </think> and <think>.", "No thoughts, but </think> and <think>.", "", []),
    ("", "", "  as it <think> stands <tool_call> \n", "  as it <think> stands <tool_call> \n", "", []),
]  # fmt: skip


@pytest.mark.parametrize(("dialect", "thoughts", "text", "content", "reasoning", "calls"), SAMPLES)
def test_real_samples_whole_and_character_by_character(
    dialect: str, thoughts: str, text: str, content: str, reasoning: str, calls: list[tuple[str, dict[str, object]]]
) -> None:
    whole = parse(parser(dialect, thoughts), text)
    assert gather(whole) == Read(content, reasoning, calls)
    one = parser(dialect, thoughts)
    assert gather([e for char in text for e in one.push(char)] + one.finish()) == Read(content, reasoning, calls)


def test_every_dialect_has_a_sample() -> None:
    assert {sample[0] for sample in SAMPLES} >= set(DIALECTS)
    assert {sample[1] for sample in SAMPLES} >= set(REASONING)
    assert len(DIALECTS) >= 12


# -- the oracle: any chunking gives the same events
def chunked(text: str, cuts: list[int], made: OutputParser) -> list[ParserEvent]:
    points = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    events = [e for i in range(len(points) - 1) for e in made.push(text[points[i] : points[i + 1]])]
    return events + made.finish()


def joined(events: list[ParserEvent]) -> list[ParserEvent]:
    """Neighbouring pieces of one kind as one: a slow and obvious twin of `merged`."""
    result: list[ParserEvent] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content | Reasoning | CallArguments) and type(last) is type(event):
            result[-1] = type(event)(last.text + event.text)  # type: ignore[union-attr]
        else:
            result.append(event)
    return result


@st.composite
def mangled(draw: st.DrawFn) -> tuple[str, str, str]:
    """A sample with a few characters taken out, put in or the end cut off; markers of its dialect thrown in."""
    dialect, thoughts, text, *_ = draw(st.sampled_from(SAMPLES))
    markers = DIALECTS[dialect].markers() if dialect else ("<think>",)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(text)))
        noise = draw(st.sampled_from(["", "{", "}", '"', "\\", ",", "<", "\n", " ", "x", "é", "[", "]", *markers]))
        text = text[:at] + noise + text[at + draw(st.integers(0, 3)) :]
    return dialect, thoughts, text + draw(st.sampled_from(["", "", text, " end"]))


@settings(max_examples=800, deadline=None)
@given(mangled(), st.lists(st.integers(0, 10_000), max_size=12), st.booleans(), st.sampled_from([2**20, 60]))
def test_any_chunking_gives_the_events_of_the_whole(
    case: tuple[str, str, str], cuts: list[int], thinking: bool, limit: int
) -> None:
    dialect, thoughts, text = case
    whole = parse(parser(dialect, thoughts, thinking, limit), text)
    assert joined(chunked(text, cuts, parser(dialect, thoughts, thinking, limit))) == joined(whole)
    read = gather(whole)  # json.loads of each complete call's arguments
    assert all(isinstance(arguments, dict) for _, arguments in read.calls)


# -- broken calls
@pytest.mark.parametrize("sample", [s for s in SAMPLES if s[5]], ids=lambda s: s[0])
def test_a_cut_call_gives_its_text_back(sample: tuple[str, str, str, str, str, list[object]]) -> None:
    """Wherever the text ends: no call is invented, and each character is somewhere (markers of noise aside)."""
    dialect, thoughts, text, *_, calls = sample
    for n in range(len(text)):
        read = gather(parse(parser(dialect, thoughts), text[:n]))
        assert read.calls == calls[: len(read.calls)]
        assert len(read.broken) <= 1
        if read.broken:
            assert text[:n].endswith(read.shown[read.shown.index(read.broken[0]) :])


@pytest.mark.parametrize(
    "bad",
    [
        '<tool_call>{"name": "now", "arguments": {"a": }}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": "\\u12x4"}}</tool_call>',
        '<tool_call>{"name": "now", "arguments": {"a": 1},}</tool_call>',
        '<tool_call>{"arguments": {}}</tool_call>',
        "<tool_call>I would call it.</tool_call>",
        '<tool_call>{"name": "x\\u0000y"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": ' + '{"a":' * 500,
    ],
)
def test_a_malformed_call_is_text(bad: str) -> None:
    read = gather(parse(parser("hermes"), f"Hm {bad} end"))
    assert read.calls == []
    assert read.shown == f"Hm {bad} end"


def test_a_marker_that_the_end_has_cut_is_no_text() -> None:
    for n in range(len("</tool_call>")):
        read = gather(parse(parser("hermes"), '<tool_call>{"name": "now"}\n' + "</tool_call>"[:n]))
        assert (read.content, read.calls) == ("", [("now", {})])
    assert gather(parse(parser("hermes"), '<tool_call>{"name": "now"}</tool')).content == ""
    assert gather(parse(parser("hermes"), '<tool_call>{"name": "now"}</toolbox')).content == "</toolbox"


def test_the_text_goes_on_after_a_broken_call() -> None:
    read = gather(parse(parser("hermes"), '<tool_call>oops<tool_call>{"name": "now"}</tool_call>'))
    assert (read.content, read.calls) == ("<tool_call>oops", [("now", {})])


def test_arguments_are_repaired_where_the_meaning_is_plain() -> None:
    text = '<tool_call>{"name": "now", "arguments": {"a": "one\ntwo\t\\d \\\'"}}</tool_call>'
    assert gather(parse(parser("hermes"), text)).calls == [("now", {"a": "one\ntwo\t\\d \\'"})]


def test_lone_surrogates_never_reach_the_wire() -> None:
    for dialect, text in (
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'),
        ("pythonic", '[now(a="é\\ud800")]'),
    ):
        events = parse(parser(dialect), text)
        "".join(e.text for e in events if isinstance(e, CallArguments)).encode()
        assert gather(events).calls[0][1]["a"][-1] == "\ud800"  # type: ignore[index]


def test_arguments_come_in_pieces_and_the_name_once() -> None:
    made = parser("hermes")
    text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    steps = [made.push(char) for char in text]
    assert sum(isinstance(e, CallStart) for step in steps for e in step) == 1
    assert sum(any(isinstance(e, CallArguments) for e in step) for step in steps) > 10
    pieces = "".join(e.text for step in steps for e in step if isinstance(e, CallArguments))
    assert pieces == '{"city": "Paris"}'


ENDLESS = {
    "json string": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "', "x"),
    "json space": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": ', " "),
    "json members": ("hermes", '<tool_call>{"name": "now", "arguments": {"b": 1', ', "a": "\\n"'),
    "number": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1', "0"),
    "tag value": ("qwen3_coder", "<tool_call><function=get_weather><parameter=city>", "</parameter"),
    "python": ("pythonic", "[get_weather(city=", "'a' "),
    "brackets": ("pythonic", "[get_weather(city=", "["),
    "header": ("deepseek_v3", "<｜tool▁call▁begin｜>", "<｜tool▁sep"),
    "triggers": ("hermes", "", "<tool_call>"),
    "harmony": ("openai", "", "<|channel|>"),
    "half markers": ("hermes", "", "<tool_cal"),
    "space": ("hermes", "<tool_call>", "\n"),
}


@pytest.mark.parametrize("case", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_calls_take_linear_time_and_bounded_memory(case: tuple[str, str, str]) -> None:
    dialect, start, more = case
    text = start + more * (200_000 // len(more))

    def seconds(n: int) -> float:
        made = parser(dialect, limit=50_000)
        begun = time.process_time()
        events = [e for i in range(0, n, 7) for e in made.push(text[i : min(i + 7, n)])] + made.finish()
        took = time.process_time() - begun
        read = gather(events)
        assert read.calls == []
        assert len(read.content) + sum(map(len, read.broken)) >= n // 8
        assert all(len(text) <= 50_000 for text in read.broken)
        return took

    tries = ((seconds(200_000), max(seconds(25_000), 0.02)) for _ in range(4))  # a neighbour may slow one of them
    assert any(long < 8 * short * 3 for long, short in tries)  # quadratic: 64 times


# -- the table
def test_markers_of_a_dialect_do_not_contain_each_other() -> None:
    for row in DIALECTS.values():
        Markers(row.triggers + row.noise)
    for thoughts in REASONING.values():
        if not thoughts.harmony:
            Markers((thoughts.open, thoughts.close))


TEMPLATES = [
    ("{% if tools %}<tool_call>{% endif %}<think></think>", "hermes", "qwen3"),
    ("{{ tools }}[AVAILABLE_TOOLS][TOOL_CALLS]", "mistral", None),
    ("{{ tools }}<|python_tag|> ipython <|eom_id|>", "llama3_json", None),
    ("{{ tools }} [func_name1(params_name1=params_value1)]", "pythonic", None),
    ("{{ tools }}<｜tool▁calls▁begin｜><｜tool▁sep｜></think>", "deepseek_v3", "qwen3"),
    ("{{ tools }}<tool_call>{{ x }}<arg_key></think>", "glm45", "qwen3"),
    ("{{ tools }}<tool_call><function=x><parameter=y>", "qwen3_coder", None),
    ("{{ tools }}<|tool_calls_section_begin|><think>", "kimi_k2", "kimi_k2"),
    ("{{ tools }}<|channel|>analysis<|message|>", "openai", "openai_gptoss"),
    ("{{ tools }}<start_function_call>", "functiongemma", None),
    ("{{ tools }}<|turn>model<|tool_call>call:<tool_call|><|channel>thought", "gemma4", "gemma4"),
    ("{{ tools }}<|tool_list_start|>", "lfm2", None),
    ("{{ tools }}tool_declare<|im_middle|>", "kimi_k2", None),
    ("{{ tools }}<TOOLCALL>", "nemotron", None),
    ("{{ tools }}<|tool_call|>", "granite", None),
    ("{{ tools }}<|tool_call|><|/tool_call|>", "phi4_mini_json", None),
    ("{{ tools }} strange", "json", None),
    ("{{ messages }}", "hermes", None),
    (None, "hermes", None),
]


@pytest.mark.parametrize(("template", "dialect", "thoughts"), TEMPLATES)
def test_the_template_shows_the_dialect(template: str | None, dialect: str, thoughts: str | None) -> None:
    assert dialect_of(template).name == dialect
    found = reasoning_of(template)
    assert (found.name if found else None) == thoughts


def test_a_chosen_parser_goes_before_the_template() -> None:
    assert dialect_of("{{ tools }}<tool_call>", "mistral").name == "mistral"
    assert dialect_of("", "qwen25").name == "hermes"
    assert reasoning_of("<think></think>", "none") is None
    chosen = reasoning_of("", "deepseek_r1")
    assert chosen is not None
    assert chosen.assumed
    with pytest.raises(InvalidRequest, match=r"tool_call_parser 'nope'.*hermes"):
        dialect_of("", "nope")
    with pytest.raises(InvalidRequest, match="reasoning_parser 'nope'"):
        reasoning_of("", "nope")


def test_thoughts_that_the_prompt_opened() -> None:
    assert gather(parse(parser("hermes", "qwen3", thinking=True), "so\n</think>\n\nYes")) == Read("Yes", "so")
    assert gather(parse(parser("", "qwen3", thinking=True), "cut in")) == Read("", "cut in")
