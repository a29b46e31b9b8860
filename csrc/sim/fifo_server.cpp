#include "sim/fifo_server.hpp"

#include <algorithm>

namespace dualpath::sim {

std::optional<double> FifoServer::push(double now_s, const Transfer& transfer) {
    queue_.push_back(transfer);
    if (queue_.size() > 1) return std::nullopt;
    begin(now_s);
    return end_s();
}

FifoServer::Transfer FifoServer::pop(double now_s) {
    const Transfer done = queue_.front();
    queue_.pop_front();
    begin(now_s);
    return done;
}

std::optional<double> FifoServer::end_s() const {
    if (queue_.empty()) return std::nullopt;
    return begun_s_ + left_bytes_ / bytes_per_s_;
}

FifoServer::Served FifoServer::take_served(double now_s) {
    if (queue_.empty()) return {now_s, now_s, 0};
    const double bytes = std::clamp((now_s - begun_s_) * bytes_per_s_, 0.0, left_bytes_);
    const Served served{begun_s_, now_s, bytes};
    begun_s_ = now_s;
    left_bytes_ -= bytes;
    return served;
}

void FifoServer::set_rate(double now_s, double bytes_per_s) {
    take_served(now_s);
    bytes_per_s_ = bytes_per_s;
    ++version_;
}

void FifoServer::clear(double now_s) {
    queue_.clear();
    begin(now_s);
}

void FifoServer::begin(double now_s) {
    begun_s_ = now_s;
    left_bytes_ = queue_.empty() ? 0 : queue_.front().bytes;
    ++version_;
}

}  // namespace dualpath::sim
