// A node's staging memory: all or nothing, first come first served.
#pragma once

#include <cstdint>
#include <deque>

namespace dualpath::sim {

class StagingPool {
  public:
    struct Waiting {
        std::uint32_t agent;
        std::uint32_t attempt;
        std::int64_t bytes;
    };

    explicit StagingPool(std::int64_t num_bytes) : free_bytes_(num_bytes), num_bytes_(num_bytes) {}

    // Whether the bytes were granted; if not, the request waits behind all who came earlier.
    bool take(const Waiting& request);
    void give_back(std::int64_t num_bytes) { free_bytes_ += num_bytes; }
    // Whether the first who waits can have its bytes now.
    bool can_grant() const { return !line_.empty() && line_.front().bytes <= free_bytes_; }
    // Grants to the first who waits. `keep` false: it has gone away and gets nothing.
    Waiting grant(bool keep);
    const Waiting& head() const { return line_.front(); }
    bool anyone_waits() const { return !line_.empty(); }

    std::int64_t used_bytes() const { return num_bytes_ - free_bytes_; }
    std::int64_t num_bytes() const { return num_bytes_; }

  private:
    std::int64_t free_bytes_;
    std::int64_t num_bytes_;
    std::deque<Waiting> line_;
};

}  // namespace dualpath::sim
