// Copies between a GPU's paged caches and registered host memory, on streams of our own.
#pragma once

#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <string>

#include "copy/copy_queue.hpp"
#include "copy/cuda_driver.hpp"

namespace dualpath {

// One driver call for all pieces of a slice, or one for each.
enum class CudaMethod { kBatch, kSingle };

// A GPU's context and our two streams in it, by lane. Shared by all that must go before it.
class CudaLanes {
  public:
    CudaLanes(std::shared_ptr<const CudaDriver> driver, int device);
    ~CudaLanes();
    CudaLanes(const CudaLanes&) = delete;
    CudaLanes& operator=(const CudaLanes&) = delete;

    // Makes the context the calling thread's: every thread does this before it uses the driver.
    const CudaDriver& enter() const;
    CudaStream stream(CopyLane lane) const { return streams_[static_cast<std::size_t>(lane)]; }

  private:
    std::shared_ptr<const CudaDriver> driver_;
    int device_;
    CudaContext context_;
    std::array<CudaStream, 2> streams_{};
};

// An event of the driver. Destroyed on any thread, also while it is pending.
class CudaEventHandle {
  public:
    explicit CudaEventHandle(std::shared_ptr<const CudaLanes> lanes);
    ~CudaEventHandle();
    CudaEventHandle(const CudaEventHandle&) = delete;
    CudaEventHandle& operator=(const CudaEventHandle&) = delete;
    CudaEvent get() const { return event_; }

  private:
    std::shared_ptr<const CudaLanes> lanes_;
    CudaEvent event_;
};

// A point in the order of copies and kernels: `event`, once the queue has handed over `ticket`.
struct CudaMark {
    CopyQueue::Ticket ticket;
    std::shared_ptr<const CudaEventHandle> event;
};

// Handing over a copy to the driver takes time for each piece, so a thread of ours does it; what
// submits pays the same for any number of pages. Any thread may call.
class CudaCopies {
  public:
    // Throws CudaError if the driver has no such copies.
    CudaCopies(std::shared_ptr<const CudaDriver> driver, int device, CudaMethod method);

    // Copies behind everything launched on `after` so far.
    CudaMark submit(std::shared_ptr<const PageRows> rows, CopyDirection direction,
                    std::size_t first_layer, std::size_t end_layer, CopyLane lane,
                    const CudaMark& after, bool reported = false);
    // As the queue's; an end is one on the GPU. One thread waits for reports.
    void submit_barrier();
    std::uint64_t wait_reports(std::uint64_t seen, std::chrono::nanoseconds timeout);
    // Why copies failed, on their way to the GPU or there; empty while none has.
    std::string error() const;
    // A mark behind everything launched on `stream` so far.
    CudaMark now(CudaStream stream) const;
    // What is launched on `stream` from now on comes behind `mark`. Blocks until the copy has been
    // handed to the driver; false if it has not after `timeout`.
    bool hold(CudaStream stream, const CudaMark& mark, std::chrono::nanoseconds timeout) const;
    // Blocks until `mark` is reached; the timeout is for the handing over.
    bool wait(const CudaMark& mark, std::chrono::nanoseconds timeout) const;
    bool close(std::chrono::nanoseconds timeout);

  private:
    std::shared_ptr<const CudaLanes> lanes_;
    std::shared_ptr<std::shared_ptr<const CudaEventHandle>> last_urgent_;  // the queue's thread's
    mutable std::mutex mutex_;
    std::deque<std::shared_ptr<const CudaEventHandle>> unreported_;
    std::string error_;  // of the first end that could not be waited for
    CopyQueue queue_;
};

}  // namespace dualpath
