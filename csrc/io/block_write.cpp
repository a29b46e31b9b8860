#include "io/block_write.hpp"

#include <fcntl.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/crc32c.hpp"

namespace dualpath {
namespace {

std::string parent_of(const std::string& path) { return path.substr(0, path.rfind('/')); }

void store_u32(std::byte* where, std::uint32_t value) {
    static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the format is little-endian");
    std::memcpy(where, &value, sizeof value);
}

}  // namespace

BlockWrite::BlockWrite(BlockRequest request, const TransferOptions& options)
    : request_(std::move(request)),
      options_(options),
      inner_directory_(parent_of(request_.path)),
      outer_directory_(parent_of(inner_directory_)),
      header_(options.layout->header_bytes),
      pieces_(header_.data(), options.layout->header_bytes, request_.payload,
              options.layout->payload_bytes, options.piece_bytes, options.direct),
      checksums_(*options_.layout, request_.payload) {
    outcome_.id = request_.id;
    std::memcpy(header_.data(), request_.header.data(), options_.layout->header_bytes);
}

bool BlockWrite::next(Operation& operation) {
    if (phase_ == Phase::kTransfer) return next_piece(operation);
    if (num_flying_ > 0 || phase_ == Phase::kFinished) return false;
    operation = step_operation();
    ++num_flying_;
    return true;
}

Operation BlockWrite::step_operation() const {
    Operation operation;
    operation.fd = fd_;
    switch (phase_) {
        case Phase::kLookUp:
            operation.step = Step::kLookUp;
            operation.path = request_.path.c_str();
            operation.stat = const_cast<struct statx*>(&stat_);
            break;
        case Phase::kOpen:
            operation.step = Step::kOpen;
            operation.path = request_.temporary.c_str();
            operation.flags =
                O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | (options_.direct ? O_DIRECT : 0);
            break;
        case Phase::kAllocate:
            operation.step = Step::kAllocate;
            operation.num_bytes = options_.layout->file_bytes();
            break;
        case Phase::kClose:
            operation.step = Step::kClose;
            break;
        case Phase::kRename:
            operation.step = Step::kRename;
            operation.path = request_.temporary.c_str();
            operation.target = request_.path.c_str();
            break;
        case Phase::kMakeOuter:
        case Phase::kMakeInner:
            operation.step = Step::kMakeDirectory;
            operation.path =
                (phase_ == Phase::kMakeOuter ? outer_directory_ : inner_directory_).c_str();
            break;
        default:
            operation.step = Step::kUnlink;
            operation.path = request_.temporary.c_str();
    }
    return operation;
}

bool BlockWrite::next_piece(Operation& operation) {
    std::size_t piece;
    if (failed_) return false;
    if (!again_.empty()) {
        piece = again_.back();
        again_.pop_back();
    } else if (next_piece_ < num_checked_) {
        piece = next_piece_++;
    } else if (num_checked_ == pieces_.size() && !first_given_) {
        piece = 0;
        first_given_ = true;
        fill_header();
    } else {
        return false;
    }
    operation = pieces_.operation(Step::kWrite, fd_, piece);
    ++num_flying_;
    return true;
}

void BlockWrite::complete(const Operation& operation, std::int64_t result) {
    --num_flying_;
    if (phase_ == Phase::kTransfer) {
        moved(operation, result);
    } else if (!is_transient(result) || phase_ == Phase::kClose || ++num_retries_ >= kMaxRetries) {
        stepped(result);
    }
    // Else the same step is asked for again; a close never is, as it frees the descriptor.
}

void BlockWrite::stepped(std::int64_t result) {
    switch (phase_) {
        case Phase::kLookUp:
            return looked_up(result);
        case Phase::kOpen:
            return opened(result);
        case Phase::kAllocate:
            // Space set aside makes the pieces' writes independent of each other, and a full file
            // system shows before any byte is moved. What a file system cannot do it need not do.
            if (result == -ENOSPC || result == -EDQUOT || result == -EIO) {
                return fail(Step::kAllocate, result);
            }
            phase_ = Phase::kTransfer;
            return;
        case Phase::kClose:
            return closed(result);
        case Phase::kRename:
            return renamed(result);
        case Phase::kMakeOuter:
        case Phase::kMakeInner:
            return made_directory(result);
        default:
            // Of kUnlink: a temporary file that stays is removed when it is old (storage/tree).
            phase_ = Phase::kFinished;
    }
}

void BlockWrite::looked_up(std::int64_t result) {
    if (result >= 0) {
        outcome_.status = BlockOutcome::Status::kExists;
        phase_ = Phase::kFinished;
    } else if (result == -ENOENT) {
        phase_ = Phase::kOpen;
    } else {
        fail(Step::kLookUp, result);
    }
}

void BlockWrite::opened(std::int64_t result) {
    if (result < 0) return fail(Step::kOpen, result);
    fd_ = static_cast<int>(result);
    // A single piece has no other to be independent of.
    phase_ = pieces_.size() > 1 ? Phase::kAllocate : Phase::kTransfer;
}

void BlockWrite::moved(const Operation& operation, std::int64_t result) {
    switch (pieces_.advance(operation.piece, result)) {
        case PieceTransfer::Progress::kDone:
            ++num_done_;
            break;
        case PieceTransfer::Progress::kAgain:
            again_.push_back(operation.piece);
            break;
        case PieceTransfer::Progress::kEndOfFile:
            fail(Step::kWrite, -EIO);  // the file system takes no more bytes and gives no reason
            return;
        case PieceTransfer::Progress::kFailed:
            fail(Step::kWrite, result);
            return;
    }
    if (failed_) return give_up();
    if (num_done_ == pieces_.size()) phase_ = Phase::kClose;
}

void BlockWrite::closed(std::int64_t result) {
    fd_ = -1;
    // Network file systems report a full disk here.
    if (result < 0)
        fail(Step::kClose, result);
    else if (failed_)
        give_up();
    else
        phase_ = Phase::kRename;
}

void BlockWrite::renamed(std::int64_t result) {
    // Renamed, not linked: whichever of two writers comes last, the block stays whole, and file
    // systems without hard links serve as well.
    if (result >= 0) {
        outcome_.num_bytes = options_.layout->file_bytes();
        phase_ = Phase::kFinished;
    } else if (result == -ENOENT && !made_directories_) {
        made_directories_ = true;
        phase_ = Phase::kMakeInner;
    } else {
        fail(Step::kRename, result);
    }
}

void BlockWrite::made_directory(std::int64_t result) {
    const bool is_there = result >= 0 || result == -EEXIST;
    if (phase_ == Phase::kMakeInner) {
        if (is_there)
            phase_ = Phase::kRename;
        else if (result == -ENOENT)
            phase_ = Phase::kMakeOuter;
        else
            fail(Step::kMakeDirectory, result);
    } else if (is_there) {
        phase_ = Phase::kMakeInner;
    } else {
        fail(Step::kMakeDirectory, result);
    }
}

void BlockWrite::fail(Step step, std::int64_t result) {
    if (!failed_) {  // the first failure is the cause
        failed_ = true;
        outcome_.status = BlockOutcome::Status::kFailed;
        outcome_.step = step;
        outcome_.error = static_cast<int>(-result);
    }
    give_up();
}

// Towards the end without leaving anything behind.
void BlockWrite::give_up() {
    if (num_flying_ > 0) return;
    num_retries_ = 0;
    if (fd_ >= 0)
        phase_ = Phase::kClose;
    else if (phase_ == Phase::kLookUp || phase_ == Phase::kOpen)
        phase_ = Phase::kFinished;
    else
        phase_ = Phase::kUnlink;
}

void BlockWrite::fill_header() {
    const BlockLayout& layout = *options_.layout;
    std::byte* table = header_.data() + layout.crc_table_offset;
    for (const std::uint32_t value : checksums_.values()) {
        store_u32(table, value);
        table += sizeof value;
    }
    store_u32(header_.data() + layout.header_crc_offset,
              crc32c(header_.data(), layout.header_crc_offset, 0));
}

bool BlockWrite::has_work() const {
    return phase_ == Phase::kTransfer && !failed_ && num_checked_ < pieces_.size();
}

void BlockWrite::work() { checksums_.advance(pieces_.payload_end(num_checked_++)); }

std::size_t BlockWrite::num_pieces_left() const { return pieces_.size() - num_done_; }

BlockOutcome BlockWrite::take_outcome() { return std::move(outcome_); }

}  // namespace dualpath
