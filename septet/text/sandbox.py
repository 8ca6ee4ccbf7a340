"""A Jinja environment in which a template can neither escape nor run away: for chat templates that came with a model.

Called by `template` alone. On jinja2's immutable sandbox (no underscore attributes, no mutation, ranges of at most
100,000) it adds a `Budget` per rendering. Bounded: CPU time (checked at every loop turn, macro, call, filter and
operator; one such operation may overrun), the size of each value a template builds (strings, numbers, containers with
all they contain) and of all together. Growth is predicted before the work. Not bounded: memory to the byte, time
to the millisecond. Templates get plain data only, never objects of ours; no loader, so no include or import.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

if TYPE_CHECKING:
    from jinja2.runtime import Context

__all__ = ["BUDGET", "Budget", "ChatEnvironment", "OverBudget"]

MAX_VALUE = 2**24  # characters (and container slots) of one value
MAX_WORK = 2**27  # of all values built in one rendering
MAX_CPU_S = 2.0
MAX_INTEGER = 1024  # bytes: multiplying is not linear
MAX_FORMAT = 10_000  # characters of a format string
BUDGET = "budget!"  # key in the rendering's context: not a name that a template can spell

_FILTERS_LEFT_OUT = frozenset(
    ("batch", "center", "format", "forceescape", "pprint", "random", "slice", "striptags", "sum", "truncate")
) | {"urlize", "wordcount", "wordwrap", "xmlattr"}
_METHODS_LEFT_OUT = frozenset(("center", "encode", "expandtabs", "format_map", "ljust", "rjust", "translate", "zfill"))
_ESCAPED_MARK = re.compile(r"(?<!\\)((?:\\\\)*)\\ufdd([012])")  # the marks of `template` must survive as they are
_UNBOUNDED_FORMAT = re.compile(r"\d{4}|%[^a-zA-Z%]*\*|\{[^}]*\{")


class OverBudget(jinja2.TemplateRuntimeError):
    """The template wants more time or memory than it may have."""


class Budget:
    """What one rendering may still use."""

    def __init__(self, cpu_s: float = MAX_CPU_S, work: int = MAX_WORK) -> None:
        self._deadline = time.thread_time() + cpu_s
        self._work = work
        self._weights: dict[int, tuple[int, Any]] = {}  # id -> (weight, the object: it must live as long as its id)

    def tick(self) -> None:
        if time.thread_time() > self._deadline:
            raise OverBudget("it takes too long")

    def reserve(self, size: int) -> None:
        """A value of `size` is about to be made."""
        self.tick()
        self._work -= size
        if size > MAX_VALUE or self._work < 0:
            raise OverBudget("it builds too large a value" if size > MAX_VALUE else "it builds too many values")

    def keep(self, value: Any) -> Any:
        """A value was made; containers count with all they contain, however often they contain it."""
        self.reserve(self.weight(value))
        return value

    def weight(self, value: Any) -> int:
        if isinstance(value, str):
            return len(value) + 1
        if isinstance(value, int):
            return value.bit_length() // 8 + 1
        if not isinstance(value, list | tuple | Mapping):
            return 1
        if (known := self._weights.get(id(value))) is None:
            inner = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
            known = (1 + sum(map(self.weight, inner)), value)
            self._weights[id(value)] = known
        return known[0]


def _budget(context: Context) -> Budget:
    return context[BUDGET]


class _Inject(NodeTransformer):
    """Rewrites the syntax tree so that loops, macros, `~`, slices and displays go through the budget."""

    def _call(self, name: str, *args: nodes.Expr) -> nodes.Call:
        return nodes.Call(nodes.EnvironmentAttribute(name), [nodes.ContextReference(), *args], [], None, None)

    def _ticking(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(self._call("tick")))
        return node

    visit_For = visit_Macro = visit_CallBlock = _ticking

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("concatenate", *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        if not isinstance(node.arg, nodes.Slice):
            return node
        parts = [part or nodes.Const(None) for part in (node.arg.start, node.arg.stop, node.arg.step)]
        return self._call("cut", node.node, *parts)

    def _display(self, node: Any) -> Any:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":  # a target: {% for a, b in ... %}
            return node
        return self._call("keep", node)

    visit_List = visit_Tuple = visit_Dict = _display


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment chat templates expect (transformers' one): trimmed blocks, loop controls, its own `tojson`."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
        for name in _FILTERS_LEFT_OUT:
            del self.filters[name]
        del self.globals["lipsum"]
        own: dict[str, Callable[..., Any]] = {"join": _join, "indent": _indent, "tojson": _tojson, "replace": _replace}
        self.filters |= own
        self.filters = {name: _metered(function) for name, function in self.filters.items()}
        self.globals |= {"namespace": _Namespace, "raise_exception": _raise, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = _Inject().visit(super()._parse(source, name, filename))
        for node in tree.find_all(nodes.Node):
            if getattr(node, "lineno", 1) is None:
                node.lineno = 1
        return tree.set_environment(self)

    # -- what rewritten trees call, with the rendering's context
    def tick(self, context: Context) -> str:
        _budget(context).tick()
        return ""

    def concatenate(self, context: Context, *values: Any) -> str:
        _budget(context).reserve(sum(map(_budget(context).weight, values)))
        return "".join(map(str, values))

    def cut(self, context: Context, value: Any, start: Any, stop: Any, step: Any) -> Any:
        return _budget(context).keep(value[start:stop:step])

    def keep(self, context: Context, value: Any) -> Any:
        return _budget(context).keep(value)

    # -- the sandbox's own seams
    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        budget.reserve(_predicted(budget, operator, left, right))
        return budget.keep(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(__obj, "__self__", None) is __self:  # injected by us; jinja2 adds its own keywords inside loops
            return __obj(*args)
        budget = _budget(__context)
        budget.tick()
        _check_method(budget, __obj, args)
        return budget.keep(super().call(__context, __obj, *args, **kwargs))


class _Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what the assistant wrote, for training: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(Namespace):
    """`namespace()` without underscore names, and without a representation that shows what it holds."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attributes must not begin with an underscore: {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _predicted(budget: Budget, operator: str, left: Any, right: Any) -> int:
    """The size of the result, before it is made."""
    if operator == "%" and isinstance(left, str):
        _check_format(left)
        return 1000 * len(left) + budget.weight(right)
    sizes = budget.weight(left), budget.weight(right)
    if isinstance(left, int) and isinstance(right, int):
        size = left.bit_length() * abs(right) // 8 if operator == "**" else sum(sizes)
        if size > MAX_INTEGER:
            raise OverBudget("it builds too large a number")
        return size
    if operator == "*":
        if isinstance(left, int) and isinstance(right, str | list | tuple):
            return max(left, 0) * sizes[1]
        if isinstance(right, int) and isinstance(left, str | list | tuple):
            return max(right, 0) * sizes[0]
    return sum(sizes)


def _check_format(text: str) -> None:
    if len(text) > MAX_FORMAT or _UNBOUNDED_FORMAT.search(text):
        raise OverBudget("it formats with an unbounded width")


def _check_method(budget: Budget, method: Any, args: Sequence[Any]) -> None:
    """Refuse methods that grow without bound, predict those that grow with their arguments."""
    owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(owner, int | float) and not isinstance(owner, bool) and name != "is_integer":
        raise OverBudget(f"it calls {name} of a number")
    if isinstance(wrapped := getattr(getattr(method, "__wrapped__", None), "__self__", None), str):
        _check_format(wrapped)  # the sandbox wraps str.format
    if not isinstance(owner, str):
        return
    if name in _METHODS_LEFT_OUT:
        raise OverBudget(f"it calls the string method {name}")
    if name == "replace" and len(args) >= 2:
        budget.reserve(_replaced(owner, str(args[0]), str(args[1])))
    if name == "join" and args and isinstance(args[0], Sequence | Mapping):
        budget.reserve(len(owner) * len(args[0]) + budget.weight(args[0]))


def _replaced(text: str, old: str, new: str) -> int:
    return len(text) + text.count(old) * max(0, len(new) - len(old))


def _metered(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter, with its result charged to the rendering's budget; lazy results are made lists."""
    wants = getattr(function, "jinja_pass_arg", None)

    @pass_context
    def metered(context: Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.tick()
        first = {
            "context": context,
            "eval_context": context.eval_ctx,
            "environment": context.environment,
        }.get(getattr(wants, "name", ""))
        result = function(value, *args, **kwargs) if first is None else function(first, value, *args, **kwargs)
        if isinstance(result, Iterator):
            result = list(result)
        return budget.keep(result)

    return metered


@pass_context
def _join(context: Context, value: Any, d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    items = list(value)
    budget = _budget(context)
    budget.reserve(sum(map(budget.weight, items)) + len(str(d)) * len(items))
    return str(d).join(map(str, items))


@pass_context
def _indent(context: Context, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, str) and not 0 <= width <= 1000:
        raise OverBudget("it indents by more than 1000")
    margin = width if isinstance(width, str) else " " * width
    lines = str(s).splitlines() + ([""] if str(s).endswith("\n") else [])
    _budget(context).reserve(len(s) + len(margin) * len(lines))
    body = [margin + line if (i or first) and (line or blank) else line for i, line in enumerate(lines)]
    return "\n".join(body)


@pass_context
def _replace(context: Context, s: str, old: str, new: str, count: int | None = None) -> str:
    s, old, new = str(s), str(old), str(new)
    _budget(context).reserve(_replaced(s, old, new))
    return s.replace(old, new, -1 if count is None else count)


@pass_context
def _tojson(
    context: Context,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's HTML escapes, as transformers' templates expect."""
    budget = _budget(context)
    budget.reserve(budget.weight(value))
    if indent is not None and not (isinstance(indent, int) and indent <= 16):
        raise OverBudget("it indents JSON by more than 16")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    parts = []
    for part in encoder.iterencode(value):
        budget.reserve(len(part))
        parts.append(_ESCAPED_MARK.sub(lambda m: m[1] + chr(0xFDD0 + int(m[2])), part) if ensure_ascii else part)
    return "".join(parts)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    _check_format(pattern)
    return datetime.now().strftime(pattern)
