"""Identity of processes and hosts, and the private directory of sockets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dualpath.control.host import host_id, process_alive, process_start_ticks
from vllm_dualpath.control.runtime_dir import mover_socket_path, runtime_dir
from vllm_dualpath.errors import ConfigError


def test_own_process() -> None:
    """The own process is alive under its start time and under no other."""
    start = process_start_ticks(os.getpid())
    assert start is not None
    assert process_alive(os.getpid(), start)
    assert not process_alive(os.getpid(), start + 1)


def test_dead_process() -> None:
    """A killed process is gone at once, also as a zombie that nobody has waited for."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    start = process_start_ticks(process.pid)
    assert start is not None
    assert process_alive(process.pid, start)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not process_alive(process.pid, start)
    process.wait(10)
    assert process_start_ticks(process.pid) is None


def test_host_id() -> None:
    """Equal in a child process; names kernel and pid namespace."""
    code = "from vllm_dualpath.control.host import host_id; print(host_id())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == host_id()


def test_runtime_dir_is_private(tmp_path: Path) -> None:
    """It is made with mode 0700; one that others can enter, a link or a file is refused."""
    made = runtime_dir(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    assert runtime_dir(made) == made
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    open_to_all.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(made)
    a_file = tmp_path / "file"
    a_file.write_text("")
    for path in (open_to_all, link, a_file):
        with pytest.raises(ConfigError, match="0700"):
            runtime_dir(path)


def test_socket_paths_are_short_and_distinct(tmp_path: Path) -> None:
    """However long the engine's id, the path fits a Unix socket address."""
    long = mover_socket_path(Path("/tmp/vllm-dualpath-4294967295"), "engine" * 100)
    assert len(str(long)) < 107
    assert mover_socket_path(tmp_path, "a/0") != mover_socket_path(tmp_path, "a/1")
