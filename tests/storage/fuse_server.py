"""A file system for tests: passes everything through to a directory, and fails when told to.

Run as a program ``fuse_server.py DIRECTORY MOUNTPOINT``: mounts, prints ``ready``, then obeys one
JSON object a line on its standard input (``{"fault": NAME, ...}``, ``{}`` for none), each answered
by ``ok``. It ends when its input does. A process of its own, because a process that waits for a
file system it serves itself cannot even be killed.

Faults: ``short_reads`` (at most ``bytes`` a call), ``eio_read`` and ``eio_write`` (calls that reach
``offset``), ``enospc`` (writes and allocations), ``shrink`` (a file opened from now on reads as if
it had ``bytes``), ``hang`` (requests ``op`` are not answered until the next line),
``no_direct`` (opening with O_DIRECT fails), ``eio_close`` (flushing fails).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import stat
import struct
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import fuse_wire as wire

_BUFFER_BYTES = (1 << 20) + 4096
_NUM_THREADS = 8
_libc = ctypes.CDLL(None, use_errno=True)


class Faults:
    """What goes wrong now. Any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._now: dict[str, Any] = {}
        self._generation = 0

    def set(self, fault: dict[str, Any]) -> None:
        """Replace the fault; requests that hang are answered."""
        with self._changed:
            self._now = fault
            self._generation += 1
            self._changed.notify_all()

    def get(self, name: str) -> dict[str, Any] | None:
        return self._now if self._now.get("fault") == name else None

    def hang(self, opcode: int) -> None:
        """Wait as long as the fault says that this kind of request hangs."""
        with self._changed:
            generation = self._generation
            hangs = self._now.get("fault") == "hang" and self._now["op"] == opcode
            self._changed.wait_for(lambda: not hangs or self._generation != generation)


class Server:
    """Nodes are paths below ``directory``, numbered as the kernel learns of them."""

    def __init__(self, device: int, directory: Path) -> None:
        self._device = device
        self.faults = Faults()
        self._paths: dict[int, Path] = {wire.ROOT: directory}
        self._ids: dict[Path, int] = {directory: wire.ROOT}
        self._lock = threading.Lock()

    def serve(self) -> None:
        """Answer requests until the file system is unmounted."""
        while True:
            try:
                request = os.read(self._device, _BUFFER_BYTES)
            except OSError as exc:
                if exc.errno in (errno.EINTR, errno.ENOENT, errno.EAGAIN):
                    continue
                return  # ENODEV: unmounted
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = wire.IN_HEADER.unpack_from(request)
        body = request[wire.IN_HEADER.size :]
        if opcode in (wire.Opcode.FORGET, wire.Opcode.BATCH_FORGET, wire.Opcode.INTERRUPT):
            return  # have no answer
        self.faults.hang(opcode)
        error, answer = 0, b""
        try:
            handler = getattr(self, f"_{wire.Opcode(opcode).name.lower()}", None)
            if handler is None:
                raise OSError(errno.ENOSYS, "")
            answer = handler(node, body) or b""
        except ValueError:
            error = errno.ENOSYS
        except OSError as exc:
            error = exc.errno or errno.EIO
        header = wire.OUT_HEADER.pack(wire.OUT_HEADER.size + len(answer), -error, unique)
        with contextlib.suppress(OSError):  # the caller was killed meanwhile
            os.write(self._device, header + answer)

    # --- nodes -----------------------------------------------------------------------------------

    def _path(self, node: int) -> Path:
        with self._lock:
            return self._paths[node]

    def _child(self, node: int, name: bytes) -> Path:
        return self._path(node) / name.split(b"\0")[0].decode()

    def _node(self, path: Path) -> int:
        with self._lock:
            node = self._ids.setdefault(path, len(self._paths) + 1)
            self._paths[node] = path
            return node

    def _attr(self, path: Path) -> bytes:
        found = path.lstat()
        times = [int(found.st_atime), int(found.st_mtime), int(found.st_ctime)]
        return wire.ATTR.pack(
            self._node(path), found.st_size, found.st_blocks, *times, 0, 0, 0,
            found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, 4096, 0,
        )  # fmt: skip

    def _entry(self, path: Path) -> bytes:
        attr = self._attr(path)
        return wire.ENTRY.pack(self._node(path), 0, 0, 0, 0, 0) + attr

    # --- requests --------------------------------------------------------------------------------

    def _init(self, _node: int, _body: bytes) -> bytes:
        flags = wire.INIT_ASYNC_READ | wire.INIT_BIG_WRITES | wire.INIT_ASYNC_DIO
        flags |= wire.INIT_PARALLEL_DIROPS | wire.INIT_MAX_PAGES
        return wire.INIT_OUT.pack(7, wire.MINOR, 1 << 20, flags, 64, 48, 1 << 20, 1, 256, 0, 0)

    def _lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(self._child(node, body))

    def _getattr(self, node: int, _body: bytes) -> bytes:
        return wire.ATTR_OUT.pack(0, 0, 0) + self._attr(self._path(node))

    def _setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, *_ = wire.SETATTR_IN.unpack_from(body)
        if valid & wire.SETATTR_SIZE:
            os.truncate(self._path(node), size)
        return self._getattr(node, b"")

    def _mkdir(self, node: int, body: bytes) -> bytes:
        mode, _ = struct.unpack_from("<II", body)
        path = self._child(node, body[8:])
        path.mkdir(stat.S_IMODE(mode))
        return self._entry(path)

    def _unlink(self, node: int, body: bytes) -> None:
        self._child(node, body).unlink()

    def _rmdir(self, node: int, body: bytes) -> None:
        self._child(node, body).rmdir()

    def _rename(self, node: int, body: bytes, header_bytes: int = 8) -> None:
        (new_parent,) = struct.unpack_from("<Q", body)
        old, new, *_ = body[header_bytes:].split(b"\0")
        source, target = self._child(node, old), self._child(new_parent, new)
        source.replace(target)
        with self._lock:
            moved = self._ids.pop(source, None)
            if moved is not None:
                self._paths[moved] = target
                self._ids[target] = moved

    def _rename2(self, node: int, body: bytes) -> None:
        self._rename(node, body, header_bytes=16)

    def _open(self, node: int, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        return self._opened(self._path(node), flags)

    def _create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        path = self._child(node, body[16:])
        if flags & os.O_DIRECT and self.faults.get("no_direct"):
            raise OSError(errno.EINVAL, "")
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, stat.S_IMODE(mode)))
        return self._entry(path) + self._opened(path, flags)

    def _opened(self, path: Path, flags: int) -> bytes:
        if flags & os.O_DIRECT and self.faults.get("no_direct"):
            raise OSError(errno.EINVAL, "")
        fd = os.open(path, flags & os.O_ACCMODE)
        if (shrink := self.faults.get("shrink")) is not None and not flags & os.O_ACCMODE:
            shrink.setdefault("fds", set()).add(fd)
        return wire.OPEN_OUT.pack(fd, 0, 0)

    def _read(self, _node: int, body: bytes) -> bytes:
        fd, offset, size, *_ = wire.READ_IN.unpack_from(body)
        self._fail_at("eio_read", offset, size)
        if (short := self.faults.get("short_reads")) is not None:
            size = min(size, short["bytes"])
        if (shrink := self.faults.get("shrink")) is not None and fd in shrink.get("fds", ()):
            size = max(0, min(size, shrink["bytes"] - offset))
        return os.pread(fd, size, offset)

    def _write(self, _node: int, body: bytes) -> bytes:
        fd, offset, size, *_ = wire.READ_IN.unpack_from(body)
        self._fail_at("eio_write", offset, size)
        self._fail_full()
        data = body[wire.READ_IN.size : wire.READ_IN.size + size]
        return wire.WRITE_OUT.pack(os.pwrite(fd, data, offset), 0)

    def _fallocate(self, _node: int, body: bytes) -> None:
        fd, offset, size, _, _ = wire.FALLOCATE_IN.unpack_from(body)
        self._fail_full()
        os.posix_fallocate(fd, offset, size)

    def _flush(self, _node: int, _body: bytes) -> None:
        if self.faults.get("eio_close"):
            raise OSError(errno.EIO, "")

    def _fsync(self, _node: int, _body: bytes) -> None:
        """Nothing to do."""

    def _release(self, _node: int, body: bytes) -> None:
        os.close(struct.unpack_from("<Q", body)[0])

    def _statfs(self, _node: int, _body: bytes) -> bytes:
        return wire.STATFS_OUT.pack(1 << 20, 1 << 19, 1 << 19, 1 << 20, 1 << 19, 4096, 255, 4096, 0)

    def _opendir(self, _node: int, _body: bytes) -> bytes:
        return wire.OPEN_OUT.pack(0, 0, 0)

    def _releasedir(self, _node: int, _body: bytes) -> None:
        """Nothing to do."""

    def _readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size, *_ = wire.READ_IN.unpack_from(body)
        answer = b""
        names = sorted(path.name for path in self._path(node).iterdir())
        for idx, name in enumerate(names[offset:], start=offset + 1):
            raw = name.encode()
            entry = struct.pack("<QQII", idx, idx, len(raw), 0) + raw
            entry += b"\0" * (-len(entry) % 8)
            if len(answer) + len(entry) > size:
                break
            answer += entry
        return answer

    def _fail_at(self, name: str, offset: int, size: int) -> None:
        fault = self.faults.get(name)
        if fault is not None and offset <= fault["offset"] < offset + size:
            raise OSError(errno.EIO, "")

    def _fail_full(self) -> None:
        if self.faults.get("enospc"):
            raise OSError(errno.ENOSPC, "")


def mount(directory: Path, mountpoint: Path) -> Server:
    """Mount; raises ``OSError`` where that is not allowed."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,max_read={1 << 20}"
    if _libc.mount(b"dualpath-test", bytes(mountpoint), b"fuse", 0, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, f"mount: {os.strerror(code)}")
    return Server(device, directory)


def main() -> None:
    directory, mountpoint = Path(sys.argv[1]), Path(sys.argv[2])
    try:
        server = mount(directory, mountpoint)
    except OSError as exc:
        print(f"cannot mount: {exc}", flush=True)
        return
    for _ in range(_NUM_THREADS):
        threading.Thread(target=server.serve, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        server.faults.set(json.loads(line))
        print("ok", flush=True)
    _libc.umount2(bytes(mountpoint), 2)  # MNT_DETACH


if __name__ == "__main__":
    main()
