from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from tests.connector.engine import Engine


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    """Makes engines; checks at the end of the test that nothing is left over in them."""
    engines: list[Engine] = []

    def make(role: str, **options: object) -> Engine:
        made = Engine(tmp_path, role, **options)  # type: ignore[arg-type]
        engines.append(made)
        return made

    yield make
    for each in engines:
        each.close()


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    """VLLM's two schedulers."""
    return bool(request.param)
