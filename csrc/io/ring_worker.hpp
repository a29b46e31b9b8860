// Serves a lane through an io_uring: many pieces of several blocks in flight.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "io/block_job.hpp"
#include "io/io_ring.hpp"
#include "io/work_queue.hpp"

namespace dualpath {

struct RingOptions {
    unsigned depth = 16;         // operations in flight
    bool punt_metadata = false;  // the file system is remote: its opens and stats may wait
};

// Made and run on one thread, as the ring demands.
class RingWorker {
  public:
    // Throws std::system_error where io_uring is refused.
    RingWorker(WorkQueue& queue, WorkQueue::Sleeper& sleeper, TransferOptions transfer,
               RingOptions options);

    // Serves the queue until it is stopped and every block has ended. With nothing to do it sleeps
    // in the kernel.
    void run();

  private:
    struct Running {
        std::unique_ptr<BlockJob> job;
        bool delivered = false;
    };
    struct Flight {
        BlockJob* job = nullptr;
        Operation operation;
    };

    bool has_room() const;
    void take_jobs();
    void issue();
    void start(BlockJob& job, const Operation& operation);
    BlockJob* job_with_work() const;
    bool wait();
    void reap();
    void settle();
    void arm_wake();

    WorkQueue& queue_;
    WorkQueue::Sleeper& sleeper_;
    TransferOptions transfer_;
    RingOptions options_;
    IoRing ring_;
    std::vector<Running> running_;   // oldest first: a block in hand is finished first
    std::vector<Flight> flights_;    // fixed size: the kernel reads the operations
    std::vector<std::size_t> free_;  // indexes of flights_
};

}  // namespace dualpath
