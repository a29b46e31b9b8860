"""The bytes of a stored Full Block: a 4 KiB header, then the payload padded to 4 KiB.

The header names the block (hash, parent), the store it belongs to (model and geometry) and a CRC32C
of every Layer Block, and carries a CRC32C of itself. Everything is little-endian and has one layout
a format version. Knows buffers only: no files, no directories.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass

from vllm_dualpath import native
from vllm_dualpath.blocks import ALIGNMENT_BYTES, HASH_BYTES, Geometry
from vllm_dualpath.errors import BlockCorrupt, ConfigError

FORMAT_VERSION = 1
HEADER_BYTES = ALIGNMENT_BYTES

_MAGIC = b"DUALPATH"
# magic, format version, tokens, hash, parent, store id, payload bytes, layers; then the CRCs.
_FIXED = struct.Struct("<8sII32s32s32sQI")
_CRC = struct.Struct("<I")
_HEADER_CRC_OFFSET = HEADER_BYTES - _CRC.size

MAX_LAYERS = (_HEADER_CRC_OFFSET - _FIXED.size) // _CRC.size


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a sound header says."""

    hash: bytes
    parent: bytes
    layer_crcs: bytes
    """The CRC32C of each layer, as they lie in the header."""


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The offsets and sizes in a block's file that the compiled core needs, in bytes."""

    header_bytes: int
    payload_bytes: int
    crc_table_offset: int
    """In the header: one CRC32C a layer."""
    header_crc_offset: int
    """In the header: the CRC32C of all before it."""
    layer_bytes: tuple[int, ...]


class BlockFormat:
    """Builds and checks the headers of one store, that is of one fingerprint and geometry.

    Immutable, so any thread may call it. Raises ``ConfigError`` when the geometry has more layers
    than a header has room for.
    """

    def __init__(self, fingerprint: bytes, geometry: Geometry) -> None:
        if geometry.num_layers > MAX_LAYERS:
            raise ConfigError(
                f"store: the model has {geometry.num_layers} layers; format {FORMAT_VERSION}"
                f" holds at most {MAX_LAYERS} a block header"
            )
        self.geometry = geometry
        self.store_id = store_id(fingerprint, geometry)
        self.file_bytes = HEADER_BYTES + geometry.slot_bytes
        self._layer_bytes = geometry.layer_block_bytes
        self._crcs = struct.Struct(f"<{geometry.num_layers}I")

    @property
    def layout(self) -> FileLayout:
        """Where the compiled core finds what it moves and checks."""
        return FileLayout(
            header_bytes=HEADER_BYTES,
            payload_bytes=self.geometry.slot_bytes,
            crc_table_offset=_FIXED.size,
            header_crc_offset=_HEADER_CRC_OFFSET,
            layer_bytes=self._layer_bytes,
        )

    def header_template(self, block_hash: bytes, parent: bytes) -> bytes:
        """A header whose checksums, those of the layers and its own, are still to be filled in."""
        for name, value in (("hash", block_hash), ("parent", parent)):
            if len(value) != HASH_BYTES:
                raise ValueError(f"block {name}: expected {HASH_BYTES} bytes, found {len(value)}")
        fixed = _FIXED.pack(
            _MAGIC,
            FORMAT_VERSION,
            self.geometry.block_tokens,
            block_hash,
            parent,
            self.store_id,
            self.geometry.slot_bytes,
            self.geometry.num_layers,
        )
        return fixed.ljust(HEADER_BYTES, b"\0")

    def read_header(self, header: bytes | memoryview, block_hash: bytes) -> BlockHeader:
        """Parse ``header`` and check that it belongs to ``block_hash`` in this store.

        Raises ``BlockCorrupt`` naming the first field that is wrong, expected and found.
        """
        name = block_hash.hex()
        (magic, version, tokens, found_hash, parent, found_store, payload_bytes, num_layers) = (
            _FIXED.unpack_from(header)
        )
        # The CRC first: any other field of a damaged header would only mislead.
        (stated_crc,) = _CRC.unpack_from(header, _HEADER_CRC_OFFSET)
        _expect(name, "header CRC32C", f"{_header_crc(header):#010x}", f"{stated_crc:#010x}")
        _expect(name, "magic", _MAGIC, magic)
        _expect(name, "format version", FORMAT_VERSION, version)
        _expect(name, "hash", name, found_hash.hex())
        _expect(name, "store (model and geometry)", self.store_id.hex(), found_store.hex())
        _expect(name, "token count", self.geometry.block_tokens, tokens)
        _expect(name, "payload bytes", self.geometry.slot_bytes, payload_bytes)
        _expect(name, "layers", self.geometry.num_layers, num_layers)
        end = _FIXED.size + _CRC.size * num_layers
        return BlockHeader(found_hash, parent, bytes(header[_FIXED.size : end]))

    def check_layers(self, header: BlockHeader, found: bytes) -> None:
        """Compare with the checksums ``found``, as they lie in a header.

        Raises ``BlockCorrupt`` naming the first layer whose bytes are not the stored ones.
        """
        if header.layer_crcs == found:
            return
        pairs = zip(self._crcs.unpack(header.layer_crcs), self._crcs.unpack(found), strict=True)
        for layer, (expected, actual) in enumerate(pairs):
            if expected != actual:
                raise BlockCorrupt(
                    f"block {header.hash.hex()}: layer {layer} CRC32C: expected {expected:#010x},"
                    f" found {actual:#010x}"
                )

    def check_size(self, block_hash: bytes, found_bytes: int) -> None:
        """Raise ``BlockCorrupt`` unless a block's file has its size."""
        if found_bytes != self.file_bytes:
            raise BlockCorrupt(
                f"block {block_hash.hex()}: file size: expected {self.file_bytes} bytes,"
                f" found {found_bytes}"
            )


def describe_geometry(geometry: Geometry) -> dict[str, object]:
    """``geometry`` as plain JSON values."""
    return {**asdict(geometry), "layer_page_bytes": list(geometry.layer_page_bytes)}


def store_id(fingerprint: bytes, geometry: Geometry) -> bytes:
    """A digest of model and geometry, so that a block copied in from elsewhere is recognised."""
    canonical = json.dumps(describe_geometry(geometry), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(hashlib.sha256(fingerprint).digest() + canonical.encode()).digest()


def _header_crc(header: bytes | memoryview) -> int:
    return native.crc32c(native.buffer_address(header), _HEADER_CRC_OFFSET)


def _expect(name: str, field: str, expected: object, found: object) -> None:
    if expected != found:
        raise BlockCorrupt(f"block {name}: {field}: expected {expected}, found {found}")
