// Writing one block: look up, create, allocate, pieces, close, rename.
#pragma once

#include <string>
#include <vector>

#include "io/aligned_buffer.hpp"
#include "io/block_job.hpp"
#include "io/layer_checksums.hpp"
#include "io/piece_transfer.hpp"

namespace dualpath {

// All or nothing: the bytes go to a temporary name that is removed if anything fails. The first
// piece goes last, as it starts with the header and so needs every layer's checksum.
class BlockWrite final : public BlockJob {
  public:
    BlockWrite(BlockRequest request, const TransferOptions& options);

    bool next(Operation& operation) override;
    void complete(const Operation& operation, std::int64_t result) override;
    bool has_work() const override;
    void work() override;
    bool settled() const override { return finished(); }
    bool finished() const override { return phase_ == Phase::kFinished; }
    std::size_t num_pieces_left() const override;
    BlockOutcome take_outcome() override;

  private:
    enum class Phase {
        kLookUp,
        kOpen,
        kAllocate,
        kTransfer,
        kClose,
        kRename,
        kMakeOuter,  // the directory of the directory
        kMakeInner,  // the directory of the block
        kUnlink,
        kFinished,
    };

    Operation step_operation() const;
    bool next_piece(Operation& operation);
    void stepped(std::int64_t result);
    void looked_up(std::int64_t result);
    void opened(std::int64_t result);
    void closed(std::int64_t result);
    void renamed(std::int64_t result);
    void made_directory(std::int64_t result);
    void moved(const Operation& operation, std::int64_t result);
    void fail(Step step, std::int64_t result);
    void give_up();
    void fill_header();

    BlockRequest request_;
    TransferOptions options_;
    std::string inner_directory_;
    std::string outer_directory_;
    AlignedBuffer header_;
    PieceTransfer pieces_;
    LayerChecksums checksums_;
    struct statx stat_{};
    BlockOutcome outcome_;
    Phase phase_ = Phase::kLookUp;
    int fd_ = -1;
    unsigned num_retries_ = 0;
    std::size_t num_flying_ = 0;
    std::size_t num_checked_ = 0;  // leading pieces whose checksums are known
    std::size_t next_piece_ = 1;   // of those but the first
    bool first_given_ = false;
    std::vector<std::size_t> again_;
    std::size_t num_done_ = 0;
    bool made_directories_ = false;
    bool failed_ = false;
};

}  // namespace dualpath
