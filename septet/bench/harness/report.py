"""Writes report.html and report.md beside results.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from septet.bench.harness.markdown import markdown

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["write_reports"]


def write_reports(document: dict[str, Any], out: Path) -> None:
    (out / "report.md").write_text(markdown(document))
