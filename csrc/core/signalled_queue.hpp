// Events on their way from C++ threads to Python.
#pragma once

#include <mutex>
#include <utility>
#include <vector>

#include "core/event_fd.hpp"

namespace dualpath {

// push() from any thread, drain() from the owner thread.
// Invariant: fd() is readable exactly while events wait.
template <typename Event>
class SignalledQueue {
  public:
    void push(Event event) {
        const std::lock_guard lock(mutex_);
        events_.push_back(std::move(event));
        if (events_.size() == 1) readable_.signal();
    }

    std::vector<Event> drain() {
        const std::lock_guard lock(mutex_);
        // Cleared under the lock: a push that follows signals again.
        if (!events_.empty()) readable_.clear();
        return std::exchange(events_, {});
    }

    int fd() const { return readable_.fd(); }

  private:
    std::mutex mutex_;
    std::vector<Event> events_;
    EventFd readable_;
};

}  // namespace dualpath
