// The requests of one lane that no worker has taken, and the workers that sleep.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <vector>

#include "core/event_fd.hpp"
#include "io/block_job.hpp"

namespace dualpath {

using OutcomeSink = std::function<void(BlockOutcome)>;

// Safe from any thread. A request is either taken or cancelled, never both, and its sink is called
// exactly once, on the thread that ends it.
class WorkQueue {
  public:
    using Clock = std::chrono::steady_clock;

    // What a worker waits on when there is nothing to do. Lives as long as the queue.
    class Sleeper {
      public:
        int fd() const { return wake_.fd(); }
        // To be called when fd() is readable.
        void clear() { wake_.clear(); }

      private:
        friend class WorkQueue;
        EventFd wake_;
        bool asleep_ = false;
        std::size_t load_ = 0;
    };

    explicit WorkQueue(unsigned num_sleepers);

    Sleeper& sleeper(unsigned idx) { return *sleepers_[idx]; }

    // False once stopped: the request was not taken over and its sink will not be called.
    bool submit(BlockRequest request, OutcomeSink sink);
    // Ends a request that waits; false if it runs or is unknown.
    bool cancel(std::uint64_t id);
    // When a request was taken; nullopt if it waits or is unknown.
    std::optional<Clock::time_point> started(std::uint64_t id) const;

    // The oldest request that waits. Wakes another worker if more do.
    std::optional<BlockRequest> take();
    enum class Sleep {
        kSleep,      // nothing waits: fd() becomes readable when something does
        kWorkWaits,  // look again
        kOver,       // stopped, and nothing waits: nothing will
    };
    // Call before sleeping; `load`: blocks this worker serves, so that the least busy is woken.
    Sleep prepare_sleep(Sleeper& sleeper, std::size_t load);
    // Call after kSleep: a worker that may be held up in a call is not to be chosen.
    void woke(Sleeper& sleeper);
    // The request's end.
    void deliver(BlockOutcome outcome);

    // Workers end when nothing waits any more; with `drop`, what waits is cancelled.
    void stop(bool drop);

  private:
    struct Entry {
        OutcomeSink sink;
        std::optional<Clock::time_point> started;
    };

    void wake_one();

    mutable std::mutex mutex_;
    std::vector<std::unique_ptr<Sleeper>> sleepers_;
    std::deque<BlockRequest> waiting_;
    std::unordered_map<std::uint64_t, Entry> open_;
    bool stopped_ = false;
};

}  // namespace dualpath
