"""What a mover's log leaves out."""

from __future__ import annotations

import logging

from vllm_dualpath.mover.log_limit import RepeatLimit


def record(text: str, line: int = 1) -> logging.LogRecord:
    return logging.LogRecord("n", logging.WARNING, "file.py", line, "%s!", (text,), None)


def test_the_first_of_a_kind_are_said_and_then_their_number() -> None:
    """Another place in the code has a count of its own; after the window it begins again."""
    limit = RepeatLimit(most=2, window_s=0.05)
    assert [limit.filter(record("a")) for _ in range(5)] == [True, True, False, False, False]
    assert limit.filter(record("b", line=2))
    limit._window_s = 0.0
    last = record("a")
    assert limit.filter(last)
    assert last.getMessage() == "a! (3 more like this were left out)"
    following = record("a")
    limit._window_s = 60.0
    assert limit.filter(following)
    assert following.getMessage() == "a!"
