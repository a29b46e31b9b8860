// A block's bytes, cut into pieces that move independently.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "io/operation.hpp"

namespace dualpath {

// Header and payload memory seen as one file, in pieces of about equal size: one block alone then
// keeps a deep queue busy. Counts what has moved and makes the operation for the rest of a piece,
// as a kernel may move less than was asked for. One thread at a time.
class PieceTransfer {
  public:
    enum class Progress {
        kDone,       // the piece is complete
        kAgain,      // the rest must be asked for again
        kEndOfFile,  // no more bytes are to be had
        kFailed,     // with the errno that was passed
    };

    // The memory outlives it. `direct`: the rest of a piece must start at a multiple of 4096.
    PieceTransfer(std::byte* header, std::uint64_t header_bytes, std::byte* payload,
                  std::uint64_t payload_bytes, std::uint64_t piece_bytes, bool direct);

    std::size_t size() const { return pieces_.size(); }
    // Where a piece ends in the payload.
    std::uint64_t payload_end(std::size_t piece) const;
    // Reads or writes what is left of the piece.
    Operation operation(Step step, int fd, std::size_t piece) const;
    // `result` of the last operation of the piece: bytes moved, or -errno.
    Progress advance(std::size_t piece, std::int64_t result);
    // How far into the file a piece has come.
    std::uint64_t position(std::size_t piece) const { return pieces_[piece].position; }
    bool is_done(std::size_t piece) const { return pieces_[piece].position == pieces_[piece].end; }

  private:
    struct Piece {
        std::uint64_t position;
        std::uint64_t end;
        unsigned num_idle = 0;  // calls in a row that moved nothing
    };

    Progress retry(Piece& piece, Progress when_spent);

    std::byte* header_;
    std::uint64_t header_bytes_;
    std::byte* payload_;
    bool direct_;
    std::vector<Piece> pieces_;
};

}  // namespace dualpath
