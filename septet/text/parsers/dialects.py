"""The table of dialects: how each family of models writes tool calls and thoughts, and how to tell from its template.

Names are vLLM's (`--tool-call-parser`, `--reasoning-parser`). Adding a family is adding a row here. Formats: the
families' own chat templates and model cards.
"""

# ruff: noqa: RUF001 (DeepSeek's markers have full-width bars)

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from septet.errors import InvalidRequest
from septet.text.parsers.forms import BracketForm, HeaderForm, JsonForm, PythonForm, TagForm

if TYPE_CHECKING:
    from septet.text.parsers.forms import Form

T = TypeVar("T")
__all__ = ["DIALECTS", "REASONING", "Dialect", "ReasoningDialect", "dialect_of", "reasoning_of", "takes_tools"]


@dataclass(frozen=True, slots=True)
class Bound:
    """A call as a constraint writes it: begin.format(name), the arguments, end. From `trigger` on it is binding.

    `listed`: (open, separator, close) of a block of several calls. `form`: how arguments are written, as `CallForm` of
    the grammar room says; None: JSON.
    """

    trigger: str
    begin: str
    end: str = ""
    listed: tuple[str, str, str] | None = None
    form: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """`triggers` begin a call in free text; `noise` are markers that mean nothing by themselves and are left out."""

    name: str
    form: Form
    triggers: tuple[str, ...] = ()
    close: tuple[str, ...] = ()  # taken after a call where one stands there
    noise: tuple[str, ...] = ()
    bare: str = ""  # an answer that starts with one of these characters may be a call without any trigger
    harmony: bool = False  # channels instead of triggers: `harmony.py` reads it all
    bound: tuple[Bound, ...] = ()  # the ways in which a constraint lets it be written; none = it can't be bound
    around: tuple[str, str] = ("", "")  # section markers around all calls of an answer
    between: str = ""  # what has to stand between two calls

    @property
    def watched(self) -> bool:
        """Whether every call of a free answer is held to its schema: none can begin without a bound trigger."""
        triggers = [bound.trigger[0] for bound in self.bound]
        return bool(triggers) and not self.harmony and all(char in triggers for char in self.bare)

    def markers(self) -> tuple[str, ...]:
        own = (*self.triggers, *self.close, *self.noise, *filter(None, self.around))
        return tuple(dict.fromkeys(own + (HARMONY_MARKERS if self.harmony else ())))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningDialect:
    """Thoughts between two markers at the start of an answer."""

    name: str
    open: str
    close: str
    assumed: bool = False  # an answer begins with thoughts even where nothing opens them
    ends_at_call: bool = False  # a tool call's trigger ends the thoughts as well
    noise: tuple[str, ...] = ()
    harmony: bool = False

    def markers(self) -> tuple[str, ...]:
        return HARMONY_MARKERS if self.harmony else (self.open, self.close, *self.noise)

    def framed(self) -> tuple[str, str]:
        """How thoughts begin and end at the start of an answer, up to where the rest begins."""
        return HARMONY_THOUGHTS if self.harmony else (self.open, self.close)


HARMONY_THOUGHTS = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
HARMONY_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")
_JSON = JsonForm()
_HERMES = (Bound("<tool_call>", '<tool_call>\n{{"name": "{name}", "arguments": ', "}\n</tool_call>"),)


def _gemma(open: str, close: str, quote: str) -> Bound:
    """call:name{key:value}: bare keys, strings between `quote`s."""
    form = {"key_close": ":", "separator": ",", "marks": (quote, quote)}
    return Bound(open, open + "call:{name}{{", "}" + close, form=form)


def _listed(open: str, close: str) -> Bound:
    """JSON objects in a list."""
    return Bound(open.strip(), '{{"name": "{name}", "arguments": ', "}", (open + "[", ", ", "]" + close))


_TO_FUNCTIONS = "<|channel|>commentary to=functions."
_PYTHON = {"key_close": "=", "separator": ", "}
_PARAMETERS = {
    "key_open": "<parameter=", "key_close": ">\n", "value_close": "</parameter>", "rest": "\n", "marks": ("", ""),
}  # fmt: skip
_QWEN_CODER = TagForm(
    name_open="<function=", name_close=">", key_open="<parameter=", key_close=">",
    value_open="", value_close="</parameter>", end="</function>",
)  # fmt: skip
_GLM = TagForm(
    name_open="", name_close="", key_open="<arg_key>", key_close="</arg_key>",
    value_open="<arg_value>", value_close="</arg_value>", end="</tool_call>",
)  # fmt: skip
_MINIMAX = TagForm(
    name_open="", name_close='">', key_open='<parameter name="', key_close='">',
    value_open="", value_close="</parameter>", end="</invoke>",
)  # fmt: skip

_ROWS = (
    Dialect(
        name="hermes", form=_JSON, triggers=("<tool_call>",), close=("</tool_call>",), bound=_HERMES
    ),  # and Qwen 2.5 and 3
    Dialect(
        name="llama3_json", form=JsonForm((";",)), triggers=("<|python_tag|>",), bare="{", between="; ",
        bound=(Bound('{"name": "', '{{"name": "{name}", "parameters": ', "}"),),
    ),
    Dialect(
        name="pythonic", form=PythonForm(), triggers=("<|python_start|>",), close=("<|python_end|>",), bare="[",
        bound=(Bound("<|python_start|>", "{name}(", ")", ("<|python_start|>[", ", ", "]<|python_end|>"), _PYTHON),),
    ),  # Llama 3.2 and 4, ToolACE
    Dialect(
        name="functionary", form=HeaderForm((">",)), triggers=("<function=",), close=("</function>",),
        bound=(Bound("<function=", "<function={name}>", "</function>"),),
    ),  # Llama 3.1's custom calls as well
    Dialect(
        name="mistral", form=HeaderForm(("[ARGS]",), r"\s*([^\s\[]+)\s*(?:\[CALL_ID\].*)?", or_json=True),
        triggers=("[TOOL_CALLS]",),
        bound=(
            Bound("[TOOL_CALLS]", "[TOOL_CALLS]{name}[ARGS]"),
            _listed("[TOOL_CALLS]", ""),
            _listed("[TOOL_CALLS] ", ""),
        ),
    ),
    Dialect(
        name="deepseek_v3", form=HeaderForm(("<｜tool▁sep｜>",), fence=True), triggers=("<｜tool▁call▁begin｜>",),
        close=("<｜tool▁call▁end｜>",), noise=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
        bound=(Bound("<｜tool▁call▁begin｜>", "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),),
        around=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),  # R1 and V3.1 too
    Dialect(
        name="kimi_k2", form=HeaderForm(("<|tool_call_argument_begin|>",), r"\s*(?:functions\.)?([^\s:]+)(?::\d+)?\s*"),
        triggers=("<|tool_call_begin|>",), close=("<|tool_call_end|>",),
        noise=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
        bound=(
            Bound(
                "<|tool_call_begin|>", "<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            ),
        ),
        around=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    Dialect(
        name="openai", form=_JSON, harmony=True,
        bound=tuple(
            Bound(_TO_FUNCTIONS, f"{_TO_FUNCTIONS}{{name}} {kind}<|message|>", "<|call|>")
            for kind in ("<|constrain|>json", "json")
        ),
    ),  # gpt-oss
    Dialect(
        name="functiongemma", form=BracketForm(("<escape>",)), triggers=("<start_function_call>",),
        close=("<end_function_call>",), bound=(_gemma("<start_function_call>", "<end_function_call>", "<escape>"),),
    ),
    Dialect(name="gemma4", form=BracketForm(('<|"|>',)), triggers=("<|tool_call>",), close=("<tool_call|>",),
        bound=(_gemma("<|tool_call>", "<tool_call|>", '<|"|>'),),
    ),
    Dialect(
        name="granite", form=_JSON, triggers=("<|tool_call|>", "<tool_call>"), close=("</tool_call>",), bare="[",
        bound=(_listed("<|tool_call|>", ""), *_HERMES),
    ),
    Dialect(
        name="phi4_mini_json", form=_JSON, triggers=("<|tool_call|>", "functools"), close=("<|/tool_call|>",),
        bound=(_listed("<|tool_call|>", "<|/tool_call|>"),),
    ),
    Dialect(
        name="glm45", form=_GLM, triggers=("<tool_call>",),
        bound=(
            Bound("<tool_call>", "<tool_call>{name}\n", "</tool_call>", form={
                "key_open": "<arg_key>", "key_close": "</arg_key>\n<arg_value>", "value_close": "</arg_value>",
                "rest": "\n", "marks": ("", ""),
            }),
        ),
    ),
    Dialect(name="qwen3_coder", form=_QWEN_CODER, triggers=("<tool_call>",), close=("</tool_call>",),
        bound=(
            Bound("<tool_call>", "<tool_call>\n<function={name}>\n", "</function>\n</tool_call>", form=_PARAMETERS),
        ),
    ),
    Dialect(
        name="minimax_m2", form=_MINIMAX, triggers=('<invoke name="',),
        noise=("<minimax:tool_call>", "</minimax:tool_call>"),
        bound=(
            Bound('<invoke name="', '<invoke name="{name}">\n', "</invoke>", form={
                "key_open": '<parameter name="', "key_close": '">', "value_close": "</parameter>", "rest": "\n",
                "marks": ("", ""),
            }),
        ),
    ),
    Dialect(
        name="seed_oss", form=_QWEN_CODER, triggers=("<seed:tool_call>",), close=("</seed:tool_call>",),
        bound=(
            Bound(
                "<seed:tool_call>", "<seed:tool_call>\n<function={name}>\n", "</function>\n</seed:tool_call>",
                form={**_PARAMETERS, "key_close": ">"},
            ),
        ),
    ),
    Dialect(name="lfm2", form=PythonForm(), triggers=("<|tool_call_start|>",), close=("<|tool_call_end|>",),
        bound=(
            Bound("<|tool_call_start|>", "{name}(", ")", ("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"), _PYTHON),
        ),
    ),
    Dialect(
        name="cohere", form=_JSON, triggers=("<|START_ACTION|>",), close=("<|END_ACTION|>",),
        bound=(
            Bound(
                "<|START_ACTION|>", '{{"tool_call_id": "0", "tool_name": "{name}", "parameters": ', "}",
                ("<|START_ACTION|>[", ", ", "]<|END_ACTION|>"),
            ),
        ),
    ),
    Dialect(
        name="internlm", form=_JSON, triggers=("<|action_start|><|plugin|>", "<|action_start|> <|plugin|>"),
        close=("<|action_end|>",),
        bound=tuple(
            Bound(
                f"<|action_start|>{space}<|plugin|>",
                f'<|action_start|>{space}<|plugin|>\n{{{{"name": "{{name}}", "parameters": ', "}<|action_end|>",
            )
            for space in (" ", "")
        ),
    ),
    Dialect(name="nemotron", form=_JSON, triggers=("<TOOLCALL>",), close=("</TOOLCALL>",),
        bound=(_listed("<TOOLCALL>", "</TOOLCALL>"),),
    ),
    Dialect(name="jamba", form=_JSON, triggers=("<tool_calls>",), close=("</tool_calls>",),
        bound=(_listed("<tool_calls>", "</tool_calls>"),),
    ),  # and Hunyuan
    Dialect(
        name="json", form=JsonForm((";",)), triggers=("<tool_call>",), close=("</tool_call>",), bare="{[",
        bound=_HERMES,
    ),  # where the template takes tools but shows no known way
)  # fmt: skip
DIALECTS = {row.name: row for row in _ROWS}
_ALIASES = {
    "qwen": "hermes", "qwen25": "hermes", "qwen3": "hermes", "llama3": "llama3_json", "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic", "deepseek_v31": "deepseek_v3", "deepseek_r1": "deepseek_v3",
    "granite-20b-fc": "granite", "granite4": "hermes", "qwen3_xml": "qwen3_coder", "minimax": "minimax_m2",
    "hunyuan_a13b": "jamba", "phi4": "phi4_mini_json", "gpt_oss": "openai", "gptoss": "openai", "harmony": "openai",
    "xlam": "json", "glm47": "glm45", "gemma": "functiongemma", "functionary_v3": "functionary",
}  # fmt: skip

_THOUGHTS = (
    ReasoningDialect(name="qwen3", open="<think>", close="</think>"),  # and whoever else writes think tags
    ReasoningDialect(name="deepseek_r1", open="<think>", close="</think>", assumed=True),
    ReasoningDialect(name="kimi_k2", open="<think>", close="</think>", ends_at_call=True),
    ReasoningDialect(
        name="hunyuan_a13b", open="<think>", close="</think>", noise=("<answer>\n", "\n</answer>")
    ),
    ReasoningDialect(name="mistral", open="[THINK]", close="[/THINK]"),
    ReasoningDialect(name="granite", open="Here is my thought process:", close="Here is my response:"),
    ReasoningDialect(name="seed_oss", open="<seed:think>", close="</seed:think>"),
    ReasoningDialect(
        name="cohere", open="<|START_THINKING|>", close="<|END_THINKING|>",
        noise=("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ),
    ReasoningDialect(name="gemma4", open="<|channel>thought\n", close="<channel|>"),
    ReasoningDialect(name="openai_gptoss", open="", close="", harmony=True),
)  # fmt: skip
REASONING = {row.name: row for row in _THOUGHTS}
_REASONING_ALIASES = {
    "think": "qwen3", "deepseek_v3": "qwen3", "glm45": "qwen3", "olmo3": "qwen3", "minimax_m2": "qwen3",
    "step3": "deepseek_r1", "qwq": "deepseek_r1", "openai": "openai_gptoss", "gpt_oss": "openai_gptoss",
    "harmony": "openai_gptoss", "magistral": "mistral",
}  # fmt: skip

# (all of these stand in the template, dialect), the most telling first
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "<|message|>"), "openai"),
    (("<start_function_call>",), "functiongemma"),
    (("<|tool_call>",), "gemma4"),
    (("<｜tool▁sep｜>",), "deepseek_v3"),
    (("<|tool_calls_section_begin|>",), "kimi_k2"),
    (("<|im_middle|>", "tool_declare"), "kimi_k2"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<arg_key>",), "glm45"),
    (("<minimax:tool_call>",), "minimax_m2"),
    (("<seed:tool_call>",), "seed_oss"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<|tool_call_start|>",), "lfm2"),
    (("<|tool_list_start|>",), "lfm2"),
    (("<|START_ACTION|>",), "cohere"),
    (("<TOOLCALL>",), "nemotron"),
    (("<|action_start|>",), "internlm"),
    (("<|/tool_call|>",), "phi4_mini_json"),
    (("<|tool_call|>",), "granite"),
    (("<tool_calls>",), "jamba"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>",), "pythonic"),
    (("func_name1(",), "pythonic"),
    (("<function=",), "functionary"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|eom_id|>",), "llama3_json"),
)
_THOUGHT_SIGNS = (
    (("<|channel|>", "<|message|>"), "openai_gptoss"),
    (("<seed:think>",), "seed_oss"),
    (("<|START_THINKING|>",), "cohere"),
    (("<|channel>",), "gemma4"),
    (("[THINK]",), "mistral"),
    (("Here is my thought process",), "granite"),
    (("<|tool_calls_section_begin|>", "<think>"), "kimi_k2"),
    (("<think>", "<answer>"), "hunyuan_a13b"),
    (("</think>",), "qwen3"),
)


def takes_tools(template: str | None) -> bool:
    """Whether a chat template writes the tools it is given."""
    return template is not None and re.search(r"\btools\b", template) is not None


def dialect_of(template: str | None, chosen: str = "auto") -> Dialect:
    """The dialect of a template's text, or the chosen one. InvalidRequest for a name that is not in the table."""
    if chosen != "auto":
        return _named(DIALECTS, _ALIASES, chosen, "tool_call_parser")
    if not takes_tools(template):
        return DIALECTS["hermes"]  # `fallback.py` shows it to the model
    found = _first(_SIGNS, template or "")
    return DIALECTS[found or "json"]


def reasoning_of(template: str | None, chosen: str = "auto") -> ReasoningDialect | None:
    """How the model thinks, None if it does not (or `chosen` is "none")."""
    if chosen == "none":
        return None
    if chosen != "auto":
        return _named(REASONING, _REASONING_ALIASES, chosen, "reasoning_parser")
    found = _first(_THOUGHT_SIGNS, template or "")
    return REASONING[found] if found else None


def _first(signs: tuple[tuple[tuple[str, ...], str], ...], template: str) -> str | None:
    return next((name for needles, name in signs if all(needle in template for needle in needles)), None)


def _named(table: dict[str, T], aliases: dict[str, str], name: str, param: str) -> T:
    found = table.get(aliases.get(name, name))
    if found is None:
        known = ", ".join(sorted({*table, *aliases}))
        raise InvalidRequest(f"unknown {param} {name[:80]!r}; known are auto, {known}", param=param)
    return found
