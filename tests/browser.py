"""A headless Chromium for tests: the machine's own, driven by Playwright. Found, or said loudly that it is not."""

from __future__ import annotations

import os
import shutil
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def executable() -> str:
    """Under CI a missing browser is a failure; elsewhere the test is skipped with the way out."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        words = (
            f"no browser: none of {', '.join(NAMES)} is on the path, so the page was NOT tested; "
            "on Debian: apt-get install chromium-headless-shell"
        )
        (pytest.fail if os.environ.get("CI") else pytest.skip)(words)
    return str(found)


@contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = executable()
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()
