// Memory that requests wait for: all or nothing, first come first served. A node's staging in
// bytes, or a decode engine's KV cache in tokens.
#pragma once

#include <cstdint>
#include <deque>

namespace dualpath::sim {

class MemoryPool {
  public:
    struct Waiting {
        std::uint32_t agent;
        std::uint32_t attempt;
        std::int64_t amount;
    };

    explicit MemoryPool(std::int64_t amount) : free_(amount), total_(amount) {}

    // Whether it was granted; if not, the request waits behind all who came earlier.
    bool take(const Waiting& request);
    void give_back(std::int64_t amount) { free_ += amount; }
    // Whether the first who waits can be granted now.
    bool can_grant() const { return !line_.empty() && line_.front().amount <= free_; }
    // Grants to the first who waits. `keep` false: it has gone away and gets nothing.
    Waiting grant(bool keep);
    const Waiting& head() const { return line_.front(); }
    bool anyone_waits() const { return !line_.empty(); }

    std::int64_t used() const { return total_ - free_; }
    std::int64_t total() const { return total_; }

  private:
    std::int64_t free_;
    std::int64_t total_;
    std::deque<Waiting> line_;
};

}  // namespace dualpath::sim
