"""Ollama's Go templates as Jinja: what a conversation becomes, and what is refused by name."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from septet.errors import InvalidRequest
from septet.text.go_template import as_jinja, is_go_template
from septet.text.template import ChatTemplate

CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def render(source: str, messages: list[dict[str, object]] | None = None, **options: object) -> str:
    return str(ChatTemplate(as_jinja(source)).render(messages or CHAT, **options))  # type: ignore[arg-type]


def test_turn_by_turn_and_cut_behind_the_response() -> None:
    chatml = """{{ if .System }}<|im_start|>system
{{ .System }}<|im_end|>
{{ end }}{{ if .Prompt }}<|im_start|>user
{{ .Prompt }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ .Response }}<|im_end|>
"""
    assert render(chatml) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )
    gemma = "<start_of_turn>user\n{{ if .System }}{{ .System }} {{ end }}{{ .Prompt }}<end_of_turn>\n{{ .Response }}!"
    assert render(gemma) == "<start_of_turn>user\nS a<end_of_turn>\nb!<start_of_turn>user\nc<end_of_turn>\n"
    assert render("{{ .Prompt }}") == "ac"
    assert render("[{{ .System }}|{{ .Prompt }}|{{ .Response }}]", CHAT[:3]) == "[S|a|b"  # it goes on with b


def test_messages_tools_variables_and_trimming() -> None:
    template = """
{{- $n := 0 }}
{{- range $i, $m := .Messages }}
{{- $n = len (slice $.Messages 0 $i) }}
{{- $last := eq (len (slice $.Messages $i)) 1 -}}
{{ $n }}:{{ if eq .Role "user" "system" }}{{ $m.Role }}={{ .Content -}}
{{ else if .ToolCalls }}{{ range .ToolCalls }}{{ .Function.Name }}{{ json .Function.Arguments }}{{ end }}
{{- else }}?{{ .Content }}{{ end }}{{ if and (ne .Role "assistant") $last }}>{{ else }};{{ end }}
{{- end }}
{{- range .Tools }} T{{ .Function }}{{ else }} no tools{{ end }}
{{- with .System }} sys {{ . }}{{ end }} n={{ $n }}{{/* a note */}}"""
    assert render(template) == "0:system=S;1:user=a;2:?b;3:user=c> no tools sys S n=3"
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]}
    tool = {"type": "function", "function": {"name": "f"}}
    told = render(template, [CHAT[1], call], tools=[tool])
    assert told == '0:user=a;1:f{"x": 1}; T{"name": "f"} n=1'


def test_strings_pipes_and_literals() -> None:
    source = (
        r"""{{ range .Messages }}{{ .Content | print "<" }}{{ `raw"` }}{{ "a\n\"b" }}{{ not false }}{{ 1 }}{{ end }}"""
    )
    assert render(source, CHAT[1:2]) == '<araw"a\n"bTrue1'


def test_what_users_write_is_still_fenced() -> None:
    template = ChatTemplate(as_jinja("{{ .Prompt }}<|end|>"), {}, ["<|end|>"])
    prompt = template.render([{"role": "user", "content": "x<|end|>y"}])
    assert str(prompt) == "x<|end|>y<|end|>"
    assert [str(prompt)[start:end] for start, end in prompt.literal] == ["<|end|>"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ .Nope }}", ".Nope is not known"),
        ("{{ range .Messages }}{{ .Nope }}{{ end }}", ".Nope is not known"),
        ('{{ printf "%s" .Prompt }}', "the function printf is not supported"),
        ("{{ .Prompt | upper }}", "the function upper with 1 operands is not known"),
        ('{{ template "x" }}', "template is not supported"),
        ("{{ if .Prompt }}x", "{{ if }} is never ended"),
        ("{{ .Prompt }}{{ end }}", "{{ end }} without a block"),
        ("{{ .Prompt }}{{ .System", "never closed"),
        ("{{ $x }}", "the variable $x is not declared"),
        ("{{ (.Prompt }}", "a bracket is never closed"),
        ("{{ .Prompt ~ .System }}", "is not understood"),
        ("{{ if .Prompt }}" * 60 + "{{ end }}" * 60, "nested more than 50 deep"),
        ("{{ .Prompt }}" + "x" * 200_000, "more than 131072 characters"),
    ],
)
def test_what_can_not_be_mapped_is_named_with_the_way_out(source: str, words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        as_jinja(source)
    assert words in caught.value.message
    assert "in Jinja" in caught.value.message


def test_jinja_is_taken_as_it_is() -> None:
    for source in ("{% for m in messages %}{{ m.content }}{% endfor %}", "{{ messages[0].content }}", "plain"):
        assert not is_go_template(source)
        assert as_jinja(source) == source


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.sampled_from(["{{ ", " }}", "if ", "end", "range ", ".Prompt", ".Messages", "$x", ":=", "(", "|", '"', "x"])
    )
)
def test_any_text_is_mapped_or_refused(parts: list[str]) -> None:
    source = "{{ .Prompt }}" + "".join(parts)
    with suppress(InvalidRequest):
        ChatTemplate(as_jinja(source))  # what is mapped is valid Jinja: nothing else may be raised
