"""The page in a real browser over the real model: chat, stop, schema, scope; by keyboard, on a phone, without a CDN."""

from __future__ import annotations

import json
import re
import time
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.browser import browser

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.e2e.serving import Server

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Rhine", "Danube"]}, "long": {"type": "boolean"}},
    "required": ["name", "long"],
    "additionalProperties": False,
}
LAST = "article.assistant:last-of-type"
SCOPE_DIARY = """() => {
  window.diary = [];
  const rows = document.querySelector("#rows"), note = document.querySelector("#batch-note");
  const write = () => window.diary.push([note.textContent, rows.querySelectorAll("rect.decode, rect.prefill").length]);
  for (const node of [rows, note]) new MutationObserver(write).observe(node, { childList: true, subtree: true });
}"""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Any, server: Server) -> Iterator[Any]:
    """A page of its own; whatever it asks of any other host, or complains of, fails the test."""
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    troubles: list[str] = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
    page.on("request", lambda r: troubles.append(r.url) if not r.url.startswith(server.root) else None)
    page.set_default_timeout(120_000)
    page.goto(server.root + "/")
    page.wait_for_selector("#model option", state="attached")
    yield page
    context.close()
    assert troubles == []


def settings(page: Any, **values: str) -> None:
    if page.get_attribute("#open-settings", "aria-expanded") == "false":
        page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#{name}", value)


def until(page: Any, condition: str, seconds: float = 120) -> None:
    """Playwright's own wait evaluates text within the page, which the page's policy forbids: asked from outside."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"did not come true: {condition}"
        page.wait_for_timeout(30)


def finished(page: Any) -> str:
    page.wait_for_selector(f"{LAST}:not(.running)")
    return page.inner_text(f"{LAST} .text")


def test_a_conversation_by_keyboard_alone_with_its_figures(page: Any) -> None:
    settings(page, temperature="0", max_tokens="12", system="You answer in one word.")
    page.keyboard.press("Escape")
    page.focus("#tab-chat") if page.is_visible("#tab-chat") else page.focus("#open-settings")
    page.keyboard.press("/")
    page.keyboard.type("Say hello.")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Now.")
    assert page.input_value("#prompt") == "Say hello.\nNow."
    page.keyboard.press("Enter")
    assert finished(page)
    facts = page.inner_text(f"{LAST} .facts")
    assert re.search(r"TTFT \d+\.\d\d s .* \d+ tokens .* \d+ of \d+ prompt tokens cached", facts), facts
    page.keyboard.type("Again.")  # the focus is back where one writes
    page.keyboard.press("Enter")
    until(page, "document.querySelectorAll('article.assistant').length === 2")
    finished(page)
    cached = re.search(r"(\d+) of (\d+) prompt tokens cached", page.inner_text(f"{LAST} .facts"))
    assert cached is not None
    assert int(cached[1]) > 10, "the conversation so far is a prefix that the cache holds"


def test_stop_ends_the_answer_and_the_engine_forgets_it(page: Any, server: Server) -> None:
    settings(page, max_tokens="900", temperature="1", stops="never to be said")
    page.fill("#prompt", "Write a very long story about the sea.")
    page.press("#prompt", "Enter")
    until(page, "document.querySelector('article.assistant .text')?.textContent.length > 20")
    page.keyboard.press("Escape")
    finished(page)
    assert "stopped" in page.inner_text(f"{LAST} .facts") or page.is_visible(f"{LAST} .text")
    until(page, "document.querySelector('#batch-note').textContent.startsWith('0 of')")
    text = httpx.get(server.root + "/metrics").text
    running = re.search(r"^vllm:num_requests_running\{[^}]*\} (\S+)", text, re.MULTILINE)
    assert running is not None
    assert float(running[1]) == 0


def test_an_answer_follows_the_schema_and_a_broken_schema_is_told(page: Any) -> None:
    settings(page, schema="{", max_tokens="60")
    page.fill("#prompt", "A river?")
    page.click("#send")
    page.wait_for_selector(f"{LAST} .error")
    assert "schema" in page.inner_text(f"{LAST} .error")
    settings(page, schema=json.dumps(SCHEMA))
    page.fill("#prompt", "A river?")
    page.click("#send")
    until(page, "document.querySelectorAll('article.assistant').length === 2")
    answer = json.loads(finished(page))
    assert set(answer) == {"name", "long"}
    assert answer["name"] in ("Rhine", "Danube")


def test_the_scope_moves_while_the_engine_works(page: Any) -> None:
    until(page, "Number(document.body.dataset.frames) > 0")
    page.evaluate(SCOPE_DIARY)  # the answer may be over before a second question could be asked of the page
    settings(page, max_tokens="300", temperature="1")
    page.fill("#prompt", "Write a very long story about the sea.")
    page.click("#send")
    finished(page)
    diary = page.evaluate("window.diary")
    assert any(rows and re.match(r"1 of \d+ rows", note) for note, rows in diary), diary
    until(page, "document.querySelector('#rows').textContent === 'nothing runs'")
    assert page.locator("#tree rect").count() >= 1
    assert page.locator("#curve-ttft circle").count() >= 1
    assert page.locator("#curve-rate polyline").count() == 1
    drawn = "[...document.querySelector('#pool').getContext('2d').getImageData(0, 0, 300, 40).data].some((v) => v)"
    assert page.evaluate(drawn)


def test_text_of_a_model_is_never_markup(page: Any) -> None:
    """The user's own words come back the same way: as text."""
    settings(page, max_tokens="1")
    page.fill("#prompt", "<img src=x onerror=alert(1)><b>bold</b>")
    page.click("#send")
    finished(page)
    assert page.locator("#messages img, #messages b").count() == 0
    assert "<b>bold</b>" in page.inner_text("article.user .text")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_everything_fits_and_can_be_reached(chromium: Any, server: Server, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.goto(server.root + "/")
    page.wait_for_selector("#model option", state="attached")
    for tab in ("scope", "chat"):
        page.tap(f"#tab-{tab}")
        assert page.is_visible(f"#{tab}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{tab} is wider than the screen"
    assert page.evaluate("document.querySelector('#send').getBoundingClientRect().bottom <= innerHeight")
    page.tap("#open-settings")
    assert page.is_visible("#temperature")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    assert (bright[0] > bright[1]) == (scheme == "dark")
    assert abs(bright[0] - bright[1]) > 450, "too little contrast"
    context.close()


def test_the_page_is_served_under_a_strict_policy_and_a_client_gets_a_word(server: Server) -> None:
    page = httpx.get(server.root + "/", headers={"accept": "text/html"})
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "<script>" not in page.text
    assert "style=" not in page.text
    assert httpx.get(server.root + "/").text == "Ollama is running"
    assert httpx.get(server.root + "/static/../service.py").status_code == 404
    assert httpx.get(server.root + "/static/%2e%2e%2fservice.py").status_code == 404
