#include "io/io_lane.hpp"

#include <pthread.h>

#include <csignal>
#include <utility>

#include "io/blocking_worker.hpp"

namespace dualpath {
namespace {

// Signals are for the thread that runs Python's handlers; threads inherit the mask of their maker.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        ::sigfillset(&all);
        ::pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    SignalsBlocked(const SignalsBlocked&) = delete;
    SignalsBlocked& operator=(const SignalsBlocked&) = delete;

  private:
    sigset_t before_;
};

}  // namespace

IoLane::IoLane(LaneOptions options) : shared_(std::make_shared<Shared>(std::move(options))) {
    const SignalsBlocked blocked;
    try {
        for (unsigned idx = 0; idx < shared_->options.num_threads; ++idx) start_thread(idx);
        await_start();
    } catch (...) {
        shared_->queue.stop(true);
        for (std::thread& thread : threads_) thread.join();
        throw;
    }
}

IoLane::~IoLane() {
    // Joined already in the good case.
    for (std::thread& thread : threads_) thread.detach();
}

void IoLane::start_thread(unsigned idx) {
    {
        const std::lock_guard lock(shared_->mutex);
        ++shared_->num_running;
        ++shared_->num_starting;
    }
    try {
        threads_.emplace_back(serve, shared_, idx);
    } catch (...) {
        const std::lock_guard lock(shared_->mutex);
        --shared_->num_running;
        --shared_->num_starting;
        throw;
    }
}

// A ring is made by the thread that uses it; whether that worked is known only then.
void IoLane::await_start() {
    std::unique_lock lock(shared_->mutex);
    shared_->changed.wait(lock, [&] { return shared_->num_starting == 0; });
    if (shared_->start_error) std::rethrow_exception(shared_->start_error);
}

void IoLane::report_start(Shared& shared, std::exception_ptr error) {
    const std::lock_guard lock(shared.mutex);
    if (error) shared.start_error = std::move(error);
    --shared.num_starting;
    shared.changed.notify_all();
}

void IoLane::serve(const std::shared_ptr<Shared>& shared, unsigned idx) {
    const std::string name = shared->options.name + "-" + std::to_string(idx);
    ::pthread_setname_np(::pthread_self(), name.substr(0, 15).c_str());
    if (shared->options.backend == Backend::kIoUring) {
        serve_ring(*shared, idx);
    } else {
        report_start(*shared, nullptr);
        run_blocking_worker(shared->queue, shared->queue.sleeper(idx), shared->options.transfer);
    }
    const std::lock_guard lock(shared->mutex);
    --shared->num_running;
    shared->changed.notify_all();
}

void IoLane::serve_ring(Shared& shared, unsigned idx) {
    std::unique_ptr<RingWorker> worker;
    try {
        worker = std::make_unique<RingWorker>(shared.queue, shared.queue.sleeper(idx),
                                              shared.options.transfer, shared.options.ring);
    } catch (...) {
        return report_start(shared, std::current_exception());
    }
    report_start(shared, nullptr);
    worker->run();
}

bool IoLane::join(WorkQueue::Clock::time_point deadline) {
    {
        std::unique_lock lock(shared_->mutex);
        const auto ended = [&] { return shared_->num_running == 0; };
        if (!shared_->changed.wait_until(lock, deadline, ended)) return false;
    }
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    return true;
}

}  // namespace dualpath
