"""Function calling and reasoning through the chat API over a scripted engine: fields, shapes, streams, constraints."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from septet import LLM
from septet.engine.messages import Update
from septet.errors import InvalidRequest
from septet.request import SamplingParams
from septet.serve.app import Service, Settings, create_app
from septet.session.choice import Choice
from septet.session.events import TextDelta
from septet.session.reading import Reading, ReplyFormat
from septet.session.session import Limits, Session
from septet.structured import Structured
from septet.text.parsers.fallback import conversation, system_text
from septet.text.parsers.tools import Tool, ToolChoice
from tests.fakes import ByteTokenizer, FakeClient, session

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now"}},
]
ASK = {"messages": [{"role": "user", "content": "Weather in Paris?"}]}
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>{"name": "now"}</tool_call>'


class NativeTemplate:
    """A template that writes tools itself, in the Hermes way, and opens thoughts if asked to."""

    source = "{{ tools }} <tool_call> <think> </think>"

    def render(self, messages: Any, *, tools: Any = None, think: bool = False, **options: Any) -> str:
        return json.dumps([tools, messages]) + ("<think>\n" if think else "")


class Teachable(FakeClient):
    def teach(self, vocabulary: Any) -> None:
        self.taught = vocabulary


def made(client: FakeClient, template: Any = None, parser: str = "auto", thoughts: str = "auto") -> Session:
    reply_format = ReplyFormat.of(
        template.source if template else None,
        ByteTokenizer(),  # type: ignore[arg-type]
        tool_call_parser=parser,
        reasoning_parser=thoughts,
    )
    changes = {"template": template} if template else {}
    return session(client, limits=Limits(20_000, 257), reply_format=reply_format, **changes)


def post(body: dict[str, Any], client: FakeClient, *how: Any, **more: Any) -> httpx.Response:
    app = create_app(Service(made(client, *how, **more), Settings()))

    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost:8000") as http:
            return await http.post("/v1/chat/completions", json=body)

    return asyncio.run(go())


def choice_of(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def deltas_of(answer: httpx.Response) -> list[dict[str, Any]]:
    lines = [line[6:] for line in answer.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def joined(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream put together as a client does; the name and id of a call may come once only."""
    content, reasoning, calls = "", "", {}
    for delta in (d["delta"] for d in deltas):
        content += delta.get("content") or ""
        reasoning += delta.get("reasoning") or ""
        assert delta.get("reasoning") == delta.get("reasoning_content")
        for piece in delta.get("tool_calls", []):
            if piece["index"] not in calls:
                calls[piece["index"]] = {"id": piece["id"], "name": piece["function"]["name"], "arguments": ""}
            else:
                assert set(piece) == {"index", "function"}
                assert set(piece["function"]) == {"arguments"}
            calls[piece["index"]]["arguments"] += piece["function"]["arguments"]
    return {"content": content, "reasoning": reasoning, "calls": calls, "reason": deltas[-1]["finish_reason"]}


# -- answers ----------------------------------------------------------------------------------------------------------
def test_a_call_in_a_whole_answer() -> None:
    choice = choice_of(post({**ASK, "tools": TOOLS}, Teachable(CALL, eos=True)))
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me see."
    [call] = choice["message"]["tool_calls"]
    assert call.pop("id").startswith("call_")
    assert call == {"type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}


@pytest.mark.parametrize("n_tokens", [1, 5, 1000])
@pytest.mark.parametrize("parser", ["auto", "json"])
def test_a_streamed_answer_is_the_whole_one(n_tokens: int, parser: str) -> None:
    client = Teachable(CALL + NOW, eos=True)
    client.chunk = n_tokens
    told = joined(deltas_of(post({**ASK, "tools": TOOLS, "stream": True}, client, parser=parser)))
    assert told["content"] == "Let me see."
    assert told["reason"] == "tool_calls"
    assert [(c["name"], c["arguments"]) for c in told["calls"].values()] == [
        ("get_weather", '{"city": "Paris"}'),
        ("now", "{}"),
    ]
    assert len({c["id"] for c in told["calls"].values()}) == 2


def test_arguments_are_streamed_while_they_are_written() -> None:
    deltas = deltas_of(post({**ASK, "tools": TOOLS, "stream": True}, Teachable(CALL, eos=True)))
    assert sum("tool_calls" in d["delta"] for d in deltas) > 8


def test_without_a_constraint_a_call_is_told_when_it_is_whole() -> None:
    """Nothing keeps the model from breaking it, and a client can't unsee arguments."""
    bare = "[get_weather(city='Paris')]"
    good = deltas_of(post({**ASK, "tools": TOOLS, "stream": True}, Teachable(bare, eos=True), parser="pythonic"))
    assert joined(good)["calls"][0]["arguments"] == '{"city": "Paris"}'
    assert sum("tool_calls" in d["delta"] for d in good) == 1
    cut = "[get_weather(city='Par"
    told = joined(deltas_of(post({**ASK, "tools": TOOLS, "stream": True}, Teachable(cut, eos=True), parser="pythonic")))
    assert told == {"content": cut, "reasoning": "", "calls": {}, "reason": "stop"}


def test_a_call_cut_by_max_tokens_is_text_and_length() -> None:
    choice = choice_of(post({**ASK, "tools": TOOLS, "max_tokens": 70}, Teachable(CALL, eos=True)))
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == CALL[:70]
    assert "tool_calls" not in choice["message"]


def test_one_call_only() -> None:
    client = Teachable(NOW * 3 + "x" * 500, eos=True)
    choice = choice_of(post({**ASK, "tools": TOOLS, "parallel_tool_calls": False}, client))
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert len(client.aborted) == 1  # the rest is never generated
    assert len(choice_of(post({**ASK, "tools": TOOLS}, Teachable(NOW * 3, eos=True)))["message"]["tool_calls"]) == 3


def test_without_tools_or_with_none_nothing_is_parsed() -> None:
    for body in (ASK, {**ASK, "tools": TOOLS, "tool_choice": "none"}):
        choice = choice_of(post(body, Teachable(CALL, eos=True)))
        assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_stop_strings_and_n_and_logprobs_work_beside_calls() -> None:
    body = {**ASK, "tools": TOOLS, "n": 3, "logprobs": True, "stop": ["</tool_call>"]}
    for choice in post(body, Teachable(CALL, eos=True)).json()["choices"]:
        assert choice["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
        assert len(choice["logprobs"]["content"]) == len(CALL)


# -- reasoning --------------------------------------------------------------------------------------------------------
THOUGHT = "<think>\nHm, Paris.\n</think>\n\nIt rains."


def test_thoughts_are_told_apart() -> None:
    answer = post(ASK, Teachable(THOUGHT, eos=True), NativeTemplate())
    message = choice_of(answer)["message"]
    assert (message["content"], message["reasoning"]) == ("It rains.", "Hm, Paris.")
    assert message["reasoning_content"] == "Hm, Paris."
    tokens = answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
    assert len("Hm, Paris.") <= tokens <= len(THOUGHT) - len("It rains.")
    told = joined(deltas_of(post({**ASK, "stream": True}, Teachable(THOUGHT, eos=True), NativeTemplate())))
    assert (told["content"], told["reasoning"]) == ("It rains.", "Hm, Paris.")


def test_thoughts_that_the_template_opened_and_thoughts_left_out() -> None:
    body = {**ASK, "chat_template_kwargs": {"think": True}}
    message = choice_of(post(body, Teachable("Hm</think>Yes", eos=True), NativeTemplate()))["message"]
    assert (message["content"], message["reasoning"]) == ("Yes", "Hm")
    quiet = choice_of(post({**body, "include_reasoning": False}, Teachable("Hm</think>Yes"), NativeTemplate()))
    assert quiet["message"] == {"role": "assistant", "content": "Yes", "refusal": None}
    off = choice_of(post(ASK, Teachable(THOUGHT), NativeTemplate(), thoughts="none"))
    assert off["message"]["content"] == THOUGHT


def test_a_budget_ends_the_thoughts() -> None:
    """The engine gets a second request: all so far, the end of the thoughts, and what is left of max_tokens."""
    replies = iter(["<think>" + "so " * 100, "It rains."])
    client = Teachable(lambda request: next(replies), eos=True)
    body = {**ASK, "thinking_token_budget": 20, "max_tokens": 90, "seed": 5}
    answer = post(body, client, NativeTemplate())
    message = choice_of(answer)["message"]
    assert message["content"] == "It rains."
    assert message["reasoning"].startswith("so so")
    first, second = client.seen
    said = bytes(second.tokens[len(first.tokens) :]).decode()
    assert said.endswith("\n</think>\n\n")
    assert len(said) <= len("<think>") + 20 + len("\n</think>\n\n")
    assert second.params.max_tokens == 90 - len(said)
    assert second.params.seed == first.params.seed == 5
    assert second.id != first.id
    assert client.aborted == [first.id]
    assert answer.json()["usage"]["completion_tokens"] == len(said) + len("It rains.") + 1


def test_a_budget_with_no_token_left_behind_it() -> None:
    client = Teachable("<think>" + "so " * 100)
    choice = choice_of(post({**ASK, "thinking_token_budget": 20, "max_tokens": 30}, client, NativeTemplate()))
    assert choice["finish_reason"] == "length"
    assert len(client.seen) == 1


def test_a_budget_needs_a_model_that_thinks() -> None:
    error = post({**ASK, "thinking_token_budget": 5}, Teachable("x")).json()["error"]
    assert error["param"] == "thinking_token_budget"


# -- prompts ----------------------------------------------------------------------------------------------------------
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather in Paris and Oslo?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
        {"id": "b", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
    ]},
    {"role": "tool", "tool_call_id": "a", "content": "rain"},
    {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "snow"}]},
]  # fmt: skip


def prompt_of(client: FakeClient) -> str:
    return bytes(client.seen[0].tokens).decode()


def test_a_template_without_tools_gets_them_as_text() -> None:
    client = Teachable("fine", eos=True)
    choice_of(post({"messages": HISTORY, "tools": TOOLS}, client))
    calls = [f'<tool_call>\n{{"name": "get_weather", "arguments": {{"city": "{c}"}}}}\n</tool_call>' for c in ("Paris", "Oslo")]  # fmt: skip  # noqa: E501
    results = [f"<tool_response>\n{text}\n</tool_response>" for text in ("rain", "snow")]
    assert prompt_of(client) == "".join(
        [
            "[system]" + system_text([Tool("get_weather", "Weather", SCHEMA), Tool("now")]),
            "[user]Weather in Paris and Oslo?",
            "[assistant]" + "\n".join(calls),
            "[user]" + "\n".join(results),
            "[assistant]",
        ]
    )


def test_the_systems_own_text_comes_before_the_tools() -> None:
    system = {"role": "system", "content": "Be kind."}
    [first, _] = conversation([system, {"role": "user", "content": "hi"}], [Tool("now")])
    assert first["content"] == "Be kind.\n\n" + system_text([Tool("now")])
    assert json.dumps(Tool("now").as_json()) in first["content"]
    assert system["content"] == "Be kind."


def test_a_template_with_tools_gets_them_as_they_are() -> None:
    client = Teachable("fine", eos=True)
    choice_of(post({"messages": HISTORY, "tools": TOOLS}, client, NativeTemplate()))
    tools, messages = json.loads(prompt_of(client))
    assert [tool["function"]["name"] for tool in tools] == ["get_weather", "now"]
    assert messages[1]["tool_calls"] == HISTORY[1]["tool_calls"]
    assert messages[2] == HISTORY[2]


def test_tool_choice_none_hides_the_tools() -> None:
    client = Teachable("fine", eos=True)
    choice_of(post({**ASK, "tools": TOOLS, "tool_choice": "none"}, client))
    assert "get_weather" not in prompt_of(client)
    assert client.seen[0].params.structured is None


# -- constraints ------------------------------------------------------------------------------------------------------
def bound(**body: Any) -> dict[str, Any] | None:
    client = Teachable(CALL, eos=True)
    choice_of(post({**ASK, "tools": TOOLS, **body}, client))
    structured = client.seen[0].params.structured
    assert structured is None or structured.kind == "structural_tag"
    return None if structured is None else json.loads(structured.spec)


def test_auto_is_free_until_a_call_begins() -> None:
    spec = bound()
    assert spec is not None
    assert spec["triggers"] == ["<tool_call>"]
    assert spec["structures"][0] == {
        "begin": '<tool_call>\n{"name": "get_weather", "arguments": ',
        "schema": SCHEMA,
        "end": "}\n</tool_call>",
        "fallback": True,
    }
    assert len(spec["structures"]) == 2
    assert not spec.get("at_least_one")


def test_required_and_named() -> None:
    spec = bound(tool_choice="required")
    assert spec is not None
    assert (spec["at_least_one"], spec["stop_after_first"], len(spec["structures"])) == (True, False, 2)
    spec = bound(tool_choice={"type": "function", "function": {"name": "now"}})
    assert spec is not None
    assert (spec["at_least_one"], spec["stop_after_first"]) == (True, True)
    assert [s["begin"] for s in spec["structures"]] == ['<tool_call>\n{"name": "now", "arguments": ']


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", CALL),
        (
            "qwen3_coder",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        ),
        ("pythonic", '<|python_start|>[get_weather(city="Paris")]<|python_end|>'),
        (
            "cohere",
            '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}]',
        ),
    ],
)  # fmt: skip
def test_forced_calls_in_the_models_own_way(name: str, text: str) -> None:
    """What a constraint writes in each dialect is in `test_parsers_bound.py`; here through the API, streamed."""
    body = {**ASK, "tools": TOOLS, "tool_choice": "required", "stream": True}
    told = joined(deltas_of(post(body, Teachable(text, eos=True), parser=name)))
    assert [json.loads(call["arguments"]) for call in told["calls"].values()] == [{"city": "Paris"}]
    assert told["reason"] == "tool_calls"


def test_the_python_api_tells_calls_and_thoughts_apart() -> None:
    async def make() -> Session:
        return made(Teachable("<think>Hm</think>" + CALL + " so", eos=True), template=NativeTemplate())

    with LLM.over(make()) as llm:
        for choice in ("auto", "required", "get_weather"):
            options = {"tools": TOOLS, "tool_choice": choice, "reasoning": True}
            [output] = llm.chat(ASK["messages"], SamplingParams(max_tokens=400), use_tqdm=False, **options)
            [call] = output.outputs[0].tool_calls
            assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
            assert call.id
            assert output.outputs[0].reasoning == "Hm"
        [output] = llm.chat(ASK["messages"], SamplingParams(max_tokens=400), use_tqdm=False)
        assert CALL in output.outputs[0].text
        with pytest.raises(InvalidRequest, match="tool_choice"):
            llm.chat(ASK["messages"], tools=TOOLS, tool_choice="fly", use_tqdm=False)


def test_thoughts_that_a_model_may_open_stay_free_when_a_call_is_forced() -> None:
    client = Teachable("<think>Hm</think>" + CALL, eos=True)
    body = {**ASK, "tools": TOOLS, "tool_choice": "required", "include_reasoning": True}
    choice_of(post(body, client, NativeTemplate()))
    structured = client.seen[0].params.structured
    assert structured is not None
    assert (structured.opening, structured.after) == ("<think>", "</think>")


def test_the_constraint_waits_for_the_end_of_open_thoughts() -> None:
    client = Teachable("Hm</think>" + CALL, eos=True)
    body = {**ASK, "tools": TOOLS, "chat_template_kwargs": {"think": True}}
    choice_of(post(body, client, NativeTemplate()))
    structured = client.seen[0].params.structured
    assert structured is not None
    assert structured.after == "</think>"


def test_strict_is_refused_where_nothing_can_enforce_it() -> None:
    strict = [{"type": "function", "function": {"name": "now", "strict": True}}]
    error = post({**ASK, "tools": strict}, Teachable("x"), parser="pythonic").json()["error"]
    assert "strict" in error["message"]
    assert post({**ASK, "tools": strict}, Teachable("x"), parser="hermes").status_code == 200


# -- fields -----------------------------------------------------------------------------------------------------------
def tool(**function: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f", **function}}]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools", {"tools": {}}), ("tools[0]", {"tools": [1]}), ("tools[0]", {"tools": [{"type": "code"}]}),
        ("tools[0].function.name", {"tools": tool(name="a b")}), ("tools[0].function.name", {"tools": tool(name="")}),
        ("tools[0].function.name", {"tools": tool(name="x" * 65)}), ("tools[0]", {"tools": tool(extra=1)}),
        ("tools[0]", {"tools": tool(parameters={"type": "string"})}), ("tools[0]", {"tools": tool(parameters=[1])}),
        ("tools[0]", {"tools": tool(strict="yes")}), ("tools[0]", {"tools": tool(description=5)}),
        ("tools", {"tools": tool() * 2}), ("tools", {"tools": tool() * 129}),
        ("tool_choice", {"tool_choice": "required"}), ("tool_choice", {"tools": tool(), "tool_choice": "any"}),
        ("tool_choice", {"tools": tool(), "tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ("tool_choice", {"tools": tool(), "tool_choice": {"type": "function"}}),
        ("parallel_tool_calls", {"tools": tool(), "parallel_tool_calls": "no"}),
        ("include_reasoning", {"include_reasoning": 1}), ("thinking_token_budget", {"thinking_token_budget": -1}),
        ("thinking_token_budget", {"thinking_token_budget": "5"}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_named(param: str, body: dict[str, Any]) -> None:
    answer = post({**ASK, **body}, Teachable("x"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def call(**changes: Any) -> dict[str, Any]:
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}, **changes}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "tool", "content": "x"}, {"role": "tool", "content": "x", "tool_call_id": 5},
        {"role": "tool", "tool_call_id": "a"}, {"role": "user", "content": "x", "tool_calls": [call()]},
        {"role": "assistant", "tool_calls": [{}]}, {"role": "assistant", "tool_calls": {}},
        {"role": "assistant", "tool_calls": [call(id=None)]}, {"role": "assistant", "tool_calls": [call()] * 129},
        {"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": "{"})]},
        {"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": "[1]"})]},
        {"role": "assistant", "tool_calls": [call(function={"name": "f", "arguments": "[" * 100_000})]},
        {"role": "assistant", "tool_calls": [call(function={"name": "f f"})]},
        {"role": "assistant", "content": "x", "reasoning": 5},
    ],
)  # fmt: skip
def test_a_wrong_message_is_named(message: dict[str, Any]) -> None:
    answer = post({"messages": [*ASK["messages"], message]}, Teachable("x"))
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith("messages[1]")


def test_tool_choice_and_a_response_format_collide() -> None:
    params = SamplingParams(structured=Structured.json_object())
    with pytest.raises(InvalidRequest, match="tool_choice"):
        made(Teachable()).reply_format.bound(  # type: ignore[union-attr]
            params, Reading(tools=ToolChoice((Tool("f"),), "required")), False
        )


def test_special_tokens_that_are_markers_stay_text() -> None:
    """They are skipped in output otherwise, and the parser would never see them."""

    class Marked(ByteTokenizer):
        vocab_size = 259
        special_ids = frozenset((256, 257, 258))

        def token_bytes(self, token: int) -> bytes:
            return {257: b"<|python_tag|>", 258: b"<|pad|>"}.get(token) or super().token_bytes(token)

    found = ReplyFormat.of("tools <|python_tag|>", Marked())  # type: ignore[arg-type]
    assert found.call_ids == {257}
    assert found.kept_ids(Reading(tools=ToolChoice((Tool("f"),)))) == {257}
    assert found.kept_ids(Reading(reasoning=True)) == frozenset()

    params = SamplingParams(max_tokens=9, seed=1)
    choice = Choice(0, Marked(), params, 1, found.call_ids)  # type: ignore[arg-type]
    [delta] = choice.feed(Update("r", tokens=(257, 65, 258)))
    assert isinstance(delta, TextDelta)
    assert delta.text == "<|python_tag|>A"


def test_the_python_api_takes_tools_as_openai_writes_them() -> None:
    async def prompt(tools: Any) -> str:
        return str((await made(FakeClient()).chat_prompt(ASK["messages"], tools=tools)).text)

    assert system_text([Tool("get_weather", "Weather", SCHEMA), Tool("now")]) in asyncio.run(prompt(TOOLS))
    assert "tools" not in asyncio.run(prompt(None))
    for wrong in ([{}], ["now"], [{"function": {}}], [{"function": {"name": "f", "parameters": 5}}]):
        with pytest.raises(InvalidRequest, match="tools"):
            asyncio.run(prompt(wrong))
