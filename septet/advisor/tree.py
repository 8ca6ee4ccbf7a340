"""The decision tree as a picture: for one hardware, each use and each priority, and the engine that comes first.

Called by `septet advise --svg`. Plain SVG, light and dark by the viewer's preference; no scripts.
"""

from __future__ import annotations

from html import escape

from septet.advisor.advise import Question, advise, choices

__all__ = ["decision_tree"]

ROW, COLUMN, LEFT, TOP = 26, 150, 330, 96
STYLE = """
svg{font:13px system-ui,sans-serif;background:#fff;color:#1c2430}
text{fill:currentColor} .head{font-weight:600} .quiet{opacity:.65} .line{stroke:currentColor;opacity:.35;fill:none}
.box{fill:#e8eef8;stroke:#8aa4cf} .chosen{fill:#ffe3b3;stroke:#c98a12}
@media(prefers-color-scheme:dark){svg{background:#12161d;color:#dfe6f0}.box{fill:#1f2b40;stroke:#4f6a9a}
.chosen{fill:#4d3a10;stroke:#d9a441}}
"""


def decision_tree(question: Question) -> str:
    """Rows: uses; columns: priorities; a cell: who comes first. The question's own cell is marked."""
    uses, priorities = choices("use"), choices("priority")
    width, height = LEFT + COLUMN * len(priorities) + 20, TOP + ROW * len(uses) + 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="Which engine, by use and priority">',
        f"<style>{STYLE}</style>",
        _text(20, 30, f"Which engine on {choices('hardware')[question.hardware]}?", "head"),
        _text(20, 50, "rows: what for; columns: what matters most; marked: your answers", "quiet"),
    ]
    middle = TOP + ROW * len(uses) / 2
    parts += [f'<rect class="box" x="20" y="{middle - 14}" width="120" height="28" rx="6"/>']
    parts += [_text(80, middle + 5, choices("hardware")[question.hardware][:18], "head", "middle")]
    for j, title in enumerate(priorities.values()):
        parts.append(_text(LEFT + COLUMN * j + COLUMN / 2, TOP - 14, title, "head", "middle"))
    for i, (use, title) in enumerate(uses.items()):
        y = TOP + ROW * i
        parts.append(f'<path class="line" d="M140 {middle} C170 {middle} 150 {y + 13} 180 {y + 13}"/>')
        parts.append(_text(186, y + 17, title))
        for j, priority in enumerate(priorities):
            first = advise(Question(hardware=question.hardware, use=use, priority=priority)).ranking[0]
            mark = "chosen" if (use, priority) == (question.use, question.priority) else "box"
            x = LEFT + COLUMN * j
            parts.append(
                f'<rect class="{mark}" x="{x + 4}" y="{y + 2}" width="{COLUMN - 8}" height="{ROW - 4}" rx="4"/>'
            )
            parts.append(_text(x + COLUMN / 2, y + 17, first.title, "", "middle"))
    foot = "Points of published, corrected and measured rankings: septet advise says which."
    parts.append(_text(20, height - 18, foot, "quiet"))
    return "\n".join([*parts, "</svg>", ""])


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'
