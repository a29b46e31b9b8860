#include "sim/recorder.hpp"

#include <algorithm>
#include <cmath>

namespace dualpath::sim {

void Recorder::end_turn(const Agent& agent, double now_s) {
    ++counts_.turns;
    counts_.generated_tokens += static_cast<std::uint64_t>(agent.generated);
    last_end_s_ = std::max(last_end_s_, now_s);
    if (agent.ready_s < from_s_ || agent.ready_s >= until_s_) return;
    const auto add = [](std::vector<float>& list, bool has_it, double seconds) {
        list.push_back(has_it ? static_cast<float>(seconds) : std::nanf(""));
    };
    add(times_.first_token, true, agent.first_token_s - agent.ready_s);
    add(times_.second_token, agent.generated > 1, agent.second_token_s - agent.first_token_s);
    const auto others = static_cast<double>(agent.generated - 2);
    add(times_.per_token, others > 0, (now_s - agent.second_token_s) / others);
    add(times_.staged, agent.decision.num_segments > 0, agent.staged_s - agent.placed_s);
    add(times_.waiting, true, agent.placed_s - agent.ready_s);
}

void Recorder::end_agent(std::uint32_t agent, double arrived_s, double now_s) {
    ++counts_.finished_agents;
    agent_s_[agent] = static_cast<float>(now_s - arrived_s);
}

void Recorder::begin_step(const PrefillGroup::Step& step) {
    ++counts_.prefill_steps;
    counts_.computed_tokens += static_cast<std::uint64_t>(step.num_tokens);
    if (!step.everyone_works) return;
    attention_.slowest_s += step.slowest_attention_s;
    attention_.mean_s += step.mean_attention_s;
}

}  // namespace dualpath::sim
