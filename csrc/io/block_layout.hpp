// Where the parts of a stored Full Block lie. The format itself belongs to Python's storage/format.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dualpath {

// Direct I/O needs memory, offsets and lengths that are multiples of this.
inline constexpr std::uint64_t kDirectAlignment = 4096;

// A file is a header, then the payload. Checksums are 32-bit little-endian CRC32C.
struct BlockLayout {
    std::uint64_t header_bytes = 0;
    std::uint64_t payload_bytes = 0;           // padded: multiple of kDirectAlignment
    std::uint64_t crc_table_offset = 0;        // in the header: one checksum a layer
    std::uint64_t header_crc_offset = 0;       // in the header: covers all bytes before it
    std::vector<std::uint64_t> layer_bytes{};  // adjacent from the payload's start

    std::uint64_t file_bytes() const { return header_bytes + payload_bytes; }

    // Throws std::invalid_argument naming the first part that does not fit.
    void check() const;
};

}  // namespace dualpath
