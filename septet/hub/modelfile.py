"""Modelfiles: a model made of another one's weights and a template, a system message, parameters, an opening.

`parse` reads Ollama's format, `Recipe` is what is kept in the store, `written` shows it again. Called by `create.py`
and the Ollama dialect. Errors name the line. Knows no weights and no template language.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.hub.facts import Facts, shown
from septet.hub.parameters import KNOWN, checked_all

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Modelfile", "Recipe", "checked_recipe", "parse", "parse_recipe", "written"]

MAX_BYTES = 2**20
MAX_MESSAGES = 1024
ROLES = ("system", "user", "assistant")
_REFUSED = {
    "adapter": "LoRA adapters are not supported; merge the adapter into the weights and use FROM with the result",
    "renderer": "built-in renderers are not supported; give TEMPLATE",
    "parser": "built-in parsers are not supported; how a model writes calls and thoughts is read off its template",
    "draft": "draft models are not supported yet",
}
_COMMANDS = ("from", "parameter", "template", "system", "message", "license", "requires", *_REFUSED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a created model adds to its weights. None and empty: as the model behind it."""

    parent: str  # name that FROM gave
    template: str | None = None  # Jinja, or a Go template as Ollama's
    system: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)  # Ollama's names; see parameters.py
    messages: tuple[tuple[str, str], ...] = ()  # (role, content), before every conversation
    license: str | None = None

    def over(self, base: Recipe | None) -> Recipe:
        """This one, with what it leaves open taken from the recipe of the model it was made from."""
        if base is None:
            return self
        return Recipe(
            parent=self.parent,
            template=self.template if self.template is not None else base.template,
            system=self.system if self.system is not None else base.system,
            parameters={**base.parameters, **self.parameters},
            messages=self.messages or base.messages,
            license=self.license if self.license is not None else base.license,
        )


@dataclass(frozen=True, slots=True)
class Modelfile:
    base: str  # of FROM: a name or a path
    recipe: Recipe


def parse(text: str) -> Modelfile:
    """InvalidRequest names the line and the way out."""
    if len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise _bad(1, f"the file is larger than {MAX_BYTES} bytes")
    base, template, system = "", None, None
    licenses: list[str] = []
    parameters: dict[str, Any] = {}
    messages: list[tuple[str, str]] = []
    for line, command, value in _commands(text):
        match command:
            case "from":
                if base:
                    raise _bad(line, "FROM is given twice")
                base = value
            case "template":
                template = value
            case "system":
                system = value
            case "license":
                licenses.append(value)
            case "message":
                messages.append(_message(line, value))
            case "parameter":
                _parameter(line, value, parameters)
    if not base:
        raise _bad(1, "FROM is missing: the first line is FROM with a model's name or the path of a .gguf file")
    recipe = Recipe(parent=base, template=template, system=system, parameters=parameters, messages=tuple(messages),
                    license="\n\n".join(licenses) if licenses else None)  # fmt: skip
    return Modelfile(base, checked_recipe(recipe))


def checked_recipe(recipe: Recipe) -> Recipe:
    """The same, its parameters typed. InvalidRequest for a value that no request could use."""
    if len(recipe.messages) > MAX_MESSAGES:
        raise InvalidRequest(f"{len(recipe.messages)} messages; at most {MAX_MESSAGES} are taken", param="messages")
    for role, _ in recipe.messages:
        if role not in ROLES:
            raise InvalidRequest(f"a message's role must be one of {', '.join(ROLES)}, not {shown(role)}", param="role")
    for name in ("template", "system", "license"):
        if len(getattr(recipe, name) or "") > MAX_BYTES:
            raise InvalidRequest(f"{name} is longer than {MAX_BYTES} characters", param=name)
    return Recipe(parent=recipe.parent, template=recipe.template, system=recipe.system,
                  parameters=checked_all(recipe.parameters), messages=recipe.messages,
                  license=recipe.license)  # fmt: skip


def _bad(line: int, words: str) -> InvalidRequest:
    return InvalidRequest(f"Modelfile line {line}: {words}", param="modelfile")


# -- lines ------------------------------------------------------------------------------------------------------------
def _commands(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, command in lower case, its value) of each command."""
    lines = text.lstrip("\ufeff").split("\n")
    at = 0
    while at < len(lines):
        number, line = at + 1, lines[at].strip()
        at += 1
        if not line or line.startswith("#"):
            continue
        word, _, rest = line.partition(" ") if " " in line else line.partition("\t")
        command = word.lower()
        if command in _REFUSED:
            raise _bad(number, f"{word.upper()}: {_REFUSED[command]}")
        if command not in _COMMANDS:
            known = ", ".join(name.upper() for name in _COMMANDS if name not in _REFUSED)
            raise _bad(number, f"unknown command {shown(word)}; known are {known}")
        head, quoted = _opening(command, rest.strip())
        if quoted is not None:
            value, at = _quoted(lines, at, number, quoted)
            value = f"{head} {value}" if head else value
        else:
            value = head
        if not value.strip() and command not in ("template", "system", "license"):
            raise _bad(number, f"{word.upper()} has no value")
        yield number, command, value


def _opening(command: str, rest: str) -> tuple[str, str | None]:
    """What stands before a quoted value (a role), and the value from its first quote on; None: it is not quoted."""
    head, value = "", rest
    if command == "message":
        head, _, value = rest.partition(" ")
        value = value.strip()
    return (head, value) if value.startswith('"') else (rest, None)


def _quoted(lines: list[str], at: int, number: int, value: str) -> tuple[str, int]:
    """A value in quotes, single or triple, which may go on over lines; and the line after it."""
    quote = '"""' if value.startswith('"""') else '"'
    inner = value[len(quote) :]
    parts: list[str] = []
    while True:
        end = inner.rfind(quote) if quote == '"' else inner.find(quote)
        if end >= 0 and not inner[end + len(quote) :].strip():
            parts.append(inner[:end])
            return "\n".join(parts), at
        if end >= 0 and quote == '"""':
            raise _bad(at, f"text after the closing quotes: {shown(inner[end + 3 :].strip())}")
        if at >= len(lines):
            raise _bad(number, f"the value opened with {quote} is never closed")
        parts.append(inner)
        inner = lines[at].rstrip("\r")
        at += 1


def _message(line: int, value: str) -> tuple[str, str]:
    role, _, content = value.partition(" ")
    if role.lower() not in ROLES:
        raise _bad(line, f"MESSAGE begins with one of {', '.join(ROLES)}, not {shown(role)}")
    return role.lower(), content.strip()


_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def _parameter(line: int, value: str, parameters: dict[str, Any]) -> None:
    name, _, text = value.partition(" ")
    name, text = name.lower(), text.strip()
    if name not in KNOWN:
        raise _bad(line, f"unknown parameter {shown(name)}; known are {', '.join(sorted(KNOWN))}")
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    typed: Any = text
    if KNOWN[name] is list:
        typed = [*parameters.get(name, []), text]
    elif KNOWN[name] is bool and text.lower() in ("true", "false"):
        typed = text.lower() == "true"
    elif KNOWN[name] in (int, float) and len(text) < 40 and _NUMBER.fullmatch(text):
        typed = int(text) if text.lstrip("+-").isdigit() else float(text)
    try:
        parameters[name] = checked_all({**parameters, name: typed})[name]
    except InvalidRequest as error:
        raise _bad(line, f"PARAMETER {error.message}") from None


# -- in the store, and for people -------------------------------------------------------------------------------------
def parse_recipe(facts: Facts) -> Recipe:
    """A recipe out of a manifest: as suspicious as any file. ModelFileError."""
    messages = facts.values.get("messages") or []
    pairs = [tuple(m) for m in messages if isinstance(m, list) and len(m) == 2] if isinstance(messages, list) else []
    if not isinstance(messages, list) or len(pairs) != len(messages):
        raise facts.bad("messages", "a list of pairs")
    if not all(isinstance(part, str) for pair in pairs for part in pair):
        raise facts.bad("messages", "a list of pairs of texts")
    parameters = facts.part("parameters")
    recipe = Recipe(
        parent=facts.text("parent"),
        template=facts.text("template", default=None),
        system=facts.text("system", default=None),
        parameters=dict(parameters.values) if parameters else {},
        messages=tuple(pairs),
        license=facts.text("license", default=None),
    )
    try:
        return checked_recipe(recipe)
    except InvalidRequest as error:
        raise facts.bad("recipe", f"sound ({error.message})") from None


def written(recipe: Recipe, base: str | None = None) -> str:
    """The recipe as a Modelfile, which `parse` reads back to the same."""
    lines = [f"FROM {base or recipe.parent}"]
    for name in ("template", "system", "license"):
        value = getattr(recipe, name)
        if value is not None:
            lines.append(f"{name.upper()} {_in_quotes(value)}")
    lines += parameter_lines(recipe.parameters, "PARAMETER ")
    lines += [f"MESSAGE {role} {_in_quotes(content)}" for role, content in recipe.messages]
    return "\n".join(lines) + "\n"


def parameter_lines(parameters: Mapping[str, Any], before: str = "") -> list[str]:
    lines = []
    for name, value in sorted(parameters.items()):
        for one in value if isinstance(value, list) else [value]:
            text = f'"{one}"' if isinstance(one, str) else str(one).lower() if isinstance(one, bool) else f"{one}"
            lines.append(f"{before}{name} {text}")
    return lines


def _in_quotes(text: str) -> str:
    return f'"""{text}"""' if '"' in text or "\n" in text else f'"{text}"'
