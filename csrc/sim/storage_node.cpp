#include "sim/storage_node.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>

namespace dualpath::sim {

FifoServer::Transfer StorageNode::end_read(double now_s) {
    settle(now_s);
    return reads_.pop(now_s);
}

void StorageNode::slow_down(double now_s, double factor) {
    settle(now_s);
    reads_.set_rate(now_s, nominal_ * factor);
}

void StorageNode::die(double now_s) {
    settle(now_s);
    reads_.clear(now_s);
    alive_ = false;
}

double StorageNode::measured_rate(double now_s, double elapsed_s, double bytes_per_token) {
    settle(now_s);
    const double tokens = (read_bytes_ - reported_bytes_) / bytes_per_token;
    rate_.add(static_cast<std::int64_t>(tokens), busy_s_ - reported_busy_s_, elapsed_s,
              nominal_ / bytes_per_token);
    reported_bytes_ = read_bytes_;
    reported_busy_s_ = busy_s_;
    return rate_.rate();
}

void StorageNode::note_staging() { peak_staging_ = std::max(peak_staging_, staging_.used()); }

// Spreads what was served evenly over the windows that it took.
void StorageNode::settle(double now_s) {
    const FifoServer::Served served = reads_.take_served(now_s);
    const double duration = served.until_s - served.from_s;
    if (served.bytes <= 0 || duration <= 0) return;
    read_bytes_ += served.bytes;
    busy_s_ += duration;
    const auto last = static_cast<std::size_t>(served.until_s / window_s_);
    if (windows_.size() <= last) windows_.resize(last + 1, 0.0F);
    for (auto window = static_cast<std::size_t>(served.from_s / window_s_); window <= last;
         ++window) {
        const double from = std::max(served.from_s, static_cast<double>(window) * window_s_);
        const double until = std::min(served.until_s, static_cast<double>(window + 1) * window_s_);
        windows_[window] +=
            static_cast<float>(served.bytes * std::max(0.0, until - from) / duration);
    }
}

}  // namespace dualpath::sim
