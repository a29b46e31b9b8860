#include "sim/decode_group.hpp"

#include <algorithm>
#include <cmath>

#include "sim/costs.hpp"

namespace dualpath::sim {

DecodeGroup::DecodeGroup(const DecodeCost& cost, std::uint32_t num_engines)
    : cost_(cost), engine_s_(num_engines, 0.0), step_s_(cost.step_s) {}

DecodeGroup::Joined DecodeGroup::join(double now_s, const Sequence& sequence,
                                      std::int64_t num_steps, std::int64_t context) {
    advance(now_s);
    Sequence joined = sequence;
    joined.context_s = context_s(cost_, context);
    // An idle group begins a step at once; a busy one takes newcomers at the next step.
    if (num_running_ == 0) num_steps_ = std::ceil(num_steps_ - kSlack);
    const double first_step = std::ceil(num_steps_ - kSlack);
    joined.last_step = first_step + static_cast<double>(num_steps);
    engine_s_[joined.engine] += joined.context_s;
    ++num_running_;
    running_.push(joined);
    update();
    return {now_s + (first_step + 1 - num_steps_) * step_s_, joined.context_s};
}

void DecodeGroup::leave(double now_s, std::uint32_t engine, double context_s) {
    advance(now_s);
    remove(engine, context_s);
}

std::optional<double> DecodeGroup::end_s() const {
    if (running_.empty()) return std::nullopt;
    return at_s_ + std::max(0.0, running_.top().last_step - num_steps_) * step_s_;
}

void DecodeGroup::advance(double now_s) {
    if (num_running_ > 0) num_steps_ += (now_s - at_s_) / step_s_;
    at_s_ = now_s;
}

void DecodeGroup::remove(std::uint32_t engine, double context_s) {
    engine_s_[engine] -= context_s;
    --num_running_;
    update();
}

void DecodeGroup::update() {
    const double mean = static_cast<double>(num_running_) / static_cast<double>(engine_s_.size());
    const double fullest = *std::max_element(engine_s_.begin(), engine_s_.end());
    step_s_ = cost_.step_s + cost_.request_s * mean + std::max(0.0, fullest);
    ++version_;
}

}  // namespace dualpath::sim
