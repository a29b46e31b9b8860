#include "policy/cluster_view.hpp"

#include <cmath>
#include <stdexcept>
#include <string>

namespace dualpath::policy {
namespace {

void require(bool good, const std::string& what) {
    if (!good) throw std::invalid_argument("cluster view: " + what);
}

bool is_rate(double value) { return std::isfinite(value) && value >= 0; }

}  // namespace

void ClusterView::add_reads(std::uint32_t node, std::int64_t num_tokens) {
    NodeState& state = nodes[node];
    state.read_queue_tokens += num_tokens;
    if (num_tokens > 0) state.recent_read_tokens += static_cast<double>(num_tokens);
}

void ClusterView::forget_reads(std::uint32_t node, double elapsed_s) {
    nodes[node].recent_read_tokens *= std::exp(-elapsed_s / kRecentReadsS);
}

void check(const ClusterView& view) {
    require(view.engines.size() < kNone && view.nodes.size() < kNone, "more than 2^32 - 2 entries");
    for (std::size_t n = 0; n < view.nodes.size(); ++n) {
        const NodeState& node = view.nodes[n];
        const std::string where = "node " + std::to_string(n);
        require(node.read_queue_tokens >= 0, where + ": read_queue_tokens is negative");
        require(is_rate(node.recent_read_tokens), where + ": recent_read_tokens is no number");
        require(node.push_queue_tokens >= 0, where + ": push_queue_tokens is negative");
        require(is_rate(node.read_rate), where + ": read_rate is no rate");
        require(is_rate(node.push_rate), where + ": push_rate is no rate");
    }
    for (std::size_t e = 0; e < view.engines.size(); ++e) {
        const EngineState& engine = view.engines[e];
        const std::string where = "engine " + std::to_string(e);
        require(engine.node < view.nodes.size(),
                where + ": its node " + std::to_string(engine.node) + " is not one of " +
                    std::to_string(view.nodes.size()));
        // Sums over groups are kept in an array.
        require(engine.group <= view.engines.size(), where + ": its group is beyond all engines");
        require(engine.num_requests >= 0, where + ": num_requests is negative");
        require(engine.num_tokens >= 0, where + ": num_tokens is negative");
    }
    require(is_rate(view.nominal_read_rate), "nominal_read_rate is no rate");
    require(is_rate(view.prefill.tokens_per_s), "prefill.tokens_per_s is no rate");
    require(is_rate(view.prefill.s_per_token_pair), "prefill.s_per_token_pair is no time");
}

}  // namespace dualpath::policy
