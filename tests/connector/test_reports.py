"""What follows copies: in order, on a thread of its own, whatever goes wrong."""

from __future__ import annotations

import threading

import pytest

from vllm_dualpath.connector.copies import HostCopies
from vllm_dualpath.connector.reports import Reports


@pytest.fixture
def copies():
    engine = HostCopies()
    yield engine
    engine.close()


def test_reports_keep_their_order_and_survive_errors(copies):
    """One report that raises ends nothing; close waits for those under way."""
    reports = Reports(copies)
    seen: list[object] = []
    reports.after_all(lambda done: seen.append((1, done, threading.current_thread().name)))
    reports.after_all(lambda _done: 1 // 0)
    reports.after_all(lambda done: seen.append((2, done)))
    reports.close()
    assert seen == [(1, True, "dualpath-reports"), (2, True)]


def test_refused_copy_leaves_no_report_behind(copies):
    """The report of a copy that was not submitted is not taken for that of the next one."""
    reports = Reports(copies)
    seen: list[int] = []
    with pytest.raises(TypeError):
        reports.submit(None, "no layer", 1, lambda _done: seen.append(1), load=False)
    reports.after_all(lambda _done: seen.append(2))
    reports.close()
    assert seen == [2]
