// Carries out copies of pages in the order they were handed over, on a thread of its own.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "copy/copy_device.hpp"

namespace dualpath {

// Carries out urgent copies in the order of their submission, background ones in theirs when
// nothing urgent waits. A background copy must not touch pages of an urgent one that is submitted
// after it: those may overtake it. Copies submitted before it are always carried out first.
//
// A copy that fails ends them all: the device may be gone. Those behind it are not carried out.
//
// Any thread may call. The thread sleeps while there is nothing to do.
class CopyQueue {
  public:
    // Names one submitted copy; tickets of one lane grow, starting above 0.
    using Ticket = std::uint64_t;

    explicit CopyQueue(std::unique_ptr<CopyDevice> device);
    // Carries out what was submitted, then ends the thread.
    ~CopyQueue();
    CopyQueue(const CopyQueue&) = delete;
    CopyQueue& operator=(const CopyQueue&) = delete;

    // Costs the same for any number of rows and bytes. Throws std::invalid_argument for layers that
    // the map does not have, std::runtime_error after close(). With `reported`, which is for one
    // lane only, its end is counted by wait_reports().
    Ticket submit(CopyOrder order, CopyLane lane, bool reported = false);
    // A copy of nothing, whose end is reported in its turn: that of all urgent ones before it. Of
    // its fences only after() is called.
    Ticket submit_barrier(std::shared_ptr<CopyFences> fences = nullptr);
    // Each layer of the order as a copy of its own, in turn: the first one's ticket; the others'
    // follow, kTicketStep apart.
    Ticket submit_layers(const CopyOrder& order, CopyLane lane);
    static constexpr Ticket kTicketStep = 2;

    // Whether the copy is carried out, or never will be and touches nothing any more; 0 always is.
    // Throws std::runtime_error for one that is done once any copy has failed, with the reason.
    bool done(Ticket ticket) const;
    // The last ticket that is done in the lane of `ticket`, for who asks about many in turn.
    Ticket done_until(Ticket ticket) const;
    // Waits until a copy is done; false after `timeout`.
    bool wait(Ticket ticket, std::chrono::nanoseconds timeout) const;

    // How many reported copies have ended since the start, well or not, in the order of their
    // submission. Waits until there are more than `seen`; after close() and the last one, or after
    // `timeout`, there may be none.
    std::uint64_t wait_reports(std::uint64_t seen, std::chrono::nanoseconds timeout) const;
    // Why copies failed; empty while none has.
    std::string error() const;

    // Refuses new copies, carries out the others, ends the thread. False if it still copies after
    // `timeout`; may be called again.
    bool close(std::chrono::nanoseconds timeout);

  private:
    struct Job {
        CopyOrder order;
        std::size_t layer;
        std::size_t row;
        bool reported;
    };
    struct Lane {
        std::deque<Job> jobs;
        std::uint64_t num_submitted = 0;
        std::uint64_t num_done = 0;
    };

    // One thread that waits until `count` has reached `least`, woken once: a step has many copies,
    // and most are waited for as one.
    struct Waiter {
        const std::uint64_t& count;
        std::uint64_t least;
        std::condition_variable wake;
    };

    void check(const CopyOrder& order) const;
    Ticket push(CopyOrder order, CopyLane lane, bool reported);
    bool wait_for(std::unique_lock<std::mutex>& lock, Waiter& waiter,
                  std::chrono::nanoseconds timeout) const;
    void run();
    void fail(std::string error, std::unique_lock<std::mutex>& lock);
    Lane* next_lane();
    void wake_waiters();
    // One slice of a job; true when it was the last.
    bool advance(Job& job, CopyLane lane);
    bool settled(Ticket ticket) const;

    const std::unique_ptr<CopyDevice> device_;
    mutable std::mutex mutex_;
    std::condition_variable work_;
    std::condition_variable end_;
    mutable std::vector<Waiter*> waiters_;
    std::array<Lane, kTicketStep> lanes_;  // by CopyLane
    std::uint64_t num_reports_ = 0;
    std::string error_;  // of the first copy that failed
    bool closing_ = false;
    bool ended_ = false;
    std::thread thread_;
};

}  // namespace dualpath
