#include "io/layer_checksums.hpp"

#include <algorithm>

#include "core/crc32c.hpp"

namespace dualpath {

LayerChecksums::LayerChecksums(const BlockLayout& layout, const std::byte* payload)
    : layout_(layout),
      payload_(payload),
      values_(layout.layer_bytes.size(), 0),
      layer_end_(layout.layer_bytes.front()) {}

void LayerChecksums::advance(std::uint64_t end) {
    // The padding after the last layer is not covered: the loop ends with the layers.
    while (position_ < end && layer_ < values_.size()) {
        const std::uint64_t stop = std::min(end, layer_end_);
        values_[layer_] = crc32c(payload_ + position_, stop - position_, values_[layer_]);
        position_ = stop;
        if (position_ == layer_end_ && ++layer_ < values_.size()) {
            layer_end_ += layout_.layer_bytes[layer_];
        }
    }
}

}  // namespace dualpath
