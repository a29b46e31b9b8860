"""Entering a network namespace with a thread of this process."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from vllm_dualpath.bench.testbed.layout import NETNS_ROOT
from vllm_dualpath.errors import LaunchError

_CLONE_NEWNET = 0x40000000
_T = TypeVar("_T")


def inside(namespace: str, call: Callable[[], _T]) -> _T:
    """Call something in a namespace, in a thread of its own that ends with it."""
    results: list[_T] = []
    errors: list[BaseException] = []

    def enter_and_call() -> None:
        try:
            _enter(NETNS_ROOT / namespace)
            results.append(call())
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=enter_and_call, name="dualpath-namespace")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Inside, the calling thread is in ``namespace``, so are threads and processes it starts."""
    own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        _enter(NETNS_ROOT / namespace)
        try:
            yield
        finally:
            _set(own)
    finally:
        os.close(own)


def _enter(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as exc:
        raise LaunchError(f"namespace {path}: cannot be opened: {exc}") from exc
    try:
        _set(fd)
    finally:
        os.close(fd)


def _set(fd: int) -> None:
    # os.setns is Python 3.12's.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, _CLONE_NEWNET):
        errno = ctypes.get_errno()
        raise LaunchError(f"a network namespace cannot be entered: {os.strerror(errno)}")
