from __future__ import annotations

import errno
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vllm_dualpath.blocks import Geometry
from vllm_dualpath.config import StoreIo
from vllm_dualpath.errors import ConfigError, StorageError, StoreFull
from vllm_dualpath.storage import (
    BlockStore,
    IoOptions,
    PosixStore,
    measure_bandwidth,
    open_store,
)
from vllm_dualpath.storage.probe import choose_io

from .contract import (
    FILE_BYTES,
    FINGERPRINT,
    GEOMETRY,
    HEADER_BYTES,
    OTHER_GEOMETRY,
    OpenStore,
    StoreContract,
    assert_quarantined,
    block_hash,
    empty_payload,
    filled_payload,
    put_chain,
)

WRITER_WITHOUT_END = """
import itertools, sys
from tests_storage.contract import FINGERPRINT, GEOMETRY, block_hash, filled_payload
from vllm_dualpath.storage import PosixStore

store = PosixStore(sys.argv[1], FINGERPRINT, GEOMETRY)
print("ready", flush=True)
for idx in itertools.count():
    store.put(block_hash(idx), bytes(32), filled_payload(idx))
"""


def start_writer(program: str, uri: str) -> subprocess.Popen[str]:
    bootstrap = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('tests_storage', {__file__!r},"
        f" submodule_search_locations=[{str(Path(__file__).parent)!r}])\n"
        "sys.modules['tests_storage'] = importlib.util.module_from_spec(spec)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", bootstrap + program, uri], stdout=subprocess.PIPE, text=True
    )


def block_path(root: Path, idx: int) -> Path:
    name = block_hash(idx).hex()
    return root / FINGERPRINT.hex() / name[:2] / name[2:4] / name


def flip_byte(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x40
    path.write_bytes(data)


IO_WAYS = {
    "io_uring": IoOptions("io_uring", direct=True),
    "threads": IoOptions("threads", direct=True),
    "buffered": IoOptions("threads", direct=False),
}


def open_posix(uri: str, io: IoOptions) -> PosixStore:
    return PosixStore(uri, FINGERPRINT, GEOMETRY, io=io)


class TestPosixStore(StoreContract):
    @pytest.fixture(params=IO_WAYS)
    def open_store(self, tmp_path: Path, request: pytest.FixtureRequest) -> OpenStore:
        options = IO_WAYS[request.param]
        try:
            choose_io(tmp_path, options.wanted, options.direct)
        except ConfigError as exc:
            pytest.skip(str(exc))
        return functools.partial(open_posix, f"file://{tmp_path}", options)

    @pytest.mark.parametrize(
        ("offset", "match"),
        [
            (0, "header CRC32C"),
            (60, "header CRC32C"),
            (HEADER_BYTES - 1, "header CRC32C"),
            (HEADER_BYTES, "layer 0 CRC32C: expected 0x.*, found 0x"),
            (HEADER_BYTES + GEOMETRY.layer_offsets[1], "layer 1 CRC32C"),
            (HEADER_BYTES + GEOMETRY.payload_bytes - 1, "layer 2 CRC32C"),
        ],
    )
    def test_one_flipped_bit_anywhere_is_found_and_named(
        self, store: BlockStore, tmp_path: Path, offset: int, match: str
    ) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        flip_byte(block_path(tmp_path, 1), offset)
        assert_quarantined(store, block_hash(1), match=f"{block_hash(1).hex()}.*{match}")

    def test_without_verify_the_payload_is_not_checked(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        flip_byte(block_path(tmp_path, 1), HEADER_BYTES)
        assert store.get(block_hash(1), empty_payload(), verify=False) == FILE_BYTES

    @pytest.mark.parametrize("num_bytes", [0, 100, HEADER_BYTES, FILE_BYTES - 1, FILE_BYTES + 1])
    def test_a_file_of_another_size_is_corrupt(
        self, store: BlockStore, tmp_path: Path, num_bytes: int
    ) -> None:
        put_chain(store, 2)
        os.truncate(block_path(tmp_path, 1), num_bytes)
        assert [entry.hash for entry in store.entries()] == [block_hash(0)]
        assert_quarantined(store, block_hash(1), match=f"{FILE_BYTES} bytes, found {num_bytes}")

    def test_a_block_under_anothers_name_is_corrupt(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        target = block_path(tmp_path, 2)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(block_path(tmp_path, 1).read_bytes())
        assert [entry.hash for entry in store.entries()] == [block_hash(1)]
        assert_quarantined(store, block_hash(2), match=f"hash: expected {block_hash(2).hex()}")
        assert store.contains(block_hash(1))

    def test_a_block_of_another_geometry_is_corrupt(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        other_root = tmp_path / "other"
        other_root.mkdir()
        other = PosixStore(f"file://{other_root}", FINGERPRINT, OTHER_GEOMETRY)
        other.put(block_hash(1), bytes(32), filled_payload(1))
        target = block_path(tmp_path, 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(block_path(other_root, 1).read_bytes())
        assert_quarantined(store, block_hash(1), match="store .model and geometry.: expected")

    def test_a_quarantined_block_can_be_stored_again(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        flip_byte(block_path(tmp_path, 1), 0)
        assert_quarantined(store, block_hash(1), match="header")
        assert store.put(block_hash(1), bytes(32), filled_payload(1)) == FILE_BYTES

    def test_only_the_last_bad_blocks_are_kept(self, store: BlockStore, tmp_path: Path) -> None:
        for idx, name in enumerate(put_chain(store, 20)):
            flip_byte(block_path(tmp_path, idx), 0)
            assert_quarantined(store, name, match="header")
        kept = {path.name for path in (tmp_path / FINGERPRINT.hex() / "quarantine").iterdir()}
        assert len(kept) == 16
        assert block_hash(19).hex() in kept

    def test_what_is_no_file_is_taken_away_and_replaced(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        for idx in range(18):
            block_path(tmp_path, idx).mkdir(parents=True)
            with pytest.raises(StorageError):
                store.get(block_hash(idx), empty_payload())
            assert store.put(block_hash(idx), bytes(32), filled_payload(idx)) == FILE_BYTES
        assert len(list((tmp_path / FINGERPRINT.hex() / "quarantine").iterdir())) == 16

    @pytest.mark.timeout(20)
    def test_a_listing_neither_waits_for_a_fifo_nor_ends_at_what_cannot_be_listed(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        put_chain(store, 3)
        block_path(tmp_path, 1).unlink()
        os.mkfifo(block_path(tmp_path, 1))
        first = sorted(path for path in (tmp_path / FINGERPRINT.hex()).iterdir())[0]
        (tmp_path / FINGERPRINT.hex() / "00").write_text("not a directory")
        (first / "00").write_text("neither")
        found = {entry.hash for entry in store.entries()}
        assert found == {block_hash(0), block_hash(2)}

    def test_memory_that_is_not_aligned_is_refused(self, store: BlockStore) -> None:
        memory = memoryview(bytearray(GEOMETRY.slot_bytes + 8192))
        payload = memory[8:][: GEOMETRY.slot_bytes]
        with pytest.raises(ValueError, match="aligned"):
            store.put(block_hash(1), bytes(32), payload)

    def test_a_read_counts_as_a_use_at_most_once_a_minute(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        now_s = time.time()
        os.utime(block_path(tmp_path, 1), (now_s - 30, now_s - 30))
        store.get(block_hash(1), empty_payload())
        assert next(store.entries()).last_used_s == pytest.approx(now_s - 30, abs=1)
        os.utime(block_path(tmp_path, 1), (now_s - 90, now_s - 90))
        store.get(block_hash(1), empty_payload())
        assert next(store.entries()).last_used_s == pytest.approx(now_s, abs=5)

    def test_an_opened_block_stays_readable_when_it_is_removed(
        self, store: BlockStore, tmp_path: Path
    ) -> None:
        store.put(block_hash(1), bytes(32), filled_payload(1))
        with block_path(tmp_path, 1).open("rb") as opened:
            store.remove(block_hash(1))
            assert len(opened.read()) == FILE_BYTES


class TestCrashes:
    def test_what_a_crashed_writer_left_goes_when_it_is_an_hour_old(self, tmp_path: Path) -> None:
        store = open_posix(f"file://{tmp_path}", IO_WAYS["buffered"])
        temporary = tmp_path / FINGERPRINT.hex() / "tmp" / "1-ab-0"
        temporary.write_bytes(b"half a block")
        open_posix(f"file://{tmp_path}", IO_WAYS["buffered"])
        assert temporary.exists()
        os.utime(temporary, (time.time() - 3601, time.time() - 3601))
        open_posix(f"file://{tmp_path}", IO_WAYS["buffered"])
        assert not temporary.exists()
        assert list(store.entries()) == []

    def test_a_writer_killed_at_any_moment_leaves_whole_blocks_only(self, tmp_path: Path) -> None:
        with start_writer(WRITER_WITHOUT_END, f"file://{tmp_path}") as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            time.sleep(0.2)
            writer.kill()
        store, found = open_posix(f"file://{tmp_path}", IO_WAYS["buffered"]), empty_payload()
        files = list(tmp_path.glob("*/??/??/*"))
        assert len(files) > 3
        assert len(list(store.entries())) == len(files)
        for path in files:
            store.get(bytes.fromhex(path.name), found)


class TestFullFileSystem:
    @pytest.fixture
    def tiny(self, tmp_path: Path) -> Iterator[Path]:
        root = tmp_path / "tiny"
        root.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(root)],
            capture_output=True,
            text=True,
            check=False,
        )
        if mounted.returncode:
            pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
        yield root
        subprocess.run(["umount", str(root)], check=True)

    @pytest.mark.parametrize("wanted", ["io_uring", "threads"])
    def test_a_block_without_room_raises_and_leaves_nothing(
        self, tiny: Path, wanted: StoreIo
    ) -> None:
        store = PosixStore(f"file://{tiny}", FINGERPRINT, GEOMETRY, io=IoOptions(wanted))
        with pytest.raises(StoreFull, match="store_quota_bytes"):
            put_chain(store, 64)
        num_stored = len(list(store.entries()))
        assert num_stored > 3
        assert not store.contains(block_hash(num_stored))
        assert list((tiny / FINGERPRINT.hex() / "tmp").iterdir()) == []
        store.remove(block_hash(0))
        assert store.put(block_hash(0), bytes(32), filled_payload(0)) == FILE_BYTES

    def test_beneath_a_store_that_was_unmounted_nothing_is_made(self, tiny: Path) -> None:
        """Another device: it would fill a disk that nobody meant."""
        store = PosixStore(f"file://{tiny}", FINGERPRINT, GEOMETRY, io=IoOptions("threads"))
        store.put(block_hash(0), bytes(32), filled_payload(0))
        subprocess.run(["umount", "--lazy", str(tiny)], check=True)
        try:
            for _ in range(2):
                with pytest.raises(StorageError, match="put block"):
                    store.put(block_hash(1), bytes(32), filled_payload(1))
            assert list(tiny.iterdir()) == []
        finally:
            subprocess.run(["mount", "-t", "tmpfs", "none", str(tiny)], check=True)


class TestOpening:
    def test_a_root_that_does_not_exist_is_refused_with_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="mkdir -p"):
            open_store(f"file://{tmp_path}/missing", FINGERPRINT, GEOMETRY)
        assert not (tmp_path / "missing").exists()

    def test_without_create_a_missing_store_is_refused_and_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="no store of this model"):
            open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY, create=False)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("uri", ["http://x/y", "file://host/x", "/plain/path", "file:relative"])
    def test_a_uri_that_is_not_an_absolute_file_is_refused(self, uri: str) -> None:
        with pytest.raises(ConfigError, match="file://"):
            open_store(uri, FINGERPRINT, GEOMETRY)

    def test_a_manifest_of_another_geometry_is_refused_by_name(self, tmp_path: Path) -> None:
        open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)
        with pytest.raises(ConfigError, match=r"geometry.layer_page_bytes: expected .*, found"):
            open_store(f"file://{tmp_path}", FINGERPRINT, OTHER_GEOMETRY)

    def test_a_damaged_manifest_is_refused(self, tmp_path: Path) -> None:
        open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)
        manifest = tmp_path / FINGERPRINT.hex() / "MANIFEST.json"
        for text in ("{", "[]"):
            manifest.write_text(text)
            with pytest.raises(ConfigError, match="not a manifest"):
                open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)

    def test_a_full_disk_at_the_first_start_spoils_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def half_written(path: Path, text: str) -> int:
            path.write_bytes(text[:9].encode())
            raise OSError(errno.ENOSPC, "no space left on device")

        with monkeypatch.context() as full_disk:
            full_disk.setattr(Path, "write_text", half_written)
            with pytest.raises(ConfigError, match="no space left"):
                open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)
        open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)

    def test_the_manifest_is_readable_and_keeps_what_its_maker_added(self, tmp_path: Path) -> None:
        open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY, {"model": "tiny"})
        open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY, {"model": "same weights"})
        manifest = json.loads((tmp_path / FINGERPRINT.hex() / "MANIFEST.json").read_text())
        assert manifest["extra"] == {"model": "tiny"}
        assert manifest["fingerprint"] == FINGERPRINT.hex()

    def test_more_layers_than_a_header_holds_are_refused(self, tmp_path: Path) -> None:
        many = Geometry(64, 16, (64,) * 1000, "LBHNC", 2, "bfloat16")
        with pytest.raises(ConfigError, match="1000 layers"):
            open_store(f"file://{tmp_path}", FINGERPRINT, many)

    def test_a_lease_file_that_makes_no_sense_counts_as_run_out(self, tmp_path: Path) -> None:
        store = open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)
        (tmp_path / FINGERPRINT.hex() / "eviction.lease").write_text("{}")
        assert store.acquire_eviction_lease("a", 60)

    def test_a_store_that_went_away_is_a_storage_error(self, tmp_path: Path) -> None:
        store = open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)
        (tmp_path / FINGERPRINT.hex() / "tmp").rmdir()
        with pytest.raises(StorageError, match="put block"):
            store.put(block_hash(1), bytes(32), filled_payload(1))

    def test_a_store_that_was_emptied_takes_blocks_again(self, tmp_path: Path) -> None:
        store = open_store(f"file://{tmp_path}", FINGERPRINT, GEOMETRY)
        store.put(block_hash(0), bytes(32), filled_payload(0))
        shutil.rmtree(tmp_path / FINGERPRINT.hex())
        with pytest.raises(StorageError, match="put block"):
            store.put(block_hash(1), bytes(32), filled_payload(1))
        assert store.put(block_hash(1), bytes(32), filled_payload(1)) == FILE_BYTES
        assert (tmp_path / FINGERPRINT.hex() / "MANIFEST.json").exists()

    def test_a_store_that_was_removed_is_not_made_again(self, tmp_path: Path) -> None:
        (tmp_path / "kv").mkdir()
        store = open_store(f"file://{tmp_path}/kv", FINGERPRINT, GEOMETRY)
        store.put(block_hash(0), bytes(32), filled_payload(0))
        shutil.rmtree(tmp_path / "kv")
        for _ in range(2):
            with pytest.raises(StorageError, match="put block"):
                store.put(block_hash(1), bytes(32), filled_payload(1))
        assert not (tmp_path / "kv").exists()


def test_bandwidth_is_measured_and_leaves_nothing(tmp_path: Path) -> None:
    read_bytes_per_s, write_bytes_per_s = measure_bandwidth(tmp_path, 1 << 20, direct=False)
    assert read_bytes_per_s > 0
    assert write_bytes_per_s > 0
    assert list(tmp_path.iterdir()) == []
