"""What follows copies: in order, on a thread of its own, whatever goes wrong."""

from __future__ import annotations

import os
import threading
from pathlib import Path

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


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core to run on")
def test_threads_keep_off_the_cores_of_the_forward_pass():
    """Copies and reports run elsewhere than the thread that is bound to a core, which stays."""
    mine = os.sched_getaffinity(0)
    before = {each.name for each in Path("/proc/self/task").iterdir()}
    os.sched_setaffinity(0, {min(mine)})
    try:
        engine = HostCopies()
        reports = Reports(engine)
        reported = threading.Event()
        reports.after_all(lambda _done: reported.set())
        assert reported.wait(10)
        started = {each.name for each in Path("/proc/self/task").iterdir()} - before
        assert len(started) == 2
        for thread in started:
            assert os.sched_getaffinity(int(thread)) == mine - {min(mine)}
        assert os.sched_getaffinity(0) == {min(mine)}
        reports.close()
        engine.close()
    finally:
        os.sched_setaffinity(0, mine)
