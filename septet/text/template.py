"""Messages to a prompt: the chat template that came with a model, rendered in a bounded sandbox.

Called by the session. Follows transformers' `apply_chat_template`, with two differences: what users wrote can't forge
the markers of roles (see `ChatPrompt`), and a template's time, memory and output are bounded (see `sandbox`). Only a
model brings templates: requests name messages, tools and the variables that its template reads, nothing else.
"""

from __future__ import annotations

import json
import re
from functools import cached_property
from itertools import groupby
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest, ModelFileError
from septet.text.tokenizer import ChatPrompt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from septet.text.tokenizer import Tokenizer

__all__ = ["ChatTemplate"]

MAX_SOURCE = 2**18  # characters of a template; the longest known has 20 thousand
MAX_OUTPUT = 2**24  # characters of a prompt
MAX_DEPTH = 64  # of tools and other nested values
MAX_FORGED = 2**14  # special tokens that one text may spell
MAX_MARKER = 256  # characters of a special token that users must not forge; the longest known has 38
_OPEN, _CLOSE, _END = "\ufdd0", "\ufdd1", "\ufdd2"  # noncharacters: never text (Unicode 23.7)
_MARK = re.compile(f"[{_OPEN}{_CLOSE}{_END}]")
_OURS = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"))

# For models whose file lost its template, where the family has one well-known format. Used only if the markers are
# special tokens of the vocabulary.
_GEMMA = (
    "{{ bos_token }}{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    "{{ (system if loop.first else '') + message.content | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_GEMMA_MARKERS = ("<start_of_turn>", "<end_of_turn>")
_FAMILIES = dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), (_GEMMA_MARKERS, _GEMMA))


class ChatTemplate:
    """One template, compiled once; `render` may be called from several threads.

    `special`: the variables bos_token, eos_token ... `control`: texts that users must not be able to forge.
    """

    def __init__(self, source: str, special: Mapping[str, str] | None = None, control: Collection[str] = ()) -> None:
        from jinja2 import TemplateError, meta

        from septet.text.sandbox import ChatEnvironment

        if len(source) > MAX_SOURCE:
            raise ModelFileError(f"the chat template has {len(source)} characters; at most {MAX_SOURCE} are accepted")
        environment = ChatEnvironment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError, MemoryError, SyntaxError, ValueError) as error:
            raise ModelFileError(f"the chat template is not valid Jinja: {error}") from None
        self.source = source
        self._special = dict(special or {})
        self._control = frozenset(control)
        self._spelled = _any_of(self._control)
        self._wants_parts = _wants_parts(tree)
        names = meta.find_undeclared_variables(tree) - _OURS - set(environment.globals) - set(self._special)
        self.variables = frozenset(name for name in names if not name.endswith("_token"))
        """Names that a request may set through `chat_template_kwargs`: those the template reads."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The model's template, or its family's where the file lost it; None if there is neither.

        ModelFileError if it is not valid Jinja.
        """
        source = tokenizer.chat_template
        if source is None:
            markers, source = _FAMILIES.get(tokenizer.family, ((), None))
            if source is None or not tokenizer.control_texts.issuperset(markers):
                return None
        return cls(source, tokenizer.special_texts, tokenizer.control_texts)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,  # so that a variable named "self" or "messages" is refused like any other
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> ChatPrompt:
        """The prompt; encode it with `add_special_tokens=False`, as templates write their own bos.

        `continue_final_message`: stop within the last message, so that the model goes on with it (no generation prompt
        then). InvalidRequest: messages of a wrong shape, non-text content, an unknown variable, or what the template
        itself refuses (with its own words).
        """
        self._check_variables(variables)
        chat = [self._message(i, message) for i, message in enumerate(_checked_list(messages))]
        if continue_final_message:
            self._tag_final(chat)
        values = {
            **self._special,
            **{name: self._plain(value, name) for name, value in variables.items()},
            "messages": chat,
            "tools": None if tools is None else self._plain(list(tools), "tools"),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        text = self._run(values)
        return _unmarked(_cut_final(text) if continue_final_message else text)

    def _check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name not in self.variables:
                known = ", ".join(sorted(self.variables)) or "none"
                raise InvalidRequest(
                    f"chat_template_kwargs: this model's template has no variable {name[:80]!r}; it has {known}",
                    param="chat_template_kwargs",
                )

    def _run(self, values: dict[str, Any]) -> str:
        from septet.text.sandbox import BUDGET, Budget

        parts, length = [], 0
        try:
            for part in self._template.generate({**values, BUDGET: Budget()}):
                parts.append(part)
                length += len(part)
                if length > MAX_OUTPUT:
                    raise InvalidRequest(
                        f"the chat template writes more than {MAX_OUTPUT} characters", param="messages"
                    )
        except InvalidRequest:
            raise
        except RecursionError:
            raise InvalidRequest("the chat template failed: it recurses without end", param="messages") from None
        except Exception as error:
            reason = _MARK.sub("", str(error))[:500]
            raise InvalidRequest(f"the chat template failed: {reason}", param="messages") from None
        return "".join(parts)

    # -- messages as templates see them
    def _message(self, i: int, message: Mapping[str, Any]) -> dict[str, Any]:
        where = f"messages[{i}]"
        if not hasattr(message, "items") or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"{where} must be an object with a role", param=where)
        plain: dict[str, Any] = {str(k): self._plain(v, f"{where}.{k}") for k, v in message.items() if k != "content"}
        for call in plain.get("tool_calls") or ():
            _parse_arguments(call)
        text = _text_of(message.get("content"), where)
        marked = self._guard(text, f"{where}.content")
        plain["content"] = [{"type": "text", "text": marked}] if self._wants_parts else marked
        return plain

    def _plain(self, value: Any, where: str, depth: int = 0) -> Any:
        """A copy made of plain JSON types, with forged markers fenced. Templates must not see other objects."""
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, str):
            return self._guard(value, where)
        if depth > MAX_DEPTH:
            raise InvalidRequest(f"{where} is nested more than {MAX_DEPTH} deep", param=where)
        if isinstance(value, list | tuple):
            return [self._plain(item, where, depth + 1) for item in value]
        if hasattr(value, "items"):
            return {self._guard(str(k), where): self._plain(v, where, depth + 1) for k, v in value.items()}
        raise InvalidRequest(f"{where} must be made of JSON values, not {type(value).__name__}", param=where)

    def _guard(self, text: str, where: str) -> str:
        """`text` with each span that spells a special token, or ends as one begins, between marks."""
        if mark := _MARK.search(text):
            raise InvalidRequest(f"{where} has the noncharacter U+{ord(mark[0]):04X}, which is not text", param=where)
        parts, done = [], 0
        for start, end in self._forged(text):
            parts += [text[done:start], _OPEN, text[start:end], _CLOSE]
            done = end
        return "".join(parts) + text[done:] if parts else text

    def _forged(self, text: str) -> Iterator[tuple[int, int]]:
        """Spans of `text`, from left to right, that spell a control text (the longest), or at the end begin one."""
        if self._spelled is None:
            return
        longest = max(map(len, self._control))
        tails = (i for i in range(max(0, len(text) - longest + 1), len(text)) if text[i:] in self._prefixes)
        at, tail, found = 0, next(tails, len(text)), 0
        for match in self._spelled.finditer(text):
            while tail < at:
                tail = next(tails, len(text))
            if tail < match.start():
                break
            yield match.span()
            at, found = match.end(), found + 1
            if found > MAX_FORGED:
                raise InvalidRequest(f"a message spells more than {MAX_FORGED} special tokens", param="messages")
        while tail < at:
            tail = next(tails, len(text))
        if tail < len(text):
            yield tail, len(text)

    @cached_property
    def _prefixes(self) -> frozenset[str]:
        """Proper prefixes of the control texts."""
        return frozenset(text[:n] for text in self._control for n in range(1, len(text)))

    def _tag_final(self, chat: list[dict[str, Any]]) -> None:
        content = chat[-1]["content"]
        tagged = (content[0]["text"] if self._wants_parts else content) + _END + " "  # the space shows trimming
        chat[-1]["content"] = [{"type": "text", "text": tagged}] if self._wants_parts else tagged


def _any_of(texts: Collection[str]) -> re.Pattern[str] | None:
    """A pattern that finds the longest of `texts` at a place; its time goes by the text searched, not by how many."""
    if not texts:
        return None
    if any(len(text) > MAX_MARKER for text in texts):
        raise ModelFileError(f"the vocabulary has a special token of more than {MAX_MARKER} characters")
    return re.compile(_alternatives(sorted(texts)))


def _alternatives(texts: list[str]) -> str:
    """Of sorted texts, none empty: grouped by their common beginnings, longer ones tried first."""
    patterns = []
    for _, group in groupby(texts, key=lambda text: text[0]):
        alike = list(group)
        common = commonprefix([alike[0], alike[-1]])  # noqa: RUF071 - of characters, not of paths
        rests = [rest for text in alike if (rest := text[len(common) :])]
        optional = "?" if len(rests) < len(alike) else ""
        patterns.append(re.escape(common) + (f"(?:{_alternatives(rests)}){optional}" if rests else ""))
    return "|".join(patterns)


def _checked_list(messages: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, list | tuple) or not messages:
        raise InvalidRequest("messages must be a list of at least one message", param="messages")
    return messages


def _text_of(content: Any, where: str) -> str:
    """The text of a message: a string, nothing, or a list of text parts (joined by newlines, as the peers do)."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise InvalidRequest(f"{where}.content must be a string or a list of parts", param=f"{where}.content")
    return "\n".join(_text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))


def _text_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if hasattr(part, "get") else None
    if kind not in ("text", "input_text", "output_text"):
        raise InvalidRequest(f"{where} is of type {str(kind)[:40]!r}; this model takes text only", param=where)
    if not isinstance(part.get("text"), str):
        raise InvalidRequest(f"{where}.text must be a string", param=where)
    return part["text"]


def _parse_arguments(call: Any) -> None:
    """OpenAI sends a call's arguments as JSON text; templates expect the object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        try:
            arguments = json.loads(function["arguments"])
        except (ValueError, RecursionError):
            return
        if isinstance(arguments, dict):
            function["arguments"] = arguments


def _wants_parts(tree: Any) -> bool:
    """Whether the template only takes content as a list of parts: it loops over it and never asks for a string."""
    from jinja2 import nodes

    if any(test.name == "string" for test in tree.find_all(nodes.Test)):
        return False
    return any(_names_content(loop.iter) for loop in tree.find_all(nodes.For))


def _names_content(node: Any) -> bool:
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    return isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and node.arg.value == "content"


def _cut_final(text: str) -> str:
    """Cut where the last message's text ended; white space before it goes if the template trimmed the text."""
    at = text.rfind(_END)
    if at < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not write the last message's content", param="messages"
        )
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


def _unmarked(text: str) -> ChatPrompt:
    """Take the marks out, keep where they stood."""
    pieces = _MARK.split(text)
    marks: list[str] = _MARK.findall(text)
    spans: list[tuple[int, int]] = []
    at, opened = 0, -1
    for piece, mark in zip(pieces, [*marks, ""], strict=True):
        at += len(piece)
        if mark == _OPEN:
            opened = at
        elif mark == _CLOSE and opened >= 0:
            spans.append((opened, at))
            opened = -1
        elif mark:
            spans.append((at, at))
    if opened >= 0:
        spans.append((opened, at))
    return ChatPrompt("".join(pieces), spans)
