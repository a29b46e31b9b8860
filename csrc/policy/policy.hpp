// Decides where a request runs and who reads its stored KV.
#pragma once

#include "policy/decision.hpp"
#include "policy/parameters.hpp"
#include "policy/placement.hpp"
#include "policy/read_path.hpp"

namespace dualpath::policy {

// Pure: no clock, no randomness, no I/O, and of itself only scratch memory. One thread at a time.
class Policy {
  public:
    // Throws std::invalid_argument for parameters out of range.
    explicit Policy(const Parameters& parameters);

    const Parameters& parameters() const { return parameters_; }
    // The view must have passed check(). O(engines + nodes), a few nanoseconds each.
    Decision decide(const ClusterView& view, const Request& request);

    // Whether the owner of the view divides a placed request's reads when there are slots for it,
    // and charges them then: what a busy node is planned to read says little of when it will.
    bool divides_late() const { return parameters_.read_path == ReadPath::kSplit; }
    // Writes segments and read_s of a placed request as they are best now. None of its reads is
    // on the view.
    void divide(const ClusterView& view, const Request& request, Decision& decision);

  private:
    Parameters parameters_;
    Placer placer_;
    ReadPlanner planner_;
};

}  // namespace dualpath::policy
