"""The mover's process: started once, noticed when it dies, ended with its engine."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import msgspec
import pytest

from vllm_dualpath.connector.supervisor import MoverProcess
from vllm_dualpath.errors import ConfigError, PeerLost
from vllm_dualpath.messages import GeometrySpec, MoverSpec

REPORT = """
import os, sys, time
spec = sys.argv[sys.argv.index('--spec') + 1]
fds = [os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if n != '3']
out = sys.argv[1]
open(out + '.tmp', 'w').write(repr((oct(os.stat(spec).st_mode & 0o777), os.getsid(0) == os.getpid(),
    any(f.startswith('pipe:') for f in fds), open(spec, 'rb').read())))
os.rename(out + '.tmp', out)
time.sleep(float(sys.argv[2]))
"""


def spec(tmp_path: Path) -> MoverSpec:
    return MoverSpec(
        version=1, engine_id="e", socket_path=str(tmp_path / "e.sock"), config={}, url="",
        model="m", fingerprint=bytes(32), root=bytes(32), max_model_len=1,
        geometry=GeometrySpec(8, 4, (1,), "LBHNC", 1, "float32"),
    )  # fmt: skip


def mover(tmp_path: Path, *command: str) -> MoverProcess:
    return MoverProcess(spec(tmp_path), (sys.executable, *command))


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text()


def test_process_gets_a_private_spec_and_inherits_nothing(tmp_path):
    """The spec is readable by its owner only; no pipe is inherited; the session is its own."""
    out = tmp_path / "out"
    process = mover(tmp_path, "-c", REPORT, str(out), "60")
    process.ensure_running()
    pid = process._process.pid
    mode, own_session, has_pipe, payload = eval(wait_for(out))
    assert (mode, own_session, has_pipe) == ("0o600", True, False)
    assert msgspec.msgpack.decode(payload, type=MoverSpec) == spec(tmp_path)
    process.ensure_running()
    assert process._process.pid == pid
    process._process.kill()
    process.stop(was_attached=True)
    assert not Path(f"/proc/{pid}").exists()


def test_a_dead_mover_is_started_again(tmp_path):
    """Killed, it is replaced on the next call; what it said last is not overwritten."""
    saying = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    process = mover(tmp_path, "-c", saying)
    process.ensure_running()
    first = process._process
    deadline = time.monotonic() + 10
    while not (tmp_path / "e.log").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    first.wait()
    with pytest.raises(PeerLost, match="status -9"):
        process.ensure_running()
    process.ensure_running()
    assert process._process.pid != first.pid
    assert (tmp_path / "e.log.1").read_text() == f"{first.pid}\n"
    process._process.kill()
    process.stop(was_attached=True)


def test_a_refused_spec_is_a_config_error(tmp_path):
    """Exit status 2 means the configuration; its last words are shown."""
    process = mover(tmp_path, "-c", "import sys; print('store: no such place'); sys.exit(2)")
    process.ensure_running()
    process._process.wait()
    with pytest.raises(ConfigError, match="store: no such place"):
        process.ensure_running()
    process.stop(was_attached=True)


def test_only_one_starter(tmp_path):
    """Whoever holds the lock starts the mover; others only connect."""
    first = mover(tmp_path, "-c", "import time; time.sleep(60)")
    second = mover(tmp_path, "-c", "raise SystemExit('must not run')")
    first.ensure_running()
    second.ensure_running()
    assert second._process is None
    first._process.kill()
    first.stop(was_attached=True)
    second.ensure_running()
    assert second._process is not None
    second.stop(was_attached=True)


def test_a_mover_that_will_not_end_is_killed(tmp_path, monkeypatch):
    """It should end when the connection closes; if it does not, it is killed."""
    monkeypatch.setattr("vllm_dualpath.connector.supervisor._END_S", 0.2)
    process = mover(tmp_path, "-c", "import time; time.sleep(60)")
    process.ensure_running()
    child = process._process
    process.stop(was_attached=True)
    assert child.returncode == -9


def test_a_mover_that_was_never_attached_is_told_to_end(tmp_path):
    """No connection closes for it, so it cannot know by itself."""
    process = mover(tmp_path, "-c", "import time; time.sleep(60)")
    process.ensure_running()
    child = process._process
    process.stop(was_attached=False)
    assert child.returncode == -15
