#include "policy/read_rate.hpp"

#include <algorithm>
#include <cmath>

namespace dualpath::policy {
namespace {

constexpr double kMostlyBusy = 0.5;  // of the time: a slow sample is the NIC's, not the load's

double toward(double from, double to, double time_s, double constant_s) {
    return from + (to - from) * -std::expm1(-time_s / constant_s);
}

}  // namespace

void ReadRate::add(std::int64_t num_tokens, double busy_s, double elapsed_s, double nominal) {
    busy_s = std::min(busy_s, elapsed_s);
    const double idle_s = elapsed_s - busy_s;
    if (rate_ > 0 && rate_ < nominal && idle_s > 0) {
        rate_ = toward(rate_, nominal, idle_s, constants_.recover_s);
    }
    if (!(busy_s > 0)) return;
    const double sample = static_cast<double>(num_tokens) / busy_s;
    const bool shows_all =
        num_tokens >= constants_.full_sample_tokens || busy_s >= kMostlyBusy * elapsed_s;
    if (rate_ == 0) {
        if (num_tokens >= constants_.full_sample_tokens) rate_ = sample;
    } else if (shows_all || sample > rate_) {
        // Not to 0, which means unknown: even a NIC that stands still is to be compared.
        rate_ = std::max(toward(rate_, sample, busy_s, constants_.memory_s), kLeastRate);
    }
}

}  // namespace dualpath::policy
