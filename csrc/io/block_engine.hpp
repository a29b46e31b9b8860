// Reads and writes of Full Blocks, each direction on a lane of its own.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "core/signalled_queue.hpp"
#include "io/block_job.hpp"
#include "io/io_lane.hpp"

namespace dualpath {

struct EngineIoOptions {
    Backend backend = Backend::kIoUring;
    bool direct = true;
    unsigned num_threads = 1;  // a direction
    unsigned depth = 64;       // operations in flight a direction; divided among the threads
    std::uint64_t piece_bytes = 1 << 20;
    std::string directory{};  // on the file system that is served
};

// Any thread may call any method, except that close() and the destructor come last. Outcomes of
// submit() come from poll(), in the order they ended; fd() is readable while some wait.
//
// A payload belongs to its request from submit() until its outcome was polled. After close() has
// answered false the payloads of requests without an outcome must be kept for the life of the
// process: the kernel may still write to them.
class BlockEngine {
  public:
    // Throws std::invalid_argument for a bad layout or option, std::system_error where io_uring is
    // refused or no thread can be had.
    BlockEngine(BlockLayout layout, const EngineIoOptions& options);
    // Waits for nothing: threads that were not joined by close() are left to end by themselves.
    ~BlockEngine();
    BlockEngine(const BlockEngine&) = delete;
    BlockEngine& operator=(const BlockEngine&) = delete;

    const BlockLayout& layout() const { return *layout_; }
    int fd() const { return outcomes_->fd(); }

    // Queues a request and returns its id. Throws std::invalid_argument for memory that direct
    // I/O cannot take, std::logic_error after close().
    std::uint64_t submit(BlockRequest request);
    // Runs a request and waits for its end, as long as the file system takes.
    BlockOutcome run(BlockRequest request);
    // Ends a request that waits for its turn; its outcome says so. False: it runs, or is over.
    bool cancel(std::uint64_t id);
    // When the request was taken from its queue, in seconds of CLOCK_MONOTONIC.
    std::optional<double> started_s(std::uint64_t id) const;
    std::vector<BlockOutcome> poll();
    // Cancels the reads that wait, finishes the writes, ends the threads. False at the deadline.
    bool close(std::chrono::duration<double> timeout);

  private:
    using Outcomes = SignalledQueue<BlockOutcome>;

    std::uint64_t enqueue(BlockRequest request, OutcomeSink sink);
    void check(const BlockRequest& request) const;
    IoLane& lane(BlockRequest::Kind kind) const;

    std::shared_ptr<const BlockLayout> layout_;
    std::shared_ptr<Outcomes> outcomes_ = std::make_shared<Outcomes>();
    std::unique_ptr<IoLane> reads_;
    std::unique_ptr<IoLane> writes_;
    std::atomic<std::uint64_t> next_id_{1};
    pid_t owner_;  // after a fork the child has no threads to wait for
};

}  // namespace dualpath
