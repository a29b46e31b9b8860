#include "policy/water_fill.hpp"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <tuple>

namespace dualpath::policy {
namespace {

struct Level {
    std::size_t num_readers;  // those under water: the first ones
    double end_s;
};

// Readers are in the order of their starts.
Level find_level(std::span<const WaterReader> readers, double num_blocks, double floor_s) {
    double speed = 0;
    double head_start = 0;
    Level level{0, 0};
    for (const WaterReader& reader : readers) {
        if (level.num_readers > 0 && (level.end_s <= reader.start_s || level.end_s <= floor_s)) {
            break;
        }
        speed += reader.blocks_per_s;
        head_start += reader.start_s * reader.blocks_per_s;
        level = {level.num_readers + 1, (num_blocks + head_start) / speed};
    }
    return level;
}

// Whole blocks: each share rounded down, what is left goes one by one to whom it delays least.
void fill(std::span<WaterReader> readers, std::uint32_t num_blocks, double end_s) {
    std::uint32_t left = num_blocks;
    for (WaterReader& reader : readers) {
        const double share =
            std::floor(std::max(0.0, end_s - reader.start_s) * reader.blocks_per_s);
        reader.num_blocks = static_cast<std::uint32_t>(std::min<double>(share, left));
        left -= reader.num_blocks;
    }
    for (; left > 0; --left) {
        const auto next_end = [](const WaterReader& reader) {
            return std::tuple(reader.start_s + (reader.num_blocks + 1) / reader.blocks_per_s,
                              reader.rank);
        };
        std::ranges::min_element(readers, {}, next_end)->num_blocks += 1;
    }
}

}  // namespace

void water_fill(std::span<WaterReader> readers, std::uint32_t num_blocks,
                std::uint32_t least_blocks, double floor_s) {
    if (readers.empty()) throw std::invalid_argument("water_fill: expected a reader, found none");
    std::ranges::sort(readers, {}, [](const WaterReader& reader) {
        return std::tuple(reader.start_s, reader.rank);
    });
    std::size_t num_open = readers.size();
    while (true) {
        for (WaterReader& reader : readers) reader.num_blocks = 0;
        if (num_blocks == 0) return;
        const Level level = find_level(readers.first(num_open), num_blocks, floor_s);
        const auto used = readers.first(level.num_readers);
        fill(used, num_blocks, level.end_s);
        const auto least = std::ranges::min_element(used, {}, [](const WaterReader& reader) {
            return std::tuple(reader.num_blocks, -static_cast<double>(reader.rank));
        });
        if (used.size() == 1 || least->num_blocks >= least_blocks) return;
        // Too small a share: without this reader, and again.
        std::rotate(least, least + 1, readers.begin() + static_cast<std::ptrdiff_t>(num_open));
        --num_open;
    }
}

}  // namespace dualpath::policy
