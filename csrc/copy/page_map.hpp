// Where every page of every layer lies, in vLLM's paged cache and in staging memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace dualpath {

// One layer. In the cache a page is `num_runs` pieces of `run_bytes`, `run_stride` bytes apart (one
// piece where vLLM keeps a page together); in a slot it is the same pieces without gaps.
struct LayerPages {
    std::uintptr_t cache_address;
    std::size_t block_stride;
    std::size_t num_runs;
    std::size_t run_stride;
    std::size_t run_bytes;
    std::size_t slot_offset;  // of the slot's first page of this layer

    std::size_t page_bytes() const { return num_runs * run_bytes; }
};

struct StagingSlots {
    std::uintptr_t address;
    std::size_t slot_bytes;
    std::size_t num_slots;
    std::size_t pages_per_block;
};

// One page of a request: vLLM block `block` is page `page` of the Full Block in slot `slot`.
struct PageRow {
    std::uint32_t block;
    std::uint32_t slot;
    std::uint32_t page;
};

// Immutable. The owner of both memories keeps them mapped while any copy may use them.
class PageMap {
  public:
    // Throws std::invalid_argument if a page would lie outside its slot.
    PageMap(std::vector<LayerPages> layers, std::size_t num_blocks, StagingSlots staging);

    const std::vector<LayerPages>& layers() const { return layers_; }
    const StagingSlots& staging() const { return staging_; }
    // Throws std::invalid_argument if a row names memory that is not there.
    void check(const std::vector<PageRow>& rows) const;

    std::uintptr_t cache_page(const LayerPages& layer, const PageRow& row) const {
        return layer.cache_address + row.block * layer.block_stride;
    }
    std::uintptr_t staging_page(const LayerPages& layer, const PageRow& row) const {
        return staging_.address + row.slot * staging_.slot_bytes + layer.slot_offset +
               row.page * layer.page_bytes();
    }

  private:
    bool is_inside(const PageRow& row) const {
        return row.block < num_blocks_ && row.slot < staging_.num_slots &&
               row.page < staging_.pages_per_block;
    }

    std::vector<LayerPages> layers_;
    std::size_t num_blocks_;
    StagingSlots staging_;
};

}  // namespace dualpath
