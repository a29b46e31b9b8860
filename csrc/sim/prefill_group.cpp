#include "sim/prefill_group.hpp"

#include <algorithm>

#include "sim/costs.hpp"

namespace dualpath::sim {

PrefillGroup::PrefillGroup(const Settings& settings, std::uint32_t num_engines)
    : cost_(settings.prefill),
      switches_(settings.switches),
      quota_s_(settings.quota_s),
      copy_token_s_(static_cast<double>(settings.kv_bytes_per_token) /
                    settings.shape.engine_nic_bytes_per_s),
      engines_(num_engines) {}

void PrefillGroup::add(std::uint32_t engine, const Prompt& prompt) {
    engines_[engine].queue.push_back(prompt);
    ++num_queued_;
}

PrefillGroup::Step PrefillGroup::begin_step() {
    Step step;
    double copy_s = 0;
    for (Engine& engine : engines_) {
        fill(engine);
        step.slowest_attention_s = std::max(step.slowest_attention_s, engine.attention_s);
        step.mean_attention_s += engine.attention_s / static_cast<double>(engines_.size());
        step.num_tokens += engine.num_tokens;
        step.everyone_works = step.everyone_works && engine.num_tokens > 0;
        copy_s = std::max(copy_s, engine.copy_s);
    }
    // Attention ends with the slowest rank; experts share the group's tokens evenly.
    const double mean_tokens =
        static_cast<double>(step.num_tokens) / static_cast<double>(engines_.size());
    const double compute_s = cost_.step_s + step.slowest_attention_s + mean_tokens * cost_.token_s;
    step.duration_s = switches_.layerwise ? std::max(compute_s, copy_s) : compute_s + copy_s;
    stepping_ = true;
    return step;
}

// Source: the paper's section 6, intra-engine: in order, until the quota; the last one is cut.
void PrefillGroup::fill(Engine& engine) {
    double left_s = quota_s_;
    std::int64_t cache_left = cost_.cache_tokens;
    std::int64_t loaded = 0, sent = 0;
    engine.num_complete = 0;
    engine.attention_s = 0;
    engine.num_tokens = 0;
    for (Prompt& prompt : engine.queue) {
        const std::int64_t length = prompt.num_cached + prompt.num_new;
        const bool is_first = engine.num_tokens == 0;
        // Layer by layer only one layer's KV is in HBM at a time; otherwise whole prompts are.
        if (!switches_.layerwise && !is_first && length > cache_left) break;
        std::int64_t count = fitting_tokens(cost_, prompt.num_cached, prompt.num_new, left_s);
        if (count == 0 && is_first) count = 1;
        if (count == 0) break;
        const double attention = attention_s(cost_, prompt.num_cached, count);
        left_s -= attention;
        cache_left -= length;
        engine.attention_s += attention;
        engine.num_tokens += count;
        loaded += prompt.num_cached - prompt.num_held;
        sent += count + prompt.num_forward;
        prompt.num_cached += count;
        prompt.num_new -= count;
        prompt.num_forward = 0;
        if (prompt.num_new > 0) break;
        ++engine.num_complete;
    }
    engine.copy_s = copies_s(loaded, sent);
}

double PrefillGroup::copies_s(std::int64_t loaded_tokens, std::int64_t sent_tokens) const {
    if (switches_.oracle) return 0;
    const double in_s = copy_token_s_ * static_cast<double>(loaded_tokens);
    const double out_s = copy_token_s_ * static_cast<double>(sent_tokens);
    // The directions of a NIC are independent; without overlap the loads come first, then the
    // sends.
    return switches_.layerwise ? std::max(in_s, out_s) : in_s + out_s;
}

void PrefillGroup::end_step(std::vector<Prompt>& done) {
    for (Engine& engine : engines_) {
        const auto end = engine.queue.begin() + static_cast<std::ptrdiff_t>(engine.num_complete);
        done.insert(done.end(), engine.queue.begin(), end);
        engine.queue.erase(engine.queue.begin(), end);
        num_queued_ -= engine.num_complete;
        engine.num_complete = 0;
    }
    stepping_ = false;
}

void PrefillGroup::drop(std::uint32_t engine) {
    num_queued_ -= engines_[engine].queue.size();
    engines_[engine] = Engine{};
}

}  // namespace dualpath::sim
