#include "copy/copy_device.hpp"

#include "core/stream_copy.hpp"

namespace dualpath {

// A tenth of a millisecond on any current memory bus.
std::size_t HostDevice::slice_bytes() const { return std::size_t{1} << 20; }

void HostDevice::copy(const CopyOrder& order, CopyLane, std::size_t layer, std::size_t first_row,
                      std::size_t end_row) {
    const PageMap& map = order.rows->map();
    const LayerPages& pages = map.layers()[layer];
    for (std::size_t i = first_row; i < end_row; ++i) {
        const PageRow& row = order.rows->rows()[i];
        auto* cache = reinterpret_cast<std::byte*>(map.cache_page(pages, row));
        auto* staged = reinterpret_cast<std::byte*>(map.staging_page(pages, row));
        for (std::size_t run = 0; run < pages.num_runs; ++run) {
            if (order.direction == CopyDirection::kLoad) {
                stream_copy_unordered(cache, staged, pages.run_bytes);
            } else {
                stream_copy_unordered(staged, cache, pages.run_bytes);
            }
            cache += pages.run_stride;
            staged += pages.run_bytes;
        }
    }
    order_streamed_copies();
}

}  // namespace dualpath
