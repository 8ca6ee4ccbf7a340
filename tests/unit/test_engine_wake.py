"""Without a GPU's driver nothing happens, and nothing is raised."""

from __future__ import annotations

from septet.engine import wake


def test_no_driver_is_no_error() -> None:
    assert wake._retain_primary_context("libno-such-driver.so") is False
    assert wake._retain_primary_context("libc.so.6") is False  # a library without its functions
    thread = wake.wake_gpu()
    thread.join(30)
    assert not thread.is_alive()
