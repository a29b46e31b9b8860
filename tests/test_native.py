from __future__ import annotations

import mmap
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_dualpath import native
from vllm_dualpath.errors import NativeUnavailable


def crc32c(data: bytes, seed: int = 0) -> int:
    """Bit by bit, from the definition: the reference both implementations are held to."""
    state = ~seed & 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return ~state & 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
        (bytes(range(31, -1, -1)), 0x113FDB5C),
    ],
)
def test_crc32c_of_published_vectors(data: bytes, expected: int) -> None:
    """The check value and the vectors of RFC 3720, appendix B.4."""
    address = native.buffer_address(data) if data else 0
    assert native.crc32c(address, len(data)) == expected
    assert native.crc32c_portable(address, len(data)) == expected
    assert crc32c(data) == expected


@given(data=st.binary(min_size=1, max_size=2000), seed=st.integers(0, (1 << 32) - 1))
def test_crc32c_agrees_with_its_definition(data: bytes, seed: int) -> None:
    """Any bytes, any alignment, any seed."""
    address = native.buffer_address(data)
    expected = crc32c(data, seed)
    assert native.crc32c(address, len(data), seed) == expected
    assert native.crc32c_portable(address, len(data), seed) == expected


@pytest.mark.parametrize("start", range(8))
def test_crc32c_of_long_ranges(start: int) -> None:
    """The interleaved lanes agree with the table around every boundary of their sizes."""
    data = np.random.default_rng(start).integers(0, 256, 40_000, dtype=np.uint8)
    address = int(data.ctypes.data) + start
    for near in (383, 384, 385, 6143, 6144, 6145, 6528, 12_288, 30_001, 39_000):
        assert native.crc32c(address, near) == native.crc32c_portable(address, near)


def test_crc32c_continues_from_a_seed() -> None:
    """A checksum in two steps is the checksum of the whole."""
    data = os.urandom(10_000)
    address = native.buffer_address(data)
    first = native.crc32c(address, 3_333)
    assert native.crc32c(address + 3_333, 6_667, first) == native.crc32c(address, 10_000)


def test_crc32c_many() -> None:
    """One call gives the checksum of each adjacent range, empty ones too."""
    data = os.urandom(6_000)
    address = native.buffer_address(data)
    expected = [native.crc32c(address + at, n) for at, n in ((0, 1000), (1000, 0), (1000, 5000))]
    assert native.crc32c_many(address, [1000, 0, 5000]) == expected
    assert native.crc32c_many(address, []) == []


def test_null_address_is_refused() -> None:
    """A null pointer is a ValueError, not a crash."""
    with pytest.raises(ValueError, match="null"):
        native.crc32c(0, 1)
    with pytest.raises(ValueError, match="null"):
        native.crc32c_many(0, [0, 1])


@pytest.mark.parametrize("address", [0, 1, 4, 4097])
def test_atomics_need_alignment(address: int) -> None:
    """A word that could be torn is refused before it is touched."""
    with pytest.raises(ValueError, match="multiple of 8"):
        native.atomic_load_u64(address)
    with pytest.raises(ValueError, match="multiple of 8"):
        native.atomic_store_u64(address, 0)
    with pytest.raises(ValueError, match="multiple of 8"):
        native.atomic_fetch_add_u64(address, 1)
    with pytest.raises(ValueError, match="multiple of 8"):
        native.atomic_compare_exchange_u64(address, 0, 1)


def test_atomics() -> None:
    """Load, store, add with wrap-around, and compare-exchange that tells what it saw."""
    words = np.zeros(2, dtype=np.uint64)
    address = native.buffer_address(words)
    native.atomic_store_u64(address, (1 << 64) - 1)
    assert native.atomic_fetch_add_u64(address, 2) == (1 << 64) - 1
    assert native.atomic_load_u64(address) == 1
    assert native.atomic_compare_exchange_u64(address, 5, 9) == (False, 1)
    assert native.atomic_compare_exchange_u64(address, 1, 9) == (True, 1)
    assert words.tolist() == [9, 0]


def _add_many(path: str, times: int) -> None:
    with Path(path).open("r+b") as file:
        shared = mmap.mmap(file.fileno(), 4096)
        address = native.buffer_address(shared)
        for _ in range(times):
            native.atomic_fetch_add_u64(address, 1)
            while True:  # the same, by compare-exchange on the next word
                seen = native.atomic_load_u64(address + 8)
                if native.atomic_compare_exchange_u64(address + 8, seen, seen + 1)[0]:
                    break


def test_atomics_between_processes(tmp_path: Path) -> None:
    """No addition of two processes is lost in memory that both map."""
    path = tmp_path / "words"
    path.write_bytes(bytes(4096))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_many, args=(str(path), 20_000)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
        assert worker.exitcode == 0
    assert np.fromfile(path, dtype=np.uint64, count=2).tolist() == [40_000, 40_000]


def test_buffer_address_of_a_mapping() -> None:
    """The address names the mapping's memory, and holds no reference to it."""
    mapping = mmap.mmap(-1, 4096)
    mapping[:9] = b"123456789"
    assert native.crc32c(native.buffer_address(mapping), 9) == 0xE3069283
    mapping.close()


def test_ucx_override_comes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """DUALPATH_UCX_LIBRARY is used or refused, never silently replaced."""
    monkeypatch.setenv(native.UCX_LIBRARY_VARIABLE, "/nonexistent/libucp.so.0")
    assert native.ucx_candidates() == [Path("/nonexistent/libucp.so.0")]
    native.load_ucx.cache_clear()
    with pytest.raises(NativeUnavailable, match="/nonexistent/libucp"):
        native.load_ucx()


def test_system_ucx_with_rdma_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system UCX with an InfiniBand module comes before the wheel's, one without after."""
    plain, rdma = tmp_path / "plain", tmp_path / "rdma"
    for directory in (plain, rdma):
        (directory / "ucx").mkdir(parents=True)
        (directory / "libucp.so.0").touch()
    (rdma / "ucx" / "libuct_ib.so.0").touch()
    monkeypatch.delenv(native.UCX_LIBRARY_VARIABLE, raising=False)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{plain}:{rdma}")
    candidates = native.ucx_candidates()
    assert candidates[0] == rdma / "libucp.so.0"
    assert plain / "libucp.so.0" in candidates[1:]


def test_not_every_library_is_a_ucx() -> None:
    """A library without UCX's functions is refused by the name of what it lacks."""
    script = "from vllm_dualpath import native; native.load_ucx()"
    environment = os.environ | {native.UCX_LIBRARY_VARIABLE: "libm.so.6"}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "has no function ucp_" in run.stderr
    assert "NativeUnavailable" in run.stderr


def test_ucx_report() -> None:
    """The report names a library, a version, and transports with a way to this host itself."""
    native.load_ucx.cache_clear()
    report = native.ucx_report()
    assert Path(report.path).exists()
    assert report.version.startswith("1.")
    assert "self" in report.transports


def test_rdma_is_told_from_the_transports() -> None:
    """Reliable-connection and similar transports are RDMA; tcp and shared memory are not."""
    info = (
        "#   resource 0 : md 0 dev 0 flags -- tcp/lo\n#   resource 1 : md 1 dev 1 -- rc_mlx5/x:1\n"
    )
    assert native.parse_ucx_transports(info) == ("tcp", "rc_mlx5")
    assert native.UcxReport("p", "1.18", ("tcp", "rc_mlx5")).has_rdma
    assert native.UcxReport("p", "1.18", ("srd",)).has_rdma
    assert not native.UcxReport("p", "1.18", ("tcp", "sysv", "posix", "cma", "self")).has_rdma
