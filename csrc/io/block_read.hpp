// Reading one block: open, stat, pieces, close.
#pragma once

#include <vector>

#include "io/aligned_buffer.hpp"
#include "io/block_job.hpp"
#include "io/layer_checksums.hpp"
#include "io/piece_transfer.hpp"

namespace dualpath {

// Checksums follow the completed prefix of pieces. The outcome stands before the file is closed:
// on a network file system a close is a round trip that nobody needs to wait for.
class BlockRead final : public BlockJob {
  public:
    BlockRead(BlockRequest request, const TransferOptions& options);

    bool next(Operation& operation) override;
    void complete(const Operation& operation, std::int64_t result) override;
    bool has_work() const override;
    void work() override;
    bool settled() const override;
    bool finished() const override;
    std::size_t num_pieces_left() const override;
    BlockOutcome take_outcome() override;

  private:
    enum class Phase { kOpen, kStat, kTransfer, kClose, kFinished };

    bool next_piece(Operation& operation);
    void opened(std::int64_t result);
    void statted(std::int64_t result);
    void moved(const Operation& operation, std::int64_t result);
    void fail(BlockOutcome::Status status, Step step, int error);
    void leave_transfer();

    BlockRequest request_;
    TransferOptions options_;
    AlignedBuffer header_;
    PieceTransfer pieces_;
    LayerChecksums checksums_;
    struct statx stat_{};
    BlockOutcome outcome_;
    Phase phase_ = Phase::kOpen;
    int fd_ = -1;
    unsigned num_retries_ = 0;
    std::size_t num_flying_ = 0;
    std::size_t next_piece_ = 0;
    std::vector<std::size_t> again_;  // pieces whose rest must be asked for
    std::size_t num_done_ = 0;
    std::size_t num_prefix_ = 0;   // leading pieces that are done
    std::size_t num_checked_ = 0;  // of those, how many the checksums cover
    bool failed_ = false;
};

}  // namespace dualpath
