"""What a store makes of a file system that fails, through each way of moving blocks."""

from __future__ import annotations

import functools
import os
import re
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.errors import (
    BlockCorrupt,
    BlockNotFound,
    ConfigError,
    OutOfDescriptors,
    StorageError,
    StoreFull,
    TransferTimeout,
)
from vllm_dualpath.storage import Finished, IoOptions, PosixStore, ReadBlock, WriteBlock, block_io
from vllm_dualpath.storage.probe import choose_io

from .contract import FINGERPRINT, block_hash, empty_payload, filled_payload
from .faulty import FaultyDirectory
from .fuse_wire import Opcode

GEOMETRY = Geometry(64, 16, (20_000, 30_000, 50_000), "LBHNC", 2, "bfloat16")
FILE_BYTES = GEOMETRY.slot_bytes + 4096
WAYS = {
    "io_uring": IoOptions("io_uring", num_threads=2, direct=True),
    "threads": IoOptions("threads", num_threads=2, direct=True),
    "io_uring_buffered": IoOptions("io_uring", num_threads=2, direct=False),
    "threads_buffered": IoOptions("threads", num_threads=2, direct=False),
}

payload_of = functools.partial(filled_payload, geometry=GEOMETRY)
empty = functools.partial(empty_payload, GEOMETRY)


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyDirectory]:
    directory = FaultyDirectory(tmp_path_factory.mktemp("faulty"))
    yield directory
    directory.close()


@pytest.fixture
def faulty(mounted: FaultyDirectory) -> FaultyDirectory:
    """Empty and healthy."""
    mounted.heal()
    mounted.enter_new()
    return mounted


@pytest.fixture(params=WAYS)
def store(faulty: FaultyDirectory, request: pytest.FixtureRequest) -> Iterator[PosixStore]:
    store = open_store(faulty.path, request.param)
    yield store
    faulty.heal()
    store.close()


def open_store(root: Path, way: str) -> PosixStore:
    return PosixStore(f"file://{root}", FINGERPRINT, GEOMETRY, io=WAYS[way])


def left_behind(faulty: FaultyDirectory) -> list[Path]:
    """Temporary files."""
    return list((faulty.backing / FINGERPRINT.hex() / "tmp").iterdir())


def wait_finished(store: PosixStore, count: int) -> list[Finished]:
    found: list[Finished] = []
    while len(found) < count:
        assert select.select([store], [], [], 20)[0], f"only {len(found)} of {count} ended"
        found += store.finished()
    return found


def test_short_reads_are_completed(store: PosixStore, faulty: FaultyDirectory) -> None:
    """A kernel may move less than was asked for: the rest is asked for again."""
    assert store.put(block_hash(1), bytes(32), payload_of(1)) == FILE_BYTES
    # A buffered read takes a short answer for the end of the file: that is the kernel's rule.
    if store.io.direct:
        faulty.fail("short_reads", bytes=8192)
    found = empty()
    assert store.get(block_hash(1), found) == FILE_BYTES
    assert found == payload_of(1)


@pytest.mark.parametrize("offset", [0, 4096, FILE_BYTES - 1])
def test_a_read_error_is_a_storage_error_and_keeps_the_block(
    store: PosixStore, faulty: FaultyDirectory, offset: int
) -> None:
    """EIO says nothing about the block: it is not quarantined, and found when the disk answers."""
    store.put(block_hash(1), bytes(32), payload_of(1))
    faulty.fail("eio_read", offset=offset)
    with pytest.raises(StorageError, match=r"get block .*read.*Input/output") as caught:
        store.get(block_hash(1), empty())
    assert not isinstance(caught.value, BlockCorrupt | BlockNotFound)
    faulty.heal()
    assert store.get(block_hash(1), empty()) == FILE_BYTES


@pytest.mark.parametrize(
    ("fault", "details", "error", "match"),
    [
        ("eio_write", {"offset": FILE_BYTES - 1}, StorageError, "write: .*Input/output"),
        ("eio_write", {"offset": 0}, StorageError, "write: .*Input/output"),
        ("eio_close", {}, StorageError, "close: .*Input/output"),
        ("enospc", {}, StoreFull, "store_quota_bytes"),
    ],
)
def test_a_failed_write_leaves_nothing(
    store: PosixStore,
    faulty: FaultyDirectory,
    fault: str,
    details: dict[str, int],
    error: type[StorageError],
    match: str,
) -> None:
    """Whatever step fails, there is no block, no temporary file, and the next write works."""
    faulty.fail(fault, **details)
    with pytest.raises(error, match=match):
        store.put(block_hash(1), bytes(32), payload_of(1))
    faulty.heal()
    assert left_behind(faulty) == []
    assert not store.contains(block_hash(1))
    assert store.put(block_hash(1), bytes(32), payload_of(1)) == FILE_BYTES


@pytest.mark.parametrize("num_bytes", [0, 5000, 40960])
def test_a_file_that_shrinks_while_it_is_read_is_corrupt(
    store: PosixStore, faulty: FaultyDirectory, num_bytes: int
) -> None:
    """The size was right when it was looked at; the end comes early all the same."""
    store.put(block_hash(1), bytes(32), payload_of(1))
    faulty.fail("shrink", bytes=num_bytes)
    with pytest.raises(BlockCorrupt, match=r"file size|CRC32C"):
        store.get(block_hash(1), empty())
    faulty.heal()
    assert not store.contains(block_hash(1))


def test_a_file_that_grew_is_corrupt(store: PosixStore, faulty: FaultyDirectory) -> None:
    """More bytes than a block has: not ours."""
    store.put(block_hash(1), bytes(32), payload_of(1))
    (path,) = faulty.backing.glob("*/??/??/*")
    with path.open("ab") as file:
        file.write(bytes(4096))
    with pytest.raises(BlockCorrupt, match=f"found {FILE_BYTES + 4096}"):
        store.get(block_hash(1), empty())


@pytest.mark.parametrize("opcode", [Opcode.OPEN, Opcode.READ, Opcode.RELEASE])
def test_a_hung_read_holds_up_no_other(
    store: PosixStore, faulty: FaultyDirectory, opcode: Opcode
) -> None:
    """One request without an answer: other blocks are still stored, and it ends when it can."""
    for idx in range(2):
        store.put(block_hash(idx), bytes(32), payload_of(idx))
    faulty.fail("hang", op=opcode)
    hung = store.submit(ReadBlock(block_hash(0), empty()))
    if opcode is Opcode.RELEASE:
        (finished,) = wait_finished(store, 1)  # nobody waits for a close
        assert finished.num_bytes == FILE_BYTES
        return
    while store.started_s(hung) is None:
        time.sleep(0.001)
    assert not store.cancel(hung)
    if opcode is Opcode.READ:
        # Writes are on another lane, and their requests are not of the kind that hangs.
        assert store.put(block_hash(5), bytes(32), payload_of(5)) == FILE_BYTES
    assert store.finished() == []
    faulty.heal()
    (finished,) = wait_finished(store, 1)
    assert (finished.ticket, finished.num_bytes, finished.error) == (hung, FILE_BYTES, None)


def test_close_gives_up_on_a_hung_call_and_keeps_its_memory(
    faulty: FaultyDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel may still write to the payload: it is kept for the life of the process."""
    monkeypatch.setattr(block_io, "_CLOSE_S", 0.2)
    abandoned: list[object] = []
    monkeypatch.setattr(block_io, "_abandoned", abandoned)
    for idx, way in enumerate(("io_uring", "threads")):
        store = open_store(faulty.path, way)
        store.put(block_hash(0), bytes(32), payload_of(0))
        faulty.fail("hang", op=Opcode.READ)
        payload = empty()
        ticket = store.submit(ReadBlock(block_hash(0), payload))
        while store.started_s(ticket) is None:
            time.sleep(0.001)
        with pytest.raises(TransferTimeout, match="did not end"):
            store.close()
        _, payloads = abandoned[idx]  # type: ignore[misc]
        assert payloads[ticket] is payload
        faulty.heal()
        wait_finished(store, 1)


def test_a_writer_killed_before_its_rename_leaves_no_block(tmp_path: Path) -> None:
    """A temporary file at most."""
    faulty = FaultyDirectory(tmp_path)
    program = (
        "import sys, importlib; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "faults = importlib.import_module('tests.storage.test_faults')\n"
        "store = faults.open_store(Path(sys.argv[1]), 'io_uring')\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "store.put(faults.block_hash(1), bytes(32), faults.payload_of(1))\n"
    )
    arguments = [sys.executable, "-c", program, str(faulty.path), str(Path(__file__).parents[2])]
    with subprocess.Popen(arguments, stdin=-1, stdout=-1, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdin is not None
        assert writer.stdout.readline() == "ready\n"
        faulty.fail("hang", op=Opcode.RENAME)
        writer.stdin.write("go\n")
        writer.stdin.flush()
        deadline = time.monotonic() + 20
        while not any(each.stat().st_size == FILE_BYTES for each in left_behind(faulty)):
            assert time.monotonic() < deadline, "nothing was written"
            time.sleep(0.005)
        writer.send_signal(signal.SIGKILL)
        faulty.close()
    assert list(faulty.backing.glob("*/??/??/*")) == []


@pytest.mark.parametrize("way", ["io_uring", "threads"])
def test_without_descriptors_a_read_fails_with_the_limit_to_raise(tmp_path: Path, way: str) -> None:
    """EMFILE says nothing about the block, which is read as soon as a descriptor is free."""
    store = open_store(tmp_path, way)
    store.put(block_hash(1), bytes(32), payload_of(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir())
    fillers: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                fillers.append(os.dup(0))
        with pytest.raises(OutOfDescriptors, match="ulimit -n"):
            store.get(block_hash(1), empty())
        with pytest.raises(OutOfDescriptors, match="ulimit -n"):
            store.put(block_hash(2), bytes(32), payload_of(2))
    finally:
        for filler in fillers:
            os.close(filler)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert store.get(block_hash(1), empty()) == FILE_BYTES
    store.close()


def test_direct_io_that_is_refused_is_left_out_with_the_reason(faulty: FaultyDirectory) -> None:
    """Some file systems refuse the flag: buffered threads serve them, and the log says why."""
    faulty.fail("no_direct")
    choice = choose_io(faulty.path)
    assert (choice.backend, choice.direct) == ("threads", False)
    assert "io_uring, direct: " in choice.reason
    assert "Invalid argument" in choice.reason
    forced = choose_io(faulty.path, "io_uring")
    assert (forced.backend, forced.direct) == ("io_uring", False)
    with pytest.raises(ConfigError, match=r"no I/O works in .*Invalid argument"):
        choose_io(faulty.path, "auto", direct=True)


def test_a_store_that_cannot_be_written_is_refused_with_every_reason(tmp_path: Path) -> None:
    """Nothing works: one message names each way and why."""
    with pytest.raises(ConfigError, match=r"io_uring, direct: .*threads, buffered: "):
        choose_io(tmp_path / "missing")


WITHOUT_IO_URING = """
import ctypes, errno, struct, sys
from pathlib import Path
from vllm_dualpath.storage.probe import choose_io

# A seccomp filter: system call 425 (io_uring_setup) fails with EPERM, as in most containers.
LOAD, JUMP_IF_EQUAL, RETURN, ERRNO, ALLOW = 0x20, 0x15, 0x06, 0x00050000, 0x7FFF0000
program = b"".join(
    struct.pack("<HBBI", *step)
    for step in [
        (LOAD, 0, 0, 0), (JUMP_IF_EQUAL, 0, 1, 425), (RETURN, 0, 0, ERRNO | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
)
memory = ctypes.create_string_buffer(program)
header = ctypes.create_string_buffer(struct.pack("<H6xQ", 4, ctypes.addressof(memory)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, ctypes.c_void_p(ctypes.addressof(header)), 0, 0) == 0  # PR_SET_SECCOMP
print(choose_io(Path(sys.argv[1])))
try:
    choose_io(Path(sys.argv[1]), "io_uring")
except Exception as exc:
    print(type(exc).__name__, exc)
"""


def test_where_io_uring_is_forbidden_threads_serve_with_the_reason(tmp_path: Path) -> None:
    """A container's filter refuses io_uring: direct I/O stays, and who insists is told why not."""
    found = subprocess.run(
        [sys.executable, "-c", WITHOUT_IO_URING, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    chosen, refused = found.stdout.splitlines()
    assert re.fullmatch(r"threads, direct \(io_uring, direct: io_uring_setup: .*permit.*\)", chosen)
    assert refused.startswith("ConfigError")
    assert "io_uring_setup" in refused


@pytest.mark.parametrize("way", ["io_uring", "threads"])
def test_reads_do_not_wait_behind_stores(faulty: FaultyDirectory, way: str) -> None:
    """With every write hanging and more queued, a block is still read."""
    store = open_store(faulty.path, way)
    store.put(block_hash(0), bytes(32), payload_of(0))
    faulty.fail("hang", op=Opcode.WRITE)
    tickets = [
        store.submit(WriteBlock(block_hash(idx), bytes(32), payload_of(idx))) for idx in range(1, 5)
    ]
    done = threading.Event()

    def read() -> None:
        store.get(block_hash(0), empty())
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(20)
    faulty.heal()
    assert {each.ticket for each in wait_finished(store, 4)} == set(tickets)
    store.close()


def test_a_full_store_is_opened(tmp_path: Path) -> None:
    """A store without a free byte is read from, and evicted from; a cache ends up so."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    root = tmp_path / "small"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(root)], check=True)
    try:
        PosixStore(f"file://{root}", FINGERPRINT, GEOMETRY).close()
        (root / "ballast").write_bytes(bytes(free_bytes(root)))
        assert free_bytes(root) == 0
        PosixStore(f"file://{root}", FINGERPRINT, GEOMETRY).close()
    finally:
        subprocess.run(["umount", str(root)], check=True)


def free_bytes(directory: Path) -> int:
    """Of the file system."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize
