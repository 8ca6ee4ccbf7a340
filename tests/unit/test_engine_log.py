"""Logs: nothing untrusted can break a line, colour a terminal, flood the log or show a key."""

from __future__ import annotations

import io
import logging
import time

import pytest

from septet.log import MAX_MESSAGE, LineFormatter, clean, configure


@pytest.fixture
def lines():
    """Configure logging into a string; returns a function that gives the lines so far."""
    logger = logging.getLogger("septet")
    before = (logger.handlers[:], logger.level, logger.propagate)
    stream = io.StringIO()
    configure("DEBUG", stream)
    yield lambda: stream.getvalue().splitlines()
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.mark.parametrize(
    "text",
    [
        "a\nb",
        "a\r\nb",
        "\x1b[31mred\x1b[0m",
        "\x9b31m",
        "\x00",
        "\x7f",
        "a\u2028b",
        "\u202eevil",
        "\u2066x",
        "\ud800",
        "\b\b\b",
    ],
)
def test_clean_gives_one_printable_line(text):
    out = clean(text)
    assert out.isprintable()
    assert len(out.splitlines()) == 1
    out.encode("utf-8")


def test_clean_keeps_ordinary_text():
    assert clean("Grüße, 世界 🙂 {a: 1}") == "Grüße, 世界 🙂 {a: 1}"


def test_clean_cuts_a_huge_value_quickly_and_says_so():
    huge = "x\n" * 50_000_000
    began = time.process_time()
    out = clean(huge, 100)
    assert time.process_time() - began < 0.1
    assert len(out) < 300
    assert "99999900 more characters" in out


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("api_key=abcdef123456&x=1", "abcdef123456"),
        ('{"api-key": "abcdef123456"}', "abcdef123456"),
        ("token hf_abcdefghijklmnop in use", "abcdefghijklmnop"),
        ("key sk-proj-abcdefghijkl", "abcdefghijkl"),
        ("https://me:abcdef123456@index.example/simple", "abcdef123456"),
    ],
)
def test_clean_masks_secrets(text, secret):
    assert secret not in clean(text)
    assert "***" in clean(text)


def test_counts_of_tokens_are_no_secrets():
    assert clean("tokens=123456789 prompt tokens: 1234567") == "tokens=123456789 prompt tokens: 1234567"


def test_a_record_is_one_line(lines):
    logging.getLogger("septet.engine.loop").info("model %s", "a\n2026-01-01 00:00:00.000 ERROR forged: x\x1b[2J")
    (line,) = lines()
    assert " INFO engine.loop: model a\\n2026" in line
    assert "\x1b" not in line


def test_a_long_record_is_cut(lines):
    logging.getLogger("septet.x").warning("%s", "y" * 10_000_000)
    (line,) = lines()
    assert len(line) < MAX_MESSAGE + 200


def test_traceback_lines_are_indented_and_clean(lines):
    try:
        raise ValueError("first\n2026-01-01 00:00:00.000 INFO forged: \x1b[31mline")
    except ValueError:
        logging.getLogger("septet.x").exception("failed")
    first, *rest = lines()
    assert first.endswith("ERROR x: failed")
    assert rest
    assert all(line.startswith("    | ") for line in rest)
    assert not any("\x1b" in line for line in rest)


def test_a_record_with_wrong_arguments_is_still_written():
    record = logging.LogRecord("septet.x", logging.INFO, "f.py", 1, "%d rows", ("many",), None)
    assert "could not be formatted" in LineFormatter().format(record)


def test_configure_twice_writes_once(lines):
    stream = io.StringIO()
    configure("INFO", stream)
    configure("INFO", stream)
    logging.getLogger("septet.x").info("once")
    assert stream.getvalue().count("once") == 1
    assert lines() == []
