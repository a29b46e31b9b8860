#include "core/put_batch.hpp"

#include <algorithm>
#include <utility>

namespace dualpath {

PutBatch::PutBatch(std::uint64_t id, const Piece* pieces, std::size_t num_pieces,
                   std::string notice, std::uint64_t max_put_bytes)
    : id(id), notice(std::move(notice)) {
    puts.reserve(num_pieces);
    for (std::size_t i = 0; i < num_pieces; ++i) {
        auto [local, remote, rest] = pieces[i];
        while (rest > 0) {
            if (puts.empty() || puts.back().local + puts.back().num_bytes != local ||
                puts.back().remote + puts.back().num_bytes != remote ||
                puts.back().num_bytes >= max_put_bytes) {
                puts.push_back({local, remote, 0, this});
            }
            const std::uint64_t taken = std::min(rest, max_put_bytes - puts.back().num_bytes);
            puts.back().num_bytes += taken;
            local += taken;
            remote += taken;
            rest -= taken;
        }
    }
}

bool PutBatch::ended() const {
    if (outstanding != 0) return false;
    return !error.empty() || (flushed && notice_posted);
}

void PutBatch::fail(const std::string& why) {
    if (error.empty()) error = why;
    next = puts.size();
}

}  // namespace dualpath
