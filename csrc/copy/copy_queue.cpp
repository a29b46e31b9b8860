#include "copy/copy_queue.hpp"

#include <pthread.h>

#include <algorithm>
#include <exception>
#include <stdexcept>
#include <utility>

#include "core/affinity.hpp"

namespace dualpath {
namespace {

template <class Action>
std::string error_of(const Action& action) {
    try {
        action();
        return {};
    } catch (const std::exception& failure) {
        return failure.what();
    }
}

}  // namespace

CopyQueue::CopyQueue(std::unique_ptr<CopyDevice> device) : device_(std::move(device)) {
    thread_ = std::thread([this] { run(); });
    pthread_setname_np(thread_.native_handle(), "dualpath-copy");
}

CopyQueue::~CopyQueue() {
    {
        const std::lock_guard lock(mutex_);
        closing_ = true;
    }
    work_.notify_all();
    if (thread_.joinable()) thread_.join();
}

CopyQueue::Ticket CopyQueue::submit(CopyOrder order, CopyLane lane, bool reported) {
    check(order);
    Ticket ticket;
    {
        const std::lock_guard lock(mutex_);
        ticket = push(std::move(order), lane, reported);
    }
    work_.notify_one();
    return ticket;
}

CopyQueue::Ticket CopyQueue::submit_barrier(std::shared_ptr<CopyFences> fences) {
    CopyOrder nothing{nullptr, CopyDirection::kSave, 0, 0, std::move(fences)};
    Ticket ticket;
    {
        const std::lock_guard lock(mutex_);
        ticket = push(std::move(nothing), CopyLane::kUrgent, true);
    }
    work_.notify_one();
    return ticket;
}

CopyQueue::Ticket CopyQueue::submit_layers(const CopyOrder& order, CopyLane lane) {
    check(order);
    Ticket first = 0;
    {
        const std::lock_guard lock(mutex_);
        for (std::size_t layer = order.first_layer; layer < order.end_layer; ++layer) {
            const Ticket ticket =
                push({order.rows, order.direction, layer, layer + 1, order.fences}, lane, false);
            if (first == 0) first = ticket;
        }
    }
    work_.notify_one();
    return first;
}

void CopyQueue::check(const CopyOrder& order) const {
    if (order.rows == nullptr) throw std::invalid_argument("a copy needs rows");
    const std::size_t num_layers = order.rows->map().layers().size();
    if (order.first_layer >= order.end_layer || order.end_layer > num_layers) {
        throw std::invalid_argument("layers " + std::to_string(order.first_layer) + " to " +
                                    std::to_string(order.end_layer) + " of " +
                                    std::to_string(num_layers));
    }
}

CopyQueue::Ticket CopyQueue::push(CopyOrder order, CopyLane lane, bool reported) {
    if (closing_) throw std::runtime_error("the copy queue is closed");
    const auto index = static_cast<std::size_t>(lane);
    const std::size_t first_layer = order.first_layer;
    lanes_[index].jobs.push_back({std::move(order), first_layer, 0, reported});
    return ++lanes_[index].num_submitted * lanes_.size() + index;
}

bool CopyQueue::done(Ticket ticket) const {
    const std::lock_guard lock(mutex_);
    if (!settled(ticket)) return false;
    if (!error_.empty()) throw std::runtime_error(error_);
    return true;
}

CopyQueue::Ticket CopyQueue::done_until(Ticket ticket) const {
    const std::lock_guard lock(mutex_);
    if (!error_.empty()) throw std::runtime_error(error_);
    const std::size_t index = ticket % lanes_.size();
    return lanes_[index].num_done * lanes_.size() + index;
}

bool CopyQueue::wait(Ticket ticket, std::chrono::nanoseconds timeout) const {
    std::unique_lock lock(mutex_);
    Waiter waiter{lanes_[ticket % lanes_.size()].num_done, ticket / lanes_.size(), {}};
    const bool in_time = wait_for(lock, waiter, timeout);
    if (in_time && !error_.empty()) throw std::runtime_error(error_);
    return in_time;
}

std::uint64_t CopyQueue::wait_reports(std::uint64_t seen, std::chrono::nanoseconds timeout) const {
    std::unique_lock lock(mutex_);
    Waiter waiter{num_reports_, seen + 1, {}};
    wait_for(lock, waiter, timeout);
    return num_reports_;
}

bool CopyQueue::wait_for(std::unique_lock<std::mutex>& lock, Waiter& waiter,
                         std::chrono::nanoseconds timeout) const {
    const auto reached = [&] { return waiter.count >= waiter.least; };
    if (reached()) return true;
    waiters_.push_back(&waiter);
    waiter.wake.wait_for(lock, timeout, [&] { return reached() || ended_; });
    std::erase(waiters_, &waiter);
    return reached();
}

std::string CopyQueue::error() const {
    const std::lock_guard lock(mutex_);
    return error_;
}

bool CopyQueue::close(std::chrono::nanoseconds timeout) {
    std::unique_lock lock(mutex_);
    closing_ = true;
    work_.notify_all();
    if (!end_.wait_for(lock, timeout, [&] { return ended_; })) return false;
    std::thread ending = std::move(thread_);
    lock.unlock();
    if (ending.joinable()) ending.join();
    return true;
}

void CopyQueue::run() {
    leave_compute_cores();
    std::string error = error_of([&] { device_->enter_thread(); });
    std::unique_lock lock(mutex_);
    error_ = std::move(error);
    while (true) {
        Lane* lane = nullptr;
        work_.wait(lock, [&] { return (lane = next_lane()) != nullptr || closing_; });
        if (lane == nullptr) break;
        Job& job = lane->jobs.front();  // stays where it is while others are queued behind it
        bool last = true;
        if (error_.empty()) {
            lock.unlock();
            error =
                error_of([&] { last = advance(job, static_cast<CopyLane>(lane - lanes_.data())); });
            lock.lock();
            if (!error.empty()) fail(std::move(error), lock);
        }
        if (last) {
            num_reports_ += job.reported;
            ++lane->num_done;
            lane->jobs.pop_front();
            wake_waiters();
        }
    }
    ended_ = true;
    wake_waiters();
    end_.notify_all();
}

// Earlier copies may be under way in the device: whoever learns of the failure frees their memory.
void CopyQueue::fail(std::string error, std::unique_lock<std::mutex>& lock) {
    lock.unlock();
    device_->settle();
    lock.lock();
    error_ = std::move(error);
}

void CopyQueue::wake_waiters() {
    for (Waiter* waiter : waiters_) {
        if (waiter->count >= waiter->least || ended_) waiter->wake.notify_one();
    }
}

CopyQueue::Lane* CopyQueue::next_lane() {
    for (Lane& lane : lanes_) {
        if (!lane.jobs.empty()) return &lane;
    }
    return nullptr;
}

bool CopyQueue::advance(Job& job, CopyLane lane) {
    const CopyOrder& order = job.order;
    if (order.rows == nullptr) {  // a barrier
        if (order.fences) order.fences->after();
        return true;
    }
    if (job.layer == order.first_layer && job.row == 0 && order.fences) order.fences->before();
    const std::size_t num_rows = order.rows->rows().size();
    const std::size_t page_bytes = order.rows->map().layers()[job.layer].page_bytes();
    const std::size_t most = std::max<std::size_t>(1, device_->slice_bytes() / page_bytes);
    const std::size_t end = std::min(num_rows, job.row + most);
    device_->copy(order, lane, job.layer, job.row, end);
    job.row = end;
    if (end == num_rows) {
        job.row = 0;
        ++job.layer;
    }
    const bool last = job.layer == order.end_layer;
    if (last && order.fences) order.fences->after();
    return last;
}

bool CopyQueue::settled(Ticket ticket) const {
    const Lane& lane = lanes_[ticket % lanes_.size()];
    return lane.num_done >= ticket / lanes_.size();
}

}  // namespace dualpath
