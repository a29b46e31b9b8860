// Chooses the prefill and the decode engine of a request.
#pragma once

#include <cstdint>
#include <vector>

#include "policy/decision.hpp"
#include "policy/parameters.hpp"

namespace dualpath::policy {

struct Pair {
    Verdict verdict;
    std::uint32_t prefill = kNone;
    std::uint32_t decode = kNone;
};

// Source: the paper's section 6; what `balanced` does beyond it is in docs/scheduling.md.
class Placer {
  public:
    explicit Placer(const Parameters& parameters) : parameters_(parameters) {}

    Pair choose(const ClusterView& view, const Request& request);

  private:
    struct Group {
        std::int64_t num_tokens = 0;
        std::int64_t free_tokens = 0;
        std::int64_t num_engines = 0;
        bool is_candidate = false;
    };

    bool is_balanced() const { return parameters_.placement == Placement::kBalanced; }
    std::uint32_t choose_prefill(const ClusterView& view, const Request& request);
    void sum_prefill_requests(const ClusterView& view);
    // In tokens to compute.
    double work(std::int64_t compute_tokens, std::int64_t num_tokens) const;
    double prefill_load(const EngineState& engine) const;
    double saved_work(const Request& request, std::uint32_t engine) const;
    bool has_short_queue(const ClusterView& view, std::uint32_t node) const;
    std::uint32_t choose_decode(const ClusterView& view, const Request& request);
    void sum_groups(const ClusterView& view, const Request& request);
    std::uint32_t lightest_group() const;
    double level(const Group& group, const Request& request) const;

    Parameters parameters_;
    std::vector<Group> groups_;                   // of decode engines
    std::vector<std::int64_t> prefill_requests_;  // by group
};

}  // namespace dualpath::policy
