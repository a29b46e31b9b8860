// Divides blocks among readers so that all end together, as water finds its level.
#pragma once

#include <cstdint>
#include <span>

namespace dualpath::policy {

struct WaterReader {
    std::uint32_t engine;
    std::uint32_t node;
    double start_s;                // when it can begin
    double blocks_per_s;           // > 0
    std::uint32_t rank = 0;        // among equals the lower one goes first
    std::uint32_t num_blocks = 0;  // the answer

    double end_s() const { return start_s + num_blocks / blocks_per_s; }
};

// Sets num_blocks of each reader; together `num_blocks`. No share is below `least_blocks` unless it
// is the only one. `floor_s`: nothing is gained by ending earlier, so no more readers are taken
// than reach it. `readers` is reordered. Throws std::invalid_argument without a reader.
void water_fill(std::span<WaterReader> readers, std::uint32_t num_blocks,
                std::uint32_t least_blocks, double floor_s);

}  // namespace dualpath::policy
