// The memory of this process that connections may read from and write to.
#pragma once

#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "core/span.hpp"

namespace dualpath {

struct TcpRegion {
    Span span;
    int file = -1;  // the shared file mapped there from its start, or -1
};

// Any thread. Regions stay until the table is destroyed; the caller keeps them mapped until then.
class RegionTable {
  public:
    // Throws std::invalid_argument for an empty region.
    void add(const TcpRegion& region);
    std::optional<TcpRegion> find(std::uint64_t address, std::uint64_t num_bytes) const;
    std::vector<Span> spans() const;

  private:
    mutable std::mutex mutex_;
    std::vector<TcpRegion> regions_;
};

}  // namespace dualpath
