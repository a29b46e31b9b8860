#include "core/piece_check.hpp"

#include <algorithm>
#include <cstdio>
#include <string>

namespace dualpath {
namespace {

std::string describe(const Piece& piece) {
    char text[96];
    std::snprintf(text, sizeof text, "piece (local %#llx, remote %#llx, %llu bytes)",
                  static_cast<unsigned long long>(piece[0]),
                  static_cast<unsigned long long>(piece[1]),
                  static_cast<unsigned long long>(piece[2]));
    return text;
}

}  // namespace

void check_pieces(const std::vector<Span>& local, const Span& remote, const Piece* pieces,
                  std::size_t num_pieces) {
    const Span* region = nullptr;
    for (const Piece* piece = pieces; piece != pieces + num_pieces; ++piece) {
        const auto [from, to, num_bytes] = *piece;
        if (num_bytes == 0) throw std::invalid_argument(describe(*piece) + " is empty");
        if (!remote.contains(to, num_bytes)) {
            throw std::invalid_argument(describe(*piece) + " is outside the peer's region");
        }
        if (region != nullptr && region->contains(from, num_bytes)) continue;
        const auto found = std::find_if(local.begin(), local.end(), [&](const Span& each) {
            return each.contains((*piece)[0], (*piece)[2]);
        });
        if (found == local.end()) {
            throw std::invalid_argument(describe(*piece) + " is outside the registered regions");
        }
        region = &*found;
    }
}

void check_notice(std::size_t num_bytes) {
    if (num_bytes > kMaxNoticeBytes) {
        throw std::invalid_argument("a notice has at most 4096 bytes, got " +
                                    std::to_string(num_bytes));
    }
}

}  // namespace dualpath
