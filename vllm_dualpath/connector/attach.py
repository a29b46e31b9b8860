"""Keeps one side of the connector attached to its mover: connects, notices a loss, connects again.

Runs in a thread of its own, so that no hook of vLLM ever waits for a mover.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from pathlib import Path
from typing import Protocol

from vllm.logger import init_logger

from vllm_dualpath.control.link import EngineLink
from vllm_dualpath.errors import ConfigError, DualPathError, TransferTimeout
from vllm_dualpath.messages import Attached, EngineMessage, LocalMessage

logger = init_logger("vllm.dualpath.attach")

MIN_BACKOFF_S = 0.5
MAX_BACKOFF_S = 10.0
_STEADY_S = 10.0
"""A connection that lasted this long ends the back-off."""
_CONNECT_TRY_S = 1.0
_JOIN_S = 15.0


class Attachment(Protocol):
    """What a side does with its connections. Called from the attach thread, but for
    ``received``.
    """

    def prepare(self) -> None:
        """Before each try to connect: let go of the last mover, start one. May raise."""

    def attached(self, attached: Attached, fds: list[int]) -> None:
        """Connected. Takes what it needs of ``fds``; they are closed afterwards."""

    def received(self, message: LocalMessage) -> None:
        """A message of the current connection; never before ``attached``. In the link's thread."""

    def lost(self) -> None:
        """The mover or its connection is gone."""


class _Inbox:
    """Holds back messages that arrive before the connection is set up."""

    def __init__(self, side: Attachment) -> None:
        self._side = side
        self._lock = threading.Lock()
        self._early: list[LocalMessage] | None = []

    def put(self, message: LocalMessage) -> None:
        with self._lock:
            if self._early is not None:
                self._early.append(message)
                return
        self._side.received(message)

    def open(self) -> None:
        with self._lock:
            early, self._early = self._early or [], None
            for message in early:
                self._side.received(message)


class MoverConnection:
    """The connection of one side (``worker`` or ``scheduler``); owns ``dualpath-attach-<kind>``."""

    def __init__(self, path: Path, kind: str, side: Attachment) -> None:
        self._path = path
        self._kind = kind
        self._side = side
        self._link: EngineLink | None = None
        self._boot_id: bytes | None = None
        self._unsent: deque[tuple[bytes, EngineMessage]] = deque()
        self._opening = threading.Lock()
        self._fatal: ConfigError | None = None
        self._stop = threading.Event()
        self._wake = threading.Event()
        self._first = threading.Event()
        self._thread = threading.Thread(
            target=self._run, name=f"dualpath-attach-{kind}", daemon=True
        )

    @property
    def boot_id(self) -> bytes | None:
        """The mover that messages reach now, or ``None``."""
        return self._boot_id

    def start(self) -> None:
        """Start to connect; returns at once."""
        self._thread.start()

    def wait_attached(self, timeout_s: float) -> None:
        """Block until attached for the first time. Raises ``ConfigError``. For start only."""
        if not self._first.wait(timeout_s):
            raise ConfigError(
                f"mover: expected it to listen at {self._path} within {timeout_s} s"
                f" (kv_connector_extra_config.deadlines.attach_s), found nothing;"
                f" see {self._path.with_suffix('.log')}"
            )
        if self._fatal is not None:
            raise self._fatal

    def send(self, boot_id: bytes, *messages: EngineMessage) -> bool:
        """Send to the mover ``boot_id``. False: it is gone, or cannot be reached right now."""
        link = self._link
        return link is not None and self._boot_id == boot_id and link.send(*messages)

    def send_surely(self, boot_id: bytes, message: EngineMessage) -> None:
        """As ``send``, but sent later if that mover is reached again: it waits for this message."""
        with self._opening:
            if not self.send(boot_id, message):
                self._unsent.append((boot_id, message))

    def close(self) -> None:
        """Disconnect and join. Raises ``TransferTimeout`` if the thread stays."""
        self._stop.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_JOIN_S)
            if self._thread.is_alive():
                raise TransferTimeout(f"thread {self._thread.name} did not end in {_JOIN_S} s")

    def _run(self) -> None:
        backoff_s = MIN_BACKOFF_S
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                self._side.prepare()
                if not self._serve():
                    continue  # connecting took its time
            except ConfigError as exc:
                logger.error("the mover refused to start: %s", exc)
                self._fatal = exc
                self._first.set()
            except (DualPathError, OSError) as exc:
                logger.warning("no mover for the %s side: %s", self._kind, exc)
            except Exception:  # a bug of ours must not end the only thread that brings movers back
                logger.exception("attaching the %s side failed", self._kind)
            if time.monotonic() - started > _STEADY_S:
                backoff_s = MIN_BACKOFF_S
            self._stop.wait(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    def _serve(self) -> bool:
        """One connection, from connect to loss. False if no mover listens yet."""
        self._wake.clear()
        inbox = _Inbox(self._side)
        link = EngineLink(self._path, self._kind, inbox.put, self._on_close)
        try:
            attached, fds = link.connect(_CONNECT_TRY_S)
        except TransferTimeout as exc:  # it may be starting still
            logger.debug("no mover for the %s side yet: %s", self._kind, exc)
            return False
        try:
            try:
                self._side.attached(attached, fds)
            finally:
                for fd in fds:
                    os.close(fd)
            self._open(link, attached.boot_id)
            inbox.open()
            if not self._stop.is_set():
                self._wake.wait()
        finally:
            self._link = self._boot_id = None
            self._side.lost()
            link.close()
        return True

    def _open(self, link: EngineLink, boot_id: bytes) -> None:
        with self._opening:
            self._boot_id = boot_id
            self._link = link
            while self._unsent:
                owner, message = self._unsent.popleft()
                if owner == boot_id:
                    link.send(message)
        logger.info("%s side attached to mover %s", self._kind, boot_id.hex()[:8])
        self._first.set()

    def _on_close(self, reason: str) -> None:
        logger.warning("%s side lost its mover (%s): no hits until it is back", self._kind, reason)
        self._wake.set()
