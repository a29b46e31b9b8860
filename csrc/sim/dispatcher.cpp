#include "sim/dispatcher.hpp"

#include <algorithm>

namespace dualpath::sim {

Dispatcher::Dispatcher(const Settings& settings)
    : policy_(settings.policy),
      num_prefill_engines_(settings.shape.num_prefill_nodes * settings.shape.engines_per_node),
      block_tokens_(settings.block_tokens) {
    view_.nodes.resize(settings.shape.num_nodes());
    view_.nominal_read_rate =
        settings.shape.storage_bytes_per_s / static_cast<double>(settings.kv_bytes_per_token);
    view_.prefill = settings.curve;
    add_engines(settings, policy::Role::kPrefill);
    add_engines(settings, policy::Role::kDecode);
    policy::check(view_);
    using policy::PrefixCacheModel;
    const std::int64_t room = PrefixCacheModel::room_of(settings.prefill.cache_tokens);
    prefix_caches_.assign(num_prefill_engines_, PrefixCacheModel(room));
}

void Dispatcher::add_engines(const Settings& settings, policy::Role role) {
    const ClusterShape& shape = settings.shape;
    const bool prefill = role == policy::Role::kPrefill;
    const std::uint32_t nodes = prefill ? shape.num_prefill_nodes : shape.num_decode_nodes;
    const std::uint32_t first_node = prefill ? 0 : shape.num_prefill_nodes;
    const std::uint32_t group_nodes =
        prefill ? shape.prefill_group_nodes : shape.decode_group_nodes;
    const std::int64_t cache = prefill ? policy::kNoLimit : settings.decode.cache_tokens;
    for (std::uint32_t k = 0; k < shape.engines_per_node; ++k) {
        for (std::uint32_t node = 0; node < nodes; ++node) {
            policy::EngineState engine;
            engine.role = role;
            engine.node = first_node + node;
            engine.group = node / group_nodes;
            engine.free_kv_tokens = cache;
            engine.max_request_tokens =
                std::min(cache, shape.staging_bytes / settings.kv_bytes_per_token);
            view_.engines.push_back(engine);
        }
    }
}

void Dispatcher::enqueue(const Waiting& waiting) {
    line_.push(waiting.request.num_tokens);
    waiting_.push_back(waiting);
}

std::optional<Dispatcher::Answer> Dispatcher::next() {
    if (waiting_.empty() || blocked_) return std::nullopt;
    Answer answer{waiting_.front(), {}};
    answer.waiting.request.line = &line_;
    answer.waiting.request.turn = num_placed_;
    const EarlierPrompt& earlier = answer.waiting.earlier;
    const std::int64_t shared = std::int64_t{earlier.cached.num_blocks} * block_tokens_;
    const std::int64_t num_tokens = answer.waiting.request.num_tokens;
    if (earlier.cached.engine != policy::kNone &&
        prefix_caches_[earlier.cached.engine].holds(earlier.stay, shared, num_tokens))
        answer.waiting.request.cached = {&earlier.cached, 1};
    answer.decision = policy_.decide(view_, answer.waiting.request);
    answer.waiting.request.cached = {};
    ++num_decisions_;
    blocked_ = answer.decision.verdict == policy::Verdict::kWaitPrefill ||
               answer.decision.verdict == policy::Verdict::kWaitDecode;
    if (blocked_) return std::nullopt;
    if (answer.decision.placed()) {
        policy::charge(view_, answer.waiting.request, answer.decision);
        if (!divides_late()) policy::charge_reads(view_, block_tokens_, answer.decision);
        prefix_caches_[answer.decision.prefill].begin(
            answer.waiting.stay, num_tokens, earlier.stay,
            std::int64_t{answer.decision.num_cached_blocks} * block_tokens_);
        ++num_placed_;
    }
    line_.pop();
    waiting_.pop_front();
    return answer;
}

void Dispatcher::divide_reads(const policy::Request& request, policy::Decision& decision) {
    policy_.divide(view_, request, decision);
    policy::charge_reads(view_, block_tokens_, decision);
}

void Dispatcher::end_read(const policy::Decision& decision, std::size_t segment) {
    const policy::ReadSegment& part = decision.segments()[segment];
    const auto tokens = static_cast<std::int64_t>(part.num_blocks()) * block_tokens_;
    policy::charge_read(view_, decision, part, -tokens);
}

bool Dispatcher::is_cache_settled() const {
    return std::all_of(prefix_caches_.begin(), prefix_caches_.end(),
                       [](const auto& cache) { return cache.open_tokens() == 0; });
}

void Dispatcher::end_prefill(const policy::Decision& decision, std::uint64_t stay,
                             std::int64_t prompt, std::int64_t computed, bool is_done) {
    prefix_caches_[decision.prefill].end(stay, is_done);
    const auto num_cached = static_cast<std::int64_t>(decision.num_cached_blocks);
    policy::charge_cached(view_, decision, -num_cached * block_tokens_);
    policy::EngineState& engine = view_.engines[decision.prefill];
    --engine.num_requests;
    engine.num_tokens -= prompt;
    engine.num_compute_tokens -= computed;
    if (engine.free_staging_tokens != policy::kNoLimit) engine.free_staging_tokens += prompt;
    blocked_ = false;
}

void Dispatcher::end_decode(const policy::Decision& decision, std::int64_t prompt,
                            std::int64_t room) {
    policy::EngineState& engine = view_.engines[decision.decode];
    --engine.num_requests;
    engine.num_tokens -= prompt;
    if (engine.free_kv_tokens != policy::kNoLimit) engine.free_kv_tokens += room;
    blocked_ = false;
}

void Dispatcher::lose_node(std::uint32_t node) {
    for (policy::EngineState& engine : view_.engines)
        if (engine.node == node) engine.usable = false;
    blocked_ = false;
}

void Dispatcher::set_read_rate(std::uint32_t node, double tokens_per_s) {
    view_.nodes[node].read_rate = tokens_per_s;
}

}  // namespace dualpath::sim
