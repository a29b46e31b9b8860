// A range of addresses, ours or a peer's.
#pragma once

#include <cstdint>

namespace dualpath {

struct Span {
    std::uint64_t address = 0;
    std::uint64_t num_bytes = 0;

    // Also right for ranges that would wrap around.
    bool contains(std::uint64_t first, std::uint64_t count) const {
        return first >= address && count <= num_bytes && first - address <= num_bytes - count;
    }
};

}  // namespace dualpath
