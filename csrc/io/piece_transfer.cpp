#include "io/piece_transfer.hpp"

#include <algorithm>
#include <cerrno>

#include "io/block_layout.hpp"

namespace dualpath {
namespace {

// Calls in a row that may move nothing (EINTR, EAGAIN, less than a sector) before we believe it.
constexpr unsigned kMaxIdleCalls = 16;

}  // namespace

PieceTransfer::PieceTransfer(std::byte* header, std::uint64_t header_bytes, std::byte* payload,
                             std::uint64_t payload_bytes, std::uint64_t piece_bytes, bool direct)
    : header_(header), header_bytes_(header_bytes), payload_(payload), direct_(direct) {
    const std::uint64_t file_bytes = header_bytes + payload_bytes;
    // Rounded: a 4 KiB remainder is worth no request of its own.
    const std::uint64_t count =
        std::max<std::uint64_t>(1, (file_bytes + piece_bytes / 2) / piece_bytes);
    const std::uint64_t share = (file_bytes + count - 1) / count;
    // The header's iovec and the payload's share the first piece, so it holds more than a header.
    const std::uint64_t stride =
        std::max((share + kDirectAlignment - 1) / kDirectAlignment * kDirectAlignment,
                 header_bytes + kDirectAlignment);
    for (std::uint64_t begin = 0; begin < file_bytes; begin += stride) {
        pieces_.push_back({begin, std::min(begin + stride, file_bytes)});
    }
}

std::uint64_t PieceTransfer::payload_end(std::size_t piece) const {
    return pieces_[piece].end - header_bytes_;
}

Operation PieceTransfer::operation(Step step, int fd, std::size_t piece) const {
    const auto [position, end, num_idle] = pieces_[piece];
    Operation operation;
    operation.step = step;
    operation.fd = fd;
    operation.piece = piece;
    operation.offset = position;
    operation.num_bytes = end - position;
    if (position < header_bytes_) {
        operation.parts[operation.num_parts++] = {header_ + position, header_bytes_ - position};
    }
    const std::uint64_t begin = std::max(position, header_bytes_);
    operation.parts[operation.num_parts++] = {payload_ + (begin - header_bytes_), end - begin};
    return operation;
}

PieceTransfer::Progress PieceTransfer::advance(std::size_t index, std::int64_t result) {
    Piece& piece = pieces_[index];
    if (result == -EINTR || result == -EAGAIN) return retry(piece, Progress::kFailed);
    if (result < 0) return Progress::kFailed;
    if (result == 0) return Progress::kEndOfFile;
    const std::uint64_t before = piece.position;
    piece.position = std::min(piece.position + static_cast<std::uint64_t>(result), piece.end);
    if (piece.position == piece.end) return Progress::kDone;
    // A direct call cannot start in the middle of a sector: its beginning is moved once more.
    if (direct_) piece.position -= piece.position % kDirectAlignment;
    if (piece.position == before) return retry(piece, Progress::kEndOfFile);
    piece.num_idle = 0;
    return Progress::kAgain;
}

PieceTransfer::Progress PieceTransfer::retry(Piece& piece, Progress when_spent) {
    return ++piece.num_idle < kMaxIdleCalls ? Progress::kAgain : when_spent;
}

}  // namespace dualpath
