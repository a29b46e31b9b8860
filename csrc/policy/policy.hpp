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

  private:
    Parameters parameters_;
    Placer placer_;
    ReadPlanner planner_;
};

}  // namespace dualpath::policy
