// The CRC32C of every Layer Block of a payload, computed as the payload grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "io/block_layout.hpp"

namespace dualpath {

// One thread at a time. `layout` and `payload` outlive it.
class LayerChecksums {
  public:
    LayerChecksums(const BlockLayout& layout, const std::byte* payload);

    // Includes the payload's bytes up to `end`, which must be final. `end` never goes back.
    void advance(std::uint64_t end);
    // One a layer; complete once advance() has seen the payload's end.
    const std::vector<std::uint32_t>& values() const { return values_; }

  private:
    const BlockLayout& layout_;
    const std::byte* payload_;
    std::vector<std::uint32_t> values_;
    std::size_t layer_ = 0;
    std::uint64_t layer_end_;
    std::uint64_t position_ = 0;
};

}  // namespace dualpath
