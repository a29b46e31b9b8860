"""The router's tests run in the event loop that the router runs in."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping

import pytest
import uvloop


@pytest.hookimpl(optionalhook=True)
def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], AbstractEventLoop]]:
    """Known to pytest-asyncio since 1.4; before, they run in asyncio's own loop."""
    return {"uvloop": uvloop.new_event_loop}
