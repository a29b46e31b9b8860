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

_FIELD_NAMES = (
    "header CRC32C",
    "magic",
    "format version",
    "token count",
    "hash",
    "parent",
    "store (model and geometry)",
    "payload bytes",
    "layers",
)

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
        self._slot_bytes = geometry.slot_bytes
        self.file_bytes = HEADER_BYTES + self._slot_bytes
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
        fixed = _FIXED.pack(*self._fixed_fields(block_hash, parent))
        return fixed.ljust(HEADER_BYTES, b"\0")

    def _fixed_fields(self, block_hash: bytes, parent: bytes) -> tuple[bytes | int, ...]:
        return (
            _MAGIC,
            FORMAT_VERSION,
            self.geometry.block_tokens,
            block_hash,
            parent,
            self.store_id,
            self._slot_bytes,
            self.geometry.num_layers,
        )

    def read_header(self, header: bytes | memoryview, block_hash: bytes) -> BlockHeader:
        """Parse ``header`` and check that it belongs to ``block_hash`` in this store.

        Raises ``BlockCorrupt`` naming the first field that is wrong, expected and found.
        """
        found = _FIXED.unpack_from(header)
        (stated_crc,) = _CRC.unpack_from(header, _HEADER_CRC_OFFSET)
        # The CRC first: any other field of a damaged header would only mislead.
        expected = (_header_crc(header), *self._fixed_fields(block_hash, found[4]))
        if (stated_crc, *found) != expected:
            _name_difference(block_hash.hex(), expected, (stated_crc, *found))
        end = _FIXED.size + self._crcs.size
        return BlockHeader(block_hash, found[4], bytes(header[_FIXED.size : end]))

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


def _name_difference(
    name: str, expected: tuple[bytes | int, ...], found: tuple[bytes | int, ...]
) -> None:
    for field, wanted, actual in zip(_FIELD_NAMES, expected, found, strict=True):
        if wanted != actual:
            shown = [each.hex() if isinstance(each, bytes) else each for each in (wanted, actual)]
            raise BlockCorrupt(f"block {name}: {field}: expected {shown[0]}, found {shown[1]}")
