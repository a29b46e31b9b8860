// Decode engines that step together. Between changes of its batch a group's steps are all equally
// long, so they are counted, not simulated: a request costs O(log n), however many tokens it gets.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <queue>
#include <vector>

#include "sim/settings.hpp"

namespace dualpath::sim {

class DecodeGroup {
  public:
    struct Sequence {
        double last_step;  // counted as the group counts its steps
        std::uint32_t agent;
        std::uint32_t attempt;
        std::uint32_t engine;
        double context_s;  // what it adds to its engine's step
    };
    // What a sequence is known by when it must leave early.
    struct Joined {
        double second_token_s;
        double context_s;
    };

    DecodeGroup(const DecodeCost& cost, std::uint32_t num_engines);

    // Adds a sequence that still needs `num_steps` (at least 1) tokens, with about `context` tokens
    // on average. It takes part from the next step on.
    Joined join(double now_s, const Sequence& sequence, std::int64_t num_steps,
                std::int64_t context);
    // Takes a sequence out whose last step is not done.
    void leave(double now_s, std::uint32_t engine, double context_s);
    // At the time that end_s() gave: those whose last step is done, into `done`. `is_live` tells
    // those that left early.
    template <class IsLive>
    void finish(double now_s, std::vector<Sequence>& done, IsLive is_live) {
        advance(now_s);
        // The first one is due by definition, whatever rounding says.
        if (!running_.empty()) num_steps_ = std::max(num_steps_, running_.top().last_step);
        while (!running_.empty() && running_.top().last_step <= num_steps_ + kSlack) {
            const Sequence sequence = running_.top();
            running_.pop();
            if (!is_live(sequence)) continue;
            remove(sequence.engine, sequence.context_s);
            done.push_back(sequence);
        }
    }
    // When the next sequence is complete if nothing changes.
    std::optional<double> end_s() const;
    double step_s() const { return step_s_; }
    std::uint64_t num_running() const { return num_running_; }
    // Grows with every change: earlier ends are void.
    std::uint32_t version() const { return version_; }

  private:
    // Rounding of counted steps.
    static constexpr double kSlack = 1e-7;

    struct Later {
        bool operator()(const Sequence& a, const Sequence& b) const {
            return a.last_step != b.last_step ? a.last_step > b.last_step : a.agent > b.agent;
        }
    };

    void advance(double now_s);
    void remove(std::uint32_t engine, double context_s);
    void update();

    DecodeCost cost_;
    std::vector<double> engine_s_;  // of contexts, by engine
    std::priority_queue<Sequence, std::vector<Sequence>, Later> running_;
    double num_steps_ = 0;
    double at_s_ = 0;
    double step_s_;
    std::uint64_t num_running_ = 0;
    std::uint32_t version_ = 0;
};

}  // namespace dualpath::sim
