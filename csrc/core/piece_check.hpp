// What a put may touch.
#pragma once

#include <cstddef>
#include <stdexcept>
#include <vector>

#include "core/put_batch.hpp"
#include "core/span.hpp"

namespace dualpath {

// A put to a peer that is closed.
class PeerClosedError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Throws std::invalid_argument unless every piece lies in one of `local` and in `remote`.
void check_pieces(const std::vector<Span>& local, const Span& remote, const Piece* pieces,
                  std::size_t num_pieces);

inline constexpr std::size_t kMaxNoticeBytes = 4096;  // as transport/base.py says

// Throws std::invalid_argument for a longer notice.
void check_notice(std::size_t num_bytes);

}  // namespace dualpath
