#include "policy/decision.hpp"

namespace dualpath::policy {
namespace {

void take(std::int64_t& room, std::int64_t num_tokens) {
    if (room != kNoLimit) room -= num_tokens;
}

// What is read on one of the two nodes goes to the other one; a donor's goes to both.
void charge_pushes(ClusterView& view, const Decision& decision, std::uint32_t source,
                   std::int64_t num_tokens) {
    for (const std::uint32_t engine : {decision.prefill, decision.decode}) {
        const std::uint32_t target = view.engines[engine].node;
        if (target == source) continue;
        view.nodes[source].push_queue_tokens += num_tokens;
        view.nodes[target].push_queue_tokens += num_tokens;
    }
}

}  // namespace

void charge_read(ClusterView& view, const Decision& decision, const ReadSegment& segment,
                 std::int64_t num_tokens) {
    view.add_reads(segment.node, num_tokens);
    charge_pushes(view, decision, segment.node, num_tokens);
}

void charge_cached(ClusterView& view, const Decision& decision, std::int64_t num_tokens) {
    charge_pushes(view, decision, view.engines[decision.prefill].node, num_tokens);
}

void charge_reads(ClusterView& view, std::uint32_t block_tokens, const Decision& decision) {
    for (const ReadSegment& segment : decision.segments()) {
        charge_read(view, decision, segment,
                    static_cast<std::int64_t>(segment.num_blocks()) * block_tokens);
    }
}

void charge(ClusterView& view, const Request& request, const Decision& decision) {
    EngineState& prefill = view.engines[decision.prefill];
    EngineState& decode = view.engines[decision.decode];
    for (EngineState* engine : {&prefill, &decode}) {
        engine->num_requests += 1;
        engine->num_tokens += request.num_tokens;
        take(engine->free_staging_tokens, request.num_tokens);
    }
    take(decode.free_kv_tokens, request.room_tokens());
    const std::int64_t known_blocks = request.num_hit_blocks - decision.num_recompute_blocks;
    prefill.num_compute_tokens += request.num_tokens - known_blocks * request.block_tokens;
    charge_cached(view, decision,
                  static_cast<std::int64_t>(decision.num_cached_blocks) * request.block_tokens);
}

}  // namespace dualpath::policy
