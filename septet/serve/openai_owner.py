"""Whose stored things (responses, files, batches) a request may see: those of its own API key.

Asked by the routes that keep something between requests. Without keys everything has one owner.
"""

from __future__ import annotations

from septet.serve.context import current

__all__ = ["owner_of"]


def owner_of() -> str:
    context = current()
    return context.key.name if context is not None and context.key is not None else ""
