#include "copy/copy_device.hpp"

#include "copy/copy_bytes.hpp"

namespace dualpath {

void HostDevice::copy(const CopyOrder& order, std::size_t layer, std::size_t first_row,
                      std::size_t end_row) {
    const PageMap& map = order.rows->map();
    const LayerPages& pages = map.layers()[layer];
    for (std::size_t i = first_row; i < end_row; ++i) {
        const PageRow& row = order.rows->rows()[i];
        auto* cache = reinterpret_cast<std::byte*>(map.cache_page(pages, row));
        auto* staged = reinterpret_cast<std::byte*>(map.staging_page(pages, row));
        for (std::size_t run = 0; run < pages.num_runs; ++run) {
            if (order.direction == CopyDirection::kLoad) {
                copy_bytes(cache, staged, pages.run_bytes);
            } else {
                copy_bytes(staged, cache, pages.run_bytes);
            }
            cache += pages.run_stride;
            staged += pages.run_bytes;
        }
    }
    finish_copies();
}

}  // namespace dualpath
