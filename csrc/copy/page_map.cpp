#include "copy/page_map.hpp"

#include <stdexcept>
#include <string>
#include <utility>

namespace dualpath {
namespace {

void check_layer(const LayerPages& layer, const StagingSlots& staging) {
    if (layer.cache_address == 0 || layer.num_runs == 0 || layer.run_bytes == 0) {
        throw std::invalid_argument("a layer needs an address and pages of at least one byte");
    }
    if (layer.num_runs > 1 && layer.run_stride < layer.run_bytes) {
        throw std::invalid_argument("the pieces of a page overlap");
    }
    const std::size_t block_bytes = staging.pages_per_block * layer.page_bytes();
    if (layer.slot_offset > staging.slot_bytes ||
        block_bytes > staging.slot_bytes - layer.slot_offset) {
        throw std::invalid_argument(
            "a layer's pages at offset " + std::to_string(layer.slot_offset) +
            " do not fit into a slot of " + std::to_string(staging.slot_bytes) + " bytes");
    }
}

}  // namespace

PageMap::PageMap(std::vector<LayerPages> layers, std::size_t num_blocks, StagingSlots staging)
    : layers_(std::move(layers)), num_blocks_(num_blocks), staging_(staging) {
    if (staging.address == 0 || staging.num_slots == 0 || staging.pages_per_block == 0) {
        throw std::invalid_argument("staging needs an address, slots and pages");
    }
    for (const LayerPages& layer : layers_) check_layer(layer, staging);
}

void PageMap::check(const std::vector<PageRow>& rows) const {
    for (const PageRow& row : rows) {
        if (is_inside(row)) continue;
        throw std::invalid_argument(
            "page " + std::to_string(row.page) + " of slot " + std::to_string(row.slot) +
            " and block " + std::to_string(row.block) + ": expected less than " +
            std::to_string(staging_.pages_per_block) + ", " + std::to_string(staging_.num_slots) +
            " and " + std::to_string(num_blocks_));
    }
}

}  // namespace dualpath
