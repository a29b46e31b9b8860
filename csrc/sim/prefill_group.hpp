// Prefill engines that step together, because expert parallelism spans them.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "sim/settings.hpp"

namespace dualpath::sim {

class PrefillGroup {
  public:
    // A prompt whose hit is staged. Load and send are what its copies take of a compute NIC.
    struct Prompt {
        std::uint32_t agent;
        std::uint32_t attempt;
        std::int64_t num_cached;   // tokens before those that are still to be computed
        std::int64_t num_new;      // still to be computed
        std::int64_t num_forward;  // hit tokens that the decode node does not have yet
        std::int64_t num_held;     // of those before: in the engine's own cache, not to be loaded
    };
    struct Step {
        double duration_s = 0;
        double slowest_attention_s = 0;
        double mean_attention_s = 0;
        std::int64_t num_tokens = 0;
        bool everyone_works = true;  // no engine is without a prompt
    };

    PrefillGroup(const Settings& settings, std::uint32_t num_engines);

    void add(std::uint32_t engine, const Prompt& prompt);
    bool is_stepping() const { return stepping_; }
    bool has_work() const { return num_queued_ > 0; }
    // Fills every engine's batch and begins a step.
    Step begin_step();
    // Ends it: the prompts that are complete, by engine, into `done`.
    void end_step(std::vector<Prompt>& done);
    // Forgets an engine's prompts: its node died.
    void drop(std::uint32_t engine);

  private:
    struct Engine {
        std::deque<Prompt> queue;
        std::size_t num_complete = 0;  // leading prompts that this step completes
        double attention_s = 0;
        double copy_s = 0;
        std::int64_t num_tokens = 0;
    };

    void fill(Engine& engine);
    double copies_s(std::int64_t loaded_tokens, std::int64_t sent_tokens) const;

    PrefillCost cost_;
    Switches switches_;
    double quota_s_;
    double copy_token_s_;  // of one token's KV over an engine's compute NICs, one direction
    std::vector<Engine> engines_;
    std::size_t num_queued_ = 0;
    bool stepping_ = false;
};

}  // namespace dualpath::sim
