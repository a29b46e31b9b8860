#include "io/block_layout.hpp"

#include <numeric>
#include <stdexcept>
#include <string>

namespace dualpath {
namespace {

void require(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(std::string("block layout: ") + what);
}

}  // namespace

void BlockLayout::check() const {
    require(header_bytes > 0 && header_bytes % kDirectAlignment == 0,
            "the header must be a positive multiple of 4096 bytes");
    require(payload_bytes > 0 && payload_bytes % kDirectAlignment == 0,
            "the payload must be a positive multiple of 4096 bytes");
    require(!layer_bytes.empty(), "at least one layer is needed");
    require(header_crc_offset + sizeof(std::uint32_t) <= header_bytes,
            "the header's checksum lies outside the header");
    require(crc_table_offset + layer_bytes.size() * sizeof(std::uint32_t) <= header_crc_offset,
            "the table of checksums does not fit before the header's own");
    const std::uint64_t sum =
        std::accumulate(layer_bytes.begin(), layer_bytes.end(), std::uint64_t{0});
    require(sum <= payload_bytes, "the layers are larger than the payload");
}

}  // namespace dualpath
