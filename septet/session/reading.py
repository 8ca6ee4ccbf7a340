"""How a chat answer is read: thoughts, tool calls, content; and what binds it. One `ReplyFormat` per model.

Used by `Session`. Puts the text room's parsers between a choice's text and its events, and writes the constraint that
makes calls valid by construction. Knows no API's JSON.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.session.events import Finished, TextDelta, ToolCallDelta
from septet.text.parsers.constraint import bindable, constraint
from septet.text.parsers.dialects import dialect_of, reasoning_of, takes_tools
from septet.text.parsers.events import CallArguments, CallBroken, CallEnd, CallStart, Content, Reasoning
from septet.text.parsers.fallback import conversation
from septet.text.parsers.machine import OutputParser
from septet.text.parsers.tools import ToolChoice

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from septet.request import SamplingParams
    from septet.session.events import Event
    from septet.structured import Structured
    from septet.text.parsers.dialects import Dialect, ReasoningDialect
    from septet.text.parsers.events import ParserEvent
    from septet.text.parsers.tools import Tool
    from septet.text.tokenizer import Tokenizer

__all__ = ["PLAIN", "Reading", "ReplyFormat", "ReplyReader"]

MAX_CALLS = 128  # of one answer; it is ended then


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one request wants of its answers. The default is plain text, as the model writes it."""

    tools: ToolChoice = field(default_factory=ToolChoice)
    reasoning: bool = False  # tell thoughts apart
    thinking_budget: int | None = None  # tokens of thoughts, then they are ended; None = no limit
    live: bool = False  # tell a call while it is written, where a constraint makes that safe


PLAIN = Reading()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """How this model writes what it thinks and calls, from its chat template or as the server was told."""

    dialect: Dialect
    thoughts: ReasoningDialect | None
    native_tools: bool  # the template writes tools itself
    call_ids: frozenset[int] = frozenset()  # special tokens that are markers of calls
    thought_ids: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls,
        template: str | None,
        tokenizer: Tokenizer,
        *,
        tool_call_parser: str = "auto",
        reasoning_parser: str = "auto",
    ) -> ReplyFormat:
        """InvalidRequest for a parser's name that is not in the table."""
        dialect = dialect_of(template, tool_call_parser)
        thoughts = reasoning_of(template, reasoning_parser)
        return cls(
            dialect=dialect,
            thoughts=thoughts,
            native_tools=takes_tools(template),
            call_ids=_ids(tokenizer, dialect.markers()),
            thought_ids=_ids(tokenizer, thoughts.markers() if thoughts else ()),
        )

    # -- the prompt's side
    def conversation(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> Sequence[Mapping[str, Any]]:
        """What the template gets: where it knows no tools, they are written into the messages."""
        return messages if self.native_tools else conversation(messages, tools)

    def template_tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
        return [tool.as_json() for tool in tools] if tools and self.native_tools else None

    # -- the answer's side
    def is_thinking(self, prompt: str | None, reading: Reading) -> bool:
        """Whether the prompt has opened the thoughts (or the model always begins with them)."""
        if self.thoughts is None or not reading.reasoning or self.thoughts.harmony:
            return False
        tail = (prompt or "")[-64:].rstrip()
        if self.thoughts.assumed and not tail.endswith(self.thoughts.close):
            return True
        return tail.endswith(self.thoughts.open.rstrip())

    def may_think(self, prompt: str | None, reading: Reading, thinking: bool) -> bool:
        """Whether an answer may begin with thoughts that nobody has opened: not where the prompt has closed them."""
        if self.thoughts is None or not reading.reasoning or thinking:
            return False
        return self.thoughts.harmony or not (prompt or "")[-64:].rstrip().endswith(self.thoughts.close)

    def bound(
        self, params: SamplingParams, reading: Reading, thinking: bool, may_think: bool = False
    ) -> SamplingParams:
        """`params` with the constraint that this reading stands for. InvalidRequest where two would collide."""
        if reading.thinking_budget is not None and (self.thoughts is None or self.thoughts.harmony):
            raise InvalidRequest("thinking_token_budget: not supported by this model", param="thinking_token_budget")
        after = self.thoughts.close if thinking and self.thoughts else None
        opening = None
        if after is None and may_think and self.thoughts is not None:
            opening, after = self.thoughts.framed()
        if params.structured is not None:
            if reading.tools.forced:
                raise InvalidRequest(
                    "tool_choice and a constraint on the answer (response_format) can't both be binding; give one",
                    param="tool_choice",
                )
            given = params.structured
            if after is None or given.after is not None:
                return params
            return replace(params, structured=replace(given, after=after, opening=opening))
        if not reading.tools.forced and opening is not None:
            after = opening = None  # thoughts are free text like any other until a call begins
        markers = self.thoughts.markers() if self.thoughts is not None else ()
        dialect = self._dialect(reading)
        bound = constraint(dialect, reading.tools, _schema, after=after, opening=opening, thoughts=markers)
        held = bound is not None and (reading.tools.forced or dialect.watched)
        if not held and any(tool.strict for tool in reading.tools.allowed()):
            raise InvalidRequest(
                f"tools: strict is not supported with tool_choice auto for this model's way of calling "
                f"({self.dialect.name}); use tool_choice required, or leave strict out",
                param="tools",
            )
        return params if bound is None else replace(params, structured=bound)

    def _dialect(self, reading: Reading) -> Dialect:
        return bindable(self.dialect, reading.tools)

    def kept_ids(self, reading: Reading) -> frozenset[int]:
        """Special tokens whose text the reader needs to see."""
        calls = self.call_ids if reading.tools.allowed() else frozenset[int]()
        return calls | (self.thought_ids if reading.reasoning else frozenset())

    def reader(self, reading: Reading, thinking: bool, bound: Structured | None) -> ReplyReader | None:
        """None where the text is taken as it stands."""
        allowed = reading.tools.allowed()
        thoughts = self.thoughts if reading.reasoning else None
        if not allowed and thoughts is None:
            return None
        dialect = self._dialect(reading) if allowed else None
        parser = OutputParser(dialect, thoughts, allowed, thinking=thinking)
        held = dialect is not None and (reading.tools.forced or dialect.watched)
        live = reading.live and held and bound is not None and bound.kind == "structural_tag"
        one = bool(allowed) and (not reading.tools.parallel or reading.tools.mode == "named")
        new_id = _short_id if self.dialect.name == "mistral" else _new_id
        return ReplyReader(parser, live=live, max_calls=1 if one else MAX_CALLS, new_id=new_id)


def _new_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _short_id() -> str:
    """Mistral's templates take nothing but nine letters and digits."""
    return secrets.token_hex(5)[:9]


class ReplyReader:
    """Events of one choice in, the same with text told apart out.

    A call is told when it is complete: nothing that a client acts on is ever taken back. With `live` (a constraint
    holds the model to the schema) it is told piece by piece, and only the end of the tokens can cut it.
    """

    def __init__(
        self, parser: OutputParser, *, live: bool, max_calls: int, new_id: Callable[[], str] = _new_id
    ) -> None:
        self._parser = parser
        self._new_id = new_id
        self._live = live
        self._max_calls = max_calls
        self._n_started = 0
        self._name: str | None = None  # of the open call, until its first piece
        self._held: list[str] = []
        self.n_calls = 0
        self.reasoning_tokens = 0

    @property
    def full(self) -> bool:
        """No more calls are wanted: the choice may end."""
        return self.n_calls >= self._max_calls

    def over(self, budget: int | None) -> bool:
        """Whether the thoughts have used up their tokens and still go on."""
        return budget is not None and self._parser.thinking and self.reasoning_tokens >= budget

    def read_all(self, events: list[Event]) -> list[Event]:
        return [told for event in events for told in self.read(event)]

    def read(self, event: Event) -> list[Event]:
        if isinstance(event, TextDelta):
            thinking = self._parser.thinking
            delta = self._delta(event, self._parser.push(event.text))
            if thinking or delta.reasoning:
                self.reasoning_tokens += len(event.token_ids)
            return [delta]
        if isinstance(event, Finished):
            rest = self._delta(TextDelta(event.index, "", ()), self._parser.finish() if not self.full else [])
            usage = replace(event.usage, reasoning_tokens=self.reasoning_tokens)
            last = replace(event, usage=usage, n_calls=self.n_calls)
            return [rest, last] if rest.text or rest.reasoning or rest.calls else [last]
        return [event]

    def _delta(self, event: TextDelta, parts: list[ParserEvent]) -> TextDelta:
        text: list[str] = []
        thoughts: list[str] = []
        calls: list[ToolCallDelta] = []
        for part in parts:
            if self.full:
                break
            if isinstance(part, Content):
                text.append(part.text)
            elif isinstance(part, Reasoning):
                thoughts.append(part.text)
            elif isinstance(part, CallBroken):
                if not self._live:
                    text.append(part.text)
                self._close()
            else:
                calls += self._call(part)
        return replace(event, text="".join(text), reasoning="".join(thoughts), calls=tuple(calls))

    def _call(self, part: CallStart | CallArguments | CallEnd) -> list[ToolCallDelta]:
        number = self._n_started
        if isinstance(part, CallStart):
            self._name = part.name
            return [self._piece(number, "")] if self._live else []
        if isinstance(part, CallArguments):
            if self._live:
                return [self._piece(number, part.text)]
            self._held.append(part.text)
            return []
        whole = [] if self._live else [self._piece(number, ""), self._piece(number, "".join(self._held))]
        self.n_calls += 1
        self._close()
        if not self._live:
            self._n_started += 1
        return whole

    def _piece(self, number: int, text: str) -> ToolCallDelta:
        name, self._name = self._name, None
        return ToolCallDelta(number, name, text, self._new_id() if name is not None else None)

    def _close(self) -> None:
        if self._live:
            self._n_started += 1
        self._held.clear()
        self._name = None


def _schema(tool: Tool) -> dict[str, Any]:
    return tool.schema()


def _ids(tokenizer: Tokenizer, markers: tuple[str, ...]) -> frozenset[int]:
    """Special tokens that are a marker or a part of one."""
    texts = {token: tokenizer.token_text(token) for token in tokenizer.special_ids}
    return frozenset(t for t, text in texts.items() if len(text) > 1 and any(text in marker for marker in markers))
