#include "core/event_queue.hpp"

#include <utility>

namespace dualpath {

void EventQueue::push(TransportEvent event) {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
    if (events_.size() == 1) readable_.signal();
}

std::vector<TransportEvent> EventQueue::drain() {
    const std::lock_guard lock(mutex_);
    // Cleared under the lock: a push that follows signals again.
    if (!events_.empty()) readable_.clear();
    return std::exchange(events_, {});
}

}  // namespace dualpath
