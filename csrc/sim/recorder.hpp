// What a simulation measured. Turns are measured if they began inside the settings' interval.
#pragma once

#include <cstdint>
#include <vector>

#include "sim/agent.hpp"
#include "sim/prefill_group.hpp"
#include "sim/settings.hpp"

namespace dualpath::sim {

// One entry a measured turn; seconds. NaN where a turn has none.
struct TurnTimes {
    std::vector<float> first_token;   // TTFT: from the turn's begin
    std::vector<float> second_token;  // TTST: from the first one
    std::vector<float> per_token;     // TPOT: mean of the others
    std::vector<float> staged;        // from placement until the hit is staged; turns with a hit
    std::vector<float> waiting;       // from the turn's begin until it was placed
};

struct Counts {
    std::uint64_t turns = 0;
    std::uint64_t evicted_turns = 0;   // repeated: a prefill engine held less when hits were staged
    std::uint64_t repeated_turns = 0;  // a node died
    std::uint64_t impossible_turns = 0;  // no engine could ever take them: the agent ends there
    std::uint64_t finished_agents = 0;
    std::uint64_t read_tokens = 0;
    std::uint64_t recomputed_tokens = 0;  // of a hit, by choice
    std::uint64_t cached_tokens = 0;      // of a hit, in the prefill engine's own cache
    std::uint64_t computed_tokens = 0;
    std::uint64_t generated_tokens = 0;
    std::uint64_t persisted_tokens = 0;
    std::uint64_t prefill_steps = 0;
    std::uint64_t events = 0;
    std::uint64_t decisions = 0;
};

// Sums over the steps in which every engine of a group has something to do: an idle one waits for
// requests, not for others' attention.
struct AttentionBalance {
    double slowest_s = 0;
    double mean_s = 0;
};

class Recorder {
  public:
    explicit Recorder(const Settings& settings, std::size_t num_agents)
        : from_s_(settings.measure_from_s),
          until_s_(settings.measure_until_s),
          agent_s_(num_agents, -1.0F) {}

    void end_turn(const Agent& agent, double now_s);
    void end_agent(std::uint32_t agent, double arrived_s, double now_s);
    void begin_step(const PrefillGroup::Step& step);

    Counts& counts() { return counts_; }
    const Counts& counts() const { return counts_; }
    const TurnTimes& times() const { return times_; }
    const AttentionBalance& attention() const { return attention_; }
    // Each agent's seconds from its arrival to its last token; -1: it did not come to its end.
    const std::vector<float>& agent_s() const { return agent_s_; }
    double last_end_s() const { return last_end_s_; }

  private:
    double from_s_;
    double until_s_;
    TurnTimes times_;
    Counts counts_;
    AttentionBalance attention_;
    std::vector<float> agent_s_;
    double last_end_s_ = 0;
};

}  // namespace dualpath::sim
