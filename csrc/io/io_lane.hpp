// One direction of an engine: a queue and the threads that serve it.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "io/block_job.hpp"
#include "io/ring_worker.hpp"
#include "io/work_queue.hpp"

namespace dualpath {

enum class Backend { kIoUring, kThreads };

struct LaneOptions {
    std::string name{};  // of its threads, at most 11 characters
    Backend backend = Backend::kIoUring;
    unsigned num_threads = 1;
    TransferOptions transfer{};
    RingOptions ring{};  // of each thread
};

// Owned by one thread; queue() may be used by any.
class IoLane {
  public:
    // Throws std::system_error where io_uring is refused or no thread can be had.
    explicit IoLane(LaneOptions options);
    ~IoLane();
    IoLane(const IoLane&) = delete;
    IoLane& operator=(const IoLane&) = delete;

    WorkQueue& queue() { return shared_->queue; }
    // Waits for the threads after WorkQueue::stop(). False at the deadline: a call hangs in the
    // kernel. Its thread, and what it uses, then stay for the life of the process, as memory that
    // the kernel may still write to is never freed; the caller keeps the payloads likewise.
    bool join(WorkQueue::Clock::time_point deadline);

  private:
    // Held by every thread, so that one that outlives the lane finds it there.
    struct Shared {
        explicit Shared(LaneOptions lane_options)
            : options(std::move(lane_options)), queue(options.num_threads) {}

        LaneOptions options;
        WorkQueue queue;
        std::mutex mutex{};
        std::condition_variable changed{};
        unsigned num_running = 0;
        std::exception_ptr start_error{};
        unsigned num_starting = 0;
    };

    static void serve(const std::shared_ptr<Shared>& shared, unsigned idx);
    static void serve_ring(Shared& shared, unsigned idx);
    static void report_start(Shared& shared, std::exception_ptr error);
    void start_thread(unsigned idx);
    void await_start();

    std::shared_ptr<Shared> shared_;
    std::vector<std::thread> threads_;
};

}  // namespace dualpath
