#include "io/blocking_worker.hpp"

#include <poll.h>

#include <utility>

namespace dualpath {

void run_blocking(BlockJob& job, WorkQueue& queue) {
    bool delivered = false;
    while (!job.finished() || !delivered) {
        Operation operation;
        // Checksums first: the bytes just moved are in the cache.
        if (job.has_work()) {
            job.work();
        } else if (job.next(operation)) {
            job.complete(operation, run_blocking(operation));
        }
        if (!delivered && job.settled()) {
            delivered = true;
            queue.deliver(job.take_outcome());
        }
    }
}

void run_blocking_worker(WorkQueue& queue, WorkQueue::Sleeper& sleeper,
                         const TransferOptions& options) {
    for (;;) {
        if (std::optional<BlockRequest> request = queue.take()) {
            run_blocking(*make_job(std::move(*request), options), queue);
            continue;
        }
        const WorkQueue::Sleep sleep = queue.prepare_sleep(sleeper, 0);
        if (sleep == WorkQueue::Sleep::kOver) return;
        if (sleep == WorkQueue::Sleep::kWorkWaits) continue;
        pollfd descriptor{sleeper.fd(), POLLIN, 0};
        // Interrupted or not: the queue is looked at again.
        (void)::poll(&descriptor, 1, -1);
        queue.woke(sleeper);
        sleeper.clear();
    }
}

}  // namespace dualpath
