"""The part of the kernel's FUSE protocol, 7.31 of linux/fuse.h, that ``fuse_server`` speaks."""

from __future__ import annotations

import struct
from enum import IntEnum

IN_HEADER = struct.Struct("<IIQQIIIHH")
OUT_HEADER = struct.Struct("<IiQ")
ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
ENTRY = struct.Struct("<QQQQII")
ATTR_OUT = struct.Struct("<QII")
OPEN_OUT = struct.Struct("<QII")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
READ_IN = struct.Struct("<QQIIQII")
WRITE_OUT = struct.Struct("<II")
SETATTR_IN = struct.Struct("<IIQQQQQQIIIIIII")
FALLOCATE_IN = struct.Struct("<QQQII")
STATFS_OUT = struct.Struct("<QQQQQIIII24x")

ROOT = 1
MINOR = 31
INIT_ASYNC_READ = 1 << 0
INIT_BIG_WRITES = 1 << 5
INIT_ASYNC_DIO = 1 << 15
INIT_PARALLEL_DIROPS = 1 << 18
INIT_MAX_PAGES = 1 << 22
SETATTR_SIZE = 1 << 3


class Opcode(IntEnum):
    """Requests that the server answers; all others get ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43
    RENAME2 = 45
