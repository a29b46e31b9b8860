// Serves a lane with blocking calls, one block at a time.
#pragma once

#include "io/block_job.hpp"
#include "io/work_queue.hpp"

namespace dualpath {

// Runs `job` to its end on this thread, reporting to `queue`.
void run_blocking(BlockJob& job, WorkQueue& queue);

// Serves `queue` until it is stopped and empty. Sleeps on the descriptor of `sleeper` otherwise.
void run_blocking_worker(WorkQueue& queue, WorkQueue::Sleeper& sleeper,
                         const TransferOptions& options);

}  // namespace dualpath
