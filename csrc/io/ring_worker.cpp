#include "io/ring_worker.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

namespace dualpath {
namespace {

constexpr std::uint64_t kWakeTag = ~std::uint64_t{0};

bool is_stat(Step step) { return step == Step::kLookUp || step == Step::kStat; }

bool may_wait(Step step) { return is_stat(step) || step == Step::kOpen || step == Step::kClose; }

}  // namespace

RingWorker::RingWorker(WorkQueue& queue, WorkQueue::Sleeper& sleeper, TransferOptions transfer,
                       RingOptions options)
    : queue_(queue),
      sleeper_(sleeper),
      transfer_(std::move(transfer)),
      options_(options),
      ring_(options.depth + 1),
      flights_(options.depth),
      free_(options.depth) {
    std::iota(free_.rbegin(), free_.rend(), 0);
}

void RingWorker::run() {
    arm_wake();
    for (;;) {
        take_jobs();
        issue();
        settle();
        if (BlockJob* job = job_with_work()) {
            // Hands over first: the device works while this thread computes.
            ring_.submit(0);
            job->work();
        } else if (!wait()) {
            return;
        }
        reap();
    }
}

// A little more than fills the queue, so that the next block is open when a piece ends; not more,
// as what is taken cannot be cancelled.
bool RingWorker::has_room() const {
    std::size_t num_pieces = 0;
    for (const Running& running : running_) num_pieces += running.job->num_pieces_left();
    return num_pieces < options_.depth + options_.depth / 2 &&
           running_.size() < 2 * std::size_t{options_.depth};
}

void RingWorker::take_jobs() {
    while (has_room()) {
        std::optional<BlockRequest> request = queue_.take();
        if (!request) return;
        running_.push_back({make_job(std::move(*request), transfer_)});
    }
}

void RingWorker::issue() {
    for (const Running& running : running_) {
        Operation operation;
        while (!free_.empty() && running.job->next(operation)) start(*running.job, operation);
    }
}

void RingWorker::start(BlockJob& job, const Operation& operation) {
    if (is_stat(operation.step) && !options_.punt_metadata) {
        // The kernel would give it to a thread of its own; a local file system answers at once.
        job.complete(operation, run_blocking(operation));
        return;
    }
    const std::size_t idx = free_.back();
    free_.pop_back();
    flights_[idx] = {&job, operation};
    ring_.prepare(flights_[idx].operation, idx, options_.punt_metadata && may_wait(operation.step));
}

BlockJob* RingWorker::job_with_work() const {
    for (const Running& running : running_) {
        if (running.job->has_work()) return running.job.get();
    }
    return nullptr;
}

// Until something ends or a request comes; false if neither can happen any more.
bool RingWorker::wait() {
    // A full worker is not to be woken for new requests: it looks when something has ended.
    if (!has_room()) {
        ring_.submit(1);
        return true;
    }
    switch (queue_.prepare_sleep(sleeper_, running_.size())) {
        case WorkQueue::Sleep::kWorkWaits:
            return true;
        case WorkQueue::Sleep::kOver:
            if (running_.empty()) return false;
            ring_.submit(1);
            return true;
        case WorkQueue::Sleep::kSleep:
            ring_.submit(1);
            queue_.woke(sleeper_);
    }
    return true;
}

void RingWorker::reap() {
    IoRing::Completion completion;
    while (ring_.next_completion(completion)) {
        if (completion.tag == kWakeTag) {
            sleeper_.clear();
            arm_wake();
            continue;
        }
        const auto idx = static_cast<std::size_t>(completion.tag);
        flights_[idx].job->complete(flights_[idx].operation, completion.result);
        free_.push_back(idx);
    }
}

void RingWorker::settle() {
    for (Running& running : running_) {
        if (!running.delivered && running.job->settled()) {
            running.delivered = true;
            queue_.deliver(running.job->take_outcome());
        }
    }
    std::erase_if(running_, [](const Running& running) { return running.job->finished(); });
}

void RingWorker::arm_wake() { ring_.prepare_poll(sleeper_.fd(), kWakeTag); }

}  // namespace dualpath
