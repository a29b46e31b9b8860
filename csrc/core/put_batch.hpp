// One batch of puts on its way to a peer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace dualpath {

class UcxEndpoint;
struct PutBatch;

// Local address, remote address, bytes: the order of PutArray in transport/base.py.
using Piece = std::array<std::uint64_t, 3>;

struct Put {
    std::uint64_t local;
    std::uint64_t remote;
    std::uint64_t num_bytes;
    PutBatch* batch;
};

// Owned by the command queue, then by one endpoint. Not copied or moved once built: puts and UCX's
// callbacks point here.
struct PutBatch {
    // Neighbours that are adjacent on both sides become one put; no put exceeds `max_put_bytes`,
    // so that what is in flight can be bounded and batches to several peers interleave.
    PutBatch(std::uint64_t id, const Piece* pieces, std::size_t num_pieces, std::string notice,
             std::uint64_t max_put_bytes);
    PutBatch(const PutBatch&) = delete;
    PutBatch& operator=(const PutBatch&) = delete;

    bool all_posted() const { return next == puts.size(); }
    bool notice_due() const { return outstanding == 0 && flushed && error.empty(); }
    // Nothing of it is with UCX any more, and nothing will be.
    bool ended() const;
    // The first error stands; what is not posted yet never will be.
    void fail(const std::string& why);

    const std::uint64_t id;
    std::vector<Put> puts;
    const std::string notice;
    UcxEndpoint* endpoint = nullptr;
    std::size_t next = 0;         // the first put not handed to UCX
    std::size_t outstanding = 0;  // requests that UCX has not completed
    std::uint64_t inflight_bytes = 0;
    bool touched = false;  // a byte of it or its notice may be on the way
    bool flush_posted = false;
    bool flushed = false;
    bool notice_posted = false;
    std::string error;
};

}  // namespace dualpath
