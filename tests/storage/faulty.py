"""A directory whose file system fails on demand: ``fuse_server`` in a process of its own."""

from __future__ import annotations

import ctypes
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest


class FaultyDirectory:
    """``path`` is mounted; ``backing`` is what lies beneath, out of reach of the faults."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._numbers = itertools.count()
        self.backing, self.path = root / "backing", root / "mounted"
        self.backing.mkdir()
        self.path.mkdir()
        server = Path(__file__).with_name("fuse_server.py")
        self._process = subprocess.Popen(
            [sys.executable, str(server), str(self.backing), str(self.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = self._answer()
        if answer != "ready":
            self._process.wait(timeout=10)
            pytest.skip(f"no FUSE file system for fault injection: {answer}")

    def enter_new(self) -> None:
        """Let ``path`` and ``backing`` name an empty directory in which no test has been."""
        name = f"part-{next(self._numbers)}"
        self.backing, self.path = self._root / "backing" / name, self._root / "mounted" / name
        self.backing.mkdir()

    def fail(self, fault: str, **details: int) -> None:
        """From now on ``fault`` (see ``fuse_server``) happens, and no other."""
        self._send({"fault": fault, **details})

    def heal(self) -> None:
        """No fault any more; what hangs goes on."""
        self._send({})

    def close(self) -> None:
        """End the server: every request that waits for it fails."""
        self._process.kill()
        ctypes.CDLL(None).umount2(bytes(self._root / "mounted"), 2)  # MNT_DETACH
        self._process.wait(timeout=10)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _send(self, command: dict[str, object]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        assert self._answer() == "ok"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()
