"""The decision tree as a picture: three questions, their branches, and the engine at each end; your path is marked.

Called by `septet advise --svg`. The branch of the hardware that was named is drawn whole; the others end in who comes
first how often. Answers to the last question that lead to the same engines share a branch. Plain SVG, light and dark by
the viewer's preference; no scripts.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from html import escape

from septet.advisor.advise import Question, choices, first, rank

__all__ = ["decision_tree", "text_width"]

LINE, GAP, PAD, CORNER = 17, 10, 10, 7  # heights of a text line, between boxes, within; radius
TOP, FOOT = 96, 54
COLUMNS = ((20, 100), (180, 200), (440, 200), (700, 270), (1030, 230))  # (x, width): root, hardware, use, priorities,
WIDTH = 1280  # engines
STYLE = """
svg{font:13px system-ui,-apple-system,"Segoe UI",sans-serif;background:#fff;color:#1c2430}
text{fill:currentColor}.head{font-weight:600;font-size:17px}.ask{font-weight:600}.quiet{fill:#5a6675}
.line{stroke:#9aa6b6;stroke-width:1.2;fill:none}.path{stroke:#b8730a;stroke-width:3;fill:none}
.box{fill:#eef2f9;stroke:#8aa4cf}.end{fill:#e6f3ea;stroke:#6aa57d}.other{fill:none;stroke:#b5bfcc;stroke-dasharray:4 3}
.chosen{fill:#ffe3b3;stroke:#b8730a;stroke-width:2}
@media(prefers-color-scheme:dark){svg{background:#12161d;color:#e3e9f2}.quiet{fill:#9aa7b8}.line{stroke:#5b6878}
.path{stroke:#e0a63f}.box{fill:#1f2b40;stroke:#5877ad}.end{fill:#1b3325;stroke:#4f9468}.other{stroke:#4c5868}
.chosen{fill:#4d3a10;stroke:#e0a63f}}
"""
QUESTIONS = ("", "1. Which hardware?", "2. What for?", "3. What matters most?", "The engine that comes first")


@dataclass(slots=True)
class Node:
    """A box: `column`, its lines, whether it lies on the asked path, what hangs on it; `y` once it is laid out."""

    column: int
    lines: list[str]
    kind: str
    chosen: bool = False
    below: list[Node] = field(default_factory=list)
    y: float = 0.0

    @property
    def height(self) -> float:
        return LINE * len(self.lines) + PAD


def decision_tree(question: Question) -> str:
    root = _node(0, "Which engine?", "box", True)
    root.below = [_hardware(name, question) for name in choices("hardware")]
    height = _lay_out(root, TOP) + FOOT
    title = f"Which engine? {choices('use')[question.use]} on {choices('hardware')[question.hardware]}, "
    title += f"{choices('priority')[question.priority]} first"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}" '
        f'role="img" aria-label="Decision tree: {escape(title)}">',
        f"<style>{STYLE}</style>",
        _text(20, 34, title, "head"),
        *(_text(x, 70, asked, "ask") for (x, _), asked in zip(COLUMNS, QUESTIONS, strict=True)),
    ]
    parts += [*_edges(root), *_boxes(root)]
    marked = "Marked: your answers. Level engines stand together. Dashed: who comes first in how many of a branch's "
    parts.append(
        _text(20, height - 20, f"{marked}answers. septet advise shows the reasons and their sources.", "quiet")
    )
    return "\n".join([*parts, "</svg>", ""])


def text_width(text: str, size: float = 13.0) -> float:
    """About how wide a text is: a little more than in the usual sans-serif faces."""
    narrow, wide = set("iljtfrI.,:;'| ()"), set("mwMWQO")
    return size * sum(0.40 if c in narrow else 1.0 if c in wide else 0.78 if c.isupper() else 0.64 for c in text)


# -- the tree ---------------------------------------------------------------------------------------------------------
def _hardware(name: str, question: Question) -> Node:
    title, chosen = choices("hardware")[name], name == question.hardware
    node = _node(1, title, "box", chosen)
    if chosen:
        node.below = [_use(use, question) for use in choices("use")]
    else:
        node.below = [_node(2, _mostly(name, question), "other", False)]
    return node


def _mostly(hardware: str, question: Question) -> str:
    """A branch that is not drawn: who comes first in most of its answers."""
    counts: Counter[str] = Counter()
    for use in choices("use"):
        for priority in choices("priority"):
            counts.update(first(rank(Question(hardware=hardware, use=use, priority=priority, users=question.users))))
    engine, times = counts.most_common(1)[0]
    return f"{engine} in {times} of {len(choices('use')) * len(choices('priority'))}"


def _use(use: str, question: Question) -> Node:
    node = _node(2, choices("use")[use], "box", use == question.use)
    ends: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for priority in choices("priority"):
        ends[first(rank(replace(question, use=use, priority=priority)))].append(priority)
    for engines, priorities in ends.items():
        chosen = use == question.use and question.priority in priorities
        every = len(priorities) == len(choices("priority"))
        titles = "whatever matters most" if every else ", ".join(choices("priority")[p] for p in priorities)
        branch = _node(3, titles, "box", chosen)
        branch.below = [_node(4, " or ".join(engines) or "none", "end", chosen)]
        node.below.append(branch)
    return node


def _node(column: int, text: str, kind: str, chosen: bool) -> Node:
    return Node(column, _wrap(text, COLUMNS[column][1] - 2 * PAD), kind, chosen)


def _wrap(text: str, width: float) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


# -- the picture ------------------------------------------------------------------------------------------------------
def _lay_out(node: Node, top: float) -> float:
    """Put a node beside the middle of what hangs on it, all from `top` on; the y below it."""
    bottom = top
    for child in node.below:
        bottom = _lay_out(child, bottom)
    bottom = max(bottom, top + node.height + GAP)
    node.y = (top + bottom - GAP - node.height) / 2
    if len(node.below) == 1:  # a single branch is level with its box
        _shift(node.below[0], node.y + node.height / 2 - node.below[0].y - node.below[0].height / 2)
    return bottom


def _shift(node: Node, by: float) -> None:
    node.y += by
    for child in node.below:
        _shift(child, by)


def _edges(node: Node) -> list[str]:
    """Those of the asked path last, so that they lie on top."""
    x0, y0 = sum(COLUMNS[node.column]), node.y + node.height / 2
    found = []
    for child in sorted(node.below, key=lambda each: each.chosen):
        x1, y1 = COLUMNS[child.column][0], child.y + child.height / 2
        middle = (x0 + x1) / 2
        kind = "path" if node.chosen and child.chosen else "line"
        found.append(f'<path class="{kind}" d="M{x0:g} {y0:g}C{middle:g} {y0:g} {middle:g} {y1:g} {x1:g} {y1:g}"/>')
        found += _edges(child)
    return found


def _boxes(node: Node) -> list[str]:
    x, width = COLUMNS[node.column]
    kind = "chosen" if node.chosen else node.kind
    found = [
        f'<rect class="{kind}" x="{x}" y="{node.y:g}" width="{width}" height="{node.height:g}" rx="{CORNER}"/>',
        *(
            _text(x + width / 2, node.y + PAD / 2 + LINE * i + 13, line, "ask" if node.chosen else "", "middle")
            for i, line in enumerate(node.lines)
        ),
    ]
    return found + [part for child in node.below for part in _boxes(child)]


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
