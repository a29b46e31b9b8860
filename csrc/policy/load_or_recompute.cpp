#include "policy/load_or_recompute.hpp"

#include <algorithm>
#include <limits>

namespace dualpath::policy {
namespace {

constexpr std::uint32_t kFirstSteps = 16;  // of the first look along the hit

class Search {
  public:
    Search(ReadPlanner& planner, const Parameters& parameters, const ClusterView& view,
           const Request& request, std::uint32_t first_block, const Decision& decision)
        : planner_(planner),
          parameters_(parameters),
          view_(view),
          request_(request),
          first_(first_block),
          decision_(decision),
          wait_s_(static_cast<double>(view.engines[decision.prefill].num_compute_tokens) /
                  view.prefill.tokens_per_s) {
        try_end(request.num_hit_blocks);
    }

    // Reads do not hold the prefill up: nothing is gained by computing.
    bool nothing_to_gain() const { return decision_.read_s <= wait_s_; }

    // Cost over the end is not convex (attention), so: a look at even steps, then ever smaller
    // ones around the best.
    std::uint32_t run() {
        const std::uint32_t last = request_.num_hit_blocks;
        std::uint32_t step = std::max(1U, (last - first_) / kFirstSteps);
        for (std::uint32_t end = first_; end < last; end += step) try_end(end);
        while (step > 1) {
            step = (step + 1) / 2;
            const std::uint32_t middle = best_;
            if (middle >= first_ + step) try_end(middle - step);
            if (middle + step <= last) try_end(middle + step);
        }
        return best_;
    }

  private:
    void try_end(std::uint32_t end) {
        planner_.plan(view_, request_, {first_, end}, decision_);
        const double known = static_cast<double>(end) * request_.block_tokens;
        const double compute_s =
            view_.prefill.seconds(known, static_cast<double>(request_.num_tokens) - known);
        // The price is on what is computed beyond the miss; that part is the same for all ends.
        const double cost =
            std::max(decision_.read_s, wait_s_) + (1 + parameters_.recompute_price) * compute_s;
        if (cost < best_cost_ || (cost == best_cost_ && end > best_)) {
            best_ = end;
            best_cost_ = cost;
        }
    }

    ReadPlanner& planner_;
    const Parameters& parameters_;
    const ClusterView& view_;
    const Request& request_;
    const std::uint32_t first_;
    Decision decision_;
    const double wait_s_;
    std::uint32_t best_ = 0;
    double best_cost_ = std::numeric_limits<double>::infinity();
};

}  // namespace

void plan_load_or_recompute(ReadPlanner& planner, const Parameters& parameters,
                            const ClusterView& view, const Request& request,
                            std::uint32_t first_block, Decision& decision) {
    Search search(planner, parameters, view, request, first_block, decision);
    const std::uint32_t end = search.nothing_to_gain() ? request.num_hit_blocks : search.run();
    decision.num_recompute_blocks = request.num_hit_blocks - end;
    planner.plan(view, request, {first_block, end}, decision);
}

}  // namespace dualpath::policy
