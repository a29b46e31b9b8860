"""Logging of the processes that this command becomes."""

from __future__ import annotations

import logging


def log_to_stderr(*, verbose: bool) -> None:
    """Lifecycle and warnings to standard error; every request too if ``verbose``."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    # An access line a request is the router's own to log, at DEBUG.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
