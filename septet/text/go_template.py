"""Ollama's Go templates as Jinja: what their usual subset means, or a refusal that names what can't be mapped.

Called by the session for a Modelfile's TEMPLATE. A template over `.Messages` is translated as it stands; one over
`.System`, `.Prompt` and `.Response` is applied turn by turn, as Ollama does, the last turn cut behind `.Response`.
Source: Go's text/template and Ollama's docs/template.md. The result is text that `template.py` runs in its sandbox.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["as_jinja", "is_go_template"]

MAX_SOURCE = 2**17
MAX_DEPTH = 50
_ACTION = re.compile(r"\{\{(-(?=\s))?(.*?)((?<=\s)-)?\}\}", re.DOTALL)
_WAY_OUT = "write the template in Jinja, or leave TEMPLATE out to use the model's own"
_TOKEN = re.compile(
    r"""\s*(?:(?P<string>"(?:\\.|[^"\\])*"|`[^`]*`)|(?P<number>-?\d+(?:\.\d+)?)|(?P<assign>:=|=)|(?P<mark>[(),|])"""
    r"""|(?P<word>\$?[A-Za-z_]*\w*(?:\.[A-Za-z_]\w*)+|\$?[A-Za-z_]\w*|\$|\.))"""
)
_FIELDS = {
    "Role": "role",
    "Content": "content",
    "Thinking": "reasoning_content",
    "ToolCalls": "tool_calls",
    "ToolName": "name",
    "ToolCallID": "tool_call_id",
    "Function": "function",
    "Name": "name",
    "Description": "description",
    "Parameters": "parameters",
    "Arguments": "arguments",
    "Type": "type",
    "Properties": "properties",
    "Required": "required",
    "ID": "id",
    "Index": "index",
}
_ROOTS = {
    "Messages": "messages",
    "Tools": "(tools or [])",
    "System": "root.system",
    "Prompt": "root.prompt",
    "Response": "root.response",
    "Suffix": "''",
    "Think": "(enable_thinking | default(false))",
    "IsThinkSet": "(enable_thinking is defined)",
    "ThinkLevel": "(reasoning_effort | default(''))",
}
_PRINTED = "Function|Parameters|Arguments|Properties|Required|Type|Tools|ToolCalls"
_COMPARE = {"ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}


def is_go_template(source: str) -> bool:
    """Go's templates name fields with a leading dot; Jinja has statements."""
    if "{%" in source:
        return False
    if re.search(r"\{\{-?\s*(\.|\$|(if|range|with|else|end|json|template|define|block)\b|/\*)", source):
        return True
    return re.search(r"\{\{[^}]*(?<![\w)\]])\.[A-Z]", source) is not None


def as_jinja(source: str) -> str:
    """The Jinja text of a template of either kind. InvalidRequest for a Go template beyond the subset."""
    if not is_go_template(source):
        return source
    if len(source) > MAX_SOURCE:
        raise _refuse(f"it has more than {MAX_SOURCE} characters")
    nodes = _Parser(source).parse()
    if re.search(r"\.Messages\b", source):
        return _SYSTEM_ONLY + _Writer().block(nodes, "root")
    body = _Writer().block(nodes, "root")
    last = _Writer(cut=True).block(nodes, "root")
    return _TURNS.replace("<body>", body).replace("<last>", last)


_SYSTEM_ONLY = (
    "{%- set root = namespace(system='', prompt='', response='') -%}{%- set v = namespace() -%}"
    "{%- for m in messages if m.role == 'system' -%}"
    "{%- set root.system = root.system ~ ('\n\n' if root.system else '') ~ m.content -%}{%- endfor -%}"
)
_TURNS = (
    "{%- set root = namespace(system='', prompt='', response='') -%}{%- set v = namespace() -%}"
    "{%- macro turn(root) -%}<body>{%- endmacro -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{%- set root.response = m.content -%}"
    "{%- elif m.role == 'system' or m.role == 'user' -%}"
    "{%- if root.response or (m.role == 'system' and root.prompt) -%}{{ turn(root) }}"
    "{%- set root.system = '' -%}{%- set root.prompt = '' -%}{%- set root.response = '' -%}{%- endif -%}"
    "{%- if m.role == 'system' -%}{%- set root.system = m.content -%}"
    "{%- else -%}{%- set root.prompt = m.content -%}{%- endif -%}"
    "{%- else -%}{{ raise_exception('this TEMPLATE has no place for the role ' ~ m.role) }}{%- endif -%}{%- endfor -%}"
    "<last>"
)


def _refuse(words: str) -> InvalidRequest:
    return InvalidRequest(f"TEMPLATE can't be used: {words}; {_WAY_OUT}", param="template")


# -- text to nodes ----------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class _Node:
    kind: str  # "text", "show", "set", "if", "range", "with", "break", "continue"
    text: str = ""  # of a text; the expression's source otherwise
    names: tuple[str, ...] = ()  # variables that a range or an assignment sets
    declares: bool = False
    body: list[_Node] = field(default_factory=list)
    other: list[_Node] = field(default_factory=list)


class _Parser:
    """Blocks and their ends. Expressions stay text until they are written."""

    def __init__(self, source: str) -> None:
        self._parts = self._split(source)
        self._at = 0

    @staticmethod
    def _split(source: str) -> list[tuple[str, str]]:
        """("text" | "action", its text), with the white space that markers trim gone."""
        parts: list[tuple[str, str]] = []
        at, trim = 0, False
        for match in _ACTION.finditer(source):
            text = source[at : match.start()]
            text = text.lstrip() if trim else text
            text = text.rstrip() if match[1] else text
            parts += [("text", text), ("action", match[2].strip())]
            at, trim = match.end(), match[3] is not None
        rest = source[at:]
        if "{{" in rest:
            raise _refuse("an action is never closed with }}")
        parts.append(("text", rest.lstrip() if trim else rest))
        return [part for part in parts if part != ("text", "")]

    def parse(self) -> list[_Node]:
        nodes, end = self._block(0)
        if end:
            raise _refuse(f"{{{{ {end} }}}} without a block")
        return nodes

    def _block(self, depth: int) -> tuple[list[_Node], str]:
        """Nodes up to the end of the block, and the action that ended it."""
        if depth > MAX_DEPTH:
            raise _refuse(f"its blocks are nested more than {MAX_DEPTH} deep")
        nodes: list[_Node] = []
        while self._at < len(self._parts):
            kind, text = self._parts[self._at]
            self._at += 1
            if kind == "text":
                nodes.append(_Node("text", text))
                continue
            word, _, rest = text.partition(" ")
            if word == "end" or word == "else":
                return nodes, text
            if word in ("if", "range", "with"):
                nodes.append(self._opened(word, rest.strip(), depth))
            elif word in ("break", "continue"):
                nodes.append(_Node(word))
            elif word in ("template", "define", "block"):
                raise _refuse(f"{word} is not supported")
            elif text and not text.startswith("/*"):
                nodes.append(self._simple(text))
        return nodes, ""

    def _opened(self, kind: str, rest: str, depth: int) -> _Node:
        names: tuple[str, ...] = ()
        if kind == "range" and (found := re.match(r"(\$\w+)(?:\s*,\s*(\$\w+))?\s*:=\s*", rest)):
            names = (found[1], found[2]) if found[2] else ("", found[1])
            rest = rest[found.end() :]
        elif kind == "with" and (found := re.match(r"(\$\w+)\s*:=\s*", rest)):
            names, rest = (found[1],), rest[found.end() :]
        node = _Node(kind, rest, names)
        node.body, end = self._block(depth + 1)
        if end.startswith("else"):
            chained = end.removeprefix("else").strip()
            if chained:  # else if: a block of its own that ends where this one does
                word, _, condition = chained.partition(" ")
                node.other = [self._opened(word, condition.strip(), depth + 1)]
                return node
            node.other, end = self._block(depth + 1)
        if end != "end":
            raise _refuse(f"a block {{{{ {kind} }}}} is never ended")
        return node

    @staticmethod
    def _simple(text: str) -> _Node:
        if found := re.match(r"(\$\w+)\s*(:?=)\s*", text):
            return _Node("set", text[found.end() :], (found[1],), found[2] == ":=")
        return _Node("show", text)


# -- nodes to Jinja ---------------------------------------------------------------------------------------------------
class _Writer:
    """`cut`: nothing is written behind the first `.Response`, as in the turn that the model is to answer."""

    def __init__(self, cut: bool = False) -> None:
        self._cut = cut
        self._done = False
        self._n = 0
        self._scopes: list[dict[str, str]] = [{}]

    def block(self, nodes: Sequence[_Node], dot: str) -> str:
        self._scopes.append({})
        parts = []
        for node in nodes:
            if self._done:
                break
            parts.append(self._node(node, dot))
        self._scopes.pop()
        return "".join(parts)

    def _node(self, node: _Node, dot: str) -> str:
        match node.kind:
            case "text":
                return "{{ " + json.dumps(node.text, ensure_ascii=False) + " }}"
            case "break" | "continue":
                return "{% " + node.kind + " %}"
            case "set":
                value = self._expression(node.text, dot)
                return f"{{% set {self._variable(node.names[0], node.declares)} = {value} %}}"
            case "if":
                condition = self._expression(node.text, dot)
                return self._either(f"{{% if {condition} %}}", self.block(node.body, dot), node, dot, "endif")
            case "with":
                return self._with(node, dot)
            case "range":
                return self._range(node, dot)
        text = "{{ " + self._shown(node.text, dot) + " }}"
        self._done = self._cut and re.search(r"\.Response\b", node.text) is not None
        return text

    def _either(self, head: str, body: str, node: _Node, dot: str, end: str) -> str:
        """A block with its else. A cut within the body goes on behind the block: the else is another way."""
        done, self._done = self._done, False
        other = self.block(node.other, dot)
        self._done = self._done or done
        return head + body + (f"{{% else %}}{other}" if other else "") + f"{{% {end} %}}"

    def _with(self, node: _Node, dot: str) -> str:
        value = self._expression(node.text, dot)
        self._n += 1
        inner = f"dot{self._n}"
        self._scopes.append({})
        head = f"{{% set v.{inner} = {value} %}}{{% if v.{inner} %}}"
        if node.names:
            head += f"{{% set {self._variable(node.names[0], True)} = v.{inner} %}}"
        body = self.block(node.body, f"v.{inner}")
        self._scopes.pop()
        return self._either(head, body, node, dot, "endif")

    def _range(self, node: _Node, dot: str) -> str:
        value = self._expression(node.text, dot)
        self._n += 1
        inner = f"dot{self._n}"
        self._scopes.append({})
        head = f"{{% for {inner} in {value} %}}"
        for name, source in zip(node.names, ("loop.index0", inner), strict=False):
            if name and name != "$_":
                head += f"{{% set {self._variable(name, True)} = {source} %}}"
        body = self.block(node.body, inner)
        self._scopes.pop()
        return self._either(head, body, node, dot, "endfor")

    def _variable(self, name: str, declares: bool) -> str:
        """Each declaration is an attribute of one namespace, so that inner blocks can set an outer variable."""
        if declares:
            self._n += 1
            self._scopes[-1][name] = f"v.{name[1:]}_{self._n}"
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        raise _refuse(f"the variable {name[:40]} is not declared")

    # -- expressions
    def _shown(self, text: str, dot: str) -> str:
        """Ollama's own values print themselves as JSON."""
        value = self._expression(text, dot)
        if text == "." or re.search(rf"\.({_PRINTED})$", text):
            return f"{value} if {value} is string else {value} | tojson"
        return value

    def _expression(self, text: str, dot: str) -> str:
        tokens, at = [], 0
        text = text.strip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None or match.lastgroup is None:
                raise _refuse(f"{text[at : at + 20]!r} is not understood")
            tokens.append((match.lastgroup, match[match.lastgroup]))
            at = match.end()
        reader = _Expression(tokens, lambda word: self._word(word, dot))
        return reader.whole()

    def _word(self, word: str, dot: str) -> str:
        if word == ".":
            return self._not_root(dot)
        if word == "$":
            raise _refuse("$ alone is not supported")
        head, *path = word.split(".")
        if head == "$" or (head == "" and dot == "root"):
            name = path.pop(0)
            if name not in _ROOTS:
                raise _refuse(f".{name[:40]} is not known")
            found = _ROOTS[name]
        elif head == "":
            found = dot
        else:
            found = self._variable(head, False)
        for name in path:
            if name not in _FIELDS:
                raise _refuse(f".{name[:40]} is not known")
            found += f".{_FIELDS[name]}"
        return found

    @staticmethod
    def _not_root(dot: str) -> str:
        if dot == "root":
            raise _refuse(". alone is not supported outside of range and with")
        return dot


class _Expression:
    """Go's pipelines: an operand, or a function and its operands; each result is the next one's last operand."""

    def __init__(self, tokens: list[tuple[str, str]], word: object) -> None:
        self._tokens = tokens
        self._word = word
        self._at = 0
        self._depth = 0

    def whole(self) -> str:
        result = self._pipeline()
        if self._at < len(self._tokens):
            raise _refuse(f"{self._tokens[self._at][1][:20]!r} is not expected")
        return result

    def _peek(self) -> tuple[str, str]:
        return self._tokens[self._at] if self._at < len(self._tokens) else ("", "")

    def _pipeline(self) -> str:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refuse("an expression is nested too deeply")
        result = self._command(None)
        while self._peek() == ("mark", "|"):
            self._at += 1
            result = self._command(result)
        self._depth -= 1
        return result

    def _command(self, piped: str | None) -> str:
        kind, text = self._peek()
        is_function = kind == "word" and text[0] not in ".$" and text not in ("true", "false", "nil")
        if not is_function:
            if piped is not None:
                raise _refuse("only a function can stand behind |")
            return self._operand()
        self._at += 1
        operands = []
        while (next_ := self._peek())[0] and next_ not in (("mark", "|"), ("mark", ")")):
            operands.append(self._operand())
        return _call(text, operands if piped is None else [*operands, piped])

    def _operand(self) -> str:
        kind, text = self._peek()
        self._at += 1
        if kind == "string":
            return json.dumps(text[1:-1] if text[0] == "`" else _unquoted(text), ensure_ascii=False)
        if kind == "number":
            return text
        if kind == "mark" and text == "(":
            inner = self._pipeline()
            if self._peek() != ("mark", ")"):
                raise _refuse("a bracket is never closed")
            self._at += 1
            return f"({inner})"
        if kind == "word" and text in ("true", "false", "nil"):
            return {"true": "true", "false": "false", "nil": "none"}[text]
        if kind == "word" and text[0] in ".$":
            assert callable(self._word)
            return str(self._word(text))
        if kind == "word":
            return _call(text, [])
        raise _refuse(f"{text[:20]!r} is not expected" if text else "an expression ends too early")


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        raise _refuse(f"the string {text[:40]} is not understood") from None


def _call(name: str, operands: list[str]) -> str:
    n = len(operands)
    match name:
        case "and" | "or" if n:
            return "(" + f" {name} ".join(operands) + ")"
        case "not" if n == 1:
            return f"(not {operands[0]})"
        case "eq" if n >= 2:
            return "(" + " or ".join(f"{operands[0]} == {other}" for other in operands[1:]) + ")"
        case "ne" | "lt" | "le" | "gt" | "ge" if n == 2:
            return f"({operands[0]} {_COMPARE[name]} {operands[1]})"
        case "len" if n == 1:
            return f"({operands[0]} | length)"
        case "index" if n >= 2:
            return operands[0] + "".join(f"[{one}]" for one in operands[1:])
        case "slice" if 1 <= n <= 3:
            return f"{operands[0]}[{':'.join(operands[1:] if n == 3 else [*operands[1:], ''])}]"
        case "json" if n == 1:
            return f"({operands[0]} | tojson)"
        case "print" if n:
            return "(" + " ~ ".join(operands) + ")"
        case "html" | "js" | "urlquery" | "printf" | "println" | "call":
            raise _refuse(f"the function {name} is not supported")
    raise _refuse(f"the function {name[:40]} with {n} operands is not known")
