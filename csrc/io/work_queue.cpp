#include "io/work_queue.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace dualpath {

WorkQueue::WorkQueue(unsigned num_sleepers) {
    for (unsigned idx = 0; idx < num_sleepers; ++idx) {
        sleepers_.push_back(std::make_unique<Sleeper>());
    }
}

bool WorkQueue::submit(BlockRequest request, OutcomeSink sink) {
    const std::lock_guard lock(mutex_);
    if (stopped_) return false;
    open_.emplace(request.id, Entry{std::move(sink), std::nullopt});
    waiting_.push_back(std::move(request));
    wake_one();
    return true;
}

bool WorkQueue::cancel(std::uint64_t id) {
    {
        const std::lock_guard lock(mutex_);
        const auto found =
            std::find_if(waiting_.begin(), waiting_.end(),
                         [id](const BlockRequest& request) { return request.id == id; });
        if (found == waiting_.end()) return false;
        waiting_.erase(found);
    }
    BlockOutcome outcome;
    outcome.id = id;
    outcome.status = BlockOutcome::Status::kCancelled;
    deliver(std::move(outcome));
    return true;
}

std::optional<WorkQueue::Clock::time_point> WorkQueue::started(std::uint64_t id) const {
    const std::lock_guard lock(mutex_);
    const auto found = open_.find(id);
    return found == open_.end() ? std::nullopt : found->second.started;
}

std::optional<BlockRequest> WorkQueue::take() {
    const std::lock_guard lock(mutex_);
    if (waiting_.empty()) return std::nullopt;
    BlockRequest request = std::move(waiting_.front());
    waiting_.pop_front();
    open_.at(request.id).started = Clock::now();
    // A worker that was woken for one request may find several; it may also be held up in a call.
    if (!waiting_.empty()) wake_one();
    return request;
}

WorkQueue::Sleep WorkQueue::prepare_sleep(Sleeper& sleeper, std::size_t load) {
    const std::lock_guard lock(mutex_);
    if (!waiting_.empty()) return Sleep::kWorkWaits;
    if (stopped_) return Sleep::kOver;
    sleeper.asleep_ = true;
    sleeper.load_ = load;
    return Sleep::kSleep;
}

void WorkQueue::woke(Sleeper& sleeper) {
    const std::lock_guard lock(mutex_);
    sleeper.asleep_ = false;
}

void WorkQueue::deliver(BlockOutcome outcome) {
    OutcomeSink sink;
    {
        const std::lock_guard lock(mutex_);
        const auto found = open_.find(outcome.id);
        if (found == open_.end()) throw std::logic_error("an I/O request ended twice");
        sink = std::move(found->second.sink);
        open_.erase(found);
    }
    sink(std::move(outcome));
}

void WorkQueue::stop(bool drop) {
    std::deque<BlockRequest> dropped;
    {
        const std::lock_guard lock(mutex_);
        stopped_ = true;
        if (drop) dropped.swap(waiting_);
        for (const auto& sleeper : sleepers_) {
            sleeper->asleep_ = false;
            sleeper->wake_.signal();
        }
    }
    for (const BlockRequest& request : dropped) {
        BlockOutcome outcome;
        outcome.id = request.id;
        outcome.status = BlockOutcome::Status::kCancelled;
        deliver(std::move(outcome));
    }
}

// Requires the lock. A worker that is awake looks at the queue before it sleeps.
void WorkQueue::wake_one() {
    Sleeper* chosen = nullptr;
    for (const auto& sleeper : sleepers_) {
        if (!sleeper->asleep_) continue;
        if (chosen == nullptr || sleeper->load_ < chosen->load_) chosen = sleeper.get();
    }
    if (chosen == nullptr) return;
    chosen->asleep_ = false;
    chosen->wake_.signal();
}

}  // namespace dualpath
