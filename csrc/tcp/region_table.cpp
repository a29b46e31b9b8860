#include "tcp/region_table.hpp"

#include <stdexcept>

namespace dualpath {

void RegionTable::add(const TcpRegion& region) {
    const Span& span = region.span;
    if (span.address == 0 || span.num_bytes == 0 || span.address + span.num_bytes < span.address) {
        throw std::invalid_argument("a region needs an address and a size");
    }
    const std::lock_guard lock(mutex_);
    regions_.push_back(region);
}

std::optional<TcpRegion> RegionTable::find(std::uint64_t address, std::uint64_t num_bytes) const {
    const std::lock_guard lock(mutex_);
    for (const TcpRegion& region : regions_) {
        if (region.span.contains(address, num_bytes)) return region;
    }
    return std::nullopt;
}

std::vector<Span> RegionTable::spans() const {
    const std::lock_guard lock(mutex_);
    std::vector<Span> spans;
    for (const TcpRegion& region : regions_) spans.push_back(region.span);
    return spans;
}

}  // namespace dualpath
