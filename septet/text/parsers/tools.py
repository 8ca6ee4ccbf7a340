"""The functions a model may call, as OpenAI's `tools` describe them: plain data for prompts, parsers and constraints.

Made by whoever takes a request (`serve`, the Python API); read by the forms of calls and by the session.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Tool", "ToolChoice", "kind_of"]


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)  # a JSON schema of an object; {} = anything
    strict: bool = False

    @classmethod
    def of(cls, value: Tool | Mapping[str, Any]) -> Tool:
        """From OpenAI's shape, {"type": "function", "function": {"name", "description", "parameters"}}."""
        if isinstance(value, Tool):
            return value
        function = value.get("function") if isinstance(value, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
            raise InvalidRequest('each of tools must be {"type": "function", "function": {"name": ...}}', param="tools")
        parameters = function.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise InvalidRequest(f"tools: the parameters of {name[:80]!r} must be a JSON schema", param="tools")
        return cls(name, str(function.get("description") or ""), parameters, function.get("strict") is True)

    def as_json(self) -> dict[str, Any]:
        """As templates expect it: OpenAI's own shape."""
        function = {"name": self.name, "description": self.description, "parameters": self.schema()}
        return {"type": "function", "function": function}

    def schema(self) -> dict[str, Any]:
        return dict(self.parameters) or {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode`: "none", "auto", "required" or "named" (then `name`). `parallel`: more than one call in one answer."""

    tools: tuple[Tool, ...] = ()
    mode: str = "auto"
    name: str = ""
    parallel: bool = True

    @classmethod
    def of(
        cls, tools: Sequence[Tool | Mapping[str, Any]] | None, choice: object = "auto", parallel: bool = True
    ) -> ToolChoice:
        """From OpenAI's values of `tools` and `tool_choice`; a function's bare name is taken too."""
        known = tuple(Tool.of(tool) for tool in tools or ())
        if choice in ("none", "auto", "required"):
            mode, name = str(choice), ""
        else:
            function = choice.get("function") if isinstance(choice, Mapping) else {"name": choice}
            found = function.get("name") if isinstance(function, Mapping) else None
            if found not in [tool.name for tool in known]:
                raise InvalidRequest(
                    f"tool_choice must be none, auto, required or one of the tools, not {str(found)[:80]!r}",
                    param="tool_choice",
                )
            mode, name = "named", str(found)
        if mode == "required" and not known:
            raise InvalidRequest("tool_choice required needs tools", param="tool_choice")
        return cls(known, mode, name, parallel)

    @property
    def forced(self) -> bool:
        return self.mode in ("required", "named")

    def allowed(self) -> tuple[Tool, ...]:
        """The tools that this answer may call."""
        if self.mode == "none":
            return ()
        return tuple(t for t in self.tools if self.mode != "named" or t.name == self.name)


def kind_of(tool: Tool | None, parameter: str) -> str:
    """The JSON type that the schema names for a parameter: "string", "integer" ...; "" where it does not say."""
    properties = tool.parameters.get("properties") if tool else None
    schema = properties.get(parameter) if isinstance(properties, Mapping) else None
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if isinstance(schema, Mapping) and kind is None:
        options = schema.get("enum")
        if isinstance(options, list) and options and all(isinstance(o, str) for o in options):
            return "string"
    return kind if isinstance(kind, str) else ""
