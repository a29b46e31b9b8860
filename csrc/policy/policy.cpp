#include "policy/policy.hpp"

#include "policy/load_or_recompute.hpp"

namespace dualpath::policy {

Policy::Policy(const Parameters& parameters)
    : parameters_((check(parameters), parameters)), placer_(parameters), planner_(parameters) {}

Decision Policy::decide(const ClusterView& view, const Request& request) {
    Decision decision;
    const Pair pair = placer_.choose(view, request);
    decision.verdict = pair.verdict;
    if (!decision.placed()) return decision;
    decision.prefill = pair.prefill;
    decision.decode = pair.decode;
    if (parameters_.read_past_cache) {
        decision.num_cached_blocks = request.cached_hit_blocks(pair.prefill);
    }
    const std::uint32_t first = decision.num_cached_blocks;
    // Seconds of reading and of computing are compared: both have to be known.
    const bool comparable = view.prefill.known() && view.nominal_read_rate > 0;
    if (parameters_.recompute && comparable && first < request.num_hit_blocks) {
        plan_load_or_recompute(planner_, parameters_, view, request, first, decision);
    } else {
        planner_.plan(view, request, {first, request.num_hit_blocks}, decision);
    }
    return decision;
}

void Policy::divide(const ClusterView& view, const Request& request, Decision& decision) {
    const std::uint32_t last = request.num_hit_blocks - decision.num_recompute_blocks;
    planner_.plan(view, request, {decision.num_cached_blocks, last}, decision);
}

}  // namespace dualpath::policy
