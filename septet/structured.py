"""What an answer must look like: one kind of grammar and its text, as plain values that travel by msgpack.

Read by the session, the engine's messages and the grammar room. Standard library only; it checks sizes and shapes, not
whether a grammar makes sense: that is `grammar/translate.py`'s business, in a process that can be killed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from septet.errors import InvalidRequest

__all__ = ["KINDS", "Structured"]

KINDS = ("json_schema", "json_object", "regex", "grammar", "choice", "structural_tag")
MAX_SPEC_BYTES = 1 << 18
MAX_AFTER_CHARS = 256


@dataclass(frozen=True, slots=True)
class Structured:
    """A constraint on the output.

    kind            spec
    json_schema     a JSON schema as JSON text (drafts 7 to 2020-12; see `grammar/schema.py` for the keywords)
    json_object     "": any JSON object
    regex           a regular expression in Rust's syntax that the whole answer matches
    grammar         EBNF: llama.cpp's GBNF (`root ::= ...`) or Lark (`start: ...`)
    choice          a JSON array of strings: the answer is one of them
    structural_tag  free text with constrained islands, as JSON: {"structures": [{"begin", "schema" or "grammar",
                    "end"}], "triggers": [...]}; a trigger is the prefix of a `begin` from which on it is binding.
                    Optional: "at_least_one", "stop_after_first", "no_text" (booleans; the last: nothing between
                    islands or behind them but white space) and "between" (text that has to stand between two then)

    `after`: the constraint begins behind this text, what comes before is free ("</think>", say). `opening`: only an
    answer that begins with this text ("<think>") has such a free part, any other is bound from its start. `source`: the
    field of a request that it came from, for errors; it makes no difference otherwise.
    Raises `InvalidRequest` for an unknown kind or a spec that is too large.
    """

    kind: str
    spec: str = ""
    after: str | None = None
    opening: str | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidRequest(f"structured: kind must be one of {', '.join(KINDS)}", param="structured")
        if not isinstance(self.spec, str):
            raise InvalidRequest(f"structured: the spec of {self.kind} must be text", param="structured")
        try:
            size = len(self.spec.encode())
        except UnicodeEncodeError:
            raise InvalidRequest(
                f"structured: the {self.kind} has a lone surrogate: it is not Unicode text", param="structured"
            ) from None
        if size > MAX_SPEC_BYTES:
            raise InvalidRequest(
                f"structured: a {self.kind} of {size} bytes; at most {MAX_SPEC_BYTES} are taken", param="structured"
            )
        if (self.kind == "json_object") != (self.spec == ""):
            raise InvalidRequest(f"structured: {_words(self.kind)}", param="structured")
        for name, text in (("after", self.after), ("opening", self.opening)):
            if text is not None and not _short_text(text):
                raise InvalidRequest(
                    f"structured: {name} must be 1 to {MAX_AFTER_CHARS} ASCII characters", param="structured"
                )
        if self.opening is not None and self.after is None:
            raise InvalidRequest("structured: an opening needs the text that ends it (after)", param="structured")

    @classmethod
    def json_schema(cls, schema: Any, *, after: str | None = None) -> Structured:
        """From a schema as a dict, a boolean, JSON text, or a pydantic model (anything with `model_json_schema`)."""
        if hasattr(schema, "model_json_schema"):
            schema = schema.model_json_schema()
        if isinstance(schema, str):
            return cls("json_schema", schema, after)
        return cls("json_schema", _dump("json_schema", schema), after)

    @classmethod
    def json_object(cls, *, after: str | None = None) -> Structured:
        return cls("json_object", "", after)

    @classmethod
    def regex(cls, pattern: str, *, after: str | None = None) -> Structured:
        return cls("regex", pattern, after)

    @classmethod
    def grammar(cls, text: str, *, after: str | None = None) -> Structured:
        return cls("grammar", text, after)

    @classmethod
    def choice(cls, options: Any, *, after: str | None = None) -> Structured:
        options = list(options) if isinstance(options, list | tuple) else None
        if not options or not all(isinstance(o, str) and o for o in options):
            raise InvalidRequest("structured: choice must be a list of non-empty strings", param="structured")
        return cls("choice", _dump("choice", options), after)

    @classmethod
    def structural_tag(
        cls, value: Any, *, after: str | None = None, opening: str | None = None, source: str = ""
    ) -> Structured:
        spec = value if isinstance(value, str) else _dump("structural_tag", value)
        return cls("structural_tag", spec, after, opening, source)

    @classmethod
    def of(cls, value: Any) -> Structured:
        """What Python callers may write for `SamplingParams.structured`: this, a pydantic model, or a schema's dict."""
        if isinstance(value, cls):
            return value
        if isinstance(value, dict | bool) or hasattr(value, "model_json_schema"):
            return cls.json_schema(value)
        raise InvalidRequest(
            "structured must be a septet.Structured, a pydantic model or a JSON schema as a dict", param="structured"
        )


def _short_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_AFTER_CHARS and value.isascii()


def _words(kind: str) -> str:
    return "json_object takes no spec" if kind == "json_object" else f"the {kind} is empty"


def _dump(kind: str, value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"structured: the {kind} is no JSON: {error}", param="structured") from None
