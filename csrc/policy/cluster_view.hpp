// What a policy knows of the cluster: plain state that its owner (router, simulator) keeps true.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace dualpath::policy {

constexpr std::int64_t kNoLimit = std::numeric_limits<std::int64_t>::max();
// What recent_read_tokens remembers. Longer than a burst, shorter than a change of the load.
constexpr double kRecentReadsS = 10;
constexpr std::uint32_t kNone = std::numeric_limits<std::uint32_t>::max();

enum class Role : std::uint8_t { kPrefill, kDecode };

// One storage NIC and the compute NICs beside it. Rates are tokens of stored KV a second.
struct NodeState {
    std::int64_t read_queue_tokens = 0;  // planned to be read here and not staged yet (read_q)
    std::int64_t push_queue_tokens = 0;  // to cross its compute NICs for staging, in or out
    // Planned to be read here lately, staged or not: a sum that forgets
    // (ClusterView::forget_reads).
    double recent_read_tokens = 0;
    double read_rate = 0;  // as measured (ReadRate); 0: unknown, the view's nominal one counts
    // What its compute NICs and memory spare for staging; 0: no limit. Only beside known read
    // rates.
    double push_rate = 0;
};

// One engine. Token counts take a request's whole prompt, cached or not, as the paper's tok_e does.
struct EngineState {
    Role role = Role::kPrefill;
    bool usable = true;
    bool donates = true;  // may read for requests of other engines (pool)
    std::uint32_t node = 0;
    std::uint32_t group = 0;                 // of decode engines with one leader, of prefill
                                             // engines that step together
    std::int64_t num_requests = 0;           // unfinished (seq_e)
    std::int64_t num_tokens = 0;             // theirs (tok_e)
    std::int64_t num_compute_tokens = 0;     // of those, to be computed still (prefill)
    std::int64_t free_kv_tokens = kNoLimit;  // room in its KV cache (decode)
    std::int64_t free_staging_tokens = kNoLimit;
    // A longer request it can never take; with its answer where that is reserved (decode).
    std::int64_t max_request_tokens = kNoLimit;
};

// Seconds a prefill engine computes: (new tokens) / rate + attention over what lies before them.
struct PrefillCurve {
    double tokens_per_s = 0;      // 0: unknown, nothing is recomputed
    double s_per_token_pair = 0;  // attention: seconds for one new token over one earlier token

    bool known() const { return tokens_per_s > 0; }
    double seconds(double cached_tokens, double new_tokens) const {
        return new_tokens / tokens_per_s +
               s_per_token_pair * new_tokens * (cached_tokens + new_tokens / 2);
    }
};

// Engines that can share KV; others are another view. Ties go to the lower index, so engines are in
// the order of their ids. Only the owner's thread writes, and never while a policy reads.
struct ClusterView {
    std::vector<NodeState> nodes;
    std::vector<EngineState> engines;  // EngineState::node indexes `nodes`
    double nominal_read_rate = 0;      // of a node that was not measured; 0: unknown
    PrefillCurve prefill;

    // Never 0, so that times can be compared also where nothing was measured.
    double read_rate(std::uint32_t node) const {
        const double measured = nodes[node].read_rate;
        if (measured > 0) return measured;
        return nominal_read_rate > 0 ? nominal_read_rate : 1.0;
    }
    double read_queue_s(std::uint32_t node) const {
        return static_cast<double>(nodes[node].read_queue_tokens) / read_rate(node);
    }
    // The same with what was read lately, weighed by `evenness`: even levels are even shares of all
    // that is read.
    double read_level_s(std::uint32_t node, double evenness) const {
        return read_queue_s(node) + evenness * nodes[node].recent_read_tokens / read_rate(node);
    }

    // Tokens are planned to be read on a node, or are staged where the number is negative.
    void add_reads(std::uint32_t node, std::int64_t num_tokens);
    // `elapsed_s` more have passed, as the owner says: once a second is often enough.
    void forget_reads(std::uint32_t node, double elapsed_s);
};

// Throws std::invalid_argument for an engine on a node that is not there, or a negative count.
void check(const ClusterView& view);

}  // namespace dualpath::policy
