#include "io/block_read.hpp"

#include <fcntl.h>

#include <cerrno>
#include <utility>

namespace dualpath {
BlockRead::BlockRead(BlockRequest request, const TransferOptions& options)
    : request_(std::move(request)),
      options_(options),
      header_(options.layout->header_bytes),
      pieces_(header_.data(), options.layout->header_bytes, request_.payload,
              options.layout->payload_bytes, options.piece_bytes, options.direct),
      checksums_(*options_.layout, request_.payload) {
    outcome_.id = request_.id;
}

bool BlockRead::next(Operation& operation) {
    if (phase_ == Phase::kTransfer) return next_piece(operation);
    if (num_flying_ > 0 || phase_ == Phase::kFinished) return false;
    operation = Operation{};
    operation.fd = fd_;
    if (phase_ == Phase::kOpen) {
        operation.step = Step::kOpen;
        operation.path = request_.path.c_str();
        operation.flags = O_RDONLY | O_CLOEXEC | (options_.direct ? O_DIRECT : 0);
    } else if (phase_ == Phase::kStat) {
        operation.step = Step::kStat;
        operation.stat = &stat_;
    } else {
        operation.step = Step::kClose;
    }
    ++num_flying_;
    return true;
}

bool BlockRead::next_piece(Operation& operation) {
    std::size_t piece;
    if (failed_) return false;
    if (!again_.empty()) {
        piece = again_.back();
        again_.pop_back();
    } else if (next_piece_ < pieces_.size()) {
        piece = next_piece_++;
    } else {
        return false;
    }
    operation = pieces_.operation(Step::kRead, fd_, piece);
    ++num_flying_;
    return true;
}

void BlockRead::complete(const Operation& operation, std::int64_t result) {
    --num_flying_;
    switch (phase_) {
        case Phase::kOpen:
            opened(result);
            break;
        case Phase::kStat:
            statted(result);
            break;
        case Phase::kTransfer:
            moved(operation, result);
            break;
        default:
            // A file that was only read loses nothing when its close fails; Linux has freed the
            // descriptor in any case.
            phase_ = Phase::kFinished;
    }
}

void BlockRead::opened(std::int64_t result) {
    if (is_transient(result) && ++num_retries_ < kMaxRetries) return;
    if (result < 0) {
        fail(BlockOutcome::Status::kFailed, Step::kOpen, static_cast<int>(-result));
        phase_ = Phase::kFinished;
        return;
    }
    fd_ = static_cast<int>(result);
    phase_ = Phase::kStat;
}

void BlockRead::statted(std::int64_t result) {
    if (is_transient(result) && ++num_retries_ < kMaxRetries) return;
    if (result < 0) {
        fail(BlockOutcome::Status::kFailed, Step::kStat, static_cast<int>(-result));
        phase_ = Phase::kClose;
        return;
    }
    outcome_.found_bytes = stat_.stx_size;
    outcome_.modified_s = stat_.stx_mtime.tv_sec;
    // Anything but a regular file could make a read wait for ever.
    if (!S_ISREG(stat_.stx_mode) || stat_.stx_size != options_.layout->file_bytes()) {
        fail(BlockOutcome::Status::kWrongSize, Step::kStat, 0);
        phase_ = Phase::kClose;
        return;
    }
    phase_ = Phase::kTransfer;
}

void BlockRead::moved(const Operation& operation, std::int64_t result) {
    switch (pieces_.advance(operation.piece, result)) {
        case PieceTransfer::Progress::kDone:
            ++num_done_;
            while (num_prefix_ < pieces_.size() && pieces_.is_done(num_prefix_)) ++num_prefix_;
            break;
        case PieceTransfer::Progress::kAgain:
            again_.push_back(operation.piece);
            break;
        case PieceTransfer::Progress::kEndOfFile:
            // It has shrunk since it was statted.
            outcome_.found_bytes = pieces_.position(operation.piece);
            fail(BlockOutcome::Status::kWrongSize, Step::kRead, 0);
            break;
        case PieceTransfer::Progress::kFailed:
            fail(BlockOutcome::Status::kFailed, Step::kRead, static_cast<int>(-result));
    }
    leave_transfer();
}

void BlockRead::fail(BlockOutcome::Status status, Step step, int error) {
    if (failed_) return;  // the first failure is the cause
    failed_ = true;
    outcome_.status = status;
    outcome_.step = step;
    outcome_.error = error;
}

void BlockRead::leave_transfer() {
    if (num_flying_ == 0 && (failed_ || num_done_ == pieces_.size())) phase_ = Phase::kClose;
}

bool BlockRead::has_work() const {
    return request_.verify && !failed_ && num_checked_ < num_prefix_;
}

void BlockRead::work() { checksums_.advance(pieces_.payload_end(num_checked_++)); }

bool BlockRead::settled() const {
    const bool transferred = phase_ == Phase::kClose || phase_ == Phase::kFinished;
    return transferred && !has_work();
}

bool BlockRead::finished() const { return phase_ == Phase::kFinished && !has_work(); }

std::size_t BlockRead::num_pieces_left() const { return pieces_.size() - num_done_; }

BlockOutcome BlockRead::take_outcome() {
    if (!failed_) {
        outcome_.num_bytes = options_.layout->file_bytes();
        outcome_.header.assign(reinterpret_cast<const char*>(header_.data()),
                               options_.layout->header_bytes);
        if (request_.verify) outcome_.crcs = checksums_.values();
    }
    return std::move(outcome_);
}

}  // namespace dualpath
