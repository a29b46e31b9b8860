// What a lane runs: a request for one block, the state machine that serves it, and its outcome.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "io/block_layout.hpp"
#include "io/operation.hpp"

namespace dualpath {

// `payload` is layout.payload_bytes long, aligned to kDirectAlignment, and belongs to this request
// until its outcome is delivered.
struct BlockRequest {
    enum class Kind : std::uint8_t { kRead, kWrite };
    Kind kind = Kind::kRead;
    std::uint64_t id = 0;
    std::string path{};
    std::byte* payload = nullptr;
    bool verify = true;       // reads: compute the layers' checksums
    std::string temporary{};  // writes: written here, then renamed
    std::string header{};     // writes: the template that gets the checksums
};

// How an I/O call is made; the same for every block of an engine.
struct TransferOptions {
    std::shared_ptr<const BlockLayout> layout{};
    std::uint64_t piece_bytes = 0;
    bool direct = true;
};

struct BlockOutcome {
    // The numbers cross to Python.
    enum class Status : std::uint8_t {
        kDone = 0,
        kExists = 1,     // writes: the block was there, nothing was written
        kWrongSize = 2,  // reads: the file has or gives `found_bytes`, or is no regular file
        kFailed = 3,     // `error` in `step`
        kCancelled = 4,  // never started
    };
    std::uint64_t id = 0;
    Status status = Status::kDone;
    Step step = Step::kOpen;
    int error = 0;                      // errno
    std::uint64_t num_bytes = 0;        // moved, header included
    std::uint64_t found_bytes = 0;      // size of the file
    std::int64_t modified_s = 0;        // reads: mtime of the file
    std::string header{};               // reads that are done: as it lies in the file
    std::vector<std::uint32_t> crcs{};  // reads that are done and verify: one a layer
};

// A step that ends so is asked for again, at most so often.
inline constexpr unsigned kMaxRetries = 16;
inline bool is_transient(std::int64_t result) { return result == -EINTR || result == -EAGAIN; }

// The state machine of one block. It makes no calls itself: an executor asks for operations,
// performs them in whatever order and number it likes, and reports each result. One thread.
//
//     while (!finished) { next() -> perform -> complete(); work() when has_work() }
class BlockJob {
  public:
    virtual ~BlockJob() = default;

    // Gives an operation that may start now; false if none may before another has ended.
    virtual bool next(Operation& operation) = 0;
    // `result` as of run_blocking(). Every operation given by next() must be completed.
    virtual void complete(const Operation& operation, std::int64_t result) = 0;
    // Checksums that can be computed now, a piece at a time: in between, calls can be started.
    virtual bool has_work() const = 0;
    virtual void work() = 0;
    // The outcome stands and the payload is touched no more; a read may still have to be closed.
    virtual bool settled() const = 0;
    // Nothing is under way and nothing is left to do.
    virtual bool finished() const = 0;
    // Transfers that have not ended: what a queue's depth is shared by.
    virtual std::size_t num_pieces_left() const = 0;
    // Once, when settled.
    virtual BlockOutcome take_outcome() = 0;
};

// `options` is copied. Throws std::bad_alloc.
std::unique_ptr<BlockJob> make_job(BlockRequest request, const TransferOptions& options);

}  // namespace dualpath
